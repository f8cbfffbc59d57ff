"""Attention masks of a segment: which keys each of its rows sees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specgen.model.attention.reach import EVERYTHING, Reach
from specgen.model.attention.rowwise import VisibleKeys, visible_in_chain, visible_in_mask
from specgen.model.segment import Segment


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
    visible = segment.visible
    if visible is None:
        visible = torch.ones(tail, tail, dtype=torch.bool).tril()[tail - rows :]
    mask = torch.cat([torch.ones(rows, prefix - start, dtype=torch.bool), visible], dim=1)
    if reach != EVERYTHING:
        keys = torch.tensor([*range(start, prefix), *segment.positions])
        mask &= reach.allows(keys[-rows:, None], keys[None, :])
    return mask


def visible_keys(segment: Segment, start: int, reach: Reach) -> list[VisibleKeys]:
    """What each row sees of the keys from position `start` on, row by row."""
    prefix, rows = segment.table.length, len(segment.tokens)
    if segment.visible is None and list(segment.positions) == list(range(prefix, prefix + segment.tail)):
        return visible_in_chain(start, segment.end, [reach.oldest(p) for p in segment.positions[-rows:]])
    mask = segment_mask(segment, start, reach)
    if mask is None:
        mask = torch.ones(1, segment.end - start, dtype=torch.bool)
    return visible_in_mask(mask, prefix - start)


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
