"""Attention masks of a segment: which keys each of its rows sees."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from specgen.model.attention.reach import EVERYTHING, Reach
from specgen.model.attention.rowwise import VisibleKeys, visible_in_chain
from specgen.model.segment import Segment, ancestors


def first_key(segment: Segment, reach: Reach) -> int:
    """The first position of the committed prefix that any row of the segment sees."""
    if reach == EVERYTHING:
        return 0
    return min(segment.table.length, reach.oldest(min(segment.new_positions)))


def segment_mask(segment: Segment, start: int, reach: Reach) -> Tensor | None:
    """bool[rows, keys] over the keys from position `start` on; `None` where the one row sees all of them."""
    prefix, tail, rows = segment.table.length, segment.tail, len(segment.tokens)
    if rows == tail == 1 and reach.oldest(segment.first_position) <= start:
        return None
    mask = torch.cat([torch.ones(rows, prefix - start, dtype=torch.bool), tail_mask(segment)], dim=1)
    if reach != EVERYTHING:
        keys = torch.tensor([*range(start, prefix), *segment.positions])
        mask &= reach.allows(keys[-rows:, None], keys[None, :])
    return mask


def tail_mask(segment: Segment) -> Tensor:
    """bool[rows, tail]: which tail rows each row of this forward sees, whatever the layer's reach."""
    tail, rows = segment.tail, len(segment.tokens)
    if segment.parents is None:
        return torch.ones(tail, tail, dtype=torch.bool).tril()[tail - rows :]
    mask = np.zeros((tail, tail), dtype=np.bool_)
    for row, parent in enumerate(segment.parents):
        if parent >= 0:
            mask[row] = mask[parent]
        mask[row, row] = True
    return torch.from_numpy(mask[tail - rows :])


def visible_keys(segment: Segment, start: int, reach: Reach) -> list[VisibleKeys]:
    """What each row sees of the keys from position `start` on, row by row."""
    prefix, rows, positions = segment.table.length, len(segment.tokens), segment.positions
    oldest = [reach.oldest(position) for position in segment.new_positions]
    if segment.parents is None and list(positions) == list(range(prefix, prefix + segment.tail)):
        return visible_in_chain(start, segment.end, oldest)
    parents = range(-1, segment.tail - 1) if segment.parents is None else segment.parents
    paths = ancestors(parents)[-rows:]
    tails = [[row for row in path if positions[row] >= first] for path, first in zip(paths, oldest, strict=True)]
    in_place = all(tail == list(range(len(tail))) for tail in tails)
    return [
        VisibleKeys(
            min(max(0, first - start), prefix - start),
            prefix - start + len(tail),
            None if in_place else torch.tensor(tail, dtype=torch.int64),
        )
        for tail, first in zip(tails, oldest, strict=True)
    ]


def dense_mask(segments: Sequence[Segment], dtype: torch.dtype) -> Tensor:
    """[1, 1, rows, keys of all segments]: 0 where a row sees a key, the dtype's minimum elsewhere."""
    rows, keys = sum(len(s.tokens) for s in segments), sum(s.end for s in segments)
    mask = torch.full((rows, keys), torch.finfo(dtype).min, dtype=dtype)
    row = column = 0
    for segment in segments:
        visible = segment_mask(segment, 0, EVERYTHING)
        block = mask[row : row + len(segment.tokens), column : column + segment.end]
        if visible is None:
            block.zero_()
        else:
            block.masked_fill_(visible, 0)
        row, column = row + len(segment.tokens), column + segment.end
    return mask[None, None]
