"""The bytes of a request's body. A small packed one may hold gigabytes: others are served while it is unpacked."""

from __future__ import annotations

import asyncio

from aiohttp import web
from aiohttp.http_exceptions import ContentEncodingError
from aiohttp.typedefs import Handler

from specgen.server.protocol.errors import ApiError

_TOO_LATE = 408
_BODY = web.RequestKey("body", bytes)


async def whole(request: web.Request) -> bytes:
    """The body, unpacked, in small steps between which others have their turn; asked for again, the same.

    Raises HTTPRequestEntityTooLarge once there is more of it than the server takes, ApiError 400 where it cannot be
    unpacked.
    """
    known: bytes | None = request.get(_BODY)
    if known is not None:
        return known
    body = bytearray()
    while chunk := await _next(request):
        body += chunk
        if len(body) > request.client_max_size:
            raise web.HTTPRequestEntityTooLarge(request.client_max_size)
        await asyncio.sleep(0)
    request[_BODY] = known = bytes(body)
    return known


async def _next(request: web.Request) -> bytes:
    try:
        return await request.content.readany()
    except (web.RequestPayloadError, ContentEncodingError):
        # The encoding of its content or of the transfer is broken.
        raise ApiError(400, "the body cannot be unpacked", code="invalid_encoding") from None


@web.middleware
async def leave_packed(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Unpack no body any further once its request is answered: aiohttp would, to use the connection again. Nor wait
    for the rest of one whose time is over."""
    is_late = False
    try:
        response = await handler(request)
        is_late = response.status == _TOO_LATE
        return response
    finally:
        if ("Content-Encoding" in request.headers or is_late) and not request.content.is_eof():
            # As if its time to read were over: it closes the connection after the answer.
            request.content.set_exception(TimeoutError("the request is answered"))
