"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web
from msgspec import UNSET, UnsetType

from specgen.server.answers import CompletionAnswer, CompletionChoice, CompletionLogprobs, RequestMetrics, Usage
from specgen.server.auth import CALLER
from specgen.server.jobs import Job
from specgen.server.protocol import CompletionRequest
from specgen.server.reading import read
from specgen.server.service import SERVICE, Service
from specgen.server.texts import LOWEST
from specgen.server.writing import Writer, respond, usage
from specgen.types import Logprob, Prompt, Result, StepOutput


async def complete(request: web.Request) -> web.StreamResponse:
    """Continue one prompt or several."""
    service = request.app[SERVICE]
    asked = await read(request, CompletionRequest)
    service.check_model(asked.model)
    prompts, params = await service.aside(request, lambda: service.asker.completion(asked, request[CALLER]))
    return await respond(request, CompletionWriter(asked, service, prompts), prompts, params)


class CompletionWriter(Writer):
    """Texts, those of each prompt side by side."""

    prefix = "cmpl"

    def __init__(self, asked: CompletionRequest, service: Service, prompts: Sequence[Prompt]) -> None:
        super().__init__(asked, service)
        self._echoes = [service.texts.prompt(prompt) for prompt in prompts] if asked.echo else []
        self._samples = asked.n or 1
        self._offsets: dict[int, int] = {}

    def answer(self, job: Job, results: Sequence[Result]) -> CompletionAnswer:
        """The whole answer."""
        answer = self._answer([self._choice(choice, result) for choice, result in enumerate(results)])
        answer.usage, answer.metrics = usage(job, results), self.metrics(results)
        return answer

    def chunks(self, job: Job, choice: int, output: StepOutput) -> list[CompletionAnswer]:
        """One for each output that has something to say."""
        text = self._echo(choice) + output.text
        added = CompletionChoice(
            index=choice,
            text=text,
            logprobs=self._logprobs(choice, output.logprobs),
            token_ids=list(output.tokens) if self.asked.return_token_ids and output.tokens else UNSET,
            trace=self.trace(job, choice, output),
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

    def _choice(self, choice: int, result: Result) -> CompletionChoice:
        return CompletionChoice(
            index=choice,
            text=self._echo(choice) + result.text,
            logprobs=self._logprobs(choice, result.logprobs),
            finish_reason=result.finish_reason,
            stop_reason=result.stop,
            token_ids=list(result.ids) if self.asked.return_token_ids else UNSET,
        )

    def _echo(self, choice: int) -> str:
        """The prompt, once, where it is wanted."""
        if not self._echoes or choice in self._offsets:
            return ""
        echo = self._echoes[choice // self._samples]
        self._offsets[choice] = len(echo)
        return echo

    def _logprobs(self, choice: int, logprobs: Sequence[Logprob]) -> CompletionLogprobs | None:
        if not logprobs:
            return None
        found = CompletionLogprobs([], [], [], [])
        offset = self._offsets.get(choice, 0)
        for each in logprobs:
            text = self.service.texts.text(each.token)
            found.text_offset.append(offset)
            found.tokens.append(text)
            found.token_logprobs.append(max(LOWEST, each.logprob))
            # The token itself is among the likeliest, or beside them.
            likeliest = (*each.top, (each.token, each.logprob))
            found.top_logprobs.append({self.service.texts.text(token): max(LOWEST, v) for token, v in likeliest})
            offset += len(text)
        self._offsets[choice] = offset
        return found
