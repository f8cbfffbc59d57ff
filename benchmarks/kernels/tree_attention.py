"""Attention of one layer over the paged pool: decoding, a tree under a text, a batch of trees."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks.kernels.case import Case, usable
from specgen.kernels.backends import Backend
from specgen.kv.formats import LayerShape
from specgen.kv.pool import PAGE_SIZE, KVPool
from specgen.model.attention.base import AttendingLayer, AttentionBackend, ForwardBatch
from specgen.model.attention.cpu_backend import CpuBackend
from specgen.model.attention.reach import EVERYTHING
from specgen.model.attention.torch_backend import TorchBackend
from specgen.model.segment import Segment, tree_segment

_HEADS, _LAYER = 32, LayerShape(8, 128, 128)
_STEPS = ((1, 1, 1024), (1, 16, 1024), (8, 8, 1024))


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """sequences x rows, each under so many committed tokens."""
    for sequences, rows, context in _STEPS:
        pages = sequences * -(-(context + rows) // PAGE_SIZE)
        pool = KVPool([_LAYER], pages, dtype=dtype, device=device)
        for stack in pool.stacks:
            stack.normal_()
        segments = [_tree(pool, rows, context) for _ in range(sequences)]
        count = sequences * rows
        new = [torch.randn(1, heads, count, 128, device=device, dtype=dtype) for heads in (_HEADS, 8, 8)]
        calls = {backend: _call(backend, segments, pool, new) for backend in usable("tree_attention", device, dtype)}
        yield Case(f"{sequences} x {rows} rows under {context}", calls)


def _tree(pool: KVPool, rows: int, context: int) -> Segment:
    """A binary tree below the root."""
    table = pool.open()
    table.reserve(context + rows)
    table.commit(context)
    return tree_segment(table, [1], [1] * (rows - 1), [-1 if n < 2 else n // 2 - 1 for n in range(rows - 1)])


def _call(backend: Backend, segments: list[Segment], pool: KVPool, new: Sequence[torch.Tensor]) -> Callable[[], object]:
    batch: ForwardBatch = _backend(backend, pool.device).begin(segments, pool)
    query, key, value = new

    def attend() -> torch.Tensor:
        kept = batch.write(pool.layers[0], key, value)
        return batch.attend(AttendingLayer(pool.layers[0], EVERYTHING, scale=0.1), query, *kept)

    return attend


def _backend(name: Backend, device: torch.device) -> AttentionBackend:
    if name == "cpu":
        return CpuBackend()
    if name == "torch":
        return TorchBackend()
    from specgen.model.attention.triton_backend import TritonBackend

    return TritonBackend(device)
