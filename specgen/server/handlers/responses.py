"""POST /v1/responses: a translation to a chat and back. Nothing is stored."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from aiohttp import web

from specgen.server.auth import CALLER
from specgen.server.generation import Generation
from specgen.server.metrics import TIMING
from specgen.server.middleware import whole
from specgen.server.parse import read
from specgen.server.protocol.errors import ErrorBody, invalid
from specgen.server.protocol.requests import (
    CalledFunction,
    ChatRequest,
    Function,
    InputItem,
    Message,
    ResponsesRequest,
    Tool,
    ToolCall,
    text_of,
)
from specgen.server.protocol.responses import (
    Incomplete,
    InputDetails,
    OutputItem,
    OutputText,
    ResponseEvent,
    ResponseObject,
    ResponseUsage,
)
from specgen.server.respond import json_response, stream
from specgen.server.service import SERVICE, Service
from specgen.server.tool_calls import is_cut, parser_of
from specgen.types import Result


async def respond(request: web.Request) -> web.StreamResponse:
    """Answer an input."""
    service = request.app[SERVICE]
    asked = await read(request, ResponsesRequest)
    service.check_model(asked.model)
    prompts, params = await service.aside(request, lambda: service.translator.chat(as_chat(asked), request[CALLER]))
    writer = ResponseWriter(asked, service)
    running = service.generations.run(
        request[CALLER], request[TIMING], prompts, params, "input", len(await whole(request))
    )
    if not asked.stream:
        async with running as generation:
            return json_response(await writer.whole(generation))
    return await stream(request, running, writer.events, writer.failed, named=True)


def as_chat(asked: ResponsesRequest) -> ChatRequest:
    """The same as a chat. Raises ApiError or InvalidRequest for what a chat cannot say."""
    messages = [] if asked.instructions is None else [Message("system", asked.instructions)]
    if isinstance(asked.input, str):
        messages.append(Message("user", asked.input))
    else:
        for place, item in enumerate(asked.input):
            messages.append(_message(item, f"input[{place}]"))
    return ChatRequest(
        model=asked.model,
        messages=messages,
        max_completion_tokens=asked.max_output_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        tools=[Tool(Function(t.name, t.description, t.parameters, t.strict)) for t in asked.tools or ()] or None,
        tool_choice=asked.tool_choice,
        parallel_tool_calls=asked.parallel_tool_calls,
        response_format=asked.text.format if asked.text else None,
        seed=asked.seed,
        speculation=asked.speculation,
        cache_salt=asked.cache_salt,
        plugin_processors=asked.plugin_processors,
    )


def _message(item: InputItem, param: str) -> Message:
    if item.type == "function_call":
        if item.name is None or item.arguments is None:
            raise invalid("a function_call needs name and arguments", param)
        call = ToolCall(item.call_id or "", CalledFunction(item.name, item.arguments))
        return Message("assistant", None, tool_calls=[call])
    if item.type == "function_call_output":
        return Message("tool", text_of(item.output, param), tool_call_id=item.call_id)
    if not item.role:
        raise invalid("a message needs a role", param)
    return Message(item.role, text_of(item.content, param))


class ResponseWriter:
    """One response. The text is one message; each call behind it is an item of its own."""

    def __init__(self, asked: ResponsesRequest, service: Service) -> None:
        self._asked = asked
        self._service = service
        self._id = f"resp_{secrets.token_hex(16)}"
        self._message_id = f"msg_{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._calls = bool(asked.tools) and asked.tool_choice != "none"
        names = [tool.name for tool in asked.tools or ()]
        self._parser = parser_of(names, asked.tool_choice, parallel=asked.parallel_tool_calls is not False)
        self._said = ""
        self._has_message = False
        self._items: list[OutputItem] = []
        self._sent = 0

    async def whole(self, generation: Generation) -> ResponseObject:
        """The response, when all of it is there."""
        async for _ in self.events(generation):
            pass
        return self._last

    async def events(self, generation: Generation) -> AsyncIterator[ResponseEvent]:
        """All events of a streamed response."""
        result: Result | None = None
        begun = False
        async for _, output in generation.outputs():
            if not begun:
                begun = True
                for each in self._begin():
                    yield each
            said, calls = self._parts(output.text, output.result)
            if said:
                for each in self._open_message():
                    yield each
                self._said += said
                yield self._text_event("response.output_text.delta", delta=said, logprobs=[])
            self._items += [_call_item(call) for call in calls]
            result = output.result or result
        if self._parser.has_partial:
            self._items[-1].status = "incomplete"
        for each in self._end(result):
            yield each

    def failed(self, error: ErrorBody) -> ResponseEvent:
        """The event for an error."""
        return self.event("error", code=str(error.code), message=error.message, param=error.param)

    def event(self, type: str, **fields: Any) -> ResponseEvent:
        """The next event."""
        self._sent += 1
        return ResponseEvent(type=type, sequence_number=self._sent - 1, **fields)

    def _begin(self) -> list[ResponseEvent]:
        response = self._response("in_progress")
        return [
            self.event("response.created", response=response),
            self.event("response.in_progress", response=response),
        ]

    def _open_message(self) -> list[ResponseEvent]:
        """The message begins with its first text: where there are calls alone, there is none."""
        if self._has_message:
            return []
        self._has_message = True
        item = OutputItem(id=self._message_id, type="message", status="in_progress", role="assistant", content=[])
        return [
            self.event("response.output_item.added", output_index=0, item=item),
            self._text_event("response.content_part.added", part=OutputText(text="")),
        ]

    def _close_message(self, message: OutputItem) -> list[ResponseEvent]:
        return [
            self._text_event("response.output_text.done", text=self._said, logprobs=[]),
            self._text_event("response.content_part.done", part=OutputText(text=self._said)),
            self.event("response.output_item.done", output_index=0, item=message),
        ]

    def _end(self, result: Result | None) -> list[ResponseEvent]:
        cut = result is not None and result.finish_reason == "length"
        status = "incomplete" if cut else "completed"
        found = [] if self._items else self._open_message()
        messages = [self._message(status)] if self._has_message else []
        for message in messages:
            found += self._close_message(message)
        for place, item in enumerate(self._items, start=len(messages)):
            begun = msgspec.structs.replace(item, status="in_progress", arguments="")
            whole, at = item.arguments or "", {"item_id": item.id, "output_index": place}
            found += [
                self.event("response.output_item.added", output_index=place, item=begun),
                self.event("response.function_call_arguments.delta", delta=whole, **at),
                self.event("response.function_call_arguments.done", arguments=whole, name=item.name, **at),
                self.event("response.output_item.done", output_index=place, item=item),
            ]
        self._last = self._response(status, [*messages, *self._items], result)
        return [*found, self.event(f"response.{status}", response=self._last)]

    def _text_event(self, type: str, **fields: object) -> ResponseEvent:
        return self.event(type, item_id=self._message_id, output_index=0, content_index=0, **fields)

    def _message(self, status: str) -> OutputItem:
        content = [OutputText(text=self._said)]
        return OutputItem(id=self._message_id, type="message", status=status, role="assistant", content=content)

    def _parts(self, text: str, result: Result | None) -> tuple[str, list[ToolCall]]:
        if not self._calls:
            return text, []
        return self._parser.parts(text, last=result is not None, cut=is_cut(result))

    def _response(
        self, status: str, output: list[OutputItem] | None = None, result: Result | None = None
    ) -> ResponseObject:
        return ResponseObject(
            id=self._id,
            created_at=self._created,
            status=status,
            model=self._asked.model or self._service.name,
            output=output or [],
            usage=_usage(result) if result else None,
            incomplete_details=Incomplete("max_output_tokens") if status == "incomplete" else None,
            instructions=self._asked.instructions,
            metadata=self._asked.metadata or {},
            parallel_tool_calls=self._asked.parallel_tool_calls is not False,
            temperature=self._asked.temperature,
            top_p=self._asked.top_p,
            tool_choice=self._asked.tool_choice or "auto",
            tools=[msgspec.to_builtins(tool) for tool in self._asked.tools or ()],
        )


def _call_item(call: ToolCall) -> OutputItem:
    return OutputItem(
        id=f"fc_{secrets.token_hex(16)}",
        type="function_call",
        status="completed",
        call_id=call.id,
        name=call.function.name,
        arguments=call.function.arguments,
    )


def _usage(result: Result) -> ResponseUsage:
    usage = result.usage
    details = InputDetails(usage.cached_tokens)
    return ResponseUsage(usage.prompt_tokens, usage.completion_tokens, usage.total_tokens, details)
