"""How vectors become codes of fewer bits, in plain torch: scales and levels, and the rotation before them.

Each vector is coded alone: what a token's keys and values read as depends on nothing beside it. `specgen.kv.formats`
says which format takes which codes; the kernels compute the same.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from specgen.kernels.blocks import in_blocks

SIZES_DTYPE: Final = torch.float16
"""Of scales and lowest levels."""
_LEAST_SCALE = 2.0**-20
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_RANGES = torch.linspace(1.0, 0.8, 6)[:, None, None, None]
_FITS = 2
_ROTATED_ROWS = (16,)


def scaled(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes of `dtype` (int8 or float8_e4m3fn), [n, heads, dim], and one scale per vector, float16[n, heads, 1]."""
    largest = _LARGEST[dtype]
    x = x.float()
    scale = _positive(x.abs().amax(dim=-1, keepdim=True) / largest)
    codes = (x / scale.float()).clamp(-largest, largest)
    return (codes if dtype.is_floating_point else codes.round()).to(dtype), scale


def affine4(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sixteen levels per vector, two codes a byte: uint8[n, heads, dim / 2], and float16[n, heads, 2], the lowest level
    and the step.

    Of several ranges, each narrower than the one from a vector's smallest to its largest number, the one that loses
    least is taken, after a fit of its levels to the numbers that they stand for (least squares, twice).
    """
    x = x.float().contiguous()
    low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    half = (high - low) / 2 * _RANGES.to(x.device)
    low, step = ((low + high) / 2 - half).to(SIZES_DTYPE), _positive(2 * half / 15)
    for _ in range(_FITS):
        low, step = _fitted(x, _levels(x, low, step))
    codes = _levels(x, low, step)
    lost = (codes * step.float() + low.float() - x).square().sum(dim=-1, keepdim=True)
    best = lost.argmin(dim=0, keepdim=True)
    codes, low, step = (
        side.gather(0, best.expand(1, *side.shape[1:]))[0] for side in (codes.to(torch.uint8), low, step)
    )
    return codes[..., ::2] | (codes[..., 1::2] << 4), torch.cat([low, step], dim=-1)


def _levels(x: Tensor, low: Tensor, scale: Tensor) -> Tensor:
    """The nearest of sixteen levels for each number."""
    return ((x - low.float()) / scale.float()).round().clamp(0, 15)


def _fitted(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest level and the step that, with these codes, are nearest to `x`."""
    spread = codes - codes.mean(dim=-1, keepdim=True)
    middle = x.mean(dim=-1, keepdim=True)
    step = (spread * (x - middle)).sum(dim=-1, keepdim=True) / spread.square().sum(dim=-1, keepdim=True).clamp_min(1.0)
    return (middle - step * codes.mean(dim=-1, keepdim=True)).to(SIZES_DTYPE), _positive(step)


def _positive(scale: Tensor) -> Tensor:
    """A scale as it is stored, never zero: codes are made with the stored one, so that they decode with it."""
    return scale.clamp(_LEAST_SCALE, torch.finfo(SIZES_DTYPE).max).to(SIZES_DTYPE)


def hadamard(dim: int, device: torch.device | None = None) -> Tensor:
    """float32[dim, dim], orthonormal and symmetric: Hadamard blocks of the largest power of two that divides `dim`."""
    size = dim & -dim
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    blocks: Tensor = torch.block_diag(*[matrix / size**0.5] * (dim // size))
    return blocks.to(device)


def rotated(x: Tensor, matrix: Tensor | None) -> Tensor:
    """`x` [rows, heads, dim] rotated, in float32 at least.

    In contiguous blocks of one size: not even the last bit of what is rounded to codes may depend on how many rows
    there are, or on how they lie in memory.
    """
    if matrix is None:
        return x
    wide = (x if x.dtype == torch.float64 else x.float()).contiguous()
    matrix = matrix.to(wide.dtype)
    result: Tensor = in_blocks(lambda block: block @ matrix, wide, _ROTATED_ROWS).to(x.dtype)
    return result
