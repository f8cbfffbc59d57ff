"""A plugin of pytest: a test fails when specgen causes a warning, by Python's `warnings` or in transformers' log.

One is caused by specgen when a line of specgen's or of a plugin's is on the stack. What a test's own calls of
transformers or peft are told, and what packages say to one another at import, is not ours.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

# What transformers says of the machine and peft of an adapter's file, whoever calls.
_ANYWAY = ("is falling back to its reference PyTorch implementation", "`lora_bias=True` was passed but")
# torch's compiler, which warns itself of what it does, more or less as its caches are cold or warm.
_COMPILER = ("torch._dynamo", "torch._inductor")


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.add(record.getMessage())

    def add(self, message: str) -> None:
        """Keep it if a line of ours is on the stack."""
        if is_ours() and not any(part in message for part in _ANYWAY):
            self.messages.append(message)


def is_ours() -> bool:
    """Whether the caller was called, in some steps, by specgen or a plugin of it, and not by torch's compiler."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith(_COMPILER):
            return False
        if name.partition(".")[0].startswith("specgen"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def is_shown(message: str, kind: type[Warning]) -> bool:
    """Whether Python's filters let a warning through, whatever module it comes from."""
    for action, pattern, category, module, _ in warnings.filters:
        if issubclass(kind, category) and module is None and (pattern is None or pattern.match(message)):
            return action != "ignore"
    return True


@pytest.fixture(autouse=True)
def we_cause_no_warning(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail after the test, quoting what was said."""
    kept, warn = _Kept(), warnings.warn

    def spied(message: Any, *args: Any, **kwargs: Any) -> None:
        category = args[0] if args else kwargs.get("category")
        kind = type(message) if isinstance(message, Warning) else category or UserWarning
        # Python shows those of libraries to nobody; of our own lines they are errors by `WARNINGS`.
        if not issubclass(kind, DeprecationWarning | PendingDeprecationWarning) and is_shown(str(message), kind):
            kept.add(str(message))
        kwargs["stacklevel"] = kwargs.get("stacklevel", args[1] if len(args) > 1 else 1) + 1
        warn(message, *args[:1], *args[2:], **kwargs)

    monkeypatch.setattr(warnings, "warn", spied)
    logger = logging.getLogger("transformers")
    logger.addHandler(kept)
    yield
    logger.removeHandler(kept)
    assert not kept.messages, f"specgen causes warnings: {kept.messages}"
