"""The table of routes: what the app serves, who may ask, and what /openapi.json says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec
from aiohttp.typedefs import Handler

from specgen.server.handlers import adapters, chat, completions, models, responses, status, tokens
from specgen.server.protocol import requests as protocol
from specgen.server.protocol import responses as answers

Access = Literal["open", "key", "admin"]


@dataclass(frozen=True, slots=True)
class Route:
    """One method on one path. access: "open" for everybody, "key" for those with a key, "admin" for the admin's.

    body and answer: the structs; None where there is none, or another kind of text. streams: the answer may be events.
    """

    method: str
    path: str
    handler: Handler
    access: Access = "key"
    body: type[msgspec.Struct] | None = None
    answer: object = None
    event: type[msgspec.Struct] | None = None

    @property
    def summary(self) -> str:
        """What it does, in a sentence."""
        return (self.handler.__doc__ or "").split("\n", maxsplit=1)[0]


ROUTES: tuple[Route, ...] = (
    Route(
        "POST",
        "/v1/chat/completions",
        chat.chat,
        body=protocol.ChatRequest,
        answer=answers.ChatAnswer,
        event=answers.ChatChunk,
    ),
    Route(
        "POST",
        "/v1/completions",
        completions.complete,
        body=protocol.CompletionRequest,
        answer=answers.CompletionAnswer,
        event=answers.CompletionAnswer,
    ),
    Route(
        "POST",
        "/v1/responses",
        responses.respond,
        body=protocol.ResponsesRequest,
        answer=answers.ResponseObject,
        event=answers.ResponseEvent,
    ),
    Route("GET", "/v1/models", models.models, answer=answers.ModelList),
    Route("GET", "/v1/models/{model:.+}", models.model, answer=answers.ModelCard),
    Route("POST", "/tokenize", tokens.tokenize, body=protocol.TokenizeRequest, answer=answers.TokenizeAnswer),
    Route("POST", "/detokenize", tokens.detokenize, body=protocol.DetokenizeRequest, answer=answers.DetokenizeAnswer),
    Route(
        "POST",
        "/v1/load_lora_adapter",
        adapters.load_adapter,
        "admin",
        body=protocol.LoadAdapterRequest,
        answer=answers.Status,
    ),
    Route(
        "POST",
        "/v1/unload_lora_adapter",
        adapters.unload_adapter,
        "admin",
        body=protocol.UnloadAdapterRequest,
        answer=answers.Status,
    ),
    Route("GET", "/health", status.health, "open", answer=answers.Status),
    Route("GET", "/ready", status.ready, "open", answer=answers.Status),
    Route("GET", "/version", status.version, answer=answers.Version),
    Route("GET", "/metrics", status.metrics),
)
