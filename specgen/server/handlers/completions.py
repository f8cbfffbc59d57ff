"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web
from msgspec import UNSET, UnsetType

from specgen.server.auth import CALLER
from specgen.server.generation import Generation
from specgen.server.parse import read
from specgen.server.protocol.requests import CompletionRequest
from specgen.server.protocol.responses import (
    CompletionAnswer,
    CompletionChoice,
    CompletionLogprobs,
    RequestMetrics,
    Usage,
)
from specgen.server.respond import Writer, respond, usage
from specgen.server.service import SERVICE, Service
from specgen.server.token_text import LOWEST
from specgen.types import Logprob, Prompt, Result, StepOutput


async def complete(request: web.Request) -> web.StreamResponse:
    """Continue one prompt or several."""
    service = request.app[SERVICE]
    asked = await read(request, CompletionRequest)
    service.check_model(asked.model)
    prompts, params = await service.aside(request, lambda: service.translator.completion(asked, request[CALLER]))
    return await respond(request, CompletionWriter(asked, service, prompts), prompts, params)


class CompletionWriter(Writer):
    """Texts, those of each prompt side by side."""

    prefix = "cmpl"
    field = "prompt"

    def __init__(self, asked: CompletionRequest, service: Service, prompts: Sequence[Prompt]) -> None:
        super().__init__(asked, service)
        self._echoed = prompts if asked.echo else ()
        self._echoes: list[str] = []
        self._samples = asked.n or 1
        self._begun: set[int] = set()

    async def begin(self, generation: Generation) -> None:
        """Spell the prompts out, where they are wanted: by now their ids were checked."""
        if self._echoed:
            spell = self.service.texts.prompt
            self._echoes = await self.service.generations.in_thread(lambda: [spell(prompt) for prompt in self._echoed])

    def answer(self, generation: Generation, results: Sequence[Result]) -> CompletionAnswer:
        """The whole answer."""
        answer = self._answer([self._choice(generation, choice, result) for choice, result in enumerate(results)])
        answer.usage, answer.metrics = usage(generation, results), self.metrics(results)
        return answer

    def chunks(self, generation: Generation, choice: int, output: StepOutput) -> list[CompletionAnswer]:
        """One for each output that has something to say."""
        text = self._echo(choice) + output.text
        added = CompletionChoice(
            index=choice,
            text=text,
            logprobs=self._logprobs(self.spelt(generation, choice, output.logprobs, output.text, output.result)),
            token_ids=list(output.tokens) if self.asked.return_token_ids and output.tokens else UNSET,
            trace=self.trace(generation, choice, output),
        )
        if output.result is not None:
            added.finish_reason, added.stop_reason = output.result.finish_reason, output.result.stop
        elif not (text or added.logprobs or added.token_ids or added.trace):
            return []
        return [self._answer([added])]

    def last_chunk(self, usage: Usage, metrics: RequestMetrics | UnsetType) -> CompletionAnswer:
        """Usage and metrics."""
        chunk = self._answer([])
        chunk.usage, chunk.metrics = usage, metrics
        return chunk

    def _answer(self, choices: list[CompletionChoice]) -> CompletionAnswer:
        return CompletionAnswer(id=self.id, created=self.created, model=self.model, choices=choices)

    def _choice(self, generation: Generation, choice: int, result: Result) -> CompletionChoice:
        return CompletionChoice(
            index=choice,
            text=self._echo(choice) + result.text,
            logprobs=self._logprobs(self.spelt(generation, choice, result.logprobs, result.text, result)),
            finish_reason=result.finish_reason,
            stop_reason=result.stop,
            token_ids=list(result.ids) if self.asked.return_token_ids else UNSET,
        )

    def _echo(self, choice: int) -> str:
        """The prompt, once, where it is wanted."""
        if not self._echoes or choice in self._begun:
            return ""
        self._begun.add(choice)
        return self._echoes[choice // self._samples]

    def _logprobs(self, spelt: Sequence[tuple[int, Logprob]]) -> CompletionLogprobs | None:
        if not spelt:
            return None
        found, name = CompletionLogprobs([], [], [], []), self.service.texts.name
        for place, each in spelt:
            found.text_offset.append(place)
            found.tokens.append(name(each.token))
            found.token_logprobs.append(max(LOWEST, each.logprob))
            # The token itself is among the likeliest, or beside them.
            likeliest = (*each.top, (each.token, each.logprob))
            found.top_logprobs.append({name(token): max(LOWEST, value) for token, value in likeliest})
        return found
