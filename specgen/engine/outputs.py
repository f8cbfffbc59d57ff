"""One forward as each of its sequences sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from specgen.draft.features import Features
from specgen.model.output import ForwardOutput
from specgen.model.segment import Segment


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """The part of a forward that belongs to one segment. `logits`, `drawn` and `top` are of its wanted rows, `hidden`
    of all of them.

    logits: [wanted, vocab]. drawn: the token of each where rows are drawn at once, else the argmax. top: scores and ids
    of their likeliest tokens, [wanted, k] each. hidden: per watched layer [rows, width].
    """

    segment: Segment
    logits: Tensor
    drawn: list[int]
    top: tuple[Tensor, Tensor]
    hidden: dict[int, Tensor]

    def features(self, chain: int, nodes: Sequence[int] = ()) -> Features:
        """What drafters are shown: the first `chain` rows stay, and of the tree below them `nodes`, from the root down.

        The chain is looked at without a copy, and so is a path of nodes that lie one behind the other.
        """
        hidden = {layer: _kept(rows, chain, nodes) for layer, rows in self.hidden.items()}
        asked = tuple(self.segment.tokens[row] for row in self.segment.logits)
        scores, successors = self.top
        return Features(self.segment.first_position, hidden, asked, successors, scores)


def views(
    segments: Sequence[Segment],
    scores: ForwardOutput,
    top: tuple[Tensor, Tensor],
    drawn: list[int],
    layers: Sequence[int],
) -> list[SequenceOutput]:
    """A forward, taken apart. `top` and `drawn` are of the wanted rows of all segments."""
    wanted = [len(segment.logits) for segment in segments]
    rows = [len(segment.tokens) for segment in segments]
    ends = list(accumulate(wanted))
    hidden = [states.split(rows) for states in scores.hidden]
    return [
        SequenceOutput(
            segment,
            logits,
            drawn[end - len(logits) : end],
            (values, ids),
            {layer: states[index] for layer, states in zip(layers, hidden, strict=True)},
        )
        for index, (segment, logits, values, ids, end) in enumerate(
            zip(segments, scores.logits.split(wanted), top[0].split(wanted), top[1].split(wanted), ends, strict=True)
        )
    ]


def _kept(rows: Tensor, chain: int, nodes: Sequence[int]) -> Tensor:
    if all(node == place for place, node in enumerate(nodes)):
        return rows[: chain + len(nodes)]
    return rows[[*range(chain), *(chain + node for node in nodes)]]
