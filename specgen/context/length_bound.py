"""The fewest tokens that a text can have, by its bytes: a text that cannot fit need not be tokenised to know it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from specgen.errors import ContextLengthExceeded
from specgen.types import AnyTokenizer

_BLANKS = "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
"""All that any language here calls white space."""

_LONGEST_CHARACTER = 4
"""Bytes of UTF-8."""

# How many bytes of a text may at most become one byte: U+212A (3 bytes) is a small k, U+1D400 (4) an A, and what
# decomposes into three times as many bytes may be composed again.
_SHRINKING = {"Prepend": 1, "ByteLevel": 1, "Lowercase": 3, "NFD": 3, "NFKD": 4, "NFC": 9, "NFKC": 12}
_KEEPING = frozenset({"ByteLevel", "Digits", "Metaspace", "UnicodeScripts", "FixedLength"})
"""Pre-tokenizers that drop nothing."""
_OWN = ("__call__", "encode", "_encode_plus", "_batch_encode_plus")
"""Methods of a tokenizer that may do more to a text than its back-end does."""

State: TypeAlias = Mapping[str, Any]
"""A part of a tokenizer as the `tokenizers` library writes it to JSON."""


@dataclass(frozen=True, slots=True)
class LengthBound:
    """longest: most bytes of text that one token stands for. strips: an added token takes in the white space beside
    it, however much. dropped: bytes of UTF-8 that the tokenizer has no token for and leaves out."""

    longest: int
    strips: bool
    dropped: bytes = b""

    def tokens(self, text: str) -> int:
        """At least so many tokens."""
        size = utf8_bytes(text)
        if self.dropped:
            size = len(text.encode("utf-8", "surrogatepass").translate(None, self.dropped))
        if self.strips:
            size -= sum(text.count(blank) * len(blank.encode()) for blank in _BLANKS)
        return -(-size // self.longest)


def check_fits(tokenizer: AnyTokenizer | None, text: str, most: int, *, param: str) -> None:
    """Raise ContextLengthExceeded for a text of more than `most` tokens, where its bytes alone say so."""
    if utf8_bytes(text) <= most or (bound := length_bound(tokenizer)) is None:
        return
    if (least := bound.tokens(text)) > most:
        raise ContextLengthExceeded(
            f"the {param} has {utf8_bytes(text)} bytes, at least {least} tokens; at most {most} fit. Shorten it",
            param=param,
        )


def utf8_bytes(text: str) -> int:
    """The size of a text, lone surrogates included."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def length_bound(tokenizer: AnyTokenizer | None) -> LengthBound | None:
    """The bound of a tokenizer; None where it may make any length of text one token or none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    size = len(tokenizer)
    if (known := _known.get(tokenizer)) is None or known[0] != size:
        # Tokens may be added to a tokenizer that is in use.
        known = _known[tokenizer] = size, _bound(tokenizer, backend)
    return known[1]


_known: WeakKeyDictionary[object, tuple[int, LengthBound | None]] = WeakKeyDictionary()


def _bound(tokenizer: Any, backend: Any) -> LengthBound | None:
    if any(getattr(type(tokenizer), name, None) is not getattr(PreTrainedTokenizerFast, name, None) for name in _OWN):
        return None
    try:
        normalizers, splitters = _parts(backend.normalizer), _parts(backend.pre_tokenizer)
    except Exception:  # a part written in Python has no state to look at
        return None
    if not all(_keeps(part) for part in splitters):
        return None
    shrinking = 1
    for part in normalizers:
        shrinking *= _shrinking(part)
    vocabulary = backend.get_vocab(with_added_tokens=False)
    is_byte_level = any(part["type"] == "ByteLevel" for part in (*normalizers, *splitters))
    dropped = _dropped(backend.model, vocabulary) if is_byte_level else b""
    longest = _longest(backend.model, vocabulary, is_byte_level=is_byte_level)
    # Which bytes a normalizer would make of a text is not known.
    if not shrinking or not longest or (dropped and any(part["type"] != "ByteLevel" for part in normalizers)):
        return None
    added = tokenizer.added_tokens_decoder.values()
    longest = max([longest, *(len(token.content.encode()) for token in added)])
    return LengthBound(longest * shrinking, any(token.lstrip or token.rstrip for token in added), dropped)


def _parts(component: Any) -> list[State]:
    """What a normalizer or pre-tokenizer consists of, as tokenizer.json writes it."""
    return [] if component is None else list(_flat(json.loads(component.__getstate__())))


def _flat(state: State) -> Iterable[State]:
    if state["type"] != "Sequence":
        yield state
        return
    for part in state.get("normalizers") or state.get("pretokenizers") or ():
        yield from _flat(part)


def _keeps(splitter: State) -> bool:
    if splitter["type"] in ("Split", "Punctuation"):
        return bool(splitter["behavior"] != "Removed")
    return splitter["type"] in _KEEPING


def _shrinking(normalizer: State) -> int:
    """By how much it may shorten a text; 0 without bound."""
    if normalizer["type"] != "Replace":
        return _SHRINKING.get(normalizer["type"], 0)
    old, new = normalizer["pattern"].get("String", ""), normalizer["content"]
    return -(-len(old.encode()) // len(new.encode())) if old and new else 0


def _dropped(model: Any, vocabulary: Mapping[str, int]) -> bytes:
    """The bytes that a byte-level BPE has no letter for. Some vocabularies lack those that their training never saw, as
    control characters; without an unknown token such a byte is left out."""
    if getattr(model, "unk_token", None) is not None or getattr(model, "byte_fallback", False):
        return b""
    return bytes(byte for byte, letter in bytes_to_unicode().items() if letter not in vocabulary)


def _longest(model: Any, vocabulary: Mapping[str, int], *, is_byte_level: bool) -> int:
    """Most bytes of one token of a model that makes something of every byte; 0 for any other model."""
    kind = type(model).__name__
    unknown, has_all = getattr(model, "unk_token", None), all(x in vocabulary for x in bytes_to_unicode().values())
    if is_byte_level and kind == "BPE" and (has_all or (unknown is None and not model.byte_fallback)):
        return max(map(len, vocabulary))
    falls_back = getattr(model, "byte_fallback", False) and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    knows_unknown = kind == "BPE" and model.unk_token in vocabulary and not model.fuse_unk
    if kind in ("BPE", "Unigram") and (falls_back or knows_unknown):
        return max(_LONGEST_CHARACTER, *(len(token.encode()) for token in vocabulary))
    return 0
