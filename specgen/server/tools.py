"""Calls in a text, as Hermes, Qwen and many more write them: `<tool_call>{"name": ..., "arguments": ...}</tool_call>`.

What the model says is read as JSON and never run.
"""

from __future__ import annotations

import secrets
from typing import Any

import msgspec

from specgen.server.protocol import CalledFunction, ToolCall

_BEGIN, _END = "<tool_call>", "</tool_call>"


class _Said(msgspec.Struct):
    name: str
    arguments: dict[str, Any] | None = None
    parameters: dict[str, Any] | None = None


class CallParser:
    """Parts the text of one choice, as it comes, into what is said and what is called.

    Text that turns out to be no call is said. most: how many calls are handed out; later ones are dropped.
    """

    def __init__(self, most: int | None = None) -> None:
        self.found = 0
        self._most = most
        self._held = ""
        self._inside = False
        self._called = False

    def parts(self, text: str, *, last: bool) -> tuple[str, list[ToolCall]]:
        """`feed`, and `flush` where the text is the last."""
        said, calls = self.feed(text)
        rest, more = self.flush() if last else ("", [])
        return said + rest, calls + more

    def feed(self, text: str) -> tuple[str, list[ToolCall]]:
        """Take text in: what may be shown of it now, and the calls that are complete."""
        said, calls = "", []
        self._held += text
        while True:
            mark = _END if self._inside else _BEGIN
            place = self._held.find(mark)
            if place < 0:
                break
            inner, self._held = self._held[:place], self._held[place + len(mark) :]
            if not self._inside:
                said += self._shown(inner)
            elif (call := _call(inner)) is None:
                said += f"{_BEGIN}{inner}{_END}"
            else:
                calls += self._counted(call)
            self._inside = not self._inside
        if not self._inside:
            safe = len(self._held) - _may_begin(self._held)
            said, self._held = said + self._shown(self._held[:safe]), self._held[safe:]
        return said, calls

    def flush(self) -> tuple[str, list[ToolCall]]:
        """The rest, when the text is over. Models leave out the last mark where it would be their end token."""
        held, self._held = self._held, ""
        if not self._inside:
            return self._shown(held), []
        self._inside = False
        call = _call(held)
        if call is None:
            return _BEGIN + held, []
        return "", self._counted(call)

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
        said = msgspec.json.decode(text, type=_Said)
    except (msgspec.DecodeError, RecursionError):
        return None
    arguments = said.arguments if said.arguments is not None else said.parameters or {}
    function = CalledFunction(said.name, msgspec.json.encode(arguments).decode())
    return ToolCall(f"call_{secrets.token_hex(12)}", function)


def _may_begin(text: str) -> int:
    """Length of the longest end of `text` that is a beginning of the mark."""
    return max((n for n in range(1, len(_BEGIN)) if text.endswith(_BEGIN[:n])), default=0)
