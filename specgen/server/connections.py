"""Connections: at most so many, and what cannot be read of them is answered and logged like everything else."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import ContentEncodingError, LineTooLong

from specgen._base.log import Log
from specgen.server.config import ServerConfig
from specgen.server.protocol.errors import ApiError, api_error
from specgen.server.service import SERVICE

log = Log("specgen.server")

HEAD_SECONDS = 75.0
"""How long a connection may be silent between two requests."""

_SPARE_FILES = 32
"""Descriptors for everything but connections."""
_LEAST_CONNECTIONS = 4
_REPEAT_SECONDS = 10.0


class Runner(web.AppRunner):
    """Runs an app whose connections are ours."""

    __slots__ = ("_most",)

    def __init__(self, app: web.Application, **options: Any) -> None:
        # Without handler_cancellation a request whose client has gone would run on to its end.
        super().__init__(app, handler_cancellation=True, access_log=None, keepalive_timeout=HEAD_SECONDS, **options)
        self._most = most_connections(app[SERVICE].config)

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _Server(made, self.app, self._most)


class _Server(web.Server):
    """Makes connections."""

    def __init__(self, made: web.Server, app: web.Application, most: int) -> None:
        super().__init__(
            made.request_handler,
            request_factory=made.request_factory,
            handler_cancellation=made.handler_cancellation,
            loop=made._loop,
            **made._kwargs,
        )
        self.metrics = app[SERVICE].metrics
        self.most = most
        self._tell = Throttle()

    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)

    @property
    def is_full(self) -> bool:
        """Whether there is no room for one more."""
        return len(self._connections) >= self.most

    def refused(self) -> None:
        """One more was refused."""
        self.metrics.connection_refused()
        self._tell("connections are refused", most=self.most)

    def unreadable(self, peer: str | None, error: BaseException | None) -> None:
        """A request could not be read. Of the error only its type: its text quotes what was sent."""
        kind = type(error).__name__ if error else "HTTPException"
        self.metrics.unreadable(kind)
        log.warning("a request cannot be read", error=kind, peer=peer)


class _Connection(web.RequestHandler):
    """One connection."""

    _ours: _Server
    _is_refused = False

    def __init__(self, manager: _Server, **options: Any) -> None:
        super().__init__(manager, **options)
        self._ours = manager

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not self._ours.is_full:
            super().connection_made(transport)
            return
        self._is_refused = True
        self._ours.refused()
        if isinstance(transport, asyncio.Transport):
            transport.write(_no_room(self._ours.most))
        transport.close()

    def connection_lost(self, exc: BaseException | None) -> None:
        if not self._is_refused:
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._is_refused:
            super().data_received(data)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to a head that cannot be read; the connection is closed behind it."""
        self._ours.unreadable(request.remote, exc)
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun already")
        answer = _unreadable(status, exc).response()
        answer.force_close()
        return answer

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send an answer. What aiohttp itself refuses, such as an unknown Expect, comes by no middleware."""
        if isinstance(resp, web.HTTPException):
            self._ours.unreadable(request.remote, resp)
            resp = api_error(resp).response()
            resp.force_close()
        return await super().finish_response(request, resp, start_time)

    def log_exception(self, *args: object, **kw: object) -> None:
        error = kw.get("exc_info")
        log.error("a connection failed", error=type(error).__name__ if error else None, peer=str(self.peername))


class Throttle:
    """Writes the same line once in a while, with how often it would have been written."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: dict[str, float] = {}
        self._missed: dict[str, int] = {}

    def __call__(self, event: str, **values: object) -> None:
        """Write a line, unless the same was written a short while ago."""
        now = self._clock()
        if event in self._last and now - self._last[event] < _REPEAT_SECONDS:
            self._missed[event] = self._missed.get(event, 0) + 1
            return
        self._last[event] = now
        log.warning(event, times=self._missed.pop(event, 0) + 1, **values)


def told_by_loop(tell: Throttle) -> Callable[[asyncio.AbstractEventLoop, dict[str, object]], None]:
    """An exception handler for an event loop. Descriptors that run out are told a hundred times a second else."""

    def handle(_: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        error = context.get("exception")
        tell(str(context.get("message", "an error in the event loop")), error=type(error).__name__ if error else None)

    return handle


def most_connections(config: ServerConfig) -> int:
    """How many connections there may be at once: what the config says, as far as the system has descriptors."""
    if (limit := _most_descriptors()) is None:
        return config.max_connections
    used = _SPARE_FILES
    with suppress(OSError):
        used += len(os.listdir("/proc/self/fd"))
    return min(config.max_connections, max(_LEAST_CONNECTIONS, limit - used))


def _most_descriptors() -> int | None:
    """How many descriptors this process may have; None where no limit is set."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def _unreadable(status: int, error: BaseException | None) -> ApiError:
    if status >= 500:
        return api_error(error or RuntimeError())
    if isinstance(error, ContentEncodingError):
        if "Can not decode" in error.message:
            return ApiError(415, "the content encoding is not known here", code="unsupported_encoding")
        return ApiError(400, "the body cannot be unpacked", code="invalid_encoding")
    if isinstance(error, LineTooLong):
        return ApiError(400, "a line of the request's head is too long", code="invalid_http")
    return ApiError(400, f"this is no valid HTTP request ({type(error).__name__})", code="invalid_http")


def _no_room(most: int) -> bytes:
    error = ApiError(503, f"the server has {most} connections, its most", code="too_many_connections", retry=1)
    body = error.encoded()
    head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Retry-After: 1\r\nConnection: close\r\n\r\n".encode() + body
