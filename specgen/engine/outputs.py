"""One forward as each of its sequences sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from specgen.draft.features import Features
from specgen.model.output import ForwardOutput
from specgen.model.segment import Segment
from specgen.sampling.batch_sampler import SampledRows


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """The part of a forward that belongs to one segment. `logits`, `tokens` and `top` are of its wanted rows, `hidden`
    of all of them.

    logits: [wanted, vocab]. tokens: the token drawn at each, `None` where they are drawn one by one; see
    `SampledRows`. top: scores and ids of their likeliest tokens, [wanted, k] each. hidden: per watched layer
    [rows, width].
    """

    segment: Segment
    logits: Tensor
    tokens: Sequence[int] | None
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


def sequence_outputs(
    segments: Sequence[Segment], output: ForwardOutput, sampled: SampledRows, layers: Sequence[int]
) -> list[SequenceOutput]:
    """A forward, taken apart. layers: those whose hidden states it holds."""
    wanted = [len(segment.logits) for segment in segments]
    rows = [len(segment.tokens) for segment in segments]
    hidden = [states.split(rows) for states in output.hidden]
    parts = zip(
        segments,
        output.logits.split(wanted),
        sampled.tokens,
        sampled.scores.split(wanted),
        sampled.ids.split(wanted),
        strict=True,
    )
    return [
        SequenceOutput(
            segment,
            logits,
            tokens,
            (scores, ids),
            {layer: states[index] for layer, states in zip(layers, hidden, strict=True)},
        )
        for index, (segment, logits, tokens, scores, ids) in enumerate(parts)
    ]


def _kept(rows: Tensor, chain: int, nodes: Sequence[int]) -> Tensor:
    if all(node == place for place, node in enumerate(nodes)):
        return rows[: chain + len(nodes)]
    return rows[[*range(chain), *(chain + node for node in nodes)]]
