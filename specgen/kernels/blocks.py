"""Work on rows in blocks of a few fixed sizes, so that each row meets the same arithmetic whatever stands beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def in_blocks(work: Callable[[Tensor], Tensor], rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """`work` over rows [n, ...], in blocks of `sizes` (ascending) and of no other size; zeros fill the last one.

    The rest goes into the smallest block that holds it: one call is cheaper than several smaller ones.
    """
    count = len(rows)
    done: list[Tensor] = []
    start = 0
    while start < count or not done:
        size = next((size for size in sizes if size >= count - start), sizes[-1])
        block = rows[start : start + size]
        if len(block) < size:
            block = torch.cat([block, block.new_zeros(size - len(block), *rows.shape[1:])])
        done.append(work(block))
        start += size
    output = done[0] if len(done) == 1 else torch.cat(done)
    return output if start == count else output[:count]
