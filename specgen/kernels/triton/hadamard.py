"""Heads rotated by the Hadamard matrix, as formats do that rotate; see `specgen.kv.formats.hadamard`."""

from __future__ import annotations

import triton
import triton.language as tl

from specgen.kernels.triton.dot import product


@triton.jit
def rotated(x: tl.tensor, DIM: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """float32[rows, BLOCK]: each row of x [rows, BLOCK] rotated; its first DIM numbers count.

    The signs are products in any dtype exactly; the factor comes after. The matrix is symmetric and its own inverse.
    """
    SIZE: tl.constexpr = DIM & -DIM
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    both = (row & column) & (SIZE - 1)
    both ^= both >> 4
    both ^= both >> 2
    both ^= both >> 1
    together = (row // SIZE == column // SIZE) & (row < DIM) & (column < DIM)
    signs = (
        tl.where(together, 1 - 2 * (both & 1), 0).to(tl.float32).to(tl.bfloat16 if x.dtype == tl.float32 else x.dtype)
    )
    sums = tl.zeros(x.shape, tl.float32)
    if x.dtype == tl.float32:
        # Three bfloat16 numbers hold a float32 whole, and tensor cores take them.
        high = x.to(tl.bfloat16)
        rest = x - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        sums = product(high, signs, product(middle, signs, product(low, signs, sums)))
    else:
        sums = product(x, signs, sums)
    return sums * (1.0 / SIZE) ** 0.5
