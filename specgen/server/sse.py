"""Server-sent events as OpenAI's clients read them, to readers who may be slow or gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
from aiohttp import web

_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_DONE = b"data: [DONE]\n\n"
_PING = b": ping\n\n"


class ReaderTooSlow(Exception):
    """The client did not read for too long; its connection is closed."""


class EventStream:
    """One answer of events. It opens with the first one: what fails before is an answer with a status of its own.

    write_seconds: how long a write may wait for the client to read. ping_seconds: after so much silence a comment
    tells the client, and everything in between, that the connection lives. named: each event says its `type` in a line
    of its own, as in the responses API, which has no [DONE].
    """

    def __init__(self, request: web.Request, *, write: float, ping: float, named: bool) -> None:
        self._request = request
        self._write_seconds = write
        self._ping_seconds = ping
        self._named = named
        self.response = web.StreamResponse(headers=_HEADERS)

    @property
    def is_open(self) -> bool:
        """Whether the status was sent."""
        return self.response.prepared

    async def feed(self, events: AsyncIterator[msgspec.Struct]) -> None:
        """Send all events, and pings while there are none. Raises what `events` raises, and ReaderTooSlow."""
        coming: asyncio.Future[msgspec.Struct] | None = None
        try:
            while True:
                coming = coming or asyncio.ensure_future(anext(events))
                done, _ = await asyncio.wait({coming}, timeout=self._ping_seconds)
                if not done:
                    await self._write(_PING)
                    continue
                try:
                    event = coming.result()
                except StopAsyncIteration:
                    return
                coming = None
                await self.send(event)
        finally:
            if coming is not None:
                coming.cancel()

    async def send(self, event: msgspec.Struct) -> None:
        """Send one event."""
        head = b"event: %b\n" % event.type.encode() if self._named else b""  # type: ignore[attr-defined]
        await self._write(b"%bdata: %b\n\n" % (head, msgspec.json.encode(event)))

    async def done(self) -> None:
        """No more events."""
        if not self._named:
            await self._write(_DONE)
        await self.response.write_eof()

    async def _write(self, data: bytes) -> None:
        try:
            async with asyncio.timeout(self._write_seconds):
                if not self.is_open:
                    await self.response.prepare(self._request)
                await self.response.write(data)
        except TimeoutError:
            if self._request.transport:
                self._request.transport.abort()
            raise ReaderTooSlow from None
