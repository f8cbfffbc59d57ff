"""Ids to text as they come: never half a character, never text that may still turn out to be a stop string.

The text is a function of the ids alone, however they are split into steps, and whatever else was asked for: it is read
token by token. It is what the tokenizer decodes from prompt and output together, behind what it decodes from the prompt
alone, without cleaning up spaces; but in a run of byte tokens (`byte_fallback.py`) that is not UTF-8 as a whole, where
that decoding would take back characters that were shown, each character that is whole stays, and each other byte is
one U+FFFD.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from specgen.engine.byte_fallback import REPLACEMENT, ByteFallback

_CONTEXT_TOKENS = 6
_MOST_BYTES = 4
"""Of one character in UTF-8."""
_LONG_WINDOW = _CONTEXT_TOKENS + _MOST_BYTES
_SILENT_TOKENS = 64
"""Behind so many that say nothing the text of a prompt counts as empty."""


class Decoder(Protocol):
    """The one method of a tokenizer that is used here."""

    def decode(self, token_ids: list[int], **kwargs: bool) -> str:
        """Ids to text."""


@dataclass(frozen=True, slots=True)
class IncrementalDetokenizer:
    """Where the text of one sequence stands. Frozen: `advance` answers a new one, so a walk can be thrown away.

    min_tokens: so many tokens are taken in before stop strings are looked for; one may begin in theirs, not end there.
    window: the last ids, which decide how the next one is spelt; cut where a character begins, if there is a place.
    shown: the part of the window's text that was taken in already.
    pending: byte tokens behind the window that are no character yet.
    unclear: of how many tokens in a row the text ended with what may be half a character.
    prompt_half: characters U+FFFD at the end of the prompt, which are not text unless the output makes them whole.
    held: text not released yet because a stop string may begin in it.
    """

    decoder: Decoder | None
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special: bool = True
    min_tokens: int = 0
    fallback: ByteFallback | None = None
    window: tuple[int, ...] = ()
    shown: str = ""
    pending: tuple[int, ...] = ()
    unclear: int = 0
    prompt_half: int = 0
    held: str = ""

    @classmethod
    def after(cls, prompt: Sequence[int], decoder: Decoder | None, **options: object) -> IncrementalDetokenizer:
        """The cursor behind a prompt, whose last ids decide how the first new one is spelt."""
        cursor = cls(decoder, **options)  # type: ignore[arg-type]
        if decoder is None:
            return cursor
        cursor = replace(cursor, fallback=ByteFallback.of(decoder))
        window, pending = cursor._rewritten(tuple(prompt[-_LONG_WINDOW:]))
        recent, text = cursor._context(window)
        if not text:
            recent, pending = cursor._rewritten(tuple(prompt[-_SILENT_TOKENS:]))
            text = cursor._decode(recent)
        shown = text if cursor.fallback else text.rstrip(REPLACEMENT)
        half = len(pending) + len(text) - len(shown)
        return replace(cursor, window=recent, shown=shown, pending=pending, prompt_half=half)

    def advance(self, tokens: Sequence[int]) -> tuple[IncrementalDetokenizer, str, str | None]:
        """Take `tokens` in: the new cursor, the text that may be shown now, and the stop string that is complete.

        With several tokens the stop string may lie anywhere in them; the text ends before it, or with it if
        `include_stop`.
        """
        if self.decoder is None:
            return self, "", None
        cursor, released = self, []
        for token in tokens:
            moved, text = cursor._read(token)
            cursor, text, string = moved._search(text)
            released.append(text)
            if string is not None:
                return cursor, "".join(released), string
        return cursor, "".join(released), None

    def flush(self) -> str:
        """What is still held when the sequence ends otherwise, half characters included."""
        rest = self._decode(self.window)[len(self.shown) :] + REPLACEMENT * len(self.pending)
        return self.held + self._without_half(rest)[0]

    def _read(self, token: int) -> tuple[IncrementalDetokenizer, str]:
        """Behind one more token, and the text that is clear now."""
        if (self.pending or self.unclear) and self._is_skipped(token):
            return self, ""
        ids, pending = self.fallback.rewritten(self.pending, token) if self.fallback else ((token,), ())
        window = self.window + ids
        text = self._decode(window) if ids else self.shown
        if ids and text == self.shown and self._is_skipped(token):
            # It would only push out of the window what the next tokens are spelt behind.
            return self, ""
        clear = text if self.fallback else text.rstrip(REPLACEMENT)
        unclear = self.unclear + 1 if clear != text else 0
        if unclear >= _MOST_BYTES:
            # More than half a character, which no later token makes whole: the model means it, or it is no text.
            clear = max(clear, text[: 1 - _MOST_BYTES], key=len)
        moved = replace(self, window=window, pending=pending, unclear=unclear)
        said = clear[len(self.shown) :]
        if len(clear) < len(self.shown) or (unclear and not said):
            return moved, ""
        window, shown = self._trimmed(window, text, len(clear))
        said, half = self._without_half(said)
        return replace(moved, window=window, shown=shown, prompt_half=half), said

    def _is_skipped(self, token: int) -> bool:
        """Whether a token is left out when text is made, so that half a character may go on behind it."""
        if not self.skip_special or self._decode((token,)):
            return False
        return bool(replace(self, skip_special=False)._decode((token,)))

    def _without_half(self, text: str) -> tuple[str, int]:
        """`text` without what the prompt left broken and the output did not make whole; how much of it may follow."""
        broken = len(text) - len(text.lstrip(REPLACEMENT))
        said = text[min(broken, self.prompt_half) :]
        return said, 0 if said else self.prompt_half - broken

    def _search(self, text: str) -> tuple[IncrementalDetokenizer, str, str | None]:
        """Look for stop strings that `text` makes complete behind what is held."""
        held = self.held + text
        if self.min_tokens:
            found, left = None, self.min_tokens - 1
        else:
            found, left = _first(held, self.stop, len(self.held)), 0
        if found:
            at, string = found
            return replace(self, held=""), held[: at + len(string) * self.include_stop], string
        safe = len(held) - _may_begin(held, self.stop)
        if held[safe:] == self.held and left == self.min_tokens:
            return self, held[:safe], None
        return replace(self, held=held[safe:], min_tokens=left), held[:safe], None

    def _trimmed(self, window: tuple[int, ...], text: str, clear: int) -> tuple[tuple[int, ...], str]:
        """The window, and the first `clear` characters of its `text`; only its end if it is long."""
        if len(window) <= _LONG_WINDOW:
            return window, text[:clear]
        if clear < len(text):
            return self._cut_inside(window, text, clear)
        recent, said = self._context(window)
        if said:
            return recent, said
        # Tokens that say nothing: what was said before them must stay, or a text would seem to begin behind them.
        fewer = window[: -_CONTEXT_TOKENS - 1] + window[-_CONTEXT_TOKENS:]
        return (fewer, text) if self._decode(fewer) == text else (window, text)

    def _context(self, ids: tuple[int, ...]) -> tuple[tuple[int, ...], str]:
        """The last of `ids` and their text: not from inside a character on, if there is another place."""
        for size in range(_CONTEXT_TOKENS, _LONG_WINDOW):
            recent = ids[-size:]
            text = self._decode(recent)
            if not (self.fallback.continues(recent) if self.fallback else text.startswith(REPLACEMENT)):
                return recent, text
        recent = ids[-_CONTEXT_TOKENS:]
        return recent, self._decode(recent)

    def _cut_inside(self, window: tuple[int, ...], text: str, clear: int) -> tuple[tuple[int, ...], str]:
        """A long window that ends with what may be half a character, cut if its end says the same alone."""
        recent = window[-_LONG_WINDOW:]
        end = self._decode(recent)
        rest = len(text) - clear
        if end[-rest - 1 :] == text[-rest - 1 :]:
            return recent, end[:-rest]
        return window, text[:clear]

    def _rewritten(self, ids: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The last ids of a prompt as a window, and the byte tokens at their end that are no character yet."""
        if self.fallback is None:
            return ids, ()
        window: tuple[int, ...] = ()
        pending: tuple[int, ...] = ()
        for token in ids:
            if pending and self._is_skipped(token):
                continue
            known, pending = self.fallback.rewritten(pending, token)
            window += known
        return window, pending

    def _decode(self, ids: Sequence[int]) -> str:
        if self.decoder is None:
            return ""
        return self.decoder.decode(list(ids), skip_special_tokens=self.skip_special, clean_up_tokenization_spaces=False)


def _first(text: str, strings: Sequence[str], before: int) -> tuple[int, str] | None:
    """The stop string that is complete first behind the first `before` characters, and where it begins."""
    found = []
    for string in strings:
        at = text.find(string, max(0, before - len(string) + 1))
        if at >= 0:
            found.append((at + len(string), at, string))
    return min(found)[1:] if found else None


def _may_begin(text: str, strings: Sequence[str]) -> int:
    """Length of the longest end of `text` that is a beginning of one of `strings`."""
    return max(
        (n for string in strings for n in range(1, len(string)) if text.endswith(string[:n])),
        default=0,
    )
