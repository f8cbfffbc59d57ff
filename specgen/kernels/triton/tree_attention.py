"""Attention of the rows of many sequences over a paged pool of keys and values, each row over its own path.

The host cuts a forward into work items (see `specgen.model.attention.gpu_plan`): a few rows of one sequence, and the
spans of its keys that they are to look at. One program takes one item and one KV head. The query heads that share it
lie side by side in the tile, so that a single row fills a tensor core's tile as well as it can, and each key is read
once for all.

What a row sees are the keys [first, seen) of its sequence, and of the 64 behind them those whose bit is set: its
ancestors in a tree. Windows and chunks are the host's business: they move `first` and clear bits. A key's place in the
pool is looked up in the sequence's pages, or, from an item's `path_start` on, in a list: the path of a single row, laid
out as if it had been committed, so that its arithmetic is that of plain decoding, to the bit.

An item either goes through all its rows' keys and finishes, or leaves what each span came to (largest score, sum,
weighted values) for `_merge_spans`. Both merge span by span, in order, by the same arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from specgen.kernels.kv_layout import LayerPlanes
from specgen.kernels.triton.dot import product
from specgen.kernels.triton.hadamard import rotated
from specgen.kernels.triton.kv_codes import AFFINE4, PLAIN, load_codes, load_sizes, operands, tile_width
from specgen.kernels.triton.kv_splits import start_of

ITEM = ("first_row", "rows", "low", "high", "pages", "path_start", "path", "shared", "span", "spans", "whole")
"""What an item holds, int32 each: its rows; the keys that any of them sees, [low, high); where its pages stand in the
list of places; the key from which on, and where, its path is listed there instead; the keys before `shared` have no
bits to look at; its spans; whether it finishes alone."""
ROW = ("first", "seen", "low_bits", "high_bits", "span", "spans", "partial")
"""What a row holds, int32 each: the keys it sees; its spans and where its partial sums begin, where it has any."""
_ITEM = tl.constexpr(len(ITEM))
_ROW = tl.constexpr(len(ROW))
_LOG2_E = tl.constexpr(1.4426950408889634)
_NOTHING = tl.constexpr(float("-inf"))


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program works on at once, and how it is compiled: `lanes` pairs of a row and one of the query heads that
    share a KV head, `keys` keys a step; powers of two, lanes at least 16."""

    lanes: int
    keys: int
    warps: int
    stages: int


def tile(head_bytes: int, *, wide: bool, warpgroups: bool = False) -> Tile:
    """The tile for heads of so many bytes that keeps all it needs in registers, and its keys in shared memory.

    wide: for many rows of one sequence, prompts; else for few. warpgroups: whether the GPU multiplies tiles of 64 lanes
    and has shared memory to spare (NVIDIA's since Hopper).
    """
    if head_bytes > 512:
        return Tile(32, 16, 8, 2) if wide else Tile(16, 16, 4, 2)
    if head_bytes > 256:
        return Tile(32, 32, 8, 3) if wide else Tile(16, 32, 4, 3)
    if not wide:
        return Tile(16, 64, 4, 5 if warpgroups and head_bytes > 128 else 3)
    if warpgroups:
        return Tile(64, 64, 8, 3)
    return Tile(32, 64, 4, 3) if head_bytes > 128 else Tile(64, 32, 4, 3)


@dataclass(frozen=True, slots=True)
class WorkItems:
    """A forward's work, for all layers that look back as far. int32 each.

    items: [items, len(ITEM)]; those with no rows do nothing. rows: [rows, len(ROW)]. places: pages and paths.
    partials: how many partial sums the rows leave; 0 where all items finish alone.
    """

    items: Tensor
    rows: Tensor
    places: Tensor
    partials: int
    page_size: int


@triton.jit
def _nothing_seen(LANES: tl.constexpr, BLOCK: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Largest score, sum and weighted values of a softmax over nothing."""
    return tl.full([LANES], _NOTHING, tl.float32), tl.zeros([LANES], tl.float32), tl.zeros([LANES, BLOCK], tl.float32)


@triton.jit
def _merged(
    best: tl.tensor, total: tl.tensor, sums: tl.tensor, more_best: tl.tensor, more_total: tl.tensor, more: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Two parts of a softmax as one. Scores are powers of two; a part that saw nothing has the best score -inf."""
    both = tl.maximum(best, more_best)
    # Of two parts that saw nothing neither counts; the difference of infinities would.
    safe = tl.where(both == _NOTHING, 0.0, both)
    left, right = tl.exp2(best - safe), tl.exp2(more_best - safe)
    return both, total * left + more_total * right, sums * left[:, None] + more * right[:, None]


@triton.jit
def _finished(
    best: tl.tensor,
    total: tl.tensor,
    sums: tl.tensor,
    sinks: tl.tensor,
    head: tl.tensor,
    live: tl.tensor,
    SINKS: tl.constexpr,
    ROTATED: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    """DTYPE[lanes, BLOCK]: the output; zeros for what sees nothing."""
    if SINKS:
        sink = tl.load(sinks + head, mask=live, other=_NOTHING).to(tl.float32) * _LOG2_E
        best, total, sums = _merged(best, total, sums, sink, tl.where(live, 1.0, 0.0), tl.zeros_like(sums))
    output = sums / tl.where(total > 0, total, 1.0)[:, None]
    if ROTATED:
        output = rotated(output.to(DTYPE), DIM, BLOCK)
    return output.to(DTYPE)


@triton.jit
def _attend(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    key_sizes: tl.tensor,
    value_sizes: tl.tensor,
    centre: tl.tensor,
    sinks: tl.tensor,
    output: tl.tensor,
    partial_best: tl.tensor,
    partial_total: tl.tensor,
    partial_sums: tl.tensor,
    items: tl.tensor,
    rows: tl.tensor,
    places: tl.tensor,
    query_row: int,
    query_head: int,
    scale: float,
    softcap: float,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_CODING: tl.constexpr,
    VALUE_CODING: tl.constexpr,
    ROTATED: tl.constexpr,
    CENTRED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    PAGE: tl.constexpr,
    LANES: tl.constexpr,
    KEYS: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
) -> None:
    GROUP: tl.constexpr = HEADS // KV_HEADS
    DTYPE: tl.constexpr = query.dtype.element_ty
    item, kv_head = items + tl.program_id(0) * _ITEM, tl.program_id(1)
    count = tl.load(item + 1)
    if count == 0:
        return
    low, high = tl.load(item + 2), tl.load(item + 3)
    pages, path_start, path = places + tl.load(item + 4), tl.load(item + 5), places + tl.load(item + 6)
    shared, whole = tl.load(item + 7), tl.load(item + 10)
    first_span = tl.load(item + 8)

    lane = tl.arange(0, LANES)
    live = lane < count * GROUP
    row = tl.load(item) + lane // GROUP
    head = kv_head * GROUP + lane % GROUP
    dims, value_dims = tl.arange(0, KEY_BLOCK), tl.arange(0, VALUE_BLOCK)
    about = rows + row * _ROW
    first = tl.load(about, mask=live, other=0)
    seen = tl.load(about + 1, mask=live, other=0)
    low_bits = tl.load(about + 2, mask=live, other=0)
    high_bits = tl.load(about + 3, mask=live, other=0)
    partial = tl.load(about + 6, mask=live, other=0) - tl.load(about + 4, mask=live, other=0)

    at = row.to(tl.int64) * query_row + head * query_head
    asked = tl.load(query + at[:, None] + dims[None, :], mask=live[:, None] & (dims < KEY_DIM)[None, :], other=0.0)
    if ROTATED:
        asked = rotated(asked, KEY_DIM, KEY_BLOCK).to(DTYPE)
    if CENTRED:
        mean = tl.load(centre + kv_head * KEY_DIM + dims, mask=dims < KEY_DIM, other=0.0)
        towards_mean = tl.sum(asked.to(tl.float32) * mean[None, :], axis=1)
    if KEY_CODING == AFFINE4:
        asked_sum = tl.sum(asked.to(tl.float32), axis=1)

    best, total, sums = _nothing_seen(LANES, VALUE_BLOCK)
    for span in range(first_span, first_span + tl.load(item + 9)):
        span_best, span_total, span_sums = _nothing_seen(LANES, VALUE_BLOCK)
        start, stop = tl.maximum(start_of(span), low // KEYS * KEYS), tl.minimum(start_of(span + 1), high)
        for block in range(start, stop, KEYS):
            key = block + tl.arange(0, KEYS)
            there = key < high
            page = tl.load(pages + key // PAGE, mask=there & (key < path_start), other=0)
            listed = tl.load(path + key - path_start, mask=there & (key >= path_start), other=0)
            slot = tl.where(key < path_start, page * PAGE + key % PAGE, listed)
            vector = slot.to(tl.int64) * KV_HEADS + kv_head

            codes = load_codes(keys, vector, there, KEY_DIM, KEY_BLOCK, KEY_CODING, DTYPE)
            scores = product(asked, tl.trans(codes), tl.zeros([LANES, KEYS], tl.float32))
            if KEY_CODING != PLAIN:
                step, offset = load_sizes(key_sizes, keys, vector, there, KEY_CODING)
                scores = scores * step[None, :]
                if KEY_CODING == AFFINE4:
                    scores += asked_sum[:, None] * offset[None, :]
            if CENTRED:
                scores += towards_mean[:, None]
            scores *= scale
            if SOFTCAP:
                # tanh(x) = 1 - 2 / (1 + e^2x), whose ends are right even where the power overflows.
                scores = softcap - 2 * softcap / (1 + tl.exp2(scores * (2 / softcap * _LOG2_E)))
            scores *= _LOG2_E

            visible = (key[None, :] >= first[:, None]) & (key[None, :] < seen[:, None])
            if block + KEYS > shared:
                behind = key[None, :] - seen[:, None]
                word = tl.where(behind < 32, low_bits[:, None], high_bits[:, None])
                visible |= (behind >= 0) & (behind < 64) & (((word >> (behind & 31)) & 1) != 0)
            scores = tl.where(visible, scores, _NOTHING)

            block_best = tl.maximum(span_best, tl.max(scores, axis=1))
            safe = tl.where(block_best == _NOTHING, 0.0, block_best)
            kept, weights = tl.exp2(span_best - safe), tl.exp2(scores - safe[:, None])
            span_best, span_total = block_best, span_total * kept + tl.sum(weights, axis=1)
            span_sums *= kept[:, None]
            codes = load_codes(values, vector, there, VALUE_DIM, VALUE_BLOCK, VALUE_CODING, DTYPE)
            if VALUE_CODING != PLAIN:
                step, offset = load_sizes(value_sizes, values, vector, there, VALUE_CODING)
                if VALUE_CODING == AFFINE4:
                    span_sums += tl.sum(weights * offset[None, :], axis=1)[:, None]
                weights *= step[None, :]
            span_sums = product(weights.to(DTYPE), codes, span_sums)
        if whole:
            best, total, sums = _merged(best, total, sums, span_best, span_total, span_sums)
        else:
            place = (partial + span).to(tl.int64) * HEADS + head
            tl.store(partial_best + place, span_best, mask=live)
            tl.store(partial_total + place, span_total, mask=live)
            there = live[:, None] & (value_dims < VALUE_DIM)[None, :]
            tl.store(partial_sums + place[:, None] * VALUE_DIM + value_dims[None, :], span_sums, mask=there)
    if whole:
        done = _finished(best, total, sums, sinks, head, live, SINKS, ROTATED, VALUE_DIM, VALUE_BLOCK, DTYPE)
        at = row.to(tl.int64) * HEADS + head
        there = live[:, None] & (value_dims < VALUE_DIM)[None, :]
        tl.store(output + at[:, None] * VALUE_DIM + value_dims[None, :], done, mask=there)


@triton.jit
def _merge_spans(
    sinks: tl.tensor,
    output: tl.tensor,
    partial_best: tl.tensor,
    partial_total: tl.tensor,
    partial_sums: tl.tensor,
    rows: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROTATED: tl.constexpr,
    SINKS: tl.constexpr,
    LANES: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
) -> None:
    GROUP: tl.constexpr = HEADS // KV_HEADS
    DTYPE: tl.constexpr = output.dtype.element_ty
    row, kv_head = tl.program_id(0), tl.program_id(1)
    spans, partial = tl.load(rows + row * _ROW + 5), tl.load(rows + row * _ROW + 6)
    if spans == 0:
        return
    lane, dims = tl.arange(0, LANES), tl.arange(0, VALUE_BLOCK)
    live, head = lane < GROUP, kv_head * GROUP + lane
    there = live[:, None] & (dims < VALUE_DIM)[None, :]
    best, total, sums = _nothing_seen(LANES, VALUE_BLOCK)
    for span in range(spans):
        place = (partial + span).to(tl.int64) * HEADS + head
        span_best = tl.load(partial_best + place, mask=live, other=_NOTHING)
        span_total = tl.load(partial_total + place, mask=live, other=0.0)
        span_sums = tl.load(partial_sums + place[:, None] * VALUE_DIM + dims[None, :], mask=there, other=0.0)
        best, total, sums = _merged(best, total, sums, span_best, span_total, span_sums)
    done = _finished(best, total, sums, sinks, head, live, SINKS, ROTATED, VALUE_DIM, VALUE_BLOCK, DTYPE)
    at = row.to(tl.int64) * HEADS + head
    tl.store(output + at[:, None] * VALUE_DIM + dims[None, :], done, mask=there)


def tree_attention(
    query: Tensor,
    kept: LayerPlanes,
    work: WorkItems,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    tile: Tile,
) -> Tensor:
    """The rows' outputs [rows, heads, value_dim] in the query's dtype: float32, bfloat16 or float16, sums in float32.

    query: [rows, heads, key_dim], the dims side by side. sinks: [heads], see `reference.tree_attention`.
    tile: the one that the items were cut for.
    """
    layout = kept.layout
    count, heads, _ = query.shape
    output = query.new_empty(count, heads, layout.value_dim)
    best, total = torch.empty(2, work.partials, heads, dtype=torch.float32, device=query.device)
    sums = torch.empty(work.partials, heads, layout.value_dim, dtype=torch.float32, device=query.device)
    value_block = tile_width(layout.value_dim)
    either = {
        "HEADS": heads,
        "KV_HEADS": layout.kv_heads,
        "VALUE_DIM": layout.value_dim,
        "ROTATED": layout.rotated,
        "SINKS": sinks is not None,
        "LANES": tile.lanes,
        "VALUE_BLOCK": value_block,
    }
    sinks = output if sinks is None else sinks
    _attend[(len(work.items), layout.kv_heads)](
        query,
        *operands(kept, nothing=output),
        sinks,
        output,
        best,
        total,
        sums,
        work.items,
        work.rows,
        work.places,
        query.stride(0),
        query.stride(1),
        scale,
        softcap or 1.0,
        KEY_DIM=layout.key_dim,
        KEY_CODING=int(layout.key),
        VALUE_CODING=int(layout.value),
        CENTRED=kept.centre is not None,
        SOFTCAP=softcap is not None,
        PAGE=work.page_size,
        KEYS=tile.keys,
        KEY_BLOCK=tile_width(layout.key_dim),
        num_warps=tile.warps,
        num_stages=tile.stages,
        **either,
    )
    if work.partials:
        _merge_spans[(count, layout.kv_heads)](sinks, output, best, total, sums, work.rows, **either)
    return output
