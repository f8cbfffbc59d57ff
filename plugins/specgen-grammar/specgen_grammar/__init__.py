"""Constrained decoding through llguidance: what a request's text must look like, exactly, with any drafter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from specgen import ConstraintFactory, ConstraintSetup, Matcher, hookimpl
from specgen_grammar.grammars import choice, grammar, json_object, json_schema, regex
from specgen_grammar.matcher import compile_grammar
from specgen_grammar.tools import tool_calls

__all__ = ["constraints", "tool_calls"]


def _kind(name: str, grammar_of: Callable[[Any], str]) -> ConstraintFactory:
    def factory(setup: ConstraintSetup, value: Any) -> Matcher:
        return compile_grammar(name, grammar_of(value), setup)

    return factory


@hookimpl
def constraints() -> Mapping[str, ConstraintFactory]:
    """The kinds by name; README.md says what each takes."""
    kinds = {
        "json_object": json_object,
        "json_schema": json_schema,
        "regex": regex,
        "choice": choice,
        "grammar": grammar,
        "tool_calls": tool_calls,
    }
    return {name: _kind(name, grammar_of) for name, grammar_of in kinds.items()}
