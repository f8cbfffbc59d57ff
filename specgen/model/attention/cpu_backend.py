"""Attention by the CPU kernel, over all segments at once, straight from the KV pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specgen.kernels import backends
from specgen.kernels.backends import Backend
from specgen.kv.formats import KVFormat, LayerStore
from specgen.kv.pool import KVPool
from specgen.model.attention.base import AttendingLayer, ForwardBatch, Route
from specgen.model.attention.cpu_plan import plan
from specgen.model.attention.inputs import input_tensors
from specgen.model.checks.architecture import Architecture
from specgen.model.segment import Segment


@dataclass(frozen=True, slots=True)
class CpuBackend:
    """The kernel in `specgen.kernels.csrc`."""

    name: str = "cpu"
    route: Route = "direct"
    kernels: Backend = "cpu"

    def unusable(self, architecture: Architecture, kv_format: KVFormat) -> str | None:
        """See `AttentionBackend`."""
        if reason := backends.why_not("cpu", architecture.device, architecture.dtype) or architecture.no_interface:
            return reason
        if not kv_format.lossless:
            return f"kv_format is {kv_format.name!r}; the CPU kernel reads 'native' alone"
        if architecture.shares_kv:
            return "its layers share KV, which the CPU kernel would write once for each"
        return None

    def invariant(self) -> CpuBackend:
        """A row's sums are in one order whatever stands beside it."""
        return self

    def begin(self, segments: Sequence[Segment], pool: KVPool) -> CpuBatch:
        """See `AttentionBackend`."""
        return CpuBatch(pool, plan(segments), *input_tensors(segments, pool.device))


class CpuBatch(ForwardBatch):
    """A forward that the kernel knows by its plan, int32[n]; see `cpu_plan`. It traces in `torch.compile`."""

    def __init__(self, pool: KVPool, plan: Tensor, ids: Tensor, position_ids: Tensor, wanted: Tensor) -> None:
        self.pool = pool
        self.plan = plan
        self.ids, self.position_ids, self.wanted = ids, position_ids, wanted

    def write(self, store: LayerStore, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """See `ForwardBatch`. The kernel writes them when it attends."""
        return key, value

    def attend(self, layer: AttendingLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `ForwardBatch`."""
        rows = [side[0].transpose(0, 1) for side in (query, key, value)]
        sinks = None if layer.sinks is None else layer.sinks.float()
        window, chunk = layer.reach.window or 0, layer.reach.chunk or 0
        output: Tensor = torch.ops.specgen.tree_attention(
            *rows, *layer.store.planes, self.plan, layer.scale, layer.softcap or 0.0, sinks, window, chunk
        )
        return output.unsqueeze(0)
