"""Calls in a text, as Hermes, Qwen and many more write them: `<tool_call>{"name": ..., "arguments": ...}</tool_call>`.

What the model says is read as JSON and never run.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress

import msgspec

from specgen.server.protocol.requests import CalledFunction, ToolCall
from specgen.types import Result

_BEGIN, _END = "<tool_call>", "</tool_call>"
_HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*"(?P<name>(?:[^"\\]|\\.)*)'
    r'(?P<closed>"(?:\s*,\s*"(?:arguments|parameters)"\s*:\s*(?P<arguments>.*))?)?',
    re.DOTALL,
)
"""How a call begins, as far as it goes."""
_QUOTES = re.compile(r'\\.|"', re.DOTALL)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_float=str, parse_constant=_no_constant)
_BETWEEN = re.compile(r"[\s,:]*")
_SPACE = re.compile(r'("(?:\\.|[^"\\])*")|\s+')


class CallParser:
    """Parts the text of one choice, as it comes, into what is said and what is called.

    Text that turns out to be no call is said. most: how many calls are handed out; later ones are dropped. names: of
    the tools that may be called. forced: the text is calls and nothing else, so that its end, where it is cut, is a
    part of one. has_partial: the last call is one that was cut.
    """

    def __init__(self, most: int | None = None, names: Sequence[str] = (), *, forced: bool = False) -> None:
        self.found = 0
        self.has_partial = False
        self._most = most
        self._names = names
        self._forced = forced
        self._held = ""
        self._inside = False
        self._looked = 0
        self._in_string = False
        self._called = False

    def parts(self, text: str, *, last: bool, cut: bool = False) -> tuple[str, list[ToolCall]]:
        """`feed`, and `flush` where the text is the last."""
        said, calls = self.feed(text)
        rest, more = self.flush(cut=cut) if last else ("", [])
        return said + rest, calls + more

    def feed(self, text: str) -> tuple[str, list[ToolCall]]:
        """Take text in: what may be shown of it now, and the calls that are complete."""
        said = ""
        calls: list[ToolCall] = []
        self._held += text
        while (place := self._mark()) >= 0:
            if self._inside and (call := _call(self._held[:place])):
                self._take(place, _END)
                calls += self._counted(call)
            elif self._inside:
                said += self._refused()
            else:
                said += self._shown(self._take(place, _BEGIN))
        if not self._inside:
            safe = len(self._held) - _may_begin(self._held)
            said, self._held = said + self._shown(self._held[:safe]), self._held[safe:]
        return said, calls

    def flush(self, *, cut: bool = False) -> tuple[str, list[ToolCall]]:
        """The rest, when the text is over. Models leave out the last mark where it would be their end token.

        cut: the model did not end it, so that what has begun as a call is handed out as far as it came.
        """
        if cut and (self._inside or self._forced) and (rest := self._cut()) is not None:
            return "", rest
        said = ""
        calls: list[ToolCall] = []
        while self._inside and (call := _call(self._held)) is None and _END in self._held:
            # A string that was never closed hid its end; behind it there may be calls.
            said += self._refused()
            more, found = self.feed("")
            said, calls = said + more, calls + found
        held, self._held = self._held, ""
        if not self._inside:
            return said + self._shown(held), calls
        self._inside = False
        return (said + _BEGIN + held, calls) if call is None else (said, calls + self._counted(call))

    def _cut(self) -> list[ToolCall] | None:
        """The call whose text ends here, where it is known to be one; None where it may be text."""
        held = self._held if self._inside else ""
        if self._inside and _call(whole := held[: len(held) - _may_begin(held, _END)]):
            self._held = whole
            return None
        if not self._inside and not _BEGIN.startswith(self._held):
            return None
        # Behind a whole call the beginning of a mark alone is no second one.
        guesses = self._names if self._inside or not self.found else ()
        call = _partial(held, guesses if self._forced else ())
        if call is None and not self._forced:
            return None
        self._held, self._inside = "", False
        self.has_partial = call is not None
        return self._counted(call) if call else []

    def _mark(self) -> int:
        """Where the next mark stands in what is held; -1 while there is none. An end inside a string is part of it."""
        if not self._inside:
            return self._held.find(_BEGIN)
        while (place := self._held.find(_END, self._looked)) >= 0:
            quotes = sum(found == '"' for found in _QUOTES.findall(self._held, self._looked, place))
            self._in_string ^= quotes % 2 == 1
            if not self._in_string:
                return place
            self._looked = place + len(_END)
        return -1

    def _take(self, place: int, mark: str) -> str:
        """Go on behind a mark; what stands before it."""
        before, self._held = self._held[:place], self._held[place + len(mark) :]
        self._inside, self._looked, self._in_string = not self._inside, 0, False
        return before

    def _refused(self) -> str:
        """What begins as a call and is none, up to the first mark of an end, as text."""
        return f"{_BEGIN}{self._take(self._held.find(_END), _END)}{_END}"

    def _counted(self, call: ToolCall) -> list[ToolCall]:
        self.found += 1
        self._called = True
        return [call] if self._most is None or self.found <= self._most else []

    def _shown(self, text: str) -> str:
        """Text without the white space behind a call, which is nobody's."""
        shown = text.lstrip() if self._called else text
        self._called = self._called and not shown
        return shown


def _partial(text: str, guesses: Sequence[str]) -> ToolCall | None:
    """The call that a text begins with: the name where it is whole, or where only one of `guesses` begins so."""
    found = _HEAD.match(text)
    said = found["name"] if found else ""
    if found and found["closed"]:
        with suppress(msgspec.DecodeError):
            return _numbered(msgspec.json.decode(f'"{said}"', type=str), found["arguments"] or "")
    names = [name for name in guesses if msgspec.json.encode(name).decode()[1:].startswith(said)]
    return _numbered(names[0], "") if len(names) == 1 else None


def _numbered(name: str, arguments: str) -> ToolCall:
    return ToolCall(f"call_{secrets.token_hex(12)}", CalledFunction(name, arguments))


def _call(text: str) -> ToolCall | None:
    try:
        said = _members(text)
    except (ValueError, RecursionError):
        return None
    name = json.loads(said.get("name", "null"))
    given = [said[key] for key in ("arguments", "parameters") if said.get(key, "null") != "null"]
    if not isinstance(name, str) or not all(value.startswith("{") for value in given):
        return None
    return _numbered(name, given[0] if given else "{}")


def _members(text: str) -> dict[str, str]:
    """The members of a JSON object, each value as it is written but for white space: read and written again, large
    numbers and long fractions would come out otherwise. Raises ValueError for anything else."""
    value = _DECODER.decode(text)
    if not isinstance(value, dict):
        raise ValueError("no object")
    # Half a surrogate pair can be written in JSON, and is no text.
    json.dumps(value, ensure_ascii=False).encode()
    found: dict[str, str] = {}
    place = _after(_BETWEEN, text, text.index("{") + 1)
    while text[place] != "}":
        key, place = _DECODER.raw_decode(text, place)
        start = _after(_BETWEEN, text, place)
        _, place = _DECODER.raw_decode(text, start)
        found[key] = _SPACE.sub(r"\1", text[start:place])
        place = _after(_BETWEEN, text, place)
    return found


def _after(pattern: re.Pattern[str], text: str, place: int) -> int:
    found = pattern.match(text, place)
    return found.end() if found else place


def parser_of(tools: Sequence[str], choice: object, *, parallel: bool) -> CallParser:
    """For the answer to a request with tools of these names, and its `tool_choice`."""
    named = choice.get("function", choice) if isinstance(choice, Mapping) else None
    names = [named["name"]] if isinstance(named, Mapping) and "name" in named else tools
    forced = choice == "required" or named is not None
    return CallParser(None if parallel else 1, names, forced=forced)


def is_cut(result: Result | None) -> bool:
    """Whether a text ended otherwise than by its model."""
    return result is not None and (result.finish_reason == "length" or isinstance(result.stop, str))


def _may_begin(text: str, mark: str = _BEGIN) -> int:
    """Length of the longest end of `text` that is a beginning of the mark."""
    return max((n for n in range(1, len(mark)) if text.endswith(mark[:n])), default=0)
