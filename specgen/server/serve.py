"""Run a server until it is told to stop: it then finishes what it began, as far as there is time."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from aiohttp import web

from specgen._base.log import Log
from specgen.api.engine import Engine
from specgen.errors import InvalidRequest
from specgen.server.app import build_app
from specgen.server.config import ServerConfig
from specgen.server.connections import Runner, Throttle, told_by_loop
from specgen.server.protocol.errors import ApiError
from specgen.server.service import SERVICE

log = Log("specgen.server")

_LAST_WORDS_SECONDS = 5.0
_CUT_SECONDS = 0.1


@contextmanager
def bound(config: ServerConfig) -> Iterator[list[socket.socket]]:
    """Sockets at the config's host and port, one for each address of the host. Connections are refused until `serve`
    listens.

    Raises InvalidRequest for an unknown host and for a port that is in use or not allowed.
    """
    with ExitStack() as stack:
        try:
            sockets = _all_bound(config, stack)
        except (OSError, UnicodeError) as error:
            raise _cannot_listen(config, error) from None
        yield sockets


async def serve(
    engine: Engine,
    config: ServerConfig,
    sockets: Sequence[socket.socket],
    on_start: Callable[[str], None] | None = None,
) -> bool:
    """Serve until SIGTERM or SIGINT, or until the engine is beyond help; a second signal ends it at once.

    sockets: where to listen, from `bound`. on_start: gets the address when requests are taken. Answers whether the
    engine was well to the end. Raises InvalidRequest where another process listens at one of the sockets by now.
    """
    app = build_app(engine, config)
    # What is to be waited for was waited for by `drain`; to aiohttp 0 would mean for ever.
    runner = Runner(app, shutdown_timeout=_CUT_SECONDS)
    asyncio.get_running_loop().set_exception_handler(told_by_loop(Throttle()))
    await runner.setup()
    stop, now = asyncio.Event(), asyncio.Event()
    _on_signals(lambda: now.set() if stop.is_set() else stop.set())
    try:
        for each in sockets:
            await _listen(runner, each, config)
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
    gate = service.generations.gate
    gate.is_draining = True
    log.info("draining", sequences=gate.sequences, seconds=service.config.shutdown_seconds)
    waiting = {asyncio.create_task(gate.until_empty()), asyncio.create_task(now.wait())}
    timeout = 0.0 if service.health.trouble else service.config.shutdown_seconds
    await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()
    if gate.sequences and not now.is_set():
        service.generations.end_all(ApiError(503, "the server is shutting down", code="shutting_down", retry=1))
        with suppress(TimeoutError):
            await asyncio.wait_for(gate.until_empty(), _LAST_WORDS_SECONDS)


async def _listen(runner: web.AppRunner, at: socket.socket, config: ServerConfig) -> None:
    try:
        await web.SockSite(runner, at).start()
    except OSError as error:
        raise _cannot_listen(config, error) from None


def _places(config: ServerConfig) -> list[tuple[socket.AddressFamily, object]]:
    """(family, address) of all that the host's name stands for; no name is every address of this machine."""
    found = socket.getaddrinfo(config.host or None, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def _all_bound(config: ServerConfig, stack: ExitStack) -> list[socket.socket]:
    sockets, failure = [], OSError("no such address")
    for family, address in _places(config):
        try:
            sockets.append(stack.enter_context(_bound(family, address)))
        except OSError as error:
            # "localhost" has an address of the new kind where the machine speaks the old one alone.
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
            failure = error
    if not sockets:
        raise failure
    return sockets


def _bound(family: socket.AddressFamily, address: Any) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Else the connections of a server that has just ended keep the port for a minute.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # An address of the old kind has a socket of its own.
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)
    except OSError:
        made.close()
        raise
    return made


def _cannot_listen(config: ServerConfig, error: OSError | UnicodeError) -> InvalidRequest:
    if isinstance(error, socket.gaierror | UnicodeError):
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        return InvalidRequest(f"host {config.host!r} cannot be resolved: {reason}", param="host")
    at = f"port {config.port} of host {config.host!r}"
    if error.errno == errno.EADDRINUSE:
        return InvalidRequest(f"{at} is already in use; stop what listens there, or choose another port", param="port")
    return InvalidRequest(f"{at} cannot be used: {error.strerror or error}", param="port")


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
        if sys.platform == "win32":  # whose event loops know no signals
            signal.signal(name, lambda *_: loop.call_soon_threadsafe(stop))
        else:
            loop.add_signal_handler(name, stop)
