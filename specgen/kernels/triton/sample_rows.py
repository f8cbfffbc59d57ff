"""Draws at many rows of logits: temperature, top-k, top-p, min-p, then the largest of score plus Gumbel noise.

One program takes one draw and goes over its row several times. Where a row has to be cut, the cut is found bit by bit:
the largest number such that the tokens at or above it are as many, or as probable, as is asked for. So nothing is
sorted, equal logits share a fate, and a row's draw depends on nothing beside it. The noise is that of
`specgen.kernels.reference.uniforms`: a function of the position's key and the token alone.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from specgen.kernels.draws import Draw

_BLOCK = 2048
_FIELDS = tl.constexpr(7)
_NOTHING = tl.constexpr(float("-inf"))
# SplitMix64's, as signed numbers.
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15 - 2**64)
_MIX1 = tl.constexpr(0xBF58476D1CE4E5B9 - 2**64)
_MIX2 = tl.constexpr(0x94D049BB133111EB - 2**64)


@triton.jit
def _scores(row: tl.tensor, block: tl.tensor, vocab: int, temperature: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """float32[BLOCK] of a row, divided by the temperature; behind its end what is never drawn."""
    ids = block + tl.arange(0, BLOCK)
    x = tl.load(row + ids, mask=ids < vocab, other=_NOTHING).to(tl.float32)
    return tl.div_rn(x, tl.zeros_like(x) + temperature)


@triton.jit
def _ordered(x: tl.tensor) -> tl.tensor:
    """Whole numbers from 0 to 2**32 - 1 that sort as the floats do."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 0x80000000


@triton.jit
def _above(
    row: tl.tensor,
    vocab: int,
    temperature: tl.tensor,
    best: tl.tensor,
    least: tl.tensor,
    COUNTED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """How many tokens have scores at or above `least`, or how probable they are, the best one counting as 1."""
    sums = tl.zeros([BLOCK], tl.float32)
    for block in range(0, vocab, BLOCK):
        x = _scores(row, block, vocab, temperature, BLOCK)
        sums += tl.where((_ordered(x) >= least) & (x > _NOTHING), 1.0 if COUNTED else tl.exp(x - best), 0.0)
    return tl.sum(sums, axis=0)


@triton.jit
def _cut(
    row: tl.tensor,
    vocab: int,
    temperature: tl.tensor,
    best: tl.tensor,
    least: tl.tensor,
    wanted: tl.tensor,
    COUNTED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The largest number such that what is at or above it, and `least`, comes to as much as `wanted`."""
    found = least * 0
    for bit in range(32):
        higher = found + (tl.full([], 1, tl.int64) << (31 - bit))
        enough = _above(row, vocab, temperature, best, tl.maximum(higher, least), COUNTED, BLOCK) >= wanted
        found = tl.where(enough, higher, found)
    return tl.maximum(found, least)


@triton.jit
def _shifted(z: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    return (z >> BITS) & ((1 << (64 - BITS)) - 1)


@triton.jit
def _noise(ids: tl.tensor, key: tl.tensor) -> tl.tensor:
    """float64 Gumbel noise of each token."""
    z = (ids.to(tl.int64) + 1) * _GOLDEN + key
    z = (z ^ _shifted(z, 30)) * _MIX1
    z = (z ^ _shifted(z, 27)) * _MIX2
    z = z ^ _shifted(z, 31)
    uniform = (_shifted(z, 12).to(tl.float64) + 0.5) * 2.220446049250313e-16
    return -tl.log(-tl.log(uniform))


@triton.jit
def _draw(logits: tl.tensor, draws: tl.tensor, drawn: tl.tensor, vocab: int, stride: int, BLOCK: tl.constexpr) -> None:
    fields = draws + tl.program_id(0) * _FIELDS
    row = logits + tl.load(fields).to(tl.int64) * stride
    key = (tl.load(fields + 2).to(tl.int64) << 32) | (tl.load(fields + 1).to(tl.int64) & 0xFFFFFFFF)
    temperature = tl.load(fields + 3).to(tl.float32, bitcast=True)
    top_k = tl.load(fields + 4)
    top_p = tl.load(fields + 5).to(tl.float32, bitcast=True)
    min_p = tl.load(fields + 6).to(tl.float32, bitcast=True)

    bests = tl.full([BLOCK], _NOTHING, tl.float32)
    for block in range(0, vocab, BLOCK):
        bests = tl.maximum(bests, _scores(row, block, vocab, temperature, BLOCK))
    best = tl.max(bests, axis=0)
    least = tl.full([], 0, tl.int64)
    if top_k > 0:
        least = _cut(row, vocab, temperature, best, least, top_k.to(tl.float32), True, BLOCK)
    if top_p < 1.0:
        whole = _above(row, vocab, temperature, best, least, False, BLOCK)
        least = _cut(row, vocab, temperature, best, least, top_p * whole, False, BLOCK)

    scores = tl.full([BLOCK], _NOTHING, tl.float64)
    tokens = tl.full([BLOCK], -1, tl.int64)
    for block in range(0, vocab, BLOCK):
        x = _scores(row, block, vocab, temperature, BLOCK)
        ids = block + tl.arange(0, BLOCK)
        kept = (_ordered(x) >= least) & (x > _NOTHING) & (tl.exp(x - best) >= min_p)
        noisy = tl.where(kept, x.to(tl.float64) + _noise(ids, key), _NOTHING)
        better = noisy > scores
        scores, tokens = tl.where(better, noisy, scores), tl.where(better, ids.to(tl.int64), tokens)
    highest = tl.max(scores, axis=0)
    chosen = tl.min(tl.where((scores == highest) & (tokens >= 0), tokens, 1 << 62), axis=0)
    tl.store(drawn + tl.program_id(0), tl.where(highest > _NOTHING, chosen, -1))


def sample_rows(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """See `specgen.kernels.reference.sample_rows`."""
    table = torch.tensor([_fields(one) for one in draws], dtype=torch.int32, device=logits.device)
    drawn = torch.empty(len(draws), dtype=torch.int64, device=logits.device)
    _draw[(len(draws),)](logits, table, drawn, logits.shape[1], logits.stride(0), BLOCK=_BLOCK, num_warps=8)
    return drawn


def _fields(one: Draw) -> tuple[int, ...]:
    """The draw as 32-bit numbers, floats and the key by their bits."""
    low, high = struct.unpack("ii", struct.pack("q", one.key))
    temperature, top_p, min_p = (
        struct.unpack("i", struct.pack("f", number))[0]
        for number in (one.warp.temperature, one.warp.top_p, one.warp.min_p)
    )
    return one.row, low, high, temperature, one.warp.top_k, top_p, min_p
