"""New keys and values into the pool, as its format keeps them: rotated, centred, rounded to codes, scattered.

Each vector of a head is coded alone, by the arithmetic of `specgen.kv.formats`: what a token's KV reads as depends on
nothing beside it. One launch writes both sides.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from specgen.kernels.kv_layout import Coding, LayerPlanes
from specgen.kernels.triton.hadamard import rotated
from specgen.kernels.triton.kv_codes import AFFINE4, PLAIN, operands, tile_width

_VECTORS = 16
_LEAST_SCALE, _MOST_SCALE = tl.constexpr(2.0**-20), tl.constexpr(65504.0)
# Added and taken off again, it leaves a float32 rounded to a whole number, halves to the even one.
_ROUNDER = tl.constexpr(1.5 * 2.0**23)
_RANGES, _NARROWER, _FITS = tl.constexpr(6), tl.constexpr(0.04), tl.constexpr(2)


@triton.jit
def _rounded(x: tl.tensor) -> tl.tensor:
    return (x + _ROUNDER) - _ROUNDER


@triton.jit
def _positive(scale: tl.tensor) -> tl.tensor:
    """A scale as it is stored, never zero."""
    return tl.minimum(tl.maximum(scale, _LEAST_SCALE), _MOST_SCALE).to(tl.float16)


@triton.jit
def _e4m3(x: tl.tensor) -> tl.tensor:
    """The eight bits of the e4m3 number next to x, |x| <= 448, halves to the even one."""
    size = tl.abs(x)
    bits = size.to(tl.int32, bitcast=True)
    # Exponent and mantissa lie as in float32, whose bias is 120 more and whose mantissa has 20 bits more.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = _rounded(size * 512.0).to(tl.int32)
    code = tl.where(size < 0.015625, small, normal)
    return (code | tl.where(x.to(tl.int32, bitcast=True) < 0, 0x80, 0)).to(tl.uint8)


@triton.jit
def _levels(x: tl.tensor, low: tl.tensor, step: tl.tensor) -> tl.tensor:
    """The nearest of sixteen levels for each number."""
    level = _rounded(tl.div_rn(x - low.to(tl.float32)[:, None], step.to(tl.float32)[:, None] + tl.zeros_like(x)))
    return tl.minimum(tl.maximum(level, 0.0), 15.0)


@triton.jit
def _four_bits(x: tl.tensor, real: tl.tensor, DIM: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Levels float32[n, BLOCK], lowest level and step float16[n]; see `specgen.kv.formats`."""
    least = tl.min(tl.where(real, x, float("inf")), axis=1)
    most = tl.max(tl.where(real, x, float("-inf")), axis=1)
    mean = tl.sum(x, axis=1) / DIM
    best_lost = tl.full(least.shape, float("inf"), tl.float32)
    best_low, best_step = least.to(tl.float16), least.to(tl.float16)
    for number in tl.static_range(_RANGES):
        half = (most - least) * 0.5 * (1.0 - number * _NARROWER)
        low, step = ((least + most) * 0.5 - half).to(tl.float16), _positive(half * 2.0 / 15.0)
        for _ in tl.static_range(_FITS):
            levels = tl.where(real, _levels(x, low, step), 0.0)
            level_mean = tl.sum(levels, axis=1) / DIM
            spread = tl.where(real, levels - level_mean[:, None], 0.0)
            size = tl.maximum(tl.sum(spread * spread, axis=1), 1.0)
            slope = tl.sum(spread * (x - mean[:, None]), axis=1) / size
            low, step = (mean - slope * level_mean).to(tl.float16), _positive(slope)
        off = _levels(x, low, step) * step.to(tl.float32)[:, None] + low.to(tl.float32)[:, None] - x
        lost = tl.sum(tl.where(real, off * off, 0.0), axis=1)
        better = lost < best_lost
        best_lost = tl.where(better, lost, best_lost)
        best_low, best_step = tl.where(better, low, best_low), tl.where(better, step, best_step)
    return _levels(x, best_low, best_step), best_low, best_step


@triton.jit
def _write_side(
    new: tl.tensor,
    codes: tl.tensor,
    sizes: tl.tensor,
    centre: tl.tensor,
    slots: tl.tensor,
    count: int,
    stride_row: int,
    stride_head: int,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    CODING: tl.constexpr,
    ROTATED: tl.constexpr,
    CENTRED: tl.constexpr,
    VECTORS: tl.constexpr,
) -> None:
    number = tl.program_id(0) * VECTORS + tl.arange(0, VECTORS)
    row, head, dims = number // HEADS, number % HEADS, tl.arange(0, BLOCK)
    slot = tl.load(slots + row, mask=row < count, other=-1)
    kept, real = slot >= 0, (dims < DIM)[None, :]
    at = row.to(tl.int64) * stride_row + head * stride_head
    x = tl.load(new + at[:, None] + dims[None, :], mask=kept[:, None] & real, other=0.0)
    vector = slot.to(tl.int64) * HEADS + head
    place, there = codes + vector[:, None] * DIM + dims[None, :], kept[:, None] & real
    if ROTATED:
        x = rotated(x.to(tl.float32), DIM, BLOCK)
    if CENTRED:
        x = tl.where(real, x.to(tl.float32) - tl.load(centre + head[:, None] * DIM + dims[None, :], mask=there), 0.0)
    if CODING == PLAIN:
        tl.store(place, x.to(codes.dtype.element_ty), mask=there)
    elif CODING == AFFINE4:
        levels, low, step = _four_bits(x.to(tl.float32), real, DIM)
        even, odd = tl.split(tl.reshape(levels.to(tl.int32), (VECTORS, BLOCK // 2, 2)))
        pairs = tl.arange(0, BLOCK // 2)
        place = codes + vector[:, None] * (DIM // 2) + pairs[None, :]
        tl.store(place, (even | (odd << 4)).to(tl.uint8), mask=kept[:, None] & (pairs < DIM // 2)[None, :])
        tl.store(sizes + vector * 2, low, mask=kept)
        tl.store(sizes + vector * 2 + 1, step, mask=kept)
    else:
        x = x.to(tl.float32)
        BYTES: tl.constexpr = codes.dtype.element_ty == tl.uint8
        LARGEST: tl.constexpr = 448.0 if BYTES else 127.0
        largest = tl.max(tl.abs(x), axis=1)
        scale = _positive(tl.div_rn(largest, tl.zeros_like(largest) + LARGEST))
        x = tl.div_rn(x, scale.to(tl.float32)[:, None] + tl.zeros_like(x))
        x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
        if BYTES:
            tl.store(place, _e4m3(x), mask=there)
        else:
            tl.store(place, _rounded(x).to(tl.int8), mask=there)
        tl.store(sizes + vector, scale, mask=kept)


@triton.jit
def _write(
    key: tl.tensor,
    value: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    key_sizes: tl.tensor,
    value_sizes: tl.tensor,
    centre: tl.tensor,
    slots: tl.tensor,
    count: int,
    key_row: int,
    key_head: int,
    value_row: int,
    value_head: int,
    HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    KEY_CODING: tl.constexpr,
    VALUE_CODING: tl.constexpr,
    ROTATED: tl.constexpr,
    CENTRED: tl.constexpr,
    VECTORS: tl.constexpr,
) -> None:
    if tl.program_id(1) == 0:
        _write_side(
            key,
            keys,
            key_sizes,
            centre,
            slots,
            count,
            key_row,
            key_head,
            HEADS,
            KEY_DIM,
            KEY_BLOCK,
            KEY_CODING,
            ROTATED,
            CENTRED,
            VECTORS,
        )
    else:
        _write_side(
            value,
            values,
            value_sizes,
            centre,
            slots,
            count,
            value_row,
            value_head,
            HEADS,
            VALUE_DIM,
            VALUE_BLOCK,
            VALUE_CODING,
            ROTATED,
            False,
            VECTORS,
        )


def kv_write(key: Tensor, value: Tensor, kept: LayerPlanes, slots: Tensor) -> None:
    """Keep key and value, [rows, kv_heads, dim] each, the dims side by side.

    slots: int32[rows], -1 for rows that are not kept.
    """
    layout = kept.layout
    blocks = triton.cdiv(len(key) * layout.kv_heads, _VECTORS)
    _write[(blocks, 2)](
        key,
        value,
        *operands(kept, nothing=slots),
        slots,
        len(key),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        HEADS=layout.kv_heads,
        KEY_DIM=layout.key_dim,
        VALUE_DIM=layout.value_dim,
        KEY_BLOCK=tile_width(layout.key_dim),
        VALUE_BLOCK=tile_width(layout.value_dim),
        KEY_CODING=int(layout.key),
        VALUE_CODING=int(layout.value),
        ROTATED=layout.rotated,
        CENTRED=kept.centre is not None,
        VECTORS=_VECTORS,
        num_warps=4 if Coding.AFFINE4 in (layout.key, layout.value) or layout.rotated else 2,
    )
