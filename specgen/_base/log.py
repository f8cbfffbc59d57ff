"""Where specgen's log events go: where the application sends its structlog events, else to stderr.

structlog's own default is stdout, where the answers of a program stand.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress

import structlog


class Log:
    """A named logger that looks the configuration up at each event, so that it may come after the import.

    Where an event cannot be written (a full disk, a pipe that nobody reads, a processor of the application's that
    raises), it is lost, and nothing else: stderr is told if it can be.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, level: str) -> Callable[..., None]:
        sink = None if structlog.is_configured() else structlog.PrintLogger(sys.stderr)
        write = getattr(structlog.wrap_logger(sink, source=self._name), level)

        def event(name: str, **values: object) -> None:
            try:
                write(name, **values)
            except Exception as error:
                with suppress(OSError, ValueError, AttributeError):  # full, closed, none at all
                    sys.stderr.write(f"{self._name}: the event {name!r} cannot be logged: {error!r}\n")

        return event
