"""Low-rank products of many adapters, each added on its own rows: shrink, then expand.

The inputs are cut into a fixed number of pieces that are summed up side by side and added in order, so that a few rows
fill a GPU, and a row's bits do not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from specgen.kernels.triton.dot import product

_ROWS, _INPUTS, _OUTPUTS = 16, 128, 64
_PIECES = 8
_TILE = tl.constexpr(4)


@triton.jit
def _shrink(
    x: tl.tensor,
    shrunk: tl.tensor,
    tiles: tl.tensor,
    adapters: tl.tensor,
    rows: int,
    inputs: int,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
    PIECES: tl.constexpr,
) -> None:
    """shrunk[piece, row, rank] = x[row] @ down^T over the inputs of one piece."""
    tile, piece = tiles + tl.program_id(0) * _TILE, tl.program_id(1)
    row = tl.load(tile) + tl.arange(0, ROWS)
    live = tl.arange(0, ROWS) < tl.load(tile + 1)
    rank = tl.load(tile + 3)
    down = tl.load(adapters + tl.load(tile + 2) * 2).to(tl.pointer_type(x.dtype.element_ty))
    ranks = tl.arange(0, RANK)
    sums = tl.zeros([ROWS, RANK], tl.float32)
    for block in range(piece * INPUTS, inputs, PIECES * INPUTS):
        column = block + tl.arange(0, INPUTS)
        at = row.to(tl.int64)[:, None] * inputs + column[None, :]
        left = tl.load(x + at, mask=live[:, None] & (column < inputs)[None, :], other=0.0)
        at = ranks[:, None] * inputs + column[None, :]
        right = tl.load(down + at, mask=(ranks < rank)[:, None] & (column < inputs)[None, :], other=0.0)
        sums = product(left, tl.trans(right), sums)
    at = (piece * rows + row).to(tl.int64)[:, None] * RANK + ranks[None, :]
    tl.store(shrunk + at, sums, mask=live[:, None])


@triton.jit
def _expand(
    y: tl.tensor,
    shrunk: tl.tensor,
    tiles: tl.tensor,
    adapters: tl.tensor,
    rows: int,
    outputs: int,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PIECES: tl.constexpr,
) -> None:
    """y[row] += shrunk[row] @ up."""
    tile = tiles + tl.program_id(0) * _TILE
    row = tl.load(tile) + tl.arange(0, ROWS)
    live = tl.arange(0, ROWS) < tl.load(tile + 1)
    rank = tl.load(tile + 3)
    up = tl.load(adapters + tl.load(tile + 2) * 2 + 1).to(tl.pointer_type(y.dtype.element_ty))
    ranks, column = tl.arange(0, RANK), tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    left = tl.zeros([ROWS, RANK], tl.float32)
    for piece in range(PIECES):
        at = (piece * rows + row).to(tl.int64)[:, None] * RANK + ranks[None, :]
        left += tl.load(shrunk + at, mask=live[:, None], other=0.0)
    there = (column < outputs)[None, :]
    at = ranks[:, None] * outputs + column[None, :]
    right = tl.load(up + at, mask=(ranks < rank)[:, None] & there, other=0.0).to(tl.float32)
    place = y + row.to(tl.int64)[:, None] * outputs + column[None, :]
    before = tl.load(place, mask=live[:, None] & there, other=0.0).to(tl.float32)
    tl.store(place, product(left, right, before).to(y.dtype.element_ty), mask=live[:, None] & there)


def segmented_lora(y: Tensor, x: Tensor, bounds: Sequence[int], downs: Sequence[Tensor], ups: Sequence[Tensor]) -> None:
    """Add to y [rows, outputs] each adapter's product over x [rows, inputs] on its own rows, in place.

    Adapter i has rows bounds[2 * i] to bounds[2 * i + 1], downs[i]: [rank, inputs] and ups[i]: [rank, outputs], its
    scaling in one of them; ranks may differ. All contiguous and of one dtype. Sums in float32.
    """
    ranks = [len(down) for down in downs]
    tiles = [
        (row, min(_ROWS, stop - row), adapter, ranks[adapter])
        for adapter, (first, stop) in enumerate(zip(bounds[::2], bounds[1::2], strict=True))
        for row in range(first, stop, _ROWS)
    ]
    if not tiles:
        return
    addresses = [(down.data_ptr(), up.data_ptr()) for down, up in zip(downs, ups, strict=True)]
    table = torch.tensor(tiles, dtype=torch.int32, device=x.device)
    adapters = torch.tensor(addresses, dtype=torch.int64, device=x.device)
    (rows, inputs), outputs = x.shape, y.shape[1]
    rank = max(16, triton.next_power_of_2(max(ranks)))
    shrunk = torch.empty(_PIECES, rows, rank, dtype=torch.float32, device=x.device)
    either = {"RANK": rank, "ROWS": _ROWS, "PIECES": _PIECES}
    _shrink[(len(tiles), _PIECES)](x, shrunk, table, adapters, rows, inputs, INPUTS=_INPUTS, **either)
    blocks = triton.cdiv(outputs, _OUTPUTS)
    _expand[(len(tiles), blocks)](y, shrunk, table, adapters, rows, outputs, OUTPUTS=_OUTPUTS, **either)
