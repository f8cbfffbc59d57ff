"""Run a server until it is told to stop: it then finishes what it began, as far as there is time."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from contextlib import suppress

from aiohttp import web

from specgen.api import Engine
from specgen.log import Log
from specgen.server.app import build_app
from specgen.server.config import ServerConfig
from specgen.server.errors import ApiError
from specgen.server.service import SERVICE

log = Log("specgen.server")

_LAST_WORDS_SECONDS = 5.0
_HEAD_SECONDS = 75.0
_CUT_SECONDS = 0.1


async def serve(engine: Engine, config: ServerConfig, on_start: Callable[[str], None] | None = None) -> bool:
    """Serve until SIGTERM or SIGINT, or until the engine is beyond help; a second signal ends it at once.

    on_start: gets the address when requests are taken. Answers whether the engine was well to the end.
    """
    app = build_app(engine, config)
    # Without handler_cancellation a request whose client has gone would run on to its end.
    # What is to be waited for was waited for by `drain`; to aiohttp 0 would mean for ever.
    runner = web.AppRunner(
        app, handler_cancellation=True, access_log=None, keepalive_timeout=_HEAD_SECONDS, shutdown_timeout=_CUT_SECONDS
    )
    await runner.setup()
    stop, now = asyncio.Event(), asyncio.Event()
    _on_signals(lambda: now.set() if stop.is_set() else stop.set())
    try:
        site = web.TCPSite(runner, config.host, config.port)
        await site.start()
        host, port = runner.addresses[0][:2]
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        log.info("serving", address=address, model=app[SERVICE].name, keys=len(config.api_keys))
        if on_start:
            on_start(address)
        well = await _until_stopped(app, stop)
        await drain(app, now)
    finally:
        await runner.cleanup()
    log.info("stopped")
    return well


async def drain(app: web.Application, now: asyncio.Event) -> None:
    """Take no more requests and wait for those that are there, as long as the config says or until `now`."""
    service = app[SERVICE]
    gate = service.jobs.gate
    gate.is_draining = True
    log.info("draining", sequences=gate.sequences, seconds=service.config.shutdown_seconds)
    waiting = {asyncio.create_task(gate.until_empty()), asyncio.create_task(now.wait())}
    timeout = 0.0 if service.health.trouble else service.config.shutdown_seconds
    await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()
    if gate.sequences and not now.is_set():
        service.jobs.end_all(ApiError(503, "the server is shutting down", code="shutting_down", retry=1))
        with suppress(TimeoutError):
            await asyncio.wait_for(gate.until_empty(), _LAST_WORDS_SECONDS)


async def _until_stopped(app: web.Application, stop: asyncio.Event) -> bool:
    """Wait for a signal; False when the engine cannot go on, which is an end too: whoever started us starts it anew."""
    health = app[SERVICE].health
    while app[SERVICE].engine.failure is None and not stop.is_set():
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), 1.0)
    if health.trouble:
        log.error("the engine has failed", reason=health.trouble)
    return health.trouble is None


def _on_signals(stop: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop)
