"""Special tokens in what people write: spelt out, so that nobody ends a turn or begins another one's by writing so."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase


class Literals:
    """The special tokens of one tokenizer as they stand in messages, on their way through a chat template.

    Before the template they are replaced by marks that it passes on; behind it each mark is spelt in two pieces,
    neither of which is a special token, and the text between the marks is tokenised as ever.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tokens = sorted(_special_tokens(tokenizer), key=len, reverse=True)
        self._words = re.compile("|".join(map(re.escape, self._tokens)) or "(?!)")
        # Nobody can guess it, so nobody can write a mark.
        self._nonce = secrets.token_hex(4)
        self._marks = re.compile(f"\ue000{self._nonce}:(\\d+)\ue001")

    def stand_in(self, value: Any) -> bool:
        """Whether any text inside holds a special token."""
        return bool(self.marked(value) != value)

    def marked(self, value: object) -> Any:
        """A copy with marks for special tokens in every text inside."""
        return _each_text(value, lambda text: self._words.sub(self._mark, text))

    def encode(self, rendered: str) -> tuple[int, ...]:
        """The ids of what the template made of marked messages. Raises ValueError if it wrote a mark otherwise."""
        ids: list[int] = []
        # Every second piece is the number of a mark.
        for place, piece in enumerate(self._marks.split(rendered)):
            token = self._tokens[int(piece)] if place % 2 else ""
            if not token and self._nonce in piece:
                raise ValueError("it does not write special tokens in the messages as they are")
            for text in (token[:1], token[1:]) if token else (piece,):
                ids += self._tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return tuple(ids)

    def _mark(self, found: re.Match[str]) -> str:
        return f"\ue000{self._nonce}:{self._tokens.index(found[0])}\ue001"


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """All that become one control token in any text. Those with a role have a name; others only say that they are."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}


def _each_text(value: object, change: Callable[[str], str]) -> object:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_each_text(key, change): _each_text(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_each_text(inner, change) for inner in value)
    return value
