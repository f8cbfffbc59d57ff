"""POST /tokenize and /detokenize: what a prompt is to the model."""

from __future__ import annotations

from typing import cast

from aiohttp import web
from transformers import PreTrainedTokenizerBase

from specgen.sampling.params import check_ids
from specgen.server.parse import read
from specgen.server.protocol.errors import invalid
from specgen.server.protocol.requests import DetokenizeRequest, TokenizeRequest
from specgen.server.protocol.responses import DetokenizeAnswer, TokenizeAnswer
from specgen.server.respond import json_response
from specgen.server.service import SERVICE, Service
from specgen.server.translate import conversation


async def tokenize(request: web.Request) -> web.StreamResponse:
    """The ids of a prompt or of messages, as a request with them would have."""
    service = request.app[SERVICE]
    asked = await read(request, TokenizeRequest)
    service.check_model(asked.model)
    _check_tokenizer(service)
    return json_response(await service.text(request, lambda: _answer(service, asked)))


async def detokenize(request: web.Request) -> web.StreamResponse:
    """The text of ids."""
    service = request.app[SERVICE]
    asked = await read(request, DetokenizeRequest)
    service.check_model(asked.model)
    _check_tokenizer(service)
    return json_response(await service.text(request, lambda: DetokenizeAnswer(_text(service, asked))))


def _answer(service: Service, asked: TokenizeRequest) -> TokenizeAnswer:
    ids = _ids(service, asked)
    strings = list(_tokenizer(service).convert_ids_to_tokens(ids)) if asked.return_token_strs else None
    return TokenizeAnswer(len(ids), service.engine.context_length, ids, strings)


def _text(service: Service, asked: DetokenizeRequest) -> str:
    check_ids(asked.tokens, service.engine.target.vocab_size, "tokens")
    return str(_tokenizer(service).decode(asked.tokens))


def _ids(service: Service, asked: TokenizeRequest) -> list[int]:
    if (asked.prompt is None) == (asked.messages is None):
        raise invalid("send either prompt or messages", "prompt")
    if asked.messages is not None:
        options = {"add_generation_prompt": asked.add_generation_prompt}
        return service.engine.encode(conversation(asked.messages, asked.tools, options))
    ids: list[int] = _tokenizer(service).encode(asked.prompt or "", add_special_tokens=asked.add_special_tokens)
    return ids


def _tokenizer(service: Service) -> PreTrainedTokenizerBase:
    return cast(PreTrainedTokenizerBase, service.engine.tokenizer)


def _check_tokenizer(service: Service) -> None:
    if service.engine.tokenizer is None:
        raise invalid("this model has no tokenizer", "model")
