"""The endpoints as OpenAI's own client sees them, and each frame of a stream as it goes over the wire."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import openai
import pytest

from specgen import Chat
from tests.support.servers import HELLO, SLOW, World, say, serving, tokenizer

SEEDED: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 24, "temperature": 0.8, "seed": 5}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


FLAG = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}


def schema(described: dict[str, Any]) -> dict[str, Any]:
    """As a chat asks for it."""
    return {"type": "json_schema", "json_schema": {"name": "flag", "schema": described}}


async def drained(stream: Any) -> int:
    """How many chunks there are."""
    return len([chunk async for chunk in stream])


async def test_a_chat_is_what_the_engine_says(world: World) -> None:
    answer = await world.client().chat.completions.create(**SEEDED)
    expected = world.engine.generate(Chat(HELLO), max_tokens=24, temperature=0.8, seed=5)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == "length"
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
    assert answer.usage.completion_tokens == 24
    assert answer.usage.prompt_tokens_details
    assert answer.usage.prompt_tokens_details.cached_tokens is not None


@pytest.mark.parametrize("n", [1, 3])
async def test_a_stream_says_the_same(world: World, n: int) -> None:
    whole = await world.client().chat.completions.create(**SEEDED, n=n)
    stream = await world.client().chat.completions.create(
        **SEEDED, n=n, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    texts, reasons = [""] * n, [None] * n
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == ["length"] * n
    assert chunks[-1].choices == []
    assert chunks[-1].usage
    assert whole.usage
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 24 * n
    assert len({chunk.id for chunk in chunks}) == len({chunk.created for chunk in chunks}) == 1


async def test_each_frame_of_a_stream(world: World) -> None:
    """The transcript: role, text, end, usage, [DONE], and not a byte else."""
    body = {
        "model": "tiny",
        "messages": HELLO,
        "stream": True,
        "stream_options": {"include_usage": True},
        "speculation": "off",
        **say("Hi é"),
    }
    async with world.http.post(f"{world.url}/v1/chat/completions", json=body) as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "text/event-stream"
        assert answer.headers["Cache-Control"] == "no-cache"
        raw = (await answer.read()).decode()
    assert raw.endswith("\n\n")
    frames = raw.removesuffix("\n\n").split("\n\n")
    assert frames[-1] == "data: [DONE]"
    events = [json.loads(frame.removeprefix("data: ")) for frame in frames[:-1]]
    head = {key: events[0][key] for key in ("id", "created", "model", "object", "system_fingerprint")}
    assert head["object"] == "chat.completion.chunk"
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", head["id"])

    def frame(delta: dict[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish, **more}
        return {**head, "choices": [choice], "usage": None}

    assert events[:-1] == [
        frame({"role": "assistant", "content": ""}),
        *(frame({"content": letter}) for letter in "Hi é"),
        frame({}, "stop", stop_reason=tokenizer().eos_token_id),
    ]
    prompt = len(world.engine.encode(Chat(HELLO)))
    usage = events[-1].pop("usage")
    metrics = events[-1].pop("metrics")
    assert events[-1] == {**head, "choices": []}
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (prompt, 6, prompt + 6)
    assert metrics["speculative_decoding"]["num_spec_steps"] == 6
    assert metrics["speculative_decoding"]["mean_acceptance_length"] == 1.0


async def test_completions_of_texts_and_ids_side_by_side(world: World) -> None:
    client, options = world.client(), {"model": "tiny", "max_tokens": 9, "temperature": 0.0}
    prompts = ["abc", "the quick"]
    expected = [world.engine.generate(prompt, max_tokens=9).text for prompt in prompts]
    answer = await client.completions.create(prompt=prompts, **options)
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1]
    ids = [tokenizer().encode(prompt) for prompt in prompts]
    for prompt, text in ((ids, expected), (ids[1], expected[1:]), ("abc", expected[:1])):
        answer = await client.completions.create(prompt=prompt, **options)
        assert [choice.text for choice in answer.choices] == text
    twice = await client.completions.create(prompt=prompts, n=2, echo=True, **options)
    assert [choice.text for choice in twice.choices] == [
        prompt + text for prompt, text in zip(prompts, expected, strict=True) for _ in range(2)
    ]
    assert twice.usage
    assert twice.usage.prompt_tokens == sum(map(len, ids))


async def test_a_streamed_completion_says_what_the_whole_one_says(world: World) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": ["ab", "cd"], "n": 2, "max_tokens": 11, "temperature": 0.9}
    whole = await world.client().completions.create(**options, seed=3, echo=True)
    texts = [""] * 4
    reasons: list[Any] = [None] * 4
    async for chunk in await world.client().completions.create(**options, seed=3, echo=True, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == ["length"] * 4


async def test_log_probabilities_of_chats(world: World) -> None:
    asked = {**SEEDED, "logprobs": True, "top_logprobs": 3}
    answer = await world.client().chat.completions.create(**asked)
    expected = world.engine.generate(Chat(HELLO), max_tokens=24, temperature=0.8, seed=5, logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs
    assert logprobs.content
    assert [each.logprob for each in logprobs.content] == pytest.approx([each.logprob for each in expected.logprobs])
    assert all(len(each.top_logprobs) == 3 for each in logprobs.content)
    # The bytes of all tokens are the text's, though single tokens are no characters.
    spelt = bytes(byte for each in logprobs.content for byte in each.bytes or ())
    assert spelt == bytes(byte for id in expected.ids for byte in world.service.texts.bytes(id))
    assert len(spelt) >= len(expected.ids)
    streamed = []
    async for chunk in await world.client().chat.completions.create(**asked, stream=True):
        streamed += [each for choice in chunk.choices if choice.logprobs for each in choice.logprobs.content or ()]
    assert streamed == logprobs.content


async def test_log_probabilities_of_completions(world: World) -> None:
    answer = await world.client().completions.create(model="tiny", prompt="ab", max_tokens=8, temperature=0, logprobs=2)
    found = answer.choices[0].logprobs
    assert found
    assert found.tokens
    assert found.token_logprobs
    assert found.top_logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == 8
    for token, value, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert top[token] == value == max(top.values())


async def test_parts_of_characters_are_called_by_their_bytes(world: World) -> None:
    """All of them would have one name otherwise; the place of a character is that of each of its parts."""
    answer = await world.client().completions.create(
        model="tiny", prompt="ab", max_tokens=8, logprobs=20, extra_body=say("xé→y")
    )
    found = answer.choices[0].logprobs
    assert found
    assert found.tokens
    bytewise = [f"bytes:\\x{byte:02x}" for byte in "é→".encode()]
    assert found.tokens[:7] == ["x", *bytewise, "y"]
    assert (found.text_offset or [])[:7] == [0, 1, 1, 2, 2, 2, 3]
    assert found.top_logprobs
    assert {len(top) for top in found.top_logprobs} <= {20, 21}


@pytest.mark.parametrize(("stop", "shown"), [("lo", "hel"), ("el", "h"), ("zz", "hello there")])
async def test_what_is_behind_a_stop_has_no_log_probabilities(world: World, stop: str, shown: str) -> None:
    client, letters = world.client(), list({"lo": "hel", "el": "h"}.get(stop, "hello there"))
    asked: dict[str, Any] = {"model": "tiny", "stop": stop, "max_tokens": 40, "extra_body": say("hello there")}
    chats: dict[str, Any] = {**asked, "messages": HELLO, "logprobs": True}
    texts: dict[str, Any] = {**asked, "prompt": "ab", "logprobs": 1}
    whole = await client.chat.completions.create(**chats)
    content = (whole.choices[0].logprobs or pytest.fail("none")).content or []
    assert whole.choices[0].message.content == shown
    assert [each.token for each in content][: len(shown)] == letters
    assert len(content) == len(shown) + (stop == "zz")
    streamed = []
    async for chunk in await client.chat.completions.create(**chats, stream=True):
        streamed += [each for choice in chunk.choices if choice.logprobs for each in choice.logprobs.content or ()]
    assert streamed == content
    text = (await client.completions.create(**texts)).choices[0].logprobs
    assert text
    tokens: list[str] = []
    places: list[int] = []
    async for part in await client.completions.create(**texts, stream=True):
        if part.choices and (added := part.choices[0].logprobs):
            tokens, places = tokens + (added.tokens or []), places + (added.text_offset or [])
    assert (tokens, places) == (text.tokens, text.text_offset)
    assert places == list(range(len(places)))
    assert len(places) == len(content)


async def test_stops_end_a_text(world: World) -> None:
    client = world.client()
    for stop, text in (("lo", "hel"), (["xx", " t"], "hello")):
        answer = await client.chat.completions.create(
            model="tiny", messages=HELLO, stop=stop, max_tokens=40, extra_body=say("hello there")
        )
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (text, "stop")
        assert answer.choices[0].stop_reason == (stop if isinstance(stop, str) else " t")  # type: ignore[attr-defined]


async def test_extra_sampling_fields_reach_the_engine(world: World) -> None:
    extra = {"top_k": 7, "min_p": 0.01, "repetition_penalty": 1.3, "min_tokens": 3, "ignore_eos": True}
    answer = await world.client().chat.completions.create(**SEEDED, logit_bias={"70": 4.0}, extra_body=extra)
    options = {**extra, "logit_bias": {70: 4.0}, "max_tokens": 24, "temperature": 0.8, "seed": 5}
    assert answer.choices[0].message.content == world.engine.generate(Chat(HELLO), **options).text
    off = await world.client().chat.completions.create(**SEEDED, extra_body={"top_k": -1})
    assert (
        off.choices[0].message.content
        == world.engine.generate(Chat(HELLO), max_tokens=24, temperature=0.8, seed=5).text
    )


async def test_who_says_nothing_of_temperature_samples_at_one(world: World) -> None:
    """OpenAI's default, where the model's own config has none."""
    answer = await world.client().chat.completions.create(model="tiny", messages=HELLO, max_tokens=9, seed=4)
    assert (
        answer.choices[0].message.content
        == world.engine.generate(Chat(HELLO), max_tokens=9, temperature=1.0, seed=4).text
    )


async def test_a_prediction_is_drafted_and_accounted_for(world: World) -> None:
    text = "the very same words again and again"
    extra = {**say(text), "speculation": {"drafters": ["prediction"], "adaptive": False}}
    answer = await world.client().chat.completions.create(
        model="tiny",
        messages=HELLO,
        max_tokens=64,
        prediction={"type": "content", "content": [{"type": "text", "text": text}]},
        extra_body=extra,
    )
    assert answer.choices[0].message.content == text
    assert answer.usage
    details = answer.usage.completion_tokens_details
    assert details
    assert details.accepted_prediction_tokens
    assert details.accepted_prediction_tokens > len(text) // 2
    assert details.rejected_prediction_tokens is not None
    metrics = answer.metrics["speculative_decoding"]  # type: ignore[attr-defined]
    assert metrics["num_accepted_draft_tokens"] == details.accepted_prediction_tokens
    assert metrics["mean_acceptance_length"] > 2


@pytest.mark.parametrize("speculation", ["off", "auto", {"max_nodes": 5, "adaptive": False}])
async def test_speculation_per_request_changes_no_text(world: World, speculation: Any) -> None:
    answer = await world.client().chat.completions.create(**SEEDED, extra_body={"speculation": speculation})
    expected = world.engine.generate(Chat(HELLO), max_tokens=24, temperature=0.8, seed=5, speculation="off")
    assert answer.choices[0].message.content == expected.text


@pytest.mark.parametrize("tools", [TOOLS, [{"function": {"name": "f"}, "type": "function"}]])
async def test_a_template_sees_tools_as_they_were_sent(world: World, tools: Any) -> None:
    """In the form in which models were trained on them, with nothing added."""
    form = [{"type": "function", "function": tool["function"]} for tool in tools]
    async with world.http.post(f"{world.url}/tokenize", json={"messages": HELLO, "tools": tools}) as answer:
        found = (await answer.json())["tokens"]
    template = world.engine.tokenizer.apply_chat_template
    assert found == template(HELLO, tools=form, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert found == world.engine.encode(Chat(HELLO, tools=form))


@pytest.mark.parametrize("stream", [False, True])
async def test_calls_are_taken_out_of_the_text(world: World, stream: bool) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": HELLO,
        "tools": TOOLS,
        "extra_body": say(f"Let me see.\n{CALL}\n{CALL.replace('Paris', 'Rome')}"),
    }
    if stream:
        async with world.client().chat.completions.stream(**asked) as events:
            async for _ in events:
                pass
            answer: Any = await events.get_final_completion()
    else:
        answer = await world.client().chat.completions.create(**asked)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see.\n"
    calls = choice.message.tool_calls
    assert [call.function.name for call in calls] == ["weather", "weather"]
    assert [json.loads(call.function.arguments) for call in calls] == [{"city": "Paris"}, {"city": "Rome"}]
    assert len({call.id for call in calls}) == 2


async def test_the_answers_of_tools_go_into_the_next_turn(world: World) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    messages: list[Any] = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    answer = await world.client().chat.completions.create(model="tiny", messages=messages, tools=TOOLS, max_tokens=3)
    assert answer.usage
    alone = await world.client().chat.completions.create(
        model="tiny", messages=messages, tools=TOOLS, tool_choice="none", max_tokens=3
    )
    assert alone.usage
    assert answer.usage.prompt_tokens > alone.usage.prompt_tokens


@pytest.mark.parametrize(
    ("options", "status", "param", "code"),
    [
        ({"model": "gpt-9"}, 404, "model", "model_not_found"),
        ({"n": 17}, 400, "n", "400"),
        ({"n": 0}, 400, "n", "400"),
        ({"temperature": -1}, 400, "temperature", "400"),
        ({"top_p": 0}, 400, "top_p", "400"),
        ({"max_tokens": 0}, 400, "max_tokens", "400"),
        ({"max_tokens": 5000}, 400, "messages", "context_length_exceeded"),
        ({"messages": []}, 400, "messages", "400"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, "prompt", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content", "400"),
        ({"logit_bias": {"9999": 1}}, 400, "logit_bias", "400"),
        ({"logit_bias": {"a": 1}}, 400, "logit_bias", "400"),
        ({"top_logprobs": 2}, 400, "top_logprobs", "400"),
        ({"extra_body": {"stream_options": {}, "stream": False}}, 400, "stream_options", "400"),
        ({"seed": 2**65}, 400, "seed", "400"),
        ({"response_format": {"type": "yaml"}}, 400, "response_format", "400"),
        ({"response_format": {"type": "json_schema"}}, 400, "response_format", "400"),
        ({"response_format": schema({"type": "nothing"})}, 400, "response_format", "400"),
        ({"tool_choice": "required"}, 400, "tool_choice", "400"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, 400, "tool_choice", "400"),
        ({"extra_body": {"guided_regex": "("}}, 400, "guided_regex", "400"),
        ({"extra_body": {"guided_regex": "a", "structured_outputs": {"regex": "b"}}}, 400, "guided_regex", "400"),
        ({"extra_body": {"use_beam_search": True}}, 400, "use_beam_search", "unsupported_parameter"),
        ({"extra_body": {"chat_template": "x"}}, 400, "chat_template", "unsupported_parameter"),
        ({"extra_body": {"chat_template_kwargs": {"x": 1}}}, 400, "chat_template_kwargs", "400"),
        ({"extra_body": {"temprature": 1}}, 400, "temprature", "400"),
        ({"extra_body": {"speculation": "maybe"}}, 400, "speculation", "400"),
        ({"extra_body": {"plugin_processors": {"nobody": {}}}}, 400, "plugin_processors", "400"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_cannot_be_served_is_refused_by_name(
    world: World, options: dict[str, Any], status: int, param: str | None, code: str, stream: bool
) -> None:
    """With a status of its own, in a stream too: nothing was sent before."""
    with pytest.raises(openai.APIStatusError) as caught:
        await world.client().chat.completions.create(**{**SEEDED, **options}, stream=stream)
    error: Any = caught.value
    assert (error.status_code, error.param, str(error.code)) == (status, param, code)
    assert error.body["message"]
    assert error.response.headers["x-should-retry"] == "false"
    assert error.response.headers["x-request-id"].startswith("req-")


@pytest.mark.parametrize("speculation", ["auto", "off"])
async def test_a_schema_is_kept_to(world: World, speculation: str) -> None:
    asked = {**SEEDED, "max_tokens": 64, "response_format": schema(FLAG), "extra_body": {"speculation": speculation}}
    answer = await world.client().chat.completions.create(**asked)
    text = answer.choices[0].message.content
    assert text
    assert set(json.loads(text)) == {"ok"}
    expected = world.engine.generate(
        Chat(HELLO), max_tokens=64, temperature=0.8, seed=5, constraint={"json_schema": FLAG}, speculation="off"
    )
    assert text == expected.text


async def test_choices_and_expressions_are_kept_to(world: World) -> None:
    for extra in ({"structured_outputs": {"choice": ["yes", "no"]}}, {"guided_regex": "yes|no"}):
        answer = await world.client().completions.create(model="tiny", prompt="Well?", max_tokens=8, extra_body=extra)
        assert answer.choices[0].text in ("yes", "no")
        assert answer.choices[0].finish_reason == "stop"


async def test_a_response_keeps_to_a_schema(world: World) -> None:
    answer = await world.client().responses.create(
        model="tiny",
        input="hello",
        max_output_tokens=64,
        text={"format": {"type": "json_schema", "name": "flag", "schema": FLAG}},
    )
    assert set(json.loads(answer.output_text)) == {"ok"}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
async def test_a_call_that_is_asked_for_comes(world: World, choice: Any) -> None:
    function = {"name": "weather", "parameters": FLAG}
    answer = await world.client().chat.completions.create(
        **{**SEEDED, "max_tokens": 200},
        tools=[{"type": "function", "function": function}],
        tool_choice=choice,
        parallel_tool_calls=False,
    )
    (call,) = answer.choices[0].message.tool_calls or ()
    assert answer.choices[0].finish_reason == "tool_calls"
    assert getattr(call, "function").name == "weather"  # noqa: B009
    assert set(json.loads(getattr(call, "function").arguments)) == {"ok"}  # noqa: B009


async def test_the_length_of_prompt_and_answer_must_fit_to_the_token(world: World) -> None:
    prompt = len(world.engine.encode(Chat(HELLO)))
    room = world.engine.context_length - prompt
    answer = await world.client().chat.completions.create(**{**SEEDED, "max_tokens": room})
    assert answer.usage
    assert answer.usage.completion_tokens == room
    with pytest.raises(openai.BadRequestError, match=f"maximum context length is {room + prompt} tokens"):
        await world.client().chat.completions.create(**{**SEEDED, "max_tokens": room + 1})


async def test_an_error_in_mid_stream_is_an_event(world: World) -> None:
    extra = {"plugin_processors": {"broken": {"after": 3, "message": "secret"}}, "speculation": "off"}
    stream = await world.client().chat.completions.create(**SEEDED, stream=True, extra_body=extra)
    with pytest.raises(openai.APIError, match="the request failed on the way") as caught:
        await drained(stream)
    assert "secret" not in str(caught.value)
    body = {**SEEDED, **extra, "stream": True}
    async with world.http.post(f"{world.url}/v1/chat/completions", json=body) as answer:
        frames = (await answer.text()).split("\n\n")
    assert json.loads(frames[-3].removeprefix("data: "))["error"]["code"] == "request_failed"
    assert frames[-2:] == ["data: [DONE]", ""]


async def test_an_error_before_the_first_token_is_a_status(world: World) -> None:
    extra = {"plugin_processors": {"broken": {}}}
    with pytest.raises(openai.InternalServerError):
        await world.client().chat.completions.create(**SEEDED, stream=True, extra_body=extra)


async def test_models_are_listed_and_found(world: World) -> None:
    listed = await world.client().models.list()
    assert [each.id for each in listed.data] == ["tiny"]
    assert (await world.client().models.retrieve("tiny")).id == "tiny"
    with pytest.raises(openai.NotFoundError):
        await world.client().models.retrieve("other")


async def test_a_name_may_hold_slashes_and_a_head_is_answered(shared_engine: Any) -> None:
    async with serving(shared_engine, name="org/some/name") as world:
        assert (await world.client().models.retrieve("org/some/name")).id == "org/some/name"
        for path in ("/v1/models/org/some/name", "/v1/models/org%2Fsome%2Fname"):
            async with world.http.get(f"{world.url}{path}") as answer:
                assert (answer.status, (await answer.json())["id"]) == (200, "org/some/name")
        for path in ("/health", "/ready", "/v1/models"):
            async with world.http.head(f"{world.url}{path}") as answer:
                assert (answer.status, await answer.read()) == (200, b"")


async def test_what_is_too_long_is_named_as_the_request_does(world: World) -> None:
    with pytest.raises(openai.BadRequestError, match="2 in the prompt, 5000 in the completion") as caught:
        await world.client().completions.create(model="tiny", prompt="ab", max_tokens=5000)
    assert caught.value.param == "prompt"


async def test_a_deadline_ends_a_request(shared_engine: Any) -> None:
    async with serving(shared_engine, request_seconds=0.2) as world:
        with pytest.raises(openai.APIStatusError) as caught:
            await world.client().chat.completions.create(**{**SEEDED, "max_tokens": 300}, extra_body=SLOW)
        assert caught.value.status_code == 408
        assert caught.value.response.headers["x-should-retry"] == "false"
        stream = await world.client().chat.completions.create(
            **{**SEEDED, "max_tokens": 300}, stream=True, extra_body=SLOW
        )
        with pytest.raises(openai.APIError, match="took longer than"):
            await drained(stream)


async def test_many_at_once_with_the_synchronous_client(world: World) -> None:
    def ask(number: int) -> str | None:
        client = openai.OpenAI(base_url=f"{world.url}/v1", api_key="any", max_retries=0)
        asked: Any = {**SEEDED, "seed": number}
        return client.chat.completions.create(**asked).choices[0].message.content

    found = await asyncio.gather(*(asyncio.to_thread(ask, number) for number in range(6)))
    options: dict[str, Any] = {"max_tokens": 24, "temperature": 0.8}
    assert found == [world.engine.generate(Chat(HELLO), seed=number, **options).text for number in range(6)]


async def test_silence_is_filled_with_pings(shared_engine: Any) -> None:
    async with serving(shared_engine, ping_seconds=0.05) as world:
        body = {**SEEDED, "max_tokens": 3, "stream": True, "plugin_processors": {"slow": {"seconds": 0.2}}}
        async with world.http.post(f"{world.url}/v1/chat/completions", json=body) as answer:
            frames = (await answer.text()).split("\n\n")
        assert frames.count(": ping") >= 4
        stream = await world.client().chat.completions.create(
            **{**SEEDED, "max_tokens": 3}, stream=True, extra_body={"plugin_processors": {"slow": {"seconds": 0.2}}}
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == world.engine.generate(Chat(HELLO), max_tokens=3, temperature=0.8, seed=5).text


async def test_tokenize_and_back(world: World) -> None:
    async def post(path: str, body: dict[str, Any]) -> Any:
        async with world.http.post(f"{world.url}{path}", json=body) as answer:
            assert answer.status == 200
            return await answer.json()

    found = await post("/tokenize", {"prompt": "héllo", "return_token_strs": True})
    assert found["tokens"] == tokenizer().encode("héllo")
    assert (found["count"], found["max_model_len"]) == (6, world.engine.context_length)
    assert len(found["token_strs"]) == 6
    assert (await post("/detokenize", {"tokens": found["tokens"]})) == {"prompt": "héllo"}
    assert (await post("/tokenize", {"messages": HELLO}))["tokens"] == world.engine.encode(Chat(HELLO))
