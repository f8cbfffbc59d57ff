"""A drafter that is told the truth and passes it on as often as it is asked to. specgen's tests draft with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Annotated

import msgspec

from specgen import (
    Drafter,
    DrafterFactory,
    DrafterSetup,
    DraftHints,
    DraftSession,
    TokenTree,
    hookimpl,
    read_options,
    takes_options,
)


class EchoOptions(msgspec.Struct, frozen=True, kw_only=True):
    """hit_rate: share of positions, 0 to 1, where the truth is in the tree. Which ones is a function of `seed`.
    siblings: wrong nodes beside each node of the main path, each with a wrong child of its own.
    depth: length of the main path.
    confidence: what each node claims, 0 to 1; `None` tells the truth, the hit rate over the nodes of a level.
    """

    hit_rate: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0
    siblings: Annotated[int, msgspec.Meta(ge=0, le=62)] = 1
    depth: Annotated[int, msgspec.Meta(ge=1, le=63)] = 8
    seed: Annotated[int, msgspec.Meta(ge=0)] = 0
    confidence: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None


@takes_options(EchoOptions)
def echo(setup: DrafterSetup) -> EchoDrafter:
    """The factory. Raises UnknownName for an option that there is not, InvalidRequest for a value out of range."""
    return EchoDrafter(setup.vocab_size, read_options("drafter 'echo'", setup.options, EchoOptions))


@hookimpl
def drafters() -> Mapping[str, DrafterFactory]:
    """Offer "echo"."""
    return {"echo": echo}


class EchoDrafter(Drafter):
    """Drafts from `hints.prediction`, which must hold the true continuation as token ids."""

    def __init__(self, vocab_size: int, options: EchoOptions) -> None:
        self.vocab_size, self.options = vocab_size, options

    def open(self, prompt: Sequence[int], hints: DraftHints) -> DraftSession:
        """A session that knows the truth at the positions after `prompt` that `hints.prediction` covers."""
        return EchoSession(self, len(prompt), hints.prediction)


class EchoSession(DraftSession):
    """Hits and noise are functions of the absolute position, so they do not depend on where steps begin and end."""

    def __init__(self, drafter: EchoDrafter, length: int, prediction: tuple[int, ...]) -> None:
        self._vocab_size, self._options = drafter.vocab_size, drafter.options
        self._start = self._position = length
        self._prediction = prediction

    def propose(self, max_nodes: int) -> TokenTree:
        """Level by level: the main node among its noise, then the noise's children. Where nodes run out, noise goes."""
        tokens: list[int] = []
        parents: list[int] = []
        main, end = -1, self._position + self._options.depth
        for position in range(self._position, end):
            truth = self._hit(position)
            level = self._level(position, truth, min(self._options.siblings + 1, max_nodes - len(tokens)))
            if not level:
                break
            nodes = range(len(tokens), len(tokens) + len(level))
            tokens += level
            parents += [main] * len(level)
            main = nodes[level.index(truth) if truth in level else 0]
            if position + 1 < end:
                child = self._noise(position + 1, 1)
                wrong = [node for node in nodes if node != main][: max_nodes - len(tokens)]
                tokens += child * len(wrong)
                parents += wrong * len(child)
        claim = self._options.confidence
        if claim is None:
            claim = self._options.hit_rate / (self._options.siblings + 1)
        return TokenTree(tuple(tokens), tuple(parents), (claim,) * len(tokens))

    def commit(self, tokens: Sequence[int]) -> None:
        """Forget the prediction for good once `tokens` have left it."""
        at = self._position - self._start
        if tuple(tokens) != self._prediction[at : at + len(tokens)]:
            self._prediction = ()
        self._position += len(tokens)

    def _truth(self, position: int) -> int | None:
        at = position - self._start
        return self._prediction[at] if at < len(self._prediction) else None

    def _hit(self, position: int) -> int | None:
        hit = self._hash("hit", position) < self._options.hit_rate * 2**64
        truth = self._truth(position)
        return truth if hit and truth is not None and 0 <= truth < self._vocab_size else None

    def _level(self, position: int, truth: int | None, count: int) -> list[int]:
        """`count` nodes of one depth in a shuffled order, the truth among them unless it is None."""
        if truth is None or count < 1:
            return self._noise(position, count)
        level = self._noise(position, count - 1)
        level.insert(self._hash("order", position) % (len(level) + 1), truth)
        return level

    def _noise(self, position: int, count: int) -> list[int]:
        """`count` different tokens that are wrong at `position`; fewer if the vocabulary has no more."""
        first, truth = self._hash("noise", position), self._truth(position)
        run = ((first + step) % self._vocab_size for step in range(min(count + 1, self._vocab_size)))
        return [token for token in run if token != truth][: max(count, 0)]

    def _hash(self, use: str, position: int) -> int:
        digest = blake2b(f"{use} {self._options.seed} {position}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")
