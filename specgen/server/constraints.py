"""What OpenAI's and vLLM's request fields ask of the form of a text, as a constraint. Which plugin keeps to it is
nobody's business here: the kinds are `json_object`, `json_schema`, `regex`, `choice`, `grammar` and `tool_calls`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from specgen.errors import InvalidRequest, UnknownName
from specgen.types import Constraint

_FORMATS = ("text", "json_object", "json_schema")
_STRUCTURED = {
    "json": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
    "json_object": "json_object",
}
_GUIDED = {
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}


def constraint_of(fields: Mapping[str, object]) -> Constraint | None:
    """The constraint that a request's JSON `fields` ask for; None where any text will do.

    Read are `response_format`, `structured_outputs`, `guided_json`, `guided_regex`, `guided_choice`, `guided_grammar`,
    and of `tools`, `tool_choice` and `parallel_tool_calls` what a text must keep to: a call that is required, or those
    of tools that are `strict`. A field that is None counts as left out.

    Raises InvalidRequest, naming the field, for what is malformed and where two fields ask for a form each.
    """
    found = list(_asked(fields))
    if len(found) > 1:
        first, second, *_ = (constraint.param for constraint in found)
        raise InvalidRequest(f"{first} and {second} both say what the text must look like; give one", param=second)
    return found[0] if found else None


def _asked(fields: Mapping[str, object]) -> Iterator[Constraint]:
    if (asked := fields.get("response_format")) is not None:
        yield from _response_format(asked)
    if (asked := fields.get("structured_outputs")) is not None:
        yield from _structured_outputs(asked)
    for name, kind in _GUIDED.items():
        if (asked := fields.get(name)) is not None:
            yield Constraint.of({kind: asked}, param=name)
    yield from _tool_calls(
        fields.get("tools") or (), fields.get("tool_choice"), parallel=fields.get("parallel_tool_calls") is not False
    )


def _response_format(asked: Any) -> Iterator[Constraint]:
    """OpenAI's; `schema` stands under `json_schema` in chats, beside `type` in responses."""
    kind = asked.get("type") if isinstance(asked, Mapping) else None
    if kind not in _FORMATS:
        raise UnknownName("type of response_format", kind, _FORMATS, param="response_format")
    if kind == "json_object":
        yield Constraint.of("json_object", param="response_format")
    if kind == "json_schema":
        described = asked.get("json_schema") or asked
        schema = described.get("schema") if isinstance(described, Mapping) else None
        if schema is None:
            raise InvalidRequest("response_format 'json_schema' has no schema", param="response_format")
        yield Constraint.of({"json_schema": schema}, param="response_format")


def _structured_outputs(asked: object) -> Iterator[Constraint]:
    """vLLM's. What it can say besides, of white space and back-ends, is refused by name."""
    if not isinstance(asked, Mapping):
        raise InvalidRequest(f"structured_outputs is {asked!r}; it must be a mapping", param="structured_outputs")
    # Clients send all fields of vLLM's struct, those that say nothing as null or false.
    for name, value in asked.items():
        if value is None or value is False:
            continue
        if name not in _STRUCTURED:
            raise UnknownName("field of structured_outputs", name, _STRUCTURED, param="structured_outputs")
        yield Constraint.of({_STRUCTURED[name]: value}, param="structured_outputs")


def _tool_calls(tools: object, choice: object, *, parallel: bool) -> Iterator[Constraint]:
    named = _named(choice)
    if named is None and choice not in (None, "none", "auto", "required"):
        choices = "none, auto, required, {'type': 'function', 'function': {'name': ...}}"
        raise InvalidRequest(f"tool_choice is {choice!r}; choices: {choices}", param="tool_choice")
    if not isinstance(tools, Sequence) or not all(_is_function(tool) for tool in tools):
        raise InvalidRequest("tools must be a list of functions with a name", param="tools")
    known = {tool["function"]["name"]: tool for tool in tools}
    if named is not None:
        if named not in known:
            raise UnknownName("tool", named, known, param="tool_choice")
        yield _calls([known[named]], "required", parallel=False)
    elif choice == "required":
        if not tools:
            raise InvalidRequest("tool_choice is 'required', but there are no tools", param="tool_choice")
        yield _calls(tools, "required", parallel=parallel)
    elif choice != "none" and any(tool["function"].get("strict") for tool in tools):
        yield _calls(tools, "auto", parallel=parallel)


def _calls(tools: Sequence[Mapping[str, object]], choice: str, *, parallel: bool) -> Constraint:
    value = {"tools": list(tools), "choice": choice, "parallel": parallel}
    return Constraint.of({"tool_calls": value}, param="tools")


def _named(choice: object) -> str | None:
    """The function that `tool_choice` names: under `function` in chats, beside `type` in responses."""
    if not isinstance(choice, Mapping) or choice.get("type") != "function":
        return None
    function = choice.get("function", choice)
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else None


def _is_function(tool: object) -> bool:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)
