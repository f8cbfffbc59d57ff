"""How the server is: for load balancers, for Prometheus and for people."""

from __future__ import annotations

from aiohttp import web

from specgen import __version__
from specgen.server.protocol.responses import Status, Version
from specgen.server.respond import json_response
from specgen.server.service import SERVICE


async def health(request: web.Request) -> web.StreamResponse:
    """200 while the engine is well, else 503 and why: then restart it."""
    trouble = request.app[SERVICE].health.trouble
    return json_response(Status("failed", trouble), 503) if trouble else json_response(Status("ok"))


async def ready(request: web.Request) -> web.StreamResponse:
    """200 while new requests are welcome, else 503: then send them elsewhere."""
    service = request.app[SERVICE]
    reason = "the server is shutting down" if service.generations.gate.is_draining else service.health.trouble
    return json_response(Status("not ready", reason), 503) if reason else json_response(Status("ready"))


async def version(request: web.Request) -> web.StreamResponse:
    """The version of specgen."""
    return json_response(Version(__version__))


async def metrics(request: web.Request) -> web.StreamResponse:
    """Everything that is counted, for Prometheus."""
    body = request.app[SERVICE].metrics.text()
    return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
