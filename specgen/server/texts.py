"""Single tokens as text and bytes, for log-probabilities and traces."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from specgen.params import Request
from specgen.server.answers import ChatLogprobs, StepTrace, TokenLogprob, TopLogprob, TracedNode, TracedToken
from specgen.text import TextCursor
from specgen.types import Logprob, Prompt, StepOutput

LOWEST: float = -9999.0
"""OpenAI's word for impossible: JSON has no infinity."""
_CACHED = 65536
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}


class Texts:
    """The tokens of one tokenizer, which may be None: then they have no text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.text: Callable[[int], str] = lru_cache(_CACHED)(self._text)

    def bytes(self, token: int) -> list[int]:
        """What a token stands for, be it a part of a character."""
        text = self.text(token)
        if "\ufffd" not in text:
            return list(text.encode())
        written = self.tokenizer.convert_ids_to_tokens(token)
        if found := _BYTE.fullmatch(written):
            return [int(found[1], 16)]
        return [_BYTES[letter] for letter in written] if all(letter in _BYTES for letter in written) else []

    def prompt(self, prompt: Prompt) -> str:
        """A prompt of a completion, text or ids, as text."""
        return prompt if isinstance(prompt, str) else self._decode(list(prompt), skip_special=True)  # type: ignore[arg-type]

    def chat_logprobs(self, logprobs: Sequence[Logprob]) -> ChatLogprobs:
        """Log-probabilities as chats show them."""
        return ChatLogprobs(
            [
                TokenLogprob(
                    self.text(each.token),
                    max(LOWEST, each.logprob),
                    self.bytes(each.token),
                    [TopLogprob(self.text(token), max(LOWEST, value), self.bytes(token)) for token, value in each.top],
                )
                for each in logprobs
            ]
        )

    def tracer(self, request: Request) -> Tracer:
        """For one sequence of a request."""
        return Tracer(self, request)

    def _text(self, token: int) -> str:
        return self._decode([token], skip_special=False)

    def _decode(self, ids: list[int], *, skip_special: bool) -> str:
        if self.tokenizer is None:
            return ""
        found: str = self.tokenizer.decode(ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
        return found


class Tracer:
    """The traces of one sequence, its tokens in pieces that join to its text."""

    def __init__(self, texts: Texts, request: Request) -> None:
        skip = request.params.skip_special_tokens
        self._texts = texts
        self._cursor = TextCursor.after(request.ids, texts.tokenizer, skip_special=skip)

    def trace(self, output: StepOutput) -> StepTrace:
        """Who guessed the tokens of an output, and the tree of its step."""
        trace = output.trace
        guessers = [trace.drafters[node] for node in trace.accepted] if trace else []
        tokens = []
        for place, token in enumerate(output.tokens):
            self._cursor, text, _ = self._cursor.advance([token])
            tokens.append(TracedToken(text, list(guessers[place]) if place < len(guessers) else []))
        if trace is None:
            return StepTrace(tokens, [])
        nodes = zip(trace.tree.tokens, trace.tree.parents, trace.tree.confidence, trace.drafters, strict=True)
        tree = [
            TracedNode(self._texts.text(token), parent, list(drafters), node in trace.accepted, round(confidence, 3))
            for node, (token, parent, confidence, drafters) in enumerate(nodes)
        ]
        return StepTrace(tokens, tree)
