"""Where specgen's log events go: where the application sends its structlog events, else to stderr.

structlog's own default is stdout, where the answers of a program stand.
"""

from __future__ import annotations

import sys
from typing import Any

import structlog


class Log:
    """A named logger that looks the configuration up at each event, so that it may come after the import."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, level: str) -> Any:
        sink = None if structlog.is_configured() else structlog.PrintLogger(sys.stderr)
        return getattr(structlog.wrap_logger(sink, source=self._name), level)
