"""Ids to text as they come: never half a character, never text that may still turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CONTEXT_TOKENS = 6
_MOST_BYTES = 4
"""Of one character in UTF-8."""
_LONG_WINDOW = _CONTEXT_TOKENS + _MOST_BYTES


class Decoder(Protocol):
    """The one method of a tokenizer that is used here."""

    def decode(self, token_ids: list[int], **kwargs: bool) -> str:
        """Ids to text."""


@dataclass(frozen=True, slots=True)
class TextCursor:
    """Where the text of one sequence stands. Frozen: `advance` answers a new one, so a walk can be thrown away.

    window: the ids since the last clean character border, behind a few ids before it; or the last ones, where no border
    has come for long.
    shown: the part of the window's text that was taken in already.
    held: text not released yet because a stop string may begin in it.
    """

    decoder: Decoder | None
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special: bool = True
    window: tuple[int, ...] = ()
    shown: str = ""
    held: str = ""

    @classmethod
    def after(cls, prompt: Sequence[int], decoder: Decoder | None, **options: object) -> TextCursor:
        """The cursor behind a prompt, whose last ids decide how the first new one is spelt."""
        cursor = cls(decoder, **options)  # type: ignore[arg-type]
        tail, shown = cursor._context(tuple(prompt[-_CONTEXT_TOKENS - _MOST_BYTES :]))
        return replace(cursor, window=tail, shown=shown)

    def advance(self, tokens: Sequence[int]) -> tuple[TextCursor, str, str | None]:
        """Take `tokens` in: the new cursor, the text that may be shown now, and the stop string that is complete.

        With several tokens the stop string may lie anywhere in them; the text ends before it, or with it if
        `include_stop`.
        """
        if self.decoder is None:
            return self, "", None
        window = self.window + tuple(tokens)
        text = self._decode(window)
        whole = text.rstrip(_REPLACEMENT)
        if whole != text and self._is_broken(window):
            whole = max(whole, text[: 1 - _MOST_BYTES], key=len)
        if len(whole) < len(self.shown):
            return replace(self, window=window), "", None
        held = self.held + whole[len(self.shown) :]
        recent, shown = self._context(window) if whole == text else self._shortened(window, text, len(whole))
        moved = replace(self, window=recent, shown=shown)
        if found := _first(held, self.stop):
            at, string = found
            return replace(moved, held=""), held[: at + len(string) * self.include_stop], string
        safe = len(held) - _may_begin(held, self.stop)
        return replace(moved, held=held[safe:]), held[:safe], None

    def flush(self) -> str:
        """What is still held when the sequence ends otherwise, half characters included."""
        return self.held + self._decode(self.window)[len(self.shown) :]

    def _context(self, ids: tuple[int, ...]) -> tuple[tuple[int, ...], str]:
        """The last of `ids`, which decide how the next one is spelt, and their text.

        Not from inside a character on, if there is another place: where a run of bytes begins with half a character,
        some decoders take all of the run for broken.
        """
        for size in range(_CONTEXT_TOKENS, _CONTEXT_TOKENS + _MOST_BYTES):
            text = self._decode(ids[-size:])
            if not text.startswith(_REPLACEMENT):
                return ids[-size:], text
        last = ids[-_CONTEXT_TOKENS:]
        return last, self._decode(last)

    def _is_broken(self, window: tuple[int, ...]) -> bool:
        """Whether a long window ends with more than half a character, which no later token makes whole: the model said
        so, or wrote bytes that are no text."""
        ends = (self._decode(window[: len(window) - n]) for n in range(1, _MOST_BYTES))
        return len(window) > _LONG_WINDOW and all(text.endswith(_REPLACEMENT) for text in ends)

    def _shortened(self, window: tuple[int, ...], text: str, whole: int) -> tuple[tuple[int, ...], str]:
        """A window that ends with half a character, and the first `whole` of its `text`; only its end if it is long."""
        if len(window) > _LONG_WINDOW:
            recent = window[-_LONG_WINDOW:]
            end = self._decode(recent)
            pending = len(text) - whole
            if end[-pending - 1 :] == text[-pending - 1 :]:
                return recent, end[:-pending]
        return window, text[:whole]

    def _decode(self, ids: Sequence[int]) -> str:
        if self.decoder is None:
            return ""
        return self.decoder.decode(list(ids), skip_special_tokens=self.skip_special, clean_up_tokenization_spaces=False)


def _first(text: str, strings: Sequence[str]) -> tuple[int, str] | None:
    """The stop string that is complete first, and where it begins."""
    found = [(text.find(string) + len(string), text.find(string), string) for string in strings if string in text]
    return min(found)[1:] if found else None


def _may_begin(text: str, strings: Sequence[str]) -> int:
    """Length of the longest end of `text` that is a beginning of one of `strings`."""
    return max(
        (n for string in strings for n in range(1, len(string)) if text.endswith(string[:n])),
        default=0,
    )
