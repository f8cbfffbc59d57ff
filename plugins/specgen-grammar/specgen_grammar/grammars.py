"""From what a request says to a grammar in llguidance's own form. Whether the grammar holds, the compiler says."""

from __future__ import annotations

import json
from typing import Any

from llguidance import LLMatcher, grammar_from

from specgen import InvalidRequest
from specgen_grammar.schema_numbers import kept_exactly

# White space that people and models write, and an end to it: a small model would otherwise go on with blanks for ever.
WHITESPACE = r"( |\n{1,2}[ \t]{0,20})?"


def json_object(value: Any) -> str:
    """Any JSON object. There is nothing to say about it: `value` is None, True or {}."""
    if value not in (None, True, {}):
        raise refused("json_object", value, "nothing; json_schema takes a schema")
    return json_schema({"type": "object"})


def json_schema(value: Any) -> str:
    """What a JSON Schema describes: a schema, or its text."""
    schema = value
    if isinstance(value, str):
        try:
            schema = json.loads(value)
        except ValueError as error:
            raise InvalidRequest(f"json_schema is no JSON: {error}") from None
    if not isinstance(schema, dict | bool):
        raise refused("json_schema", value, "a JSON Schema")
    return LLMatcher.grammar_from_json_schema(json.dumps(with_whitespace(schema)))


def with_whitespace(schema: dict[str, Any] | bool) -> dict[str, Any]:
    """The schema with bounded white space, unless its own `x-guidance` says otherwise, and with exact numbers.

    Raises InvalidRequest for what llguidance would not keep exactly.
    """
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    try:
        schema = dict(kept_exactly(schema))
    except RecursionError:
        raise InvalidRequest("json_schema cannot be compiled: recursion limit, it is nested too deeply") from None
    own = schema.get("x-guidance", {})
    return {**schema, "x-guidance": {"whitespace_pattern": WHITESPACE, **own}} if isinstance(own, dict) else schema


def regex(value: Any) -> str:
    """What a regular expression matches as a whole, in the syntax of Rust's regex crate."""
    if not isinstance(value, str) or not value:
        raise refused("regex", value, "a regular expression")
    return LLMatcher.grammar_from_regex(value)


def choice(value: Any) -> str:
    """One of several texts."""
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
        raise refused("choice", value, "a list of texts, none of them empty")
    # One lexeme: as a rule with thousands of alternatives it would be too wide for the parser.
    texts = " | ".join(quoted(text) for text in dict.fromkeys(value))
    return LLMatcher.grammar_from_lark(f"start: TEXT\nTEXT: {texts}")


def grammar(value: Any) -> str:
    """A context-free grammar: llguidance's Lark, or GBNF."""
    if not isinstance(value, str) or not value.strip():
        raise refused("grammar", value, "a grammar, as Lark or GBNF")
    try:
        return grammar_from("grammar", value)
    except ValueError as error:
        raise InvalidRequest(f"grammar: {error}") from None


def quoted(text: str) -> str:
    """A text as Lark quotes it."""
    # JSON leaves this one as it is, and llguidance's lexer knows no such letter.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def refused(kind: str, value: Any, expected: str) -> InvalidRequest:
    """The error for a value of the wrong form."""
    shown = repr(value)
    return InvalidRequest(f"{kind} is {shown if len(shown) <= 200 else shown[:200] + '...'}; it must be {expected}")
