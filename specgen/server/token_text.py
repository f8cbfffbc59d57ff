"""Single tokens as text and bytes, for log-probabilities and traces."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from specgen.engine.detokenizer import IncrementalDetokenizer
from specgen.engine.request import Request
from specgen.server.protocol.responses import ChatLogprobs, StepTrace, TokenLogprob, TopLogprob, TracedNode, TracedToken
from specgen.types import Logprob, Prompt, Result, StepOutput

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
        self._anchor = self._found_anchor()

    def bytes(self, token: int) -> list[int]:
        """What a token stands for, be it a part of a character."""
        text = self.text(token)
        if "\ufffd" not in text:
            return list(text.encode())
        written = self.tokenizer.convert_ids_to_tokens(token)
        if found := _BYTE.fullmatch(written):
            return [int(found[1], 16)]
        # Otherwise the token is said to be U+FFFD itself.
        return [_BYTES[letter] for letter in written] if all(map(_BYTES.__contains__, written)) else list(text.encode())

    def name(self, token: int) -> str:
        """The text of a token, or, as OpenAI writes parts of characters, its bytes: those have no text, and would all
        be called the same."""
        text = self.text(token)
        if "\ufffd" not in text:
            return text
        spelt = bytes(self.bytes(token))
        return text if spelt == text.encode() else "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelt)

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

    def spelling(self, request: Request) -> Spelling:
        """For one sequence of a request."""
        return Spelling(self, request)

    def tracer(self, request: Request) -> Tracer:
        """For one sequence of a request."""
        return Tracer(self, request)

    def _text(self, token: int) -> str:
        """A token as it is spelt within a text: at the beginning of one, some tokenizers leave out a space."""
        alone = self._decode([token], skip_special=False)
        if self._anchor is None:
            return alone
        before, ids = self._anchor
        behind = self._decode([*ids, token], skip_special=False)
        return behind.removeprefix(before) if behind.startswith(before) else alone

    def _found_anchor(self) -> tuple[str, list[int]] | None:
        """A word that others are spelt behind, as text and ids."""
        if self.tokenizer is None:
            return None
        ids = list(self.tokenizer.encode("a", add_special_tokens=False))
        text = self._decode(ids, skip_special=False)
        return (text, ids) if text and "\ufffd" not in text else None

    def _decode(self, ids: list[int], *, skip_special: bool) -> str:
        if self.tokenizer is None:
            return ""
        found: str = self.tokenizer.decode(ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
        return found


class Spelling:
    """The log-probabilities of one sequence as they may be shown, each with the place of its token in the text.

    Those of tokens from behind the beginning of a stop string are not: `text` ends before it. As long as a text may
    still turn out to be one, they wait.
    """

    def __init__(self, texts: Texts, request: Request) -> None:
        skip = request.params.skip_special_tokens
        self._cursor = IncrementalDetokenizer.after(request.ids, texts.tokenizer, skip_special=skip)
        self._may_stop = bool(request.params.stop)
        self._spelt = 0
        self._shown = 0
        self._held: deque[tuple[int, Logprob]] = deque()

    def take(self, logprobs: Sequence[Logprob], text: str, result: Result | None) -> list[tuple[int, Logprob]]:
        """(place, log-probability) of what is to be shown now; logprobs and text are what an output added, result is
        its last one's."""
        for each in logprobs:
            self._held.append((self._spelt, each))
            self._cursor, piece, _ = self._cursor.advance([each.token])
            self._spelt += len(piece)
        self._shown += len(text)
        is_cut = isinstance(result.stop, str) if result else self._may_stop
        found = []
        while self._held and (not is_cut or self._held[0][0] < self._shown):
            found.append(self._held.popleft())
        return found


class Tracer:
    """The traces of one sequence, its tokens in pieces that join to its text, and to a stop string that ended it."""

    def __init__(self, texts: Texts, request: Request) -> None:
        skip = request.params.skip_special_tokens
        self._texts = texts
        self._cursor = IncrementalDetokenizer.after(request.ids, texts.tokenizer, skip_special=skip)

    def trace(self, output: StepOutput) -> StepTrace:
        """Who guessed the tokens of an output, and the tree of its step."""
        trace = output.trace
        guessers = [trace.drafters[node] for node in trace.accepted] if trace else []
        tokens = []
        for place, text in enumerate(self._pieces(output)):
            tokens.append(TracedToken(text, list(guessers[place]) if place < len(guessers) else []))
        if trace is None:
            return StepTrace(tokens, [])
        nodes = zip(trace.tree.tokens, trace.tree.parents, trace.tree.confidence, trace.drafters, strict=True)
        tree = [
            TracedNode(self._texts.text(token), parent, list(drafters), node in trace.accepted, round(confidence, 3))
            for node, (token, parent, confidence, drafters) in enumerate(nodes)
        ]
        return StepTrace(tokens, tree)

    def _pieces(self, output: StepOutput) -> list[str]:
        """What each token of an output adds to the text; a token that ended it adds nothing."""
        ended = output.result is not None and isinstance(output.result.stop, int)
        pieces = []
        for token in output.tokens[: len(output.tokens) - ended]:
            self._cursor, text, _ = self._cursor.advance([token])
            pieces.append(text)
        pieces += [""] * ended
        if output.result is not None and not isinstance(output.result.stop, str):
            pieces[-1] += self._cursor.flush()
        return pieces
