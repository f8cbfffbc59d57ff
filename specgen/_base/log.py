"""Where specgen's log events go: where the application sends its structlog events, else to stderr.

structlog's own default is stdout, where the answers of a program stand.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import structlog


class Log:
    """A named logger that looks the configuration up at each event, so that it may come after the import.

    Where events cannot be written (a full disk, a pipe that nobody reads), they are lost, and nothing else.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, level: str) -> Callable[..., None]:
        sink = None if structlog.is_configured() else structlog.PrintLogger(sys.stderr)
        write = getattr(structlog.wrap_logger(sink, source=self._name), level)

        def event(name: str, **values: Any) -> None:
            with suppress(OSError):
                write(name, **values)

        return event
