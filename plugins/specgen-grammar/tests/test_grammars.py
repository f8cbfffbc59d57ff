"""The kinds of constraints by themselves: which texts they let through, by tokenizers of both families."""

from __future__ import annotations

import json
import threading
from copy import deepcopy
from functools import cache
from types import SimpleNamespace
from typing import Any

import llguidance.hf
import numpy as np
import pytest
import specgen_grammar
import torch
from specgen_grammar.matcher import MAX_CHARACTERS, _at_once, _in_time, _threads

from specgen import ConstraintSetup, InvalidRequest, Matcher, RequestFailed
from specgen.testing import MatcherContract
from tests.support.tokenizers import byte_level, sentence_piece

TEXT = "\n".join(
    json.dumps({"name": "Bob", "age": i, "tags": ["red", "green"], "ok": True}, indent=i % 3) for i in range(40)
)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "age", "ok"],
    "additionalProperties": False,
}


TOKENIZERS = {"byte-level": byte_level(400, TEXT), "pieces": sentence_piece(120, TEXT)}
PADDING = 13


@cache
def setup(family: str) -> ConstraintSetup:
    """Of a model whose rows are wider than its vocabulary, as many are padded."""
    tokenizer = TOKENIZERS[family]
    return ConstraintSetup(tokenizer, len(tokenizer) + PADDING, (tokenizer.eos_token_id,))


def compiled(kind: str, value: Any, family: str = "byte-level") -> Matcher:
    return specgen_grammar.constraints()[kind](setup(family), value)


def spelt(text: str, family: str) -> list[int]:
    """The ids of a text as a model would write it in the middle of another, without the blank of a beginning."""
    found = llguidance.hf.from_tokenizer(TOKENIZERS[family]).greedy_tokenize(text)
    assert TOKENIZERS[family].decode([*found]).strip() == text.strip()
    return found


def takes(matcher: Matcher, text: str, family: str) -> bool:
    """Whether the grammar lets a text through as a whole."""
    tokens = spelt(text, family)
    if matcher.permitted(tokens) < len(tokens):
        return False
    for token in tokens:
        matcher.consume(token)
    return matcher.may_end()


NESTED = {
    "$ref": "#/$defs/node",
    "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}},
}
LARK = 'start: "(" start ")" | NAME\nNAME: /[a-z]+/'
GBNF = 'root ::= "yes" | "no" digit\ndigit ::= [0-9]'
CASES: list[tuple[str, Any, str, bool]] = [
    ("json_object", None, '{"a": [1, {"b": null}], "é": "漢"}', True),
    ("json_object", True, "{}", True),
    ("json_object", None, "[1]", False),
    ("json_object", None, '{"a": 1', False),
    ("json_object", None, '{"a": 1}}', False),
    ("json_schema", SCHEMA, '{"name": "Bob", "age": 7, "ok": true}', True),
    ("json_schema", SCHEMA, '{"name":"Bob","age":7,"tags":["red"],"ok":true}', True),
    ("json_schema", SCHEMA, '{\n  "name": "Bob",\n  "age": 7,\n  "ok": true\n}', True),
    ("json_schema", SCHEMA, '{"name":  "Bob", "age": 7, "ok": true}', False),
    ("json_schema", SCHEMA, '{"name": "Bob", "age": 700, "ok": true}', False),
    ("json_schema", SCHEMA, '{"name": "Roberta", "age": 7, "ok": true}', False),
    ("json_schema", SCHEMA, '{"name": "Bob", "ok": true}', False),
    ("json_schema", json.dumps(SCHEMA), '{"name": "Bob", "age": 7, "ok": true}', True),
    ("json_schema", {**SCHEMA, "x-guidance": {"whitespace_pattern": "  "}}, '{  "name"  :', False),
    ("json_schema", {"type": "integer", "x-guidance": {}}, "12", True),
    ("json_schema", {"type": "integer", "minimum": 2**53 + 1, "maximum": 2**53 + 3}, str(2**53 + 2), True),
    ("json_schema", {"type": "integer", "minimum": 2**53 + 1, "maximum": 2**53 + 3}, str(2**53), False),
    ("json_schema", {"type": "integer", "minimum": 2**53 + 1, "maximum": 2**53 + 3}, str(2**53 + 4), False),
    ("json_schema", {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}, str(2**62 + 1), True),
    ("json_schema", {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}, str(2**63), False),
    ("json_schema", {"type": "integer", "exclusiveMaximum": -(2**53) - 1}, str(-(2**53) - 1), False),
    ("json_schema", {"type": "integer", "exclusiveMaximum": -(2**53) - 1}, str(-(2**53) - 4), True),
    ("json_schema", {"type": "number", "maximum": 10**400}, "1.5", True),
    ("json_schema", {"properties": {"const": {"const": 2**53}}, "default": 10**30}, f'{{"const": {2**53}}}', True),
    ("json_schema", {**SCHEMA, "minProperties": 4}, '{"name": "Bob", "age": 7, "ok": true}', False),
    ("json_schema", {**SCHEMA, "minProperties": 4}, '{"name": "Bob", "age": 7, "tags": [], "ok": true}', True),
    ("json_schema", True, '["a"]', True),
    ("json_schema", NESTED, '{"next": {"next": {}}}', True),
    ("json_schema", {"const": True}, "true", True),
    ("json_schema", {"const": 1}, "true", False),
    ("regex", "[a-c]{2,3}", "abc", True),
    ("regex", "[a-c]{2,3}", "a", False),
    ("regex", r"\d{4}-\d\d", "2026-11", True),
    ("choice", ["yes", "yes, sir", "no"], "yes", True),
    ("choice", ["yes", "yes, sir", "no"], "yes, sir", True),
    ("choice", ["yes", "yes, sir", "no"], "yes,", False),
    ("choice", ['say "hi"\\n', "漢"], 'say "hi"\\n', True),
    ("choice", ['say "hi"', "漢"], "漢", True),
    *(("choice", [f"a{letter}b", "c"], f"a{letter}b", True) for letter in "\x7f\x00\x1f\x85\u2028\ufeff\U0001f600/|#"),
    ("choice", [f"number {n}" for n in range(3000)], "number 2999", True),
    ("grammar", LARK, "((ab))", True),
    ("grammar", LARK, "((ab)", False),
    ("grammar", GBNF, "no7", True),
    ("grammar", GBNF, "no", False),
]


@pytest.mark.parametrize("family", TOKENIZERS)
@pytest.mark.parametrize(("kind", "value", "text", "through"), CASES, ids=range(len(CASES)))
def test_a_text_is_let_through_or_not(kind: str, value: Any, text: str, through: bool, family: str) -> None:
    assert takes(compiled(kind, value, family), text, family) == through


@pytest.mark.parametrize("family", TOKENIZERS)
def test_end_tokens_and_padding_are_no_text(family: str) -> None:
    """llguidance marks the ends where a text may end; here that is said by `may_end` alone."""
    matcher = compiled("regex", "(.|\n)+", family)
    for _ in range(3):
        allowed = matcher.allowed()
        assert allowed.shape == (setup(family).vocab_size,)
        assert not allowed[list(setup(family).end_ids)].any()
        assert not allowed[-PADDING:].any()
        matcher.consume(spelt("a", family)[0])
        assert matcher.may_end()


def test_it_says_what_llguidance_says() -> None:
    """The mask is llguidance's own but for the ends, and those stand in it exactly where `may_end` says so."""
    tokenizer = TOKENIZERS["byte-level"]
    raw = llguidance.LLMatcher(
        llguidance.hf.from_tokenizer(tokenizer, n_vocab=setup("byte-level").vocab_size),
        llguidance.LLMatcher.grammar_from_regex("[a-z]{1,3}(, [a-z]{1,3})*"),
    )
    ours = compiled("regex", "[a-z]{1,3}(, [a-z]{1,3})*")
    for token in spelt("ab, c, de, f", "byte-level"):
        bits = np.unpackbits(np.frombuffer(raw.compute_bitmask(), np.uint8), bitorder="little")
        expected = set(np.flatnonzero(bits).tolist())
        assert (tokenizer.eos_token_id in expected) == ours.may_end()
        assert set(ours.allowed().nonzero().flatten().tolist()) == expected - {tokenizer.eos_token_id}
        raw.consume_token(token)
        ours.consume(token)


@pytest.mark.parametrize("ends", [(), (0,), (0, 5)])
def test_a_model_may_have_no_end_or_several(ends: tuple[int, ...]) -> None:
    few = ConstraintSetup(TOKENIZERS["byte-level"], len(TOKENIZERS["byte-level"]), ends)
    matcher = specgen_grammar.constraints()["choice"](few, ["ab", "abc"])
    for token in spelt("ab", "byte-level"):
        assert not matcher.may_end()
        matcher.consume(token)
    assert matcher.may_end()
    assert not matcher.is_complete()
    matcher.consume(spelt("c", "byte-level")[0])
    assert matcher.is_complete()
    assert not matcher.allowed().any()


@pytest.mark.parametrize("family", TOKENIZERS)
def test_what_is_forced_is_the_text_that_must_come(family: str) -> None:
    matcher = compiled("regex", 'say "name": [0-9]+', family)
    forced = TOKENIZERS[family].decode(list(matcher.forced()))
    assert len(forced) > 8
    assert 'say "name": '.startswith(forced)
    assert not compiled("regex", "[a-z]+", family).forced()


REFUSED: list[tuple[str, Any, str]] = [
    ("json_object", {"type": "object"}, "json_object is {'type': 'object'}; it must be nothing; json_schema takes"),
    ("json_schema", 5, "json_schema is 5; it must be a JSON Schema"),
    ("json_schema", None, "json_schema is None; it must be a JSON Schema"),
    ("json_schema", "{", "json_schema is no JSON: "),
    ("json_schema", "[]", "json_schema is '[]'; it must be a JSON Schema"),
    ("json_schema", {"type": 5}, "json_schema cannot be compiled: type must be a string or array of strings"),
    ("json_schema", {"type": "nope"}, "json_schema cannot be compiled: Invalid type: nope"),
    ("json_schema", {"type": "array", "uniqueItems": True}, 'Unimplemented keys: ["uniqueItems"]'),
    ("json_schema", {"$ref": "https://example.org/x"}, "json_schema cannot be compiled: Resource"),
    ("json_schema", {"type": "string", "pattern": "(?=a)b"}, "look-around"),
    ("json_schema", {"type": "string", "format": "weird"}, "Unknown format: weird"),
    ("json_schema", {"type": "integer", "minimum": 9, "maximum": 1}, "json_schema cannot be compiled: "),
    ("json_schema", {"enum": []}, "Unsatisfiable schema"),
    (
        "json_schema",
        {"const": 2**53 + 1},
        "const holds 9007199254740993; whole numbers beyond 2**53 are not kept exactly",
    ),
    ("json_schema", {"items": {"enum": ["a", {"b": [-(10**99)]}]}}, "enum holds -1000"),
    ("json_schema", {"properties": {"a": {"multipleOf": 10**16}}}, "multipleOf holds 10000000000000000; whole"),
    ("json_schema", {"type": "integer", "minimum": 10**400}, "minimum is 1000"),
    ("json_schema", {"anyOf": [{"maximum": -(2**63)}]}, f"maximum is {-(2**63)}; it must be within 64 bits"),
    ("json_schema", {"type": "object", "minProperties": 2}, "minProperties 2 cannot be kept where names are free"),
    (
        "json_schema",
        {"allOf": [{"patternProperties": {"a": {}}, "additionalProperties": False, "minProperties": 3}]},
        "min",
    ),
    ("json_schema", False, "json_schema cannot be compiled: "),
    ("json_schema", {"type": "object", "x-guidance": 5}, "json_schema cannot be compiled: "),
    ("json_schema", {"type": "object", "x-guidance": {"whitespace_pattern": "["}}, "json_schema cannot be compiled: "),
    ("regex", "", "regex is ''; it must be a regular expression"),
    ("regex", ["a"], "regex is ['a']; it must be a regular expression"),
    ("regex", "(a", "regex cannot be compiled: "),
    ("regex", r"(a)\1", "backreferences are not supported"),
    ("regex", "()", "regex allows no text but the empty one"),
    ("choice", [], "choice is []; it must be a list of texts, none of them empty"),
    ("choice", ["a", ""], "choice is ['a', '']; it must be a list of texts"),
    ("choice", "ab", "choice is 'ab'; it must be a list of texts"),
    ("choice", [1, 2], "choice is [1, 2]; it must be a list of texts"),
    ("grammar", "", "grammar is ''; it must be a grammar"),
    ("grammar", {}, "grammar is {}; it must be a grammar"),
    ("grammar", 'x: "a"', "grammar: Failed to convert the grammar from GBNF"),
    ("grammar", 'start: "a" b', 'unknown name: "b"'),
    ("grammar", "start: start", "grammar cannot be compiled: "),
    ("grammar", 'root ::= "a', "grammar: "),
    ("choice", ["x" * MAX_CHARACTERS], f"characters; at most {MAX_CHARACTERS} are compiled"),
    ("regex", "(" * 20000 + "a" + ")" * 20000, "regex cannot be compiled: "),
]


@pytest.mark.parametrize(("kind", "value", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_does_not_compile_is_refused_by_name(kind: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        compiled(kind, value)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_tokenizer_that_llguidance_cannot_read_is_refused() -> None:
    for tokenizer in (None, object()):
        with pytest.raises(InvalidRequest, match="takes no constraints"):
            specgen_grammar.constraints()["regex"](ConstraintSetup(tokenizer, 96), "a+")
    with pytest.raises(InvalidRequest, match="takes no constraints: vocab size too small"):
        specgen_grammar.constraints()["regex"](ConstraintSetup(TOKENIZERS["byte-level"], 96), "a+")


@pytest.mark.parametrize("family", TOKENIZERS)
def test_of_a_tokenizer_larger_than_the_model_the_rest_is_cut(family: str) -> None:
    """Tokens that were added without resizing the model: it spells them in others."""
    tokenizer = deepcopy(TOKENIZERS[family])
    tokenizer.add_tokens(["Bob", '{"name'])
    rows = len(TOKENIZERS[family])
    assert len(tokenizer) > rows
    larger = ConstraintSetup(tokenizer, rows, (tokenizer.eos_token_id,))
    for kind, value, text in (
        ("json_schema", SCHEMA, '{"name": "Bob", "age": 7, "ok": true}'),
        ("choice", ["Bob"], "Bob"),
    ):
        matcher = specgen_grammar.constraints()[kind](larger, value)
        beside = compiled(kind, value, family)
        for token in spelt(text, family):
            assert torch.equal(matcher.allowed(), beside.allowed()[:rows])
            assert all(each < rows for each in matcher.forced())
            matcher.consume(token)
            beside.consume(token)
        assert (matcher.may_end(), matcher.is_complete()) == (True, beside.is_complete())


def test_a_grammar_that_grows_too_costly_on_the_way_fails_by_name() -> None:
    many = " | ".join(f'"a{number}"' for number in range(3000))
    matcher = compiled("grammar", f"start: {many}")
    with pytest.raises(RequestFailed, match="the grammar cannot be followed: .*3001 items; max is 2000"):
        matcher.consume(spelt("a", "byte-level")[0])
    with pytest.raises(RequestFailed, match="the grammar cannot be followed"):
        matcher.permitted(spelt("1", "byte-level"))


class TestSchema(MatcherContract):
    def matcher(self) -> Matcher:
        return compiled("json_schema", SCHEMA)


class TestSchemaInPieces(MatcherContract):
    def matcher(self) -> Matcher:
        return compiled("json_schema", SCHEMA, "pieces")


class TestRegex(MatcherContract):
    def matcher(self) -> Matcher:
        return compiled("regex", "[a-f]{2}(, [a-f]{2}){0,3}")


class TestChoice(MatcherContract):
    def matcher(self) -> Matcher:
        return compiled("choice", ["yes", "yes, sir", "no"])


class TestGrammar(MatcherContract):
    def matcher(self) -> Matcher:
        return compiled("grammar", LARK)


NEST = " ".join(["(b|c)*"] * 300)
DEAR = f'start: "x" a\na: {NEST}\nb: /[a-z]+/\nc: /[a-z ]/'


def test_a_dear_grammar_is_followed_elsewhere_and_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that takes too long fails its request by name; the thread that asked is free again."""
    matcher = compiled("grammar", DEAR)
    assert matcher._run is _in_time  # type: ignore[attr-defined]
    assert matcher.copy()._run is _in_time  # type: ignore[attr-defined]
    assert compiled("regex", "[a-c]{2,3}")._run is _at_once  # type: ignore[attr-defined]
    # A step that lasts until this test lets it end, however quick the machine is.
    ends, submit = threading.Event(), _threads.submit
    waiting = SimpleNamespace(submit=lambda step: submit(lambda: (ends.wait(30), step())[1]))
    monkeypatch.setattr("specgen_grammar.matcher._threads", waiting)
    monkeypatch.setattr("specgen_grammar.matcher.STEP_SECONDS", 0.01)
    with pytest.raises(RequestFailed, match=r"cannot be followed: a step takes more than 0\.01 seconds"):
        matcher.allowed()
    ends.set()


def test_a_dear_grammar_says_the_same_as_at_once() -> None:
    """A long schema, by both ways."""
    schema = {"type": "object", "properties": {f"p{n}": {"enum": ["a", n]} for n in range(90)}}
    elsewhere = compiled("json_schema", schema)
    assert elsewhere._run is _in_time  # type: ignore[attr-defined]
    at_once = elsewhere.copy()
    at_once._run = _at_once  # type: ignore[attr-defined]
    for token in spelt('{"p0": "a", "p7": 7, "p89":', "byte-level"):
        assert torch.equal(elsewhere.allowed(), at_once.allowed())
        assert elsewhere.forced() == at_once.forced()
        assert elsewhere.permitted([token, 1, 2]) == at_once.permitted([token, 1, 2])
        elsewhere.consume(token)
        at_once.consume(token)
