"""GET /v1/models: what requests may name."""

from __future__ import annotations

from aiohttp import web

from specgen.server.protocol.responses import ModelCard, ModelList
from specgen.server.respond import json_response
from specgen.server.service import SERVICE, Service


async def models(request: web.Request) -> web.StreamResponse:
    """List the model and its adapters."""
    service = request.app[SERVICE]
    return json_response(ModelList([_card(service, name) for name in service.models()]))


async def model(request: web.Request) -> web.StreamResponse:
    """One of them."""
    service = request.app[SERVICE]
    name = request.match_info["model"]
    service.check_model(name)
    return json_response(_card(service, name))


def _card(service: Service, name: str) -> ModelCard:
    parent = None if name == service.name else service.name
    return ModelCard(name, service.created, service.engine.context_length, service.name, parent)
