"""The seam for LoRA adapters: an engine that has them says so by `engine.adapters`, and nothing else here knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aiohttp import web

from specgen.api import Engine
from specgen.server.answers import Status
from specgen.server.config import ServerConfig
from specgen.server.errors import ApiError, invalid
from specgen.server.protocol import LoadAdapterRequest, UnloadAdapterRequest
from specgen.server.reading import read
from specgen.server.service import SERVICE
from specgen.server.writing import json_response


async def load_adapter(request: web.Request) -> web.StreamResponse:
    """Load an adapter under a name that requests may use as their model."""
    service = request.app[SERVICE]
    asked = await read(request, LoadAdapterRequest)
    adapters = _adapters(service.engine)
    path = adapter_path(service.config, asked.lora_path)
    await service.runner.in_thread(lambda: adapters.load(asked.lora_name, path))
    return json_response(Status("loaded"))


async def unload_adapter(request: web.Request) -> web.StreamResponse:
    """Forget an adapter; requests that use it go on."""
    service = request.app[SERVICE]
    asked = await read(request, UnloadAdapterRequest)
    adapters = _adapters(service.engine)
    await service.runner.in_thread(lambda: adapters.unload(asked.lora_name))
    return json_response(Status("unloaded"))


def adapter_path(config: ServerConfig, asked: str) -> Path:
    """The folder below the server's own that a request names. Raises ApiError for one outside, by whatever way."""
    if config.lora_root is None:
        raise ApiError(403, "this server was started without lora_root: it loads no adapters", code="admin_only")
    root = Path(config.lora_root).resolve()
    path = (root / asked).resolve()
    if Path(asked).is_absolute() or not path.is_relative_to(root) or path == root:
        raise invalid("lora_path must be a folder below the server's lora_root", "lora_path")
    if not path.is_dir():
        raise ApiError(404, "there is no such folder below the server's lora_root", param="lora_path")
    return path


def _adapters(engine: Engine) -> Any:
    adapters = getattr(engine, "adapters", None)
    if adapters is None:
        raise ApiError(501, "this engine has no adapters", code="no_adapters")
    return adapters
