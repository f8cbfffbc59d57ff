"""Tool calls as Hermes, Qwen and many more write them: `<tool_call>`, a JSON object in a line, `</tool_call>`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
from llguidance import LLMatcher

from specgen import read_options
from specgen_grammar.grammars import quoted, refused, with_whitespace

_BEGIN, _END = "<tool_call>", "</tool_call>"


class Function(msgspec.Struct, frozen=True):
    """What is called. parameters: a JSON Schema of the arguments; any object if it is left out."""

    name: Annotated[str, msgspec.Meta(min_length=1)]
    parameters: dict[str, Any] | None = None


class Tool(msgspec.Struct, frozen=True):
    """As OpenAI's API writes one."""

    function: Function
    type: Literal["function"] = "function"


class ToolCalls(msgspec.Struct, frozen=True, kw_only=True):
    """The value of the kind `tool_calls`.

    tools: what may be called. choice: "required" wants a call and nothing else; "auto" leaves it to the model whether
    it talks or calls, and holds the calls to their schemas. parallel: whether several may follow one another.
    """

    tools: Annotated[list[Tool], msgspec.Meta(min_length=1)]
    choice: Literal["required", "auto"] = "required"
    parallel: bool = True


def tool_calls(value: Any) -> str:
    """Calls of the tools in `value`, which holds the fields of `ToolCalls`, each with arguments of its schema."""
    if not isinstance(value, dict):
        raise refused("tool_calls", value, "tools, choice and parallel")
    asked = read_options("constraint 'tool_calls'", value, ToolCalls)
    return LLMatcher.grammar_from_lark("\n".join((*_shape(asked), *_functions(asked.tools))))


def _shape(asked: ToolCalls) -> Iterable[str]:
    """How calls and text take turns. Text ends at the first mark: from there on it is a call."""
    if asked.choice == "required":
        yield 'start: call ("\\n" call)*' if asked.parallel else "start: call"
        yield f"call: {quoted(_BEGIN)} rest"
    else:
        yield "start: call* TEXT" if asked.parallel else "start: call | TEXT"
        yield "call: begin rest"
        yield f"begin[lazy]: TEXT {quoted(_BEGIN)}"
        yield "TEXT: /(.|\\n)*/"
    yield f"rest: {quoted(chr(10))} function {quoted(chr(10) + _END)}"


def _functions(tools: list[Tool]) -> Iterable[str]:
    yield "function: " + " | ".join(f"function_{number}" for number in range(len(tools)))
    for number, tool in enumerate(tools):
        schema = {"type": "object"} if tool.function.parameters is None else tool.function.parameters
        begin = f'{{"name": {json.dumps(tool.function.name, ensure_ascii=False)}, "arguments": '
        yield f"function_{number}: {quoted(begin)} arguments_{number} {quoted('}')}"
        yield f"arguments_{number}: %json {json.dumps(with_whitespace(schema))}"
