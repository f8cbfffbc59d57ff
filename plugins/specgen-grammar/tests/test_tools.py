"""Tool calls: which texts are calls, with texts in between or without."""

from __future__ import annotations

import json
from typing import Any

import pytest
import specgen_grammar

from specgen import ConstraintSetup, InvalidRequest, Matcher
from specgen.testing import MatcherContract
from tests.support.tokenizers import byte_level

TEXT = 'I say: <tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>\n' * 3
TOKENIZER = byte_level(380, TEXT)
SETUP = ConstraintSetup(TOKENIZER, len(TOKENIZER), (0,))
CITY = {"type": "object", "properties": {"city": {"$ref": "#/$defs/city"}}, "required": ["city"]}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What it is like outside.",
        "parameters": {**CITY, "additionalProperties": False, "$defs": {"city": {"enum": ["Paris", "Rome"]}}},
        "strict": True,
    },
}
CLOCK = {"function": {"name": 'the "clock"'}}


def compiled(**value: Any) -> Matcher:
    return specgen_grammar.constraints()["tool_calls"](SETUP, value)


def takes(text: str, **value: Any) -> bool:
    matcher, tokens = compiled(**value), TOKENIZER.encode(text)
    if matcher.permitted(tokens) < len(tokens):
        return False
    for token in tokens:
        matcher.consume(token)
    return matcher.may_end()


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {arguments}}}\n</tool_call>'


PARIS, ROME, TIME = call("weather", '{"city": "Paris"}'), call("weather", '{"city":"Rome"}'), call('the "clock"', "{}")
BOTH = [WEATHER, CLOCK]


@pytest.mark.parametrize("choice", ["required", "auto"])
def test_a_call_has_a_name_and_arguments_that_belong_to_it(choice: str) -> None:
    for text in (PARIS, ROME, TIME, call('the "clock"', '{"zone": [1, {"x": null}]}')):
        assert takes(text, tools=BOTH, choice=choice)
        assert not takes(text[:-3], tools=BOTH, choice=choice)
    for text in (
        call("weather", '{"city": "London"}'),
        call("weather", "{}"),
        call("weather", '{"city": "Rome", "zone": 1}'),
        call("clock", "{}"),
        call('the "clock"', "[]"),
        "<tool_call>\nhello\n</tool_call>",
    ):
        assert not takes(text, tools=BOTH, choice=choice)


@pytest.mark.parametrize("name", ["a\x7fb", "日本", "a\\b", "x/y z"])
def test_a_name_may_hold_any_letter(name: str) -> None:
    tools = [{"function": {"name": name, "parameters": {"type": "object", "maxProperties": 0}}}]
    written = json.dumps(name, ensure_ascii=False)
    assert takes(call(name, "{}").replace(json.dumps(name), written), tools=tools)
    assert not takes(PARIS, tools=tools)


def test_arguments_are_of_a_schema_that_can_be_kept() -> None:
    """As one that a text must have."""
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"const": 2**60}}}}
    with pytest.raises(InvalidRequest, match="const holds 1152921504606846976"):
        compiled(tools=[{"function": function}])


def test_required_calls_leave_no_room_for_text() -> None:
    assert takes(PARIS + "\n" + TIME, tools=BOTH)
    for text in ("", "I say: " + PARIS, PARIS + "\n", PARIS + " and", PARIS + TIME, "hello"):
        assert not takes(text, tools=BOTH)


def test_one_call_completes_the_text_where_there_may_be_no_more() -> None:
    assert takes(PARIS, tools=BOTH, parallel=False)
    assert not takes(PARIS + "\n" + TIME, tools=BOTH, parallel=False)
    matcher = compiled(tools=BOTH, parallel=False)
    for token in TOKENIZER.encode(PARIS):
        assert not matcher.is_complete()
        matcher.consume(token)
    assert matcher.is_complete()


def test_the_model_may_talk_or_call_where_it_chooses() -> None:
    for text in ("hello", "I say: " + PARIS, PARIS + "\n" + TIME, PARIS + "\nThat is it.", "a <tool", "{}"):
        assert takes(text, tools=BOTH, choice="auto")
    for text in ("I say: <tool_call> hello", "hello" + call("weather", "{}"), PARIS + "\n" + call("clock", "{}")):
        assert not takes(text, tools=BOTH, choice="auto")


def test_the_model_calls_once_or_talks_where_it_chooses_and_may_not_call_again() -> None:
    for text in ("hello", PARIS, "I say: " + PARIS):
        assert takes(text, tools=BOTH, choice="auto", parallel=False)
    for text in (PARIS + "\n" + TIME, "I say: <tool_call> hello"):
        assert not takes(text, tools=BOTH, choice="auto", parallel=False)


def test_what_is_the_same_in_all_calls_is_forced() -> None:
    forced = TOKENIZER.decode(list(compiled(tools=[WEATHER]).forced()))
    assert forced.startswith('<tool_call>\n{"name": "weather", "arguments"')


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([WEATHER], "tool_calls is [{'type'"),
        ({"tools": []}, "constraint 'tool_calls': tools is []"),
        ({}, "constraint 'tool_calls'"),
        ({"tools": [WEATHER], "choice": "none"}, "constraint 'tool_calls': choice is 'none'"),
        ({"tools": [WEATHER], "tool_choice": "auto"}, "unknown option of constraint 'tool_calls': 'tool_choice'"),
        ({"tools": [{"type": "retrieval"}]}, "constraint 'tool_calls'"),
        ({"tools": [{"function": {"name": ""}}]}, "constraint 'tool_calls'"),
        ({"tools": [{"function": {"name": "f", "parameters": {"type": "nope"}}}]}, "tool_calls cannot be compiled"),
        ({"tools": [{"function": {"name": "f", "parameters": {"uniqueItems": True}}}]}, "Unimplemented keys"),
    ],
)
def test_what_is_no_tool_is_refused(value: Any, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        specgen_grammar.constraints()["tool_calls"](SETUP, value)
    assert message in str(caught.value)


class TestRequired(MatcherContract):
    def matcher(self) -> Matcher:
        return compiled(tools=BOTH)


class TestAuto(MatcherContract):
    def matcher(self) -> Matcher:
        return compiled(tools=BOTH, choice="auto")
