"""Attention by the Triton kernels: what all layers of a forward share is brought to the GPU in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from specgen.kernels import backends
from specgen.kernels.backends import Backend
from specgen.kernels.triton.kv_splits import starts
from specgen.kernels.triton.kv_write import kv_write
from specgen.kernels.triton.tree_attention import Tile, WorkItems, tile, tree_attention
from specgen.kv.formats import KVFormat, LayerStore
from specgen.kv.pool import KVPool
from specgen.model.attention.base import AttendingLayer, ForwardBatch, Route
from specgen.model.attention.gpu_plan import Places, SplitPolicy, cut
from specgen.model.attention.inputs import flat_rows, wanted_rows
from specgen.model.attention.reach import Reach
from specgen.model.attention.transfer import Array, Packed, padded, to_device
from specgen.model.checks.architecture import Architecture
from specgen.model.segment import Segment

_HOPPER = 9
_PROGRAMS_PER_PROCESSOR = 2
_INTERPRETED_PROGRAMS = 16
_PARTIALS = 4096
# The slot of a row that is not kept.
_NOWHERE = -1


class LayerKind(NamedTuple):
    """What layers must have in common to share work: how far they look back, query heads to a KV head, KV heads, and
    bytes of the wider head."""

    reach: Reach
    group: int
    kv_heads: int
    head_bytes: int


@dataclass(slots=True)
class TritonBackend:
    """The kernels in `specgen.kernels.triton`, for one model.

    batch_invariant: give each row of a tree its keys as if its path had been committed; see `gpu_plan`.
    kinds: of the model's layers, as far as forwards have met them: work that the next forward plans at once.
    """

    device: torch.device
    batch_invariant: bool = False
    kinds: dict[LayerKind, None] = field(default_factory=dict)
    name: str = "triton"
    route: Route = "direct"
    kernels: Backend = "triton"

    def unusable(self, architecture: Architecture, kv_format: KVFormat) -> str | None:
        """See `AttentionBackend`."""
        if reason := backends.why_not("triton", architecture.device, architecture.dtype) or architecture.no_interface:
            return reason
        if kv_format.key.coding is None or kv_format.value.coding is None:
            return f"kv_format is {kv_format.name!r}, which the kernels do not know"
        return None

    def invariant(self) -> TritonBackend:
        """Rows of trees by their paths."""
        return TritonBackend(self.device, batch_invariant=True)

    def begin(self, segments: Sequence[Segment], pool: KVPool) -> TritonBatch:
        """See `AttentionBackend`."""
        batch = TritonBatch(self, segments, pool)
        batch.send()
        return batch

    def tiles(self, segments: Sequence[Segment]) -> tuple[Tile, ...]:
        """Of each kind of layer, in a forward over these segments."""
        most = max(len(segment.tokens) for segment in segments)
        return tuple(self.tile(kind, most) for kind in self.kinds)

    def tile(self, kind: LayerKind, rows: int) -> Tile:
        """For a forward whose largest segment has `rows` rows. Batch-invariant rows get one size of tile,
        whatever stands beside them: products of tiles of another size may add up in another order."""
        wide = self.batch_invariant or rows * kind.group > tile(kind.head_bytes, wide=False).lanes
        chosen = tile(kind.head_bytes, wide=wide, warpgroups=self._warpgroups)
        return replace(chosen, lanes=max(chosen.lanes, 1 << (kind.group - 1).bit_length()))

    def cut(self, kind: LayerKind, tile: Tile) -> SplitPolicy:
        """How a forward's attention is cut in layers of a kind."""
        programs = max(1, self._programs // kind.kv_heads)
        return SplitPolicy(tile.lanes // kind.group, programs, _PARTIALS, self.batch_invariant)

    @property
    def _warpgroups(self) -> bool:
        """NVIDIA's since Hopper; AMD's own numbers are no such thing."""
        if self.device.type != "cuda" or torch.version.hip:
            return False
        return torch.cuda.get_device_capability(self.device)[0] >= _HOPPER

    @property
    def _programs(self) -> int:
        if self.device.type != "cuda":
            return _INTERPRETED_PROGRAMS
        properties = torch.cuda.get_device_properties(self.device)
        return _PROGRAMS_PER_PROCESSOR * int(properties.multi_processor_count)


class TritonBatch(ForwardBatch):
    """One forward's metadata, on the device once it is sent; `specgen.model.forward.graphs` has the bounds of a step.

    size: rows that the forward is padded to. Padding rows belong to no sequence: their KV is not kept, they attend to
    nothing, and logits are computed at `size` rows. What forwards of one size and the same `TritonBackend.tiles` are
    told then lies alike, and their launches are the same.
    """

    def __init__(
        self, backend: TritonBackend, segments: Sequence[Segment], pool: KVPool, *, size: int | None = None
    ) -> None:
        self._backend = backend
        self._segments = segments
        self.pool = pool
        self._fixed = size is not None
        tokens, positions = flat_rows(segments)
        slots = np.concatenate([s.table.slots(s.end - len(s.tokens), s.end).numpy() for s in segments])
        wanted = wanted_rows(segments)
        self.rows, self.wanted_rows = len(tokens), len(wanted)
        self.size = size or self.rows
        self._works: dict[LayerKind, tuple[WorkItems, Tile]] = {}
        self._message = self._cut(
            list(backend.kinds),
            padded(tokens, self.size),
            padded(positions, self.size),
            padded(slots, self.size, _NOWHERE),
            padded(wanted, self.size if self._fixed else len(wanted)),
        )

    @property
    def length(self) -> int:
        """Numbers to send."""
        return len(self._message.packed.numbers)

    def send(self, into: Tensor | None = None) -> None:
        """Bring all of it to the device in one copy: to the beginning of `into`, int32, or to memory of its own."""
        self._ids, self._positions, self.slots, self._wanted = self._told(self._message, into)

    @property
    def ids(self) -> Tensor:  # type: ignore[override]
        """int64[1, size], computed on the device."""
        return self._ids.long()[None]

    @property
    def position_ids(self) -> Tensor:  # type: ignore[override]
        """int64[1, size], computed on the device."""
        return self._positions.long()[None]

    @property
    def wanted(self) -> Tensor:  # type: ignore[override]
        """int64: the rows with logits, computed on the device; padded to `size` where the forward is."""
        return self._wanted.long()

    def write(self, store: LayerStore, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """See `ForwardBatch`."""
        kv_write(_rows(key), _rows(value), store.kernel_planes, self.slots)
        return key, value

    def attend(self, layer: AttendingLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `ForwardBatch`."""
        planes, layout = layer.store.kernel_planes, layer.store.kernel_planes.layout
        head_bytes = max(layout.key_dim, layout.value_dim) * query.element_size()
        kind = LayerKind(layer.reach, query.shape[1] // layout.kv_heads, layout.kv_heads, head_bytes)
        if kind not in self._works:
            self._told(self._cut([kind]))
            self._backend.kinds[kind] = None
        work, chosen = self._works[kind]
        scale, softcap, sinks = layer.scale, layer.softcap, layer.sinks
        output = tree_attention(_rows(query), planes, work, scale=scale, softcap=softcap, sinks=sinks, tile=chosen)
        return output[None]

    def _cut(self, kinds: Sequence[LayerKind], *others: Array) -> _Message:
        """How attention is cut in layers of these kinds, and `others`. Pages come last, for nobody knows how many."""
        most = max(len(segment.tokens) for segment in self._segments)
        places = Places()
        shares, tables = [], []
        for kind in kinds:
            chosen = self._backend.tile(kind, most)
            how = self._backend.cut(kind, chosen)
            if self._fixed:
                spans = len(starts(self.pool.capacity)) - 1
                how = replace(how, partials=min(how.partials, self.size * spans))
            found = cut(self._segments, kind.reach, how, places, self.size)
            items = padded(found.items, how.most_items(self.size)) if self._fixed else found.items
            shares.append(_Share(kind, chosen, how.partials if self._fixed else found.partials))
            tables += [items, found.rows]
        numbers = np.array([*places.numbers, 0], dtype=np.int32)
        return _Message(shares, Packed([*others, *tables, numbers]))

    def _told(self, message: _Message, into: Tensor | None = None) -> list[Tensor]:
        """Send a message, and keep what it says of kinds of layers; the others come back."""
        *views, pages = message.packed.views(to_device(message.packed.numbers, self.pool.device, into))
        others = len(views) - 2 * len(message.shares)
        for share, items, rows in zip(message.shares, views[others::2], views[others + 1 :: 2], strict=True):
            self._works[share.kind] = WorkItems(items, rows, pages, share.partials, self.pool.page_size), share.tile
        return views[:others]


class _Share(NamedTuple):
    """Of a kind of layer: its tile, and room for so many partial sums."""

    kind: LayerKind
    tile: Tile
    partials: int


class _Message(NamedTuple):
    """What is sent at once. shares: of whose tables, items and rows each, stand in it, before the pages."""

    shares: list[_Share]
    packed: Packed


def _rows(x: Tensor) -> Tensor:
    """[1, heads, rows, dim] as [rows, heads, dim], the dims side by side."""
    rows = x[0].transpose(0, 1)
    return rows if rows.stride(2) == 1 else rows.contiguous()
