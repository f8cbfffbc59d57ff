"""One line for each answer, with its request's id; never a prompt, a text or a key."""

from __future__ import annotations

import logging
import re
import secrets
import sys
import time
import traceback
from typing import Any

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler
from aiohttp.web_urldispatcher import SystemRoute
from transformers.utils.logging import disable_default_handler, enable_propagation

from specgen._base.log import Log
from specgen.server.auth import CALLER
from specgen.server.config import ServerConfig
from specgen.server.metrics import TIMING, Timing
from specgen.server.protocol.errors import api_error
from specgen.server.service import SERVICE

REQUEST_ID = web.RequestKey("request_id", str)
_HEADER = "x-request-id"
_MAY_BE_AN_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
_CLIENT_LEFT = 499
_LONGEST_LINE = 300

log = Log("specgen.server")


def configure(config: ServerConfig) -> None:
    """Write log lines to stderr as the config says, for this process."""
    plain: Any = structlog.processors.format_exc_info
    last: Any = structlog.processors.JSONRenderer()
    if config.log_format == "console":
        colors, formatter = sys.stderr.isatty(), structlog.dev.plain_traceback
        last = structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=formatter)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([plain] if config.log_format == "json" else []),
            last,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(config.log_level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    if not any(isinstance(handler, FromLogging) for handler in logging.root.handlers):
        logging.root.addHandler(FromLogging(logging.WARNING))
    logging.captureWarnings(capture=True)
    # It has a handler of its own that writes as it likes.
    disable_default_handler()
    enable_propagation()


class FromLogging(logging.Handler):
    """Writes what libraries log as our own lines are written: its first line, and of an exception the type alone."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        error = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else None
        first = record.getMessage().partition("\n")[0][:_LONGEST_LINE]
        write = log.error if record.levelno >= logging.ERROR else log.warning
        write(first, library=record.name, error=error)


@web.middleware
async def account(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give a request its id, turn what is raised into an error object, and write what became of it."""
    given = request.headers.get(_HEADER, "")
    request[REQUEST_ID] = given if _MAY_BE_AN_ID.fullmatch(given) else f"req-{secrets.token_hex(8)}"
    request[TIMING] = Timing(request.app[SERVICE].metrics)
    status = _CLIENT_LEFT
    try:
        response = await _answered(request, handler)
        status = response.status
        return response
    finally:
        _write(request, status)


async def name_answer(request: web.Request, response: web.StreamResponse) -> None:
    """Send the request's id along, before the first byte of any answer."""
    if REQUEST_ID in request:
        response.headers[_HEADER] = request[REQUEST_ID]


def report(request: web.Request, event: str, error: BaseException | None = None) -> None:
    """Write that something went wrong with a request. Of an exception type and place: its text may quote a prompt."""
    where = (
        traceback.format_tb(error.__traceback__)[-1].strip().splitlines()[0] if error and error.__traceback__ else None
    )
    kind = type(error).__name__ if error else None
    cause = type(error.__cause__).__name__ if error and error.__cause__ else None
    log.warning(event, request_id=request[REQUEST_ID], error=kind, cause=cause, where=where)


async def _answered(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ConnectionError:  # the client left while its answer was written
        raise
    except Exception as error:
        answer = api_error(error)
        if answer.status >= 500:
            report(request, "a request failed", error)
        return answer.response()


def _write(request: web.Request, status: int) -> None:
    route = request.match_info.route
    resource = None if isinstance(route, SystemRoute) else route.resource
    path = resource.canonical if resource else "unknown"
    request.app[SERVICE].metrics.answered(path, status)
    log.info(
        "answered",
        request_id=request[REQUEST_ID],
        method=request.method,
        route=path,
        status=status,
        key=request[CALLER].name if CALLER in request else None,
        seconds=round(time.monotonic() - request[TIMING].arrival, 4),
    )
