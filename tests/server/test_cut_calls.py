"""A forced tool call that `max_tokens` cuts: whole or streamed, each API tells a part of a call and no content."""

from __future__ import annotations

import re
from typing import Any

import pytest

from specgen import Engine
from tests.support.servers import HELLO, engine, serving

pytestmark = pytest.mark.usefixtures("one_thread")

WEATHER = {
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"enum": ["Paris" * 9]}}, "required": ["city"]},
}
TOOLS: list[Any] = [{"type": "function", "function": WEATHER}]
NAMED = {"type": "function", "function": {"name": "weather"}}
# Of tokens that are bytes: inside the mark, the name, the arguments.
CUTS = (8, 27, 65)
ARGUMENTS = re.compile(r'\{\s*("city"\s*:\s*"(Paris)*)?')


@pytest.fixture(scope="module")
def own() -> Any:
    with engine() as found:
        yield found


@pytest.mark.parametrize("tokens", CUTS)
@pytest.mark.parametrize("choice", ["required", NAMED])
async def test_a_chat_that_is_cut_has_a_partial_call(own: Engine, choice: Any, tokens: int) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": HELLO,
        "tools": TOOLS,
        "tool_choice": choice,
        "temperature": 0,
    }
    async with serving(own) as world:
        client = world.client()
        whole = (await client.chat.completions.create(**asked, max_tokens=tokens)).choices[0]
        stream: Any = await client.chat.completions.create(**asked, max_tokens=tokens, stream=True)
        chunks = [chunk.choices[0] async for chunk in stream]
    assert whole.message.content is None
    assert whole.finish_reason == chunks[-1].finish_reason == "length"
    (call,) = whole.message.tool_calls or []
    arguments: str = call.function.arguments  # type: ignore[union-attr]
    assert call.function.name == "weather"  # type: ignore[union-attr]
    assert arguments == "" if tokens < 40 else ARGUMENTS.match(arguments)
    assert not any(chunk.delta.content for chunk in chunks)
    (delta,) = [each for chunk in chunks for each in chunk.delta.tool_calls or []]
    assert (delta.index, delta.function.name, delta.function.arguments or "") == (0, "weather", arguments)
    assert delta.id


@pytest.mark.parametrize("tokens", CUTS)
async def test_a_response_that_is_cut_has_an_incomplete_item(own: Engine, tokens: int) -> None:
    tools = [{"type": "function", **WEATHER}]
    asked = {
        "model": "tiny",
        "input": "hi",
        "tools": tools,
        "tool_choice": "required",
        "temperature": 0,
        "max_output_tokens": tokens,
    }
    async with serving(own) as world, world.http.post(f"{world.url}/v1/responses", json=asked) as answer:
        found = await answer.json()
    assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    (item,) = found["output"]
    assert (item["type"], item["status"], item["name"]) == ("function_call", "incomplete", "weather")
    assert item["arguments"] == "" if tokens < 40 else ARGUMENTS.match(item["arguments"])
