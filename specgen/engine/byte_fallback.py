"""Tokens of a single byte, as SentencePiece vocabularies have them for what no piece spells (`<0x0A>`).

Their tokenizers decode a run of bytes as a whole: one that is not UTF-8 from its beginning to its end becomes U+FFFD
for each of its bytes, those of whole characters included. So what a run says would change with bytes that come behind
it. Here a run is rewritten byte by byte into what is always UTF-8: whole characters stay, and a byte that belongs to
none is spelt as the three bytes of U+FFFD.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What stands in a text for bytes that are no character."""

_known: WeakKeyDictionary[object, ByteFallback | None] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True, eq=False)
class ByteFallback:
    """The byte tokens of one tokenizer: `byte_of[id]` is the byte, `replacement` the ids that spell U+FFFD."""

    byte_of: Mapping[int, int]
    replacement: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: object) -> ByteFallback | None:
        """Those of `tokenizer`; None where it has none, or does not read them as bytes."""
        if tokenizer not in _known:
            _known[tokenizer] = cls._found(tokenizer)
        return _known[tokenizer]

    @classmethod
    def _found(cls, tokenizer: Any) -> ByteFallback | None:
        if not hasattr(tokenizer, "convert_tokens_to_ids"):
            return None
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        ids = tokenizer.convert_tokens_to_ids(names)
        known = zip(ids, tokenizer.convert_ids_to_tokens([id or 0 for id in ids]), names, strict=True)
        if not all(id is not None and found == name for id, found, name in known):
            return None
        replacement = tuple(ids[byte] for byte in REPLACEMENT.encode())
        reads = [tokenizer.decode(list(spelt)) for spelt in ((ids[ord("a")],), replacement)]
        byte_of = {id: byte for byte, id in enumerate(ids)}
        return cls(byte_of, replacement) if reads == ["a", REPLACEMENT] else None

    def rewritten(self, pending: tuple[int, ...], token: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What is known of a run that goes on by `token`: ids that say it, and those of a character not yet whole.

        pending: the ids of the character that was not whole before.
        """
        if token not in self.byte_of:
            return (*self.replacement * len(pending), token), ()
        known: tuple[int, ...] = ()
        pending = (*pending, token)
        while pending:
            try:
                bytes(self.byte_of[each] for each in pending).decode()
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data":
                    break
                known, pending = known + self.replacement, pending[1:]
            else:
                known, pending = known + pending, ()
        return known, pending

    def continues(self, ids: Sequence[int]) -> bool:
        """Whether the first of `ids` is a byte from inside a character."""
        return bool(ids) and self.byte_of.get(ids[0], 0) & 0xC0 == 0x80
