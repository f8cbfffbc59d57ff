"""What the fields of OpenAI's and vLLM's requests ask for, field by field."""

from __future__ import annotations

from typing import Any

import pytest

from specgen import InvalidRequest
from specgen.plugins.manager import load_plugins
from specgen.server.constraints import constraint_of

SCHEMA = {"type": "object", "properties": {"b": {"type": "null"}, "a": {"type": "null"}}}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}
STRICT: dict[str, Any] = {"type": "function", "function": {"name": "sum", "parameters": SCHEMA, "strict": True}}


def calls(tools: list[Any], choice: str, *, parallel: bool = True) -> dict[str, Any]:
    return {"tool_calls": {"tools": tools, "choice": choice, "parallel": parallel}}


ASKED: list[tuple[dict[str, Any], dict[str, Any] | None, str]] = [
    ({}, None, ""),
    ({"response_format": None, "structured_outputs": None, "guided_json": None, "tools": None}, None, ""),
    ({"response_format": {"type": "text"}}, None, ""),
    ({"response_format": {"type": "json_object"}}, {"json_object": None}, "response_format"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}},
        {"json_schema": SCHEMA},
        "response_format",
    ),
    (
        {"response_format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "json_schema": None}},
        {"json_schema": SCHEMA},
        "response_format",
    ),
    ({"structured_outputs": {}}, None, ""),
    ({"structured_outputs": {"json": SCHEMA}}, {"json_schema": SCHEMA}, "structured_outputs"),
    ({"structured_outputs": {"json": "{}"}}, {"json_schema": "{}"}, "structured_outputs"),
    (
        {"structured_outputs": {"json": None, "regex": "a+", "choice": None, "disable_fallback": False}},
        {"regex": "a+"},
        "structured_outputs",
    ),
    ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ["a", "b"]}, "structured_outputs"),
    ({"structured_outputs": {"grammar": "start: A"}}, {"grammar": "start: A"}, "structured_outputs"),
    ({"structured_outputs": {"json_object": True}}, {"json_object": True}, "structured_outputs"),
    ({"guided_json": SCHEMA}, {"json_schema": SCHEMA}, "guided_json"),
    ({"guided_regex": "a+"}, {"regex": "a+"}, "guided_regex"),
    ({"guided_choice": ["a"]}, {"choice": ["a"]}, "guided_choice"),
    ({"guided_grammar": "start: A"}, {"grammar": "start: A"}, "guided_grammar"),
    ({"tools": [CLOCK]}, None, ""),
    ({"tools": [CLOCK], "tool_choice": "auto"}, None, ""),
    ({"tools": [CLOCK, STRICT]}, calls([CLOCK, STRICT], "auto"), "tools"),
    ({"tools": [CLOCK, STRICT], "tool_choice": "none"}, None, ""),
    ({"tools": [CLOCK, STRICT], "tool_choice": "required"}, calls([CLOCK, STRICT], "required"), "tools"),
    (
        {"tools": [CLOCK], "tool_choice": "required", "parallel_tool_calls": False},
        calls([CLOCK], "required", parallel=False),
        "tools",
    ),
    (
        {"tools": [CLOCK, STRICT], "tool_choice": {"type": "function", "function": {"name": "sum"}}},
        calls([STRICT], "required", parallel=False),
        "tools",
    ),
    (
        {"tools": [CLOCK, STRICT], "tool_choice": {"type": "function", "name": "clock"}},
        calls([CLOCK], "required", parallel=False),
        "tools",
    ),
    (
        {"tools": [CLOCK], "response_format": {"type": "json_object"}},
        {"json_object": None},
        "response_format",
    ),
]


@pytest.mark.parametrize(("fields", "expected", "param"), ASKED, ids=range(len(ASKED)))
def test_fields_ask_for_a_constraint(fields: dict[str, Any], expected: dict[str, Any] | None, param: str) -> None:
    found = constraint_of(fields)
    assert (found and {found.kind: found.value}) == expected
    if found:
        assert found.param == param
        assert found.kind in load_plugins().collect("constraints")


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": "json"}, "unknown type of response_format None; choices: json_object", "response_format"),
    ({"response_format": {"type": "xml"}}, "unknown type of response_format 'xml'", "response_format"),
    ({"response_format": {"type": "json_schema"}}, "has no schema", "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": 5}}, "has no schema", "response_format"),
    ({"structured_outputs": ["json"]}, "structured_outputs is ['json']", "structured_outputs"),
    ({"structured_outputs": {"xml": "a"}}, "unknown field of structured_outputs 'xml'", "structured_outputs"),
    ({"structured_outputs": {"json": SCHEMA, "whitespace_pattern": " "}}, "'whitespace_pattern'", "structured_outputs"),
    ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "both say", "structured_outputs"),
    ({"guided_json": SCHEMA, "guided_regex": "a"}, "guided_json and guided_regex both say", "guided_regex"),
    ({"response_format": {"type": "json_object"}, "guided_choice": ["a"]}, "both say", "guided_choice"),
    (
        {"response_format": {"type": "json_object"}, "tools": [STRICT]},
        "response_format and tools both say what the text must look like",
        "tools",
    ),
    ({"guided_json": {"const": {1}}}, "guided_json 'json_schema' must hold JSON", "guided_json"),
    ({"tool_choice": "required"}, "there are no tools", "tool_choice"),
    ({"tools": [CLOCK], "tool_choice": "any"}, "tool_choice is 'any'; choices: none, auto, required", "tool_choice"),
    ({"tools": [CLOCK], "tool_choice": {"type": "function"}}, "tool_choice is {'type'", "tool_choice"),
    ({"tools": [CLOCK], "tool_choice": {"type": "allowed_tools"}}, "tool_choice is {'type'", "tool_choice"),
    (
        {"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "sum"}}},
        "unknown tool 'sum'; choices: clock",
        "tool_choice",
    ),
    ({"tools": {"name": "clock"}, "tool_choice": "required"}, "tools must be a list of functions", "tools"),
    ({"tools": [{"type": "retrieval"}], "tool_choice": "required"}, "tools must be a list of functions", "tools"),
    ({"tools": ["clock"], "tool_choice": "required"}, "tools must be a list of functions", "tools"),
]


@pytest.mark.parametrize(("fields", "message", "param"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_malformed_is_refused_by_its_field(fields: dict[str, Any], message: str, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        constraint_of(fields)
    assert message in str(caught.value)
    assert caught.value.param == param
