"""Answers go to stdout, everything else to stderr; colours only where a person looks."""

from __future__ import annotations

import logging
import sys

USAGE_ERROR = 2
# Where torchao is installed, transformers imports it, and it warns of kernels for other machines.
_CHATTY = ("torchao", "torch.utils._pytree")


def write(text: str, end: str = "\n") -> None:
    """Put `text` on stdout at once."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def note(text: str, style: str = "dim") -> None:
    """Put a line for the person at the keyboard on stderr."""
    from rich.console import Console

    Console(stderr=True, highlight=False).print(text, style=style, markup=False, soft_wrap=True)


def fail(error: Exception) -> int:
    """Say what went wrong in one line on stderr; answers the exit code."""
    note(f"error: {' '.join(str(error).split())}", style="bold red")
    return USAGE_ERROR


def quiet_libraries() -> None:
    """Keep stdout for answers: structlog logs there by default, and transformers draws progress into pipes.

    Call it before a model is loaded: libraries warn when they are imported.
    """
    import structlog
    from transformers.utils.logging import disable_progress_bar

    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)

    renderer = structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
    )
    structlog.configure(processors=[structlog.processors.add_log_level, renderer], logger_factory=_stderr_logger)
    if not sys.stderr.isatty():
        disable_progress_bar()


def _stderr_logger(*_: object) -> object:
    """A logger on what is stderr now; tests replace it."""
    import structlog

    return structlog.PrintLogger(sys.stderr)
