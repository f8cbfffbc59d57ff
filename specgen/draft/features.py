"""What the target's forward computed anyway, for drafters that learn from it: no pass of its own, no copy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a drafter wants to see of each forward.

    layers: hidden states, as transformers counts them in `hidden_states`: 0 is the embeddings, i what layer i reads,
        and the number of layers what the language-model head reads.
    successors: how many of the likeliest tokens behind each row.
    """

    layers: tuple[int, ...] = ()
    successors: int = 0

    @staticmethod
    def union(several: Iterable[Wanted]) -> Wanted:
        """All that any of them wants."""
        several = tuple(several)
        layers = {layer for wanted in several for layer in wanted.layers}
        return Wanted(tuple(sorted(layers)), max((wanted.successors for wanted in several), default=0))


@dataclass(frozen=True, slots=True)
class Features:
    """One forward's word on one sequence.

    Rows that stay, one behind the other from absolute position `position` on: a chunk of the prompt, or the last
    committed token and the accepted nodes. A position may come again after a preemption, and positions that a cached
    prefix holds never come.
    hidden: per wanted layer the states of the rows that stay, [rows, width] in the model's dtype.
    asked: the tokens of all rows whose logits were computed, also of nodes that were not accepted.
    successors: int64[len(asked), k], the likeliest tokens behind each of them, likeliest first.
    scores: float32[len(asked), k], their logits.
    """

    position: int
    hidden: Mapping[int, Tensor] = field(default_factory=dict)
    asked: tuple[int, ...] = ()
    successors: Tensor | None = None
    scores: Tensor | None = None
