"""Routes of plugins that the config names: each plugin in an application of its own, below a path of its own."""

from __future__ import annotations

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from specgen.api.engine import Engine
from specgen.errors import UnknownName
from specgen.plugins.manager import Plugins, load_plugins
from specgen.server.config import ServerConfig
from specgen.server.logs import report
from specgen.server.protocol.errors import ApiError

_HOOK = "register_routes"


def add_plugin_routes(app: web.Application, engine: Engine, config: ServerConfig) -> None:
    """Mount what the plugins register. Raises UnknownName for one without routes, PluginError for one that fails."""
    check_plugin_routes(config, engine.plugins)
    for name in config.plugin_routes:
        inner = web.Application(middlewares=[_named(name)])
        engine.plugins.call(_HOOK, only=name, app=inner, engine=engine)
        app.add_subapp(f"/plugins/{name}/", inner)


def check_plugin_routes(config: ServerConfig, plugins: Plugins | None = None) -> None:
    """Raise UnknownName for a plugin without routes; `None` are those that are installed."""
    if not config.plugin_routes:
        return
    offering = [info.name for info in (plugins or load_plugins()).info() if _HOOK in info.hooks]
    for name in config.plugin_routes:
        if name not in offering:
            raise UnknownName("plugin with routes", name, offering, param="plugin_routes")


def _named(name: str) -> Middleware:
    """Turns what a plugin's handler raises into an error that says whose it is."""

    @web.middleware
    async def blame(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except (web.HTTPException, ApiError):
            raise
        except Exception as error:
            report(request, "a plugin's route failed", error)
            message = f"plugin {name} failed ({type(error).__name__})"
            raise ApiError(500, message, code="plugin_failed") from error

    return blame
