"""Attention metadata of a packed forward for the CPU kernel, in one int32 tensor.

    count of segments
    for each: first row, rows, prefix, tail, pages, starts
    the pages of each; for those that are no chains: starts of the rows' ancestors, then the ancestors

`first row` is counted over the whole forward. `prefix` tokens are committed, `tail` rows stand behind them, the last
`rows` of which belong to this forward. `pages` and `starts` are places in this tensor, `starts` -1 for a chain: row i's
ancestors, itself included, are the tail rows from place starts[i] to starts[i + 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor

from specgen.model.segment import Segment, ancestors

_HEADER = 6


def plan(segments: Sequence[Segment]) -> Tensor:
    """int32[n], n >= 2, for the segments of one forward."""
    numbers = [len(segments), *[0] * (_HEADER * len(segments))]
    first = 0
    for index, segment in enumerate(segments):
        pages = len(numbers)
        numbers += segment.table.pages[: segment.table.pool.pages_for(segment.end)]
        starts = -1
        if segment.parents is not None:
            starts = len(numbers)
            numbers += _listed(ancestors(segment.parents)[-len(segment.tokens) :], starts)
        header = first, len(segment.tokens), segment.table.length, segment.tail, pages, starts
        numbers[1 + _HEADER * index : 1 + _HEADER * (index + 1)] = header
        first += len(segment.tokens)
    return torch.tensor(numbers, dtype=torch.int32)


def _listed(paths: Sequence[Sequence[int]], place: int) -> list[int]:
    """The starts of the rows' ancestors, then the ancestors, where the starts stand at `place`."""
    first = place + len(paths) + 1
    starts = accumulate(map(len, paths), initial=first)
    return [*starts, *chain.from_iterable(paths)]
