"""The application: routes, the order of what a request passes through, and what runs beside them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

from aiohttp import HttpVersion10, web
from aiohttp.typedefs import Handler

from specgen.api.engine import Engine
from specgen.server.auth import CALLER
from specgen.server.config import ServerConfig
from specgen.server.logs import account, name_answer
from specgen.server.middleware import leave_packed
from specgen.server.openapi import document
from specgen.server.playground import add_page
from specgen.server.plugin_routes import add_plugin_routes
from specgen.server.protocol.errors import ApiError
from specgen.server.routes import ROUTES, Access, Route
from specgen.server.service import SERVICE, Service


def build_app(engine: Engine, config: ServerConfig) -> web.Application:
    """An application around an engine, which stays the caller's to close. Serve it with `serve`, or in a test."""
    service = Service.of(engine, config)
    app = web.Application(middlewares=[leave_packed, account, admit], client_max_size=config.body_bytes)
    app[SERVICE] = service
    routes = [*ROUTES, Route("GET", "/openapi.json", openapi)]
    app[_ACCESS] = {}
    for route in routes:
        # Who may GET may ask for the HEAD alone.
        for method in ("GET", "HEAD") if route.method == "GET" else (route.method,):
            added = app.router.add_route(method, route.path, route.handler)
            app[_ACCESS][added.handler] = route.access
    app[_DOCUMENT] = document(routes)
    if config.page:
        app[_ACCESS] |= {added.handler: "open" for added in add_page(app)}
    add_plugin_routes(app, engine, config)
    app.on_response_prepare.append(name_answer)
    app.cleanup_ctx.append(_beside)
    return app


@web.middleware
async def admit(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Let in who may: everybody on open routes, elsewhere by key. What is in no table needs a key too."""
    service = request.app[SERVICE]
    if request.version < HttpVersion10:
        raise ApiError(400, "this is no HTTP request of version 1", code="invalid_http")
    service.hosts.check(request)
    access = request.app[_ACCESS].get(request.match_info.handler, "key")
    if access == "open":
        return await handler(request)
    caller = request[CALLER] = service.keys.caller(request)
    if access == "admin":
        service.keys.check_admin(caller)
    if request.method == "POST":
        service.generations.gate.check_rate(caller)
    return await handler(request)


async def openapi(request: web.Request) -> web.StreamResponse:
    """This description of the server."""
    return web.Response(body=request.app[_DOCUMENT], content_type="application/json")


async def _beside(app: web.Application) -> AsyncIterator[None]:
    """Watch the engine as long as the server runs. Constraints hold up nobody who is served already."""
    service = app[SERVICE]
    await asyncio.to_thread(service.engine.warm)
    watching = asyncio.create_task(service.health.watch())
    yield
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching
    service.generations.close()


_ACCESS: web.AppKey[dict[object, Access]] = web.AppKey("access", dict)
_DOCUMENT = web.AppKey("document", bytes)
