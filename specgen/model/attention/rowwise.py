"""Attention of rows that do not know of one another: each over exactly the keys it sees, laid out as if it were alone.

A row's keys lie in order from an aligned address, whether they were committed one by one, came in a prompt chunk or
hang in a tree: then the call is the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ALIGNMENT = 64
"""Bytes. Matrix products may start differently, and so round differently, where an address is not a multiple of it."""


@dataclass(frozen=True, slots=True)
class VisibleKeys:
    """What a row sees: keys `[first, stop)`, once those of the tail at `tail` are laid behind the committed prefix.

    tail: int64[n], counted from the prefix's end; `None` where they lie there already.
    """

    first: int
    stop: int
    tail: Tensor | None = None


def visible_in_chain(start: int, stop: int, oldest: Sequence[int]) -> list[VisibleKeys]:
    """The last rows of `[start, stop)`, each of which sees all before it from its `oldest` position on."""
    count = len(oldest)
    return [VisibleKeys(max(0, first - start), stop - start - (count - 1 - row)) for row, first in enumerate(oldest)]


def row_by_row(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Sequence[VisibleKeys],
    prefix: int,
) -> Tensor:
    """`attend` for each row of query [rows, heads, key_dim] alone, over key and value [keys, kv_heads, dim].

    prefix: how many of the keys are committed. Returns [heads, rows, value_dim].
    """
    branches = any(row.tail is not None for row in seen)
    tails = key[prefix:], value[prefix:]
    if branches:
        key, value = key.clone(), value.clone()
    outputs = []
    for number, row in enumerate(seen):
        if row.tail is not None:
            key[prefix : row.stop], value[prefix : row.stop] = (tail[row.tail] for tail in tails)
        keys, values = (_aligned(side[row.first : row.stop]).transpose(0, 1) for side in (key, value))
        outputs.append(attend(_aligned(query[number])[:, None], keys, values))
    return torch.cat(outputs, dim=1)


def _aligned(x: Tensor) -> Tensor:
    """`x`, contiguous and from an aligned address on."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % _ALIGNMENT else x
