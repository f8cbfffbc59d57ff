"""A plugin of pytest: a test fails when transformers' log warns during it, as -W does for Python's warnings."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

# What transformers says of the machine or of a test's own tiny model, whoever calls.
_ANYWAY = ("is falling back to its reference PyTorch implementation", "Last layer must use `full_attention`")


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture(autouse=True)
def transformers_is_silent() -> Iterator[None]:
    """Fail after the test, quoting what was logged."""
    kept = _Kept()
    logger = logging.getLogger("transformers")
    logger.addHandler(kept)
    yield
    logger.removeHandler(kept)
    said = [message for message in kept.messages if not any(part in message for part in _ANYWAY)]
    assert not said, f"transformers warns: {said}"
