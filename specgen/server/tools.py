"""Calls in a text, as Hermes, Qwen and many more write them: `<tool_call>{"name": ..., "arguments": ...}</tool_call>`.

What the model says is read as JSON and never run.
"""

from __future__ import annotations

import json
import re
import secrets

from specgen.server.protocol import CalledFunction, ToolCall

_BEGIN, _END = "<tool_call>", "</tool_call>"
_QUOTES = re.compile(r'\\.|"', re.DOTALL)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_float=str, parse_constant=_no_constant)
_BETWEEN = re.compile(r"[\s,:]*")
_SPACE = re.compile(r'("(?:\\.|[^"\\])*")|\s+')


class CallParser:
    """Parts the text of one choice, as it comes, into what is said and what is called.

    Text that turns out to be no call is said. most: how many calls are handed out; later ones are dropped.
    """

    def __init__(self, most: int | None = None) -> None:
        self.found = 0
        self._most = most
        self._held = ""
        self._inside = False
        self._looked = 0
        self._in_string = False
        self._called = False

    def parts(self, text: str, *, last: bool) -> tuple[str, list[ToolCall]]:
        """`feed`, and `flush` where the text is the last."""
        said, calls = self.feed(text)
        rest, more = self.flush() if last else ("", [])
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

    def flush(self) -> tuple[str, list[ToolCall]]:
        """The rest, when the text is over. Models leave out the last mark where it would be their end token."""
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


def _call(text: str) -> ToolCall | None:
    try:
        said = _members(text)
    except (ValueError, RecursionError):
        return None
    name = json.loads(said.get("name", "null"))
    given = [said[key] for key in ("arguments", "parameters") if said.get(key, "null") != "null"]
    if not isinstance(name, str) or not all(value.startswith("{") for value in given):
        return None
    return ToolCall(f"call_{secrets.token_hex(12)}", CalledFunction(name, given[0] if given else "{}"))


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


def _may_begin(text: str) -> int:
    """Length of the longest end of `text` that is a beginning of the mark."""
    return max((n for n in range(1, len(_BEGIN)) if text.endswith(_BEGIN[:n])), default=0)
