"""The likeliest tokens of rows of logits; the law is `specgen.kernels.reference.top_tokens`.

A logit and its id become one number that sorts as they do: the larger logit first, of equals the lower id. Programs
take the largest of a part of a row each, one more of each row takes the largest of those. Logits are read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_PART = 4096
_NONE = tl.constexpr(-(2**63))


@triton.jit
def _sortable(logits: tl.tensor, ids: tl.tensor) -> tl.tensor:
    """int64 keys. Adding nothing makes one zero of two."""
    bits = (logits + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit
def _take(keys: tl.tensor, output: tl.tensor, COUNT: tl.constexpr) -> None:
    """Store the COUNT largest keys, largest first. No two are equal but those that stand for nothing."""
    for place in range(COUNT):
        best = tl.max(keys, axis=0)
        tl.store(output + place, best)
        keys = tl.where(keys == best, _NONE, keys)


@triton.jit
def _take_parts(
    logits: tl.tensor,
    parts: tl.tensor,
    vocab: int,
    stride: int,
    COUNT: tl.constexpr,
    PART: tl.constexpr,
) -> None:
    row, part = tl.program_id(0), tl.program_id(1)
    ids = part * PART + tl.arange(0, PART)
    there = ids < vocab
    x = tl.load(logits + row.to(tl.int64) * stride + ids, mask=there, other=0.0).to(tl.float32)
    keys = tl.where(there, _sortable(x, ids), _NONE)
    _take(keys, parts + (row * tl.num_programs(1) + part) * COUNT, COUNT)


@triton.jit
def _take_all(parts: tl.tensor, taken: tl.tensor, count: int, COUNT: tl.constexpr, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    keys = tl.load(parts + row.to(tl.int64) * count + place, mask=place < count, other=_NONE)
    _take(keys, taken + row * COUNT, COUNT)


def top_tokens(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Values float32[rows, count] and ids int64[rows, count] of logits [rows, vocab], without NaN; count <= vocab."""
    rows, vocab = logits.shape
    parts = triton.cdiv(vocab, _PART)
    keys = torch.empty(rows, parts, count, dtype=torch.int64, device=logits.device)
    taken = torch.empty(rows, count, dtype=torch.int64, device=logits.device)
    _take_parts[(rows, parts)](logits, keys, vocab, logits.stride(0), COUNT=count, PART=_PART, num_warps=8)
    block = triton.next_power_of_2(parts * count)
    _take_all[(rows,)](keys, taken, parts * count, COUNT=count, BLOCK=block)
    ids = 0x7FFFFFFF - (taken & 0x7FFFFFFF)
    return logits.gather(1, ids).float(), ids
