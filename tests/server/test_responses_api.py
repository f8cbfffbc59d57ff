"""The responses API as OpenAI's own client sees it."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from specgen import Chat
from tests.support.servers import HELLO, World

pytestmark = pytest.mark.usefixtures("one_thread")

CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
TOOLS: list[Any] = [{"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}]
SEEDED: dict[str, Any] = {"model": "tiny", "max_output_tokens": 12, "temperature": 0.8, "extra_body": {"seed": 5}}


async def test_a_response_is_what_the_chat_says(world: World) -> None:
    expected = world.engine.generate(Chat(HELLO), max_tokens=12, temperature=0.8, seed=5)
    for asked in ("hello there", HELLO, [{"role": "user", "content": [{"type": "input_text", "text": "hello there"}]}]):
        answer = await world.client().responses.create(input=asked, **SEEDED)  # type: ignore[arg-type]
        assert answer.output_text == expected.text
    assert answer.status == "incomplete"
    assert answer.incomplete_details
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (expected.usage.prompt_tokens, 12)


async def test_instructions_are_a_system_message(world: World) -> None:
    answer = await world.client().responses.create(input="hello there", instructions="be brief", **SEEDED)
    messages = [{"role": "system", "content": "be brief"}, *HELLO]
    assert answer.output_text == world.engine.generate(Chat(messages), max_tokens=12, temperature=0.8, seed=5).text


async def test_a_streamed_response_has_its_events_in_order(world: World) -> None:
    whole = await world.client().responses.create(input="hello there", **SEEDED)
    events = [
        event async for event in await world.client().responses.create(input="hello there", stream=True, **SEEDED)
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    names = [event.type.removeprefix("response.") for event in events]
    assert names[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(names[4:-4]) == {"output_text.delta"}
    assert names[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.output_text == whole.output_text  # type: ignore[union-attr]


async def test_calls_are_items_of_their_own(world: World) -> None:
    said = {"plugin_processors": {"say": {"text": f"Well. {CALL}"}}}
    asked: dict[str, Any] = {"model": "tiny", "input": "hello", "tools": TOOLS, "temperature": 0, "extra_body": said}
    answer = await world.client().responses.create(**asked)
    assert [item.type for item in answer.output] == ["message", "function_call"]
    assert answer.output_text == "Well. "
    call: Any = answer.output[1]
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Paris"})
    async with world.client().responses.stream(**asked) as stream:
        names = [event.type.removeprefix("response.") async for event in stream]
        final: Any = await stream.get_final_response()
    assert names[-5:-1] == [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]
    assert json.loads(final.output[1].arguments) == {"city": "Paris"}


@pytest.mark.parametrize("stream", [False, True])
async def test_calls_alone_bring_no_message(world: World, stream: bool) -> None:
    said = {"plugin_processors": {"say": {"text": CALL}}}
    asked: dict[str, Any] = {"model": "tiny", "input": "hello", "tools": TOOLS, "temperature": 0, "extra_body": said}
    if stream:
        async with world.client().responses.stream(**asked) as events:
            added = [event.output_index async for event in events if event.type == "response.output_item.added"]
            answer: Any = await events.get_final_response()
        assert added == [0]
    else:
        answer = await world.client().responses.create(**asked)
    assert [item.type for item in answer.output] == ["function_call"]


async def test_a_message_that_was_cut_says_so(world: World) -> None:
    answer: Any = await world.client().responses.create(input="hello there", **SEEDED)
    assert (answer.status, answer.output[0].status) == ("incomplete", "incomplete")
    ended: Any = await world.client().responses.create(
        model="tiny", input="hello", extra_body={"plugin_processors": {"say": {"text": "Hi"}}}
    )
    assert (ended.status, ended.output[0].status) == ("completed", "completed")
    assert ended.output_text == "Hi"


async def test_what_was_asked_is_in_the_answer(world: World) -> None:
    choice: Any = {"type": "function", "name": "weather"}
    asked: dict[str, Any] = {"model": "tiny", "input": "hello", "tools": TOOLS, "max_output_tokens": 60}
    for wanted in ("none", "auto", choice):
        answer: Any = await world.client().responses.create(**asked, tool_choice=wanted, metadata={"a": "b"})
        found = answer.tool_choice
        assert (found if isinstance(found, str) else found.model_dump(exclude_none=True)) == wanted
        assert answer.metadata == {"a": "b"}
    plain: Any = await world.client().responses.create(model="tiny", input="hello", max_output_tokens=2)
    assert (plain.tool_choice, plain.metadata) == ("auto", {})


async def test_earlier_calls_and_what_they_gave_go_in(world: World) -> None:
    turns: list[Any] = [
        {"role": "user", "content": "weather?"},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
    ]
    answer = await world.client().responses.create(model="tiny", input=turns, tools=TOOLS, max_output_tokens=4)
    assert answer.usage
    assert answer.usage.output_tokens == 4


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "yaml"}}}, "response_format"),
        ({"input": []}, "input"),
        ({"input": [{"type": "function_call"}]}, "input[0]"),
        ({"input": [{"content": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0]"),
        ({"max_output_tokens": 0}, "max_tokens"),
        ({"max_output_tokens": 5000}, "input"),
        ({"metadata": {"a": 1}}, "metadata[...]"),
    ],
)
async def test_what_a_chat_cannot_say_is_refused(world: World, options: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await world.client().responses.create(**{"model": "tiny", "input": "x", **options})
    assert caught.value.param == param
