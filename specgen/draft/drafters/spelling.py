"""A tokenizer as a way to write text: what ids say behind others, and which ids say a text."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

HALF = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are no character yet."""

CONTEXT = 16
"""Tokens before a place that decide how the text there is read and spelt: no tokenizer merges across so many."""

_MOST_PENDING = 3


class Spelling:
    """Special tokens stand in texts by their names; none is added or left out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._pieces: dict[int, str] = {}
        # SentencePiece drops the space before a text's first word; behind these ids nothing is a first word.
        self._lead = self.ids("a")
        self._lead_length = len(self.text(self._lead))

    def ids(self, text: str) -> list[int]:
        """The ids that the tokenizer writes for `text`."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def text(self, ids: Sequence[int]) -> str:
        """What `ids` say."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def lengthened(self, text: str, ids: Sequence[int]) -> str:
        """What `ids` say behind other text, given that all but the last of them say `text` there."""
        piece = self._piece(ids[-1])
        return self._behind(ids) if HALF in text[-1:] + piece else text + piece

    def readable(self, ids: Sequence[int]) -> int:
        """How many of `ids` say whole characters. Bytes that will never be one are taken to be all there is."""
        tail = ids[-CONTEXT:]
        for pending in range(min(_MOST_PENDING, len(tail)) + 1):
            if not self.text(tail[: len(tail) - pending]).endswith(HALF):
                return len(ids) - pending
        return len(ids)

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = self._behind([token])
        return self._pieces[token]

    def _behind(self, ids: Sequence[int]) -> str:
        return self.text([*self._lead, *ids])[self._lead_length :]
