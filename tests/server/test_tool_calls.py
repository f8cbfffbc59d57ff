"""Calls in what a model says: whatever it says, however it comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specgen.server.tool_calls import CallParser

PIECES = (
    "<tool_call>",
    "</tool_call>",
    "<tool_",
    "call>",
    "</",
    "<",
    '{"name": "f", "arguments": {}}',
    '{"name": "f"',
    "}",
    '"',
    '{"name": "f", "arguments": {"a": "',
    "\\",
    " ",
    "\n",
    "é",
    "well",
)
Parsed = tuple[str, list[tuple[str, str]]]


def parsed(pieces: Sequence[str]) -> Parsed:
    """What is said and what is called."""
    parser, said, calls = CallParser(), "", []
    for place, piece in enumerate(pieces):
        text, found = parser.parts(piece, last=place == len(pieces) - 1)
        said += text
        calls += [(call.function.name, call.function.arguments or "") for call in found]
    return said, calls


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=14))
def test_how_a_text_is_cut_changes_nothing(pieces: list[str]) -> None:
    whole = "".join(pieces)
    assert parsed(pieces) == parsed([whole]) == parsed(list(whole))
    said, calls = parsed([whole])
    assert calls or said == whole


MARKED = '<tool_call>{"name": "f", "arguments": {"a": "<x> \\"</tool_call>\\" and </tool_call>"}}</tool_call>'
CALLED = ("f", '{"a":"<x> \\"</tool_call>\\" and </tool_call>"}')


@pytest.mark.parametrize("text", [MARKED, MARKED.removesuffix("</tool_call>")])
def test_the_mark_of_an_end_may_stand_in_an_argument(text: str) -> None:
    for pieces in ([text], list(text)):
        assert parsed(pieces) == ("", [CALLED])
        assert parsed([*pieces, *MARKED]) == ("", [CALLED, CALLED]) or not text.endswith(">")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ('{"id": 123456789012345678901234567890}', '{"id":123456789012345678901234567890}'),
        ('{"x": 1e400, "y": -1E+5, "z": 0.10, "w": 1.0000000000000000000001}', None),
        ('{"a": 1, "a": 2, "b": -0}', None),
        ('{"s": "a  b\\n \\" \\u00e9 \\u2028 \\\\"}', '{"s":"a  b\\n \\" \\u00e9 \\u2028 \\\\"}'),
        ('{\n  "é": [ {} , [ ] ,\t"," ] ,\n  "name": null }', '{"é":[{},[],","],"name":null}'),
        ("{ }", "{}"),
    ],
)
def test_arguments_come_out_as_they_were_written(written: str, read: str | None) -> None:
    """But for white space between them. Read and written again, numbers would be others."""
    read = read or written.replace(" ", "")
    for key in ("arguments", "parameters"):
        text = f'<tool_call>{{"name": "f", "{key}": {written}}}</tool_call>'
        for pieces in ([text], list(text)):
            assert parsed(pieces) == ("", [("f", read)])
    assert parsed([f'<tool_call>{{"name": "f", "arguments": null, "parameters": {written}}}']) == ("", [("f", read)])


def test_a_string_that_is_never_closed_hides_no_call_behind_it() -> None:
    odd = '<tool_call>5" long</tool_call> well '
    for pieces in ([odd + MARKED], list(odd + MARKED)):
        assert parsed(pieces) == (odd, [CALLED])


@pytest.mark.parametrize(
    "inside",
    [
        "__import__('os').mkdir('trace')",
        '{"name": "f", "arguments": __import__("os").mkdir("trace")}',
        '{"name": "f", "arguments": "{}"}',
        '{"name": 1}',
        '{"name": "\\ud800"}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": {"a": 01}}',
        '{"name": "f", "arguments": {"a": 1,}}',
        '{"name": "f", "arguments": {}} {}',
        "[" * 100_000,
        '{"name": "f", "arguments": {"a": ' + "9" * 10_000 + "}}",
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "f", "arguments": {"a": "\\ud800"}}',
        "",
    ],
)
def test_what_is_no_call_is_text_and_never_run(inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = f"<tool_call>{inside}</tool_call>"
    assert parsed([text]) == (text, [])
    assert not list(tmp_path.iterdir())


def cut(pieces: Sequence[str], names: Sequence[str] = ("f", "find"), *, forced: bool = True) -> Parsed:
    """What is said and what is called in a text that `max_tokens` ends."""
    parser, said, calls = CallParser(names=names, forced=forced), "", []
    for place, piece in enumerate(pieces):
        last = place == len(pieces) - 1
        text, found = parser.parts(piece, last=last, cut=last)
        said += text
        calls += [(call.function.name, call.function.arguments or "") for call in found]
    assert parser.found == len(calls)
    return said, calls


WHOLE = '<tool_call>\n{"name": "find", "arguments": {"a": "b </tool_call> {}", "n": [1]}}\n</tool_call>'


@pytest.mark.parametrize("size", range(len(WHOLE) + 1))
def test_a_forced_call_that_is_cut_is_a_partial_call(size: int) -> None:
    """Wherever it is cut, and however it comes; none of it is said."""
    text = WHOLE[:size]
    arguments = WHOLE[WHOLE.index('{"a"') : WHOLE.index("}\n</")]
    if size >= WHOLE.index("}\n</") + 1:
        called = [("find", '{"a":"b </tool_call> {}","n":[1]}')]
    elif '"find"' in text:
        called = [("find", arguments[: max(0, size - WHOLE.index('{"a"'))])]
    else:
        called = [("find", "")] if '"fi' in text else []
    for pieces in ([text], list(text) or [""]):
        assert cut(pieces) == ("", called)
        assert cut(pieces, ["find"]) == ("", called or [("find", "")])


def test_a_call_behind_another_is_cut_too() -> None:
    for text, more in (("\n<tool_call>", []), ("\n<too", []), ('\n<tool_call>\n{"name": "f", "arg', [("f", "")])):
        said, calls = cut([WHOLE + text], ["find"])
        assert (said.strip(), calls[1:]) == ("", more or calls[1:])
        assert cut([WHOLE + text])[1][1:] == more


def test_text_that_is_cut_is_text_where_it_need_not_be_a_call() -> None:
    for text in ("I say <tool_", "a < b", '<tool_call>\n{"nam', "<tool_call>5 < 6"):
        assert cut([text], forced=False) == (text, [])
    assert cut(['well <tool_call>{"name": "f", "arguments": {"a'], forced=False) == ("well ", [("f", '{"a')])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=14), st.booleans())
def test_how_a_text_that_is_cut_comes_changes_nothing(pieces: list[str], forced: bool) -> None:
    whole = "".join(pieces)
    assert cut(pieces, forced=forced) == cut([whole], forced=forced) == cut(list(whole), forced=forced)
