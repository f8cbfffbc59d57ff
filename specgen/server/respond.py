"""What chats and completions share when they answer: usage, metrics, padding, the way from a generation to a body."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict
from typing import Any

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from specgen.engine.request import Request
from specgen.sampling.params import SamplingParams
from specgen.server.auth import CALLER
from specgen.server.generation import Generation
from specgen.server.logs import report
from specgen.server.metrics import TIMING
from specgen.server.middleware import whole
from specgen.server.protocol.errors import ErrorAnswer, ErrorBody, api_error
from specgen.server.protocol.requests import Sampling, StreamOptions
from specgen.server.protocol.responses import (
    CompletionDetails,
    PromptDetails,
    RequestMetrics,
    SpeculativeMetrics,
    StepTrace,
    Usage,
)
from specgen.server.service import SERVICE, Service
from specgen.server.sse import EventStream, ReaderTooSlow
from specgen.server.token_text import Spelling, Tracer
from specgen.types import Logprob, Prompt, Result, StepOutput

_PADDED_TO = 256


class Writer(ABC):
    """One answer. A subclass knows its shape; this class what all shapes hold."""

    prefix: str
    field: str
    """Where the prompts stand in a request."""

    def __init__(self, asked: Sampling, service: Service) -> None:
        self.service = service
        self.asked = asked
        self.id = f"{self.prefix}-{secrets.token_hex(16)}"
        self.created = int(time.time())
        self.model = asked.model or service.name
        self.options = asked.stream_options or StreamOptions()
        self._completion = 0
        self._spellings: dict[int, Spelling] = {}
        self._tracers: dict[int, Tracer] = {}

    async def begin(self, generation: Generation) -> None:
        """What is to be done when the generation was accepted, before the answer."""

    @abstractmethod
    def answer(self, generation: Generation, results: Sequence[Result]) -> msgspec.Struct:
        """The whole answer."""

    @abstractmethod
    def chunks(self, generation: Generation, choice: int, output: StepOutput) -> list[Any]:
        """The events that one output of a choice makes."""

    @abstractmethod
    def last_chunk(self, usage: Usage, metrics: RequestMetrics | UnsetType) -> Any:
        """The event without choices that holds the usage."""

    async def events(self, generation: Generation) -> AsyncIterator[msgspec.Struct]:
        """All events of a stream, but for its [DONE]."""
        await self.begin(generation)
        results: list[Result] = []
        async for choice, output in generation.outputs():
            self._completion += len(output.tokens)
            if output.result is not None:
                results.append(output.result)
            for chunk in self.chunks(generation, choice, output):
                if self.options.continuous_usage_stats:
                    chunk.usage = _usage(_prompt_tokens(generation), self._completion)
                elif self.options.include_usage:
                    chunk.usage = None
                if self.options.include_obfuscation:
                    chunk.obfuscation = _padding(chunk)
                yield chunk
        if self.options.include_usage:
            yield self.last_chunk(usage(generation, results), self.metrics(results))

    def metrics(self, results: Sequence[Result]) -> RequestMetrics | UnsetType:
        """Acceptance, as far as the server tells it."""
        wanted = self.service.config.request_metrics
        if wanted == "none":
            return UNSET
        if len(results) != 1:
            return RequestMetrics(None)
        stats = results[0].stats
        found = SpeculativeMetrics(
            mean_acceptance_length=stats.mean_acceptance_length,
            draft_acceptance_rate=stats.draft_acceptance_rate,
            acceptance_histogram=list(stats.acceptance_histogram),
            num_spec_steps=stats.num_spec_steps,
            num_accepted_draft_tokens=stats.num_accepted_draft_tokens,
            num_draft_tokens=stats.num_draft_tokens,
            num_spec_tokens=max(stats.per_step_drafted, default=0),
            by_drafter={name: asdict(share) for name, share in stats.by_drafter.items()},
        )
        # Why a drafter was switched off is for the log: it may quote a stranger's exception.
        for share in found.by_drafter.values():
            share["disabled"] = share["disabled"] is not None
        if wanted == "detailed":
            found.per_step_accepted = list(stats.per_step_accepted)
            found.per_step_drafted = list(stats.per_step_drafted)
        return RequestMetrics(found)

    def spelt(
        self, generation: Generation, choice: int, logprobs: Sequence[Logprob], text: str, result: Result | None
    ) -> list[tuple[int, Logprob]]:
        """(place in the text, log-probability) of the tokens of a choice that may be shown by now: see `Spelling`."""
        request = self._request(generation, choice)
        if request.params.logprobs is None:
            return []
        if choice not in self._spellings:
            self._spellings[choice] = self.service.texts.spelling(request)
        return self._spellings[choice].take(logprobs, text, result)

    def _request(self, generation: Generation, choice: int) -> Request:
        return generation.prepared[choice // (self.asked.n or 1)].request

    def trace(self, generation: Generation, choice: int, output: StepOutput) -> StepTrace | UnsetType:
        """Who guessed what, where the request asks for it."""
        request = self._request(generation, choice)
        if not request.params.trace or not output.tokens:
            return UNSET
        tracer = self._tracers.setdefault(choice, self.service.texts.tracer(request))
        return tracer.trace(output)


def usage(generation: Generation, results: Sequence[Result]) -> Usage:
    """The tokens of a request: each prompt once, all of its sequences, and what became of a prediction."""
    shares = [share for result in results for name, share in result.stats.by_drafter.items() if name == "prediction"]
    return _usage(
        _prompt_tokens(generation),
        sum(result.usage.completion_tokens for result in results),
        cached=sum(result.usage.cached_tokens for result in results if result.index == 0),
        accepted=sum(share.accepted for share in shares),
        rejected=sum(share.verified - share.accepted for share in shares),
    )


async def respond(
    request: web.Request, writer: Writer, prompts: Sequence[Prompt], params: SamplingParams
) -> web.StreamResponse:
    """Run a request and answer it, whole or as a stream."""
    service = request.app[SERVICE]
    running = service.generations.run(
        request[CALLER], request[TIMING], prompts, params, writer.field, len(await whole(request))
    )
    if not writer.asked.stream:
        async with running as generation:
            await writer.begin(generation)
            results = await generation.results()
            if params.logprobs is None:
                return json_response(writer.answer(generation, results))
            # The text of each token and of those that were likely too takes a while.
            return json_response(await service.generations.in_thread(lambda: writer.answer(generation, results)))
    return await stream(request, running, writer.events)


async def stream(
    request: web.Request,
    running: AbstractAsyncContextManager[Generation],
    events: Callable[[Generation], AsyncIterator[msgspec.Struct]],
    failed: Callable[[ErrorBody], msgspec.Struct] = ErrorAnswer,
    *,
    named: bool = False,
) -> web.StreamResponse:
    """Run a generation and send its events; what fails before the first one is raised.

    failed: the event for an error. named: each event says its type in a line of its own, and none says [DONE].
    """
    config = request.app[SERVICE].config
    sent = EventStream(request, write=config.write_seconds, ping=config.ping_seconds, named=named)
    try:
        async with running as generation:
            await sent.feed(events(generation))
        await sent.done()
    except ReaderTooSlow:
        report(request, "the client read too slowly")
    except Exception as error:
        if not sent.is_open:
            raise
        report(request, "a stream failed", error)
        await sent.send(failed(api_error(error).body))
        await sent.done()
    return sent.response


def json_response(answer: msgspec.Struct, status: int = 200) -> web.Response:
    """A struct as JSON."""
    return web.Response(body=msgspec.json.encode(answer), status=status, content_type="application/json")


def _prompt_tokens(generation: Generation) -> int:
    return sum(len(prepared.request.ids) for prepared in generation.prepared)


def _usage(prompt: int, completion: int, *, cached: int = 0, accepted: int = 0, rejected: int = 0) -> Usage:
    details = CompletionDetails(accepted, rejected)
    return Usage(prompt, completion, prompt + completion, PromptDetails(cached), details)


def _padding(chunk: msgspec.Struct) -> str:
    """Random letters that make all chunks of about one size equally long."""
    missing = -len(msgspec.json.encode(chunk)) % _PADDED_TO
    return secrets.token_urlsafe(missing)[:missing]
