"""Codes of a KV format as kernels read them; see `specgen.kernels.kv_layout.Coding`.

Codes go through the matrix product as they are, exact in every dtype; sizes belong to whole vectors, so they are
applied to scores and to weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specgen.kernels.kv_layout import Coding, LayerPlanes

PLAIN, SCALED, AFFINE4 = (tl.constexpr(int(coding)) for coding in Coding)
_MIDDLE = tl.constexpr(8)
_E4M3_TO_HALF = tl.constexpr(256.0)


def operands(kept: LayerPlanes, nothing: Tensor) -> tuple[Tensor, ...]:
    """What kernels are given of a layer: codes of keys and values, sizes of both, centre. `nothing` stands for what
    there is not."""
    sizes = (nothing if there is None else there for there in (kept.key_sizes, kept.value_sizes, kept.centre))
    return _as_bytes(kept.key), _as_bytes(kept.value), *sizes


def _as_bytes(plane: Tensor) -> Tensor:
    """A plane as the kernels take it: e4m3, which not every processor knows, as its bits."""
    return plane.view(torch.uint8) if plane.dtype == torch.float8_e4m3fn else plane


def tile_width(dim: int) -> int:
    """The least width of a tile for heads of `dim` numbers that a matrix product takes."""
    return max(16, int(triton.next_power_of_2(dim)))


@triton.jit
def load_codes(
    plane: tl.tensor,
    vectors: tl.tensor,
    valid: tl.tensor,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    CODING: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    """DTYPE[n, BLOCK]: the codes of vectors [n], counted over slots and heads; zero where not `valid` and behind DIM.

    e4m3 comes out 256 times too small, 4-bit codes 8 too small: `load_sizes` makes up for it.
    """
    if CODING == AFFINE4:
        pairs = tl.arange(0, BLOCK // 2)
        there = valid[:, None] & (pairs < DIM // 2)[None, :]
        packed = tl.load(plane + vectors[:, None] * (DIM // 2) + pairs[None, :], mask=there, other=0)
        codes = tl.interleave(packed & 15, packed >> 4).to(tl.int8) - _MIDDLE
        dims = tl.arange(0, BLOCK)
        codes = tl.where((dims < DIM)[None, :], codes, 0)
    else:
        dims = tl.arange(0, BLOCK)
        there = valid[:, None] & (dims < DIM)[None, :]
        codes = tl.load(plane + vectors[:, None] * DIM + dims[None, :], mask=there, other=0)
        if plane.dtype.element_ty == tl.uint8:
            # e4m3's exponent and mantissa, moved to where float16 has them; every processor can do that.
            bits = codes.to(tl.int16)
            codes = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    if codes.dtype != DTYPE:
        # By way of float32, which the interpreter needs.
        codes = codes.to(tl.float32).to(DTYPE)
    return codes


@triton.jit
def load_sizes(
    plane: tl.tensor, codes: tl.tensor, vectors: tl.tensor, valid: tl.tensor, CODING: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """float32[n] each, step and offset: a vector is what `load_codes` gave times step plus offset."""
    if CODING == AFFINE4:
        low = tl.load(plane + vectors * 2, mask=valid, other=0.0).to(tl.float32)
        step = tl.load(plane + vectors * 2 + 1, mask=valid, other=0.0).to(tl.float32)
        return step, low + step * _MIDDLE
    scale = tl.load(plane + vectors, mask=valid, other=0.0).to(tl.float32)
    if codes.dtype.element_ty == tl.uint8:
        scale = scale * _E4M3_TO_HALF
    return scale, tl.zeros_like(scale)
