"""What all handlers of one server share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from aiohttp import web

from specgen.api.engine import Engine
from specgen.server.auth import CALLER, Keys
from specgen.server.config import ServerConfig
from specgen.server.generation import Generations
from specgen.server.health import Health
from specgen.server.hosts import Hosts
from specgen.server.metrics import TIMING, Metrics
from specgen.server.middleware import whole
from specgen.server.preparing import SMALL_BYTES
from specgen.server.protocol.errors import ApiError
from specgen.server.token_text import Texts
from specgen.server.translate import RequestTranslator

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Service:
    """An engine and all that stands around it."""

    engine: Engine
    config: ServerConfig
    name: str
    keys: Keys
    hosts: Hosts
    metrics: Metrics
    generations: Generations
    translator: RequestTranslator
    texts: Texts
    health: Health
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(cls, engine: Engine, config: ServerConfig) -> Service:
        """Build it around an engine that stays the caller's."""
        name = config.served_model_name or _name(engine)
        generations = Generations(engine, config)
        metrics = Metrics(engine, name, lambda: generations.gate.preparing, compat=config.metrics_compat == "vllm")
        return cls(
            engine,
            config,
            name,
            Keys(config.api_keys, config.admin_key),
            Hosts(config),
            metrics,
            generations,
            RequestTranslator(config, name, engine),
            Texts(engine.tokenizer),
            Health(engine, config),
        )

    def check_model(self, name: str | None) -> None:
        """Raise ApiError 404 unless requests may name this model."""
        if name is not None and name not in (known := self.models()):
            message = f"the model {name[:256]!r} does not exist; choices: {', '.join(known)}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def aside(self, request: web.Request, function: Callable[[], T]) -> T:
        """What `function` makes of a request that was read: on a thread where it is large, so that nobody waits."""
        return function() if len(await whole(request)) <= SMALL_BYTES else await self.text(request, function)

    async def text(self, request: web.Request, function: Callable[[], T]) -> T:
        """What `function` makes of the text of a request that was read, on a thread and counted as waiting."""
        size = len(await whole(request))
        return await self.generations.text(request[CALLER], request[TIMING], function, size)

    def models(self) -> list[str]:
        """The names that requests may use: the model's and its adapters'."""
        return [self.name, *(info.name for info in self.engine.adapters.list())]


SERVICE = web.AppKey("service", Service)


def _name(engine: Engine) -> str:
    """What a model is called if nobody says: the last part of where it came from."""
    model = engine.target.model
    return Path(model.name_or_path or "").name or model.config.model_type
