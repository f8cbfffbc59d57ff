"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter: for the admin, from below the engine's adapter root alone.

The engine itself fences paths in and reads nothing but safetensors.
"""

from __future__ import annotations

from pathlib import Path

from aiohttp import web

from specgen.errors import InvalidRequest
from specgen.server.parse import read
from specgen.server.protocol.errors import ApiError, invalid
from specgen.server.protocol.requests import LoadAdapterRequest, UnloadAdapterRequest
from specgen.server.protocol.responses import Status
from specgen.server.respond import json_response
from specgen.server.service import SERVICE


async def load_adapter(request: web.Request) -> web.StreamResponse:
    """Load an adapter under a name that requests may use as their model."""
    service = request.app[SERVICE]
    asked = await read(request, LoadAdapterRequest)
    root = service.engine.config.adapters.root
    if root is None:
        raise ApiError(403, "this server was started without lora-root: it loads no adapters", code="admin_only")
    if asked.lora_name == service.name:
        raise invalid(f"{asked.lora_name} is the model's own name", "lora_name")
    adapters = service.engine.adapters
    put = adapters.reload if asked.load_inplace else adapters.load
    try:
        await service.generations.in_thread(lambda: put(asked.lora_name, asked.lora_path))
    except InvalidRequest as error:
        raise invalid(_without(root, str(error)), "lora_path") from None
    return json_response(Status("loaded"))


async def unload_adapter(request: web.Request) -> web.StreamResponse:
    """Forget an adapter; requests that use it go on."""
    service = request.app[SERVICE]
    asked = await read(request, UnloadAdapterRequest)
    await service.generations.in_thread(lambda: service.engine.adapters.unload(asked.lora_name, timeout=0.0))
    return json_response(Status("unloaded"))


def _without(root: str | Path, message: str) -> str:
    """A message without the place where the server keeps its files."""
    for folder in (Path(root), Path(root).expanduser().resolve()):
        message = message.replace(f"{folder}/", "").replace(str(folder), "the adapter root")
    return message
