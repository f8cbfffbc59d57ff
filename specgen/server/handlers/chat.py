"""POST /v1/chat/completions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from aiohttp import web
from msgspec import UNSET, UnsetType

from specgen.server.auth import CALLER
from specgen.server.generation import Generation
from specgen.server.parse import read
from specgen.server.protocol.requests import ChatRequest, ToolCall
from specgen.server.protocol.responses import (
    AssistantMessage,
    CallDelta,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprobs,
    Delta,
    RequestMetrics,
    Usage,
)
from specgen.server.respond import Writer, respond, usage
from specgen.server.service import SERVICE, Service
from specgen.server.tool_calls import CallParser, is_cut, parser_of
from specgen.types import Logprob, Result, StepOutput


async def chat(request: web.Request) -> web.StreamResponse:
    """Answer a conversation."""
    service = request.app[SERVICE]
    asked = await read(request, ChatRequest)
    service.check_model(asked.model)
    prompts, params = await service.aside(request, lambda: service.translator.chat(asked, request[CALLER]))
    return await respond(request, ChatWriter(asked, service), prompts, params)


class ChatWriter(Writer):
    """A chat's answer. With tools, calls are taken out of the text."""

    prefix = "chatcmpl"
    field = "messages"

    def __init__(self, asked: ChatRequest, service: Service) -> None:
        super().__init__(asked, service)
        self._calls = bool(asked.tools) and asked.tool_choice != "none"
        self._tools = [tool.function.name for tool in asked.tools or ()]
        self._choice_of_tool = asked.tool_choice
        self._parallel = asked.parallel_tool_calls is not False
        self._parsers: dict[int, CallParser] = {}
        self._begun: set[int] = set()
        self._sent: Counter[int] = Counter()

    def answer(self, generation: Generation, results: Sequence[Result]) -> ChatAnswer:
        """The whole answer."""
        return ChatAnswer(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=[self._choice(generation, choice, result) for choice, result in enumerate(results)],
            usage=usage(generation, results),
            metrics=self.metrics(results),
        )

    def chunks(self, generation: Generation, choice: int, output: StepOutput) -> list[ChatChunk]:
        """The role comes with the first output, the reason of the end behind the last."""
        found = []
        if choice not in self._begun:
            self._begun.add(choice)
            found.append(ChatChunkChoice(index=choice, delta=Delta(role="assistant", content="")))
        said, calls = self._parts(choice, output.text, output.result)
        added = ChatChunkChoice(
            index=choice,
            delta=Delta(content=said or None, tool_calls=self._deltas(choice, calls) or None),
            logprobs=self._logprobs(self.spelt(generation, choice, output.logprobs, output.text, output.result)),
            token_ids=list(output.tokens) if self.asked.return_token_ids and output.tokens else UNSET,
            trace=self.trace(generation, choice, output),
        )
        if said or calls or added.logprobs or added.token_ids or added.trace:
            found.append(added)
        if output.result is not None:
            reason = self._finish_reason(choice, output.result)
            stop = output.result.stop
            found.append(ChatChunkChoice(index=choice, delta=Delta(), finish_reason=reason, stop_reason=stop))
        return [self._chunk([each]) for each in found]

    def last_chunk(self, usage: Usage, metrics: RequestMetrics | UnsetType) -> ChatChunk:
        """Usage and metrics."""
        chunk = self._chunk([])
        chunk.usage, chunk.metrics = usage, metrics
        return chunk

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        return ChatChunk(id=self.id, created=self.created, model=self.model, choices=choices)

    def _choice(self, generation: Generation, choice: int, result: Result) -> ChatChoice:
        said, calls = self._parts(choice, result.text, result)
        return ChatChoice(
            index=choice,
            message=AssistantMessage(said if said or not calls else None, tool_calls=calls or UNSET),
            logprobs=self._logprobs(self.spelt(generation, choice, result.logprobs, result.text, result)),
            finish_reason=self._finish_reason(choice, result),
            stop_reason=result.stop,
            token_ids=list(result.ids) if self.asked.return_token_ids else UNSET,
        )

    def _logprobs(self, spelt: Sequence[tuple[int, Logprob]]) -> ChatLogprobs | None:
        return self.service.texts.chat_logprobs([each for _, each in spelt]) if spelt else None

    def _parts(self, choice: int, text: str, result: Result | None) -> tuple[str, list[ToolCall]]:
        """What is said in a piece of text, and what is called; the last one comes with the result."""
        if not self._calls:
            return text, []
        if choice not in self._parsers:
            self._parsers[choice] = parser_of(self._tools, self._choice_of_tool, parallel=self._parallel)
        return self._parsers[choice].parts(text, last=result is not None, cut=is_cut(result))

    def _deltas(self, choice: int, calls: list[ToolCall]) -> list[CallDelta]:
        first = self._sent[choice]
        self._sent[choice] += len(calls)
        return [CallDelta(first + place, call.id, call.type, call.function) for place, call in enumerate(calls)]

    def _finish_reason(self, choice: int, result: Result) -> str:
        parser = self._parsers.get(choice)
        called = parser and parser.found and not parser.has_partial and result.finish_reason == "stop"
        return "tool_calls" if called else result.finish_reason
