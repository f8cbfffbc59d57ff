"""The segments of one packed forward, and which keys each of their rows sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specgen.kv.pool import KVPool
from specgen.model.attention.cpu_plan import plan
from specgen.model.attention.rowwise import VisibleKeys, visible_in_chain, visible_in_mask
from specgen.model.segment import Segment

if TYPE_CHECKING:
    from specgen.model.attention.triton import GpuForward


@dataclass(frozen=True, slots=True)
class Reach:
    """How far back a layer looks: `window` tokens including itself, or the tokens of its own `chunk`; `None` = all."""

    window: int | None = None
    chunk: int | None = None

    def oldest(self, position: int) -> int:
        """The first position that a row at `position` may see."""
        if self.window is not None:
            return max(0, position - self.window + 1)
        return 0 if self.chunk is None else position // self.chunk * self.chunk

    def allows(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether positions `query` may see positions `key`, by broadcasting; causality is not looked at."""
        allowed = torch.ones(torch.broadcast_shapes(query.shape, key.shape), dtype=torch.bool)
        if self.window is not None:
            allowed &= key > query - self.window
        if self.chunk is not None:
            allowed &= key // self.chunk == query // self.chunk
        return allowed


EVERYTHING = Reach()


class Batch:
    """The segments of one packed forward, with what all layers share: slots and masks. Lives for one forward.

    kernel: the CPU kernel writes and reads the pool, by the `plan`. gpu: the GPU kernels do.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        pool: KVPool,
        *,
        gathered: bool = False,
        kernel: bool = False,
        gpu: GpuForward | None = None,
    ) -> None:
        self.segments = segments
        self.pool = pool
        self.gathered = gathered
        self.kernel = kernel
        self.gpu = gpu
        self.rows = sum(len(segment.tokens) for segment in segments)
        self._views: dict[tuple[int, Reach], tuple[slice | Tensor, Tensor | None]] = {}
        self._seen: dict[tuple[int, Reach], tuple[slice | Tensor, list[VisibleKeys], int]] = {}

    def view(self, index: int, reach: Reach) -> tuple[slice | Tensor, Tensor | None]:
        """Slots that segment `index` reads, and bool[rows, keys] of what each row sees; `None` = everything."""
        cached = self._views.get((index, reach))
        if cached is None:
            segment = self.segments[index]
            start = self._start(segment, reach)
            mask = _mask(segment, start, reach)
            mask = None if mask is None else mask.to(self.pool.device)
            cached = self._views[index, reach] = segment.table.span(start, segment.end), mask
        return cached

    def seen(self, index: int, reach: Reach) -> tuple[slice | Tensor, list[VisibleKeys], int]:
        """Slots that segment `index` reads, what each row sees of them, and how many of them are committed."""
        cached = self._seen.get((index, reach))
        if cached is None:
            segment = self.segments[index]
            start = self._start(segment, reach)
            span = segment.table.span(start, segment.end)
            cached = self._seen[index, reach] = span, _seen_rows(segment, start, reach), segment.table.length - start
        return cached

    def _start(self, segment: Segment, reach: Reach) -> int:
        return 0 if self.gathered or reach == EVERYTHING else _first_seen(segment, reach)

    @cached_property
    def write(self) -> slice | Tensor:
        """The slots of all rows."""
        spans = [s.table.span(s.end - len(s.tokens), s.end) for s in self.segments]
        return spans[0] if len(spans) == 1 else _concatenated(spans)

    @cached_property
    def plan(self) -> Tensor:
        """int32: what the kernel must know of the segments; see `specgen.model.attention.cpu_plan`."""
        return plan(self.segments)

    @cached_property
    def offsets(self) -> Tensor:
        """int64[rows]: each row's position less its row number."""
        if self.gpu is not None:
            positions = self.gpu.positions[0]
            return positions - torch.arange(len(positions), device=positions.device)
        told = torch.tensor([p for s in self.segments for p in s.new_positions])
        return (told - torch.arange(self.rows)).to(self.pool.device)


class PlannedBatch:
    """A batch as a compiled forward sees it: the plan alone. plan: int32[n]; position_ids: int64[1, rows]."""

    gathered = False
    kernel = True

    def __init__(self, pool: KVPool, plan: Tensor, position_ids: Tensor) -> None:
        self.pool = pool
        self.plan = plan
        self.offsets = position_ids[0] - torch.arange(position_ids.shape[1])


def _first_seen(segment: Segment, reach: Reach) -> int:
    """The first position of the prefix that any row sees."""
    earliest = min(segment.new_positions)
    return min(segment.table.length, reach.oldest(earliest))


def _seen_rows(segment: Segment, start: int, reach: Reach) -> list[VisibleKeys]:
    prefix, rows = segment.table.length, len(segment.tokens)
    if segment.visible is None and list(segment.positions) == list(range(prefix, prefix + segment.tail)):
        return visible_in_chain(start, segment.end, [reach.oldest(p) for p in segment.positions[-rows:]])
    mask = _mask(segment, start, reach)
    if mask is None:
        mask = torch.ones(1, segment.end - start, dtype=torch.bool)
    return visible_in_mask(mask, prefix - start)


def _concatenated(spans: Sequence[slice | Tensor]) -> Tensor:
    return torch.cat([torch.arange(s.start, s.stop) if isinstance(s, slice) else s for s in spans])


def _mask(segment: Segment, start: int, reach: Reach) -> Tensor | None:
    prefix, tail, rows = segment.table.length, segment.tail, len(segment.tokens)
    if rows == tail == 1 and reach.oldest(segment.first_position) <= start:
        return None
    visible = segment.visible
    if visible is None:
        visible = torch.ones(tail, tail, dtype=torch.bool).tril()[tail - rows :]
    mask = torch.cat([torch.ones(rows, prefix - start, dtype=torch.bool), visible], dim=1)
    if reach != EVERYTHING:
        keys = torch.tensor([*range(start, prefix), *segment.positions])
        mask &= reach.allows(keys[-rows:, None], keys[None, :])
    return mask


def dense_mask(batch: Batch, dtype: torch.dtype) -> Tensor:
    """[1, 1, rows, keys of all segments]: 0 where a row sees a key, the dtype's minimum elsewhere."""
    keys = sum(segment.end for segment in batch.segments)
    mask = torch.full((batch.rows, keys), torch.finfo(dtype).min, dtype=dtype, device=batch.pool.device)
    row = column = 0
    for index, segment in enumerate(batch.segments):
        _, visible = batch.view(index, EVERYTHING)
        block = mask[row : row + len(segment.tokens), column : column + segment.end]
        if visible is None:
            block.zero_()
        else:
            block.masked_fill_(visible, 0)
        row, column = row + len(segment.tokens), column + segment.end
    return mask[None, None]
