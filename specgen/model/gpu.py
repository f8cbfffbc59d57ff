"""A packed forward as the GPU kernels see it: what all layers share, brought over in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specgen.errors import UnsupportedModel
from specgen.kernels.gpu.kv_write import kv_write
from specgen.kernels.gpu.tree_attention import Tile, Work, tile, tree_attention
from specgen.kernels.layout import Kept
from specgen.kv.formats import LayerStore
from specgen.kv.pool import KVPool
from specgen.kv.segment import Segment
from specgen.model.batch import Reach
from specgen.model.plan import wanted_rows
from specgen.model.work import Cut, Cuttings, Places, cut

_HOPPER = 9
_PROGRAMS_PER_PROCESSOR = 2
_INTERPRETED_PROGRAMS = 16
_PARTIALS = 4096
# Tensors begin where Triton may take it that vectors can be loaded: at multiples of 16 bytes.
_ALIGNED = 4

Array = NDArray[np.int32]


class LayerKind(NamedTuple):
    """What layers must have in common to share work: how far they look back, query heads to a KV head, KV heads, and
    bytes of the wider head."""

    reach: Reach
    group: int
    kv_heads: int
    head_bytes: int


@dataclass(slots=True)
class GpuKernels:
    """The kernels for one target. kinds: of its layers, as far as forwards have met them.

    by_path: give each row of a tree its keys as if its path had been committed; see `specgen.model.work`.
    """

    device: torch.device
    kinds: dict[LayerKind, None]
    by_path: bool = False

    @classmethod
    def on(cls, device: torch.device) -> GpuKernels:
        """For a device that the kernels can run on."""
        return cls(device, {})

    def forward(self, segments: Sequence[Segment], pool: KVPool) -> GpuForward:
        """What the layers of one forward need."""
        return GpuForward(self, segments, pool)

    def tile(self, kind: LayerKind, rows: int) -> Tile:
        """For a forward whose largest segment has `rows` rows. Rows that must not know of one another get one tile in
        all company: products of tiles of another size may add up in another order."""
        wide = self.by_path or rows * kind.group > tile(kind.head_bytes, wide=False).lanes
        chosen = tile(kind.head_bytes, wide=wide, warpgroups=self._warpgroups)
        return replace(chosen, lanes=max(chosen.lanes, 1 << (kind.group - 1).bit_length()))

    def cut(self, kind: LayerKind, tile: Tile) -> Cut:
        """How a forward's attention is cut in layers of a kind."""
        programs = max(1, self._programs // kind.kv_heads)
        return Cut(tile.lanes // kind.group, programs, _PARTIALS, self.by_path)

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


class GpuForward:
    """One forward's metadata on the device. ids, positions: int64[1, rows]; wanted: int64[n], rows with logits.

    Bounds of a step, whatever the number of sequences and rows.
    To the device: one copy, of all that is told here; one for each sequence whose accepted rows have to move; one if
    rows are sampled; two for each layer under an adapter.
    Back: one, `top.on_host`, the only time that the host waits for drafters and for requests that are greedy or warped
    alone (`Sampler.warp`); one with other processors waits once a token that it draws.
    Launches besides the model's own: `kv_write` and attention once a layer, the merging of spans once a layer where
    contexts are cut, two for the likeliest tokens, one for all sampled rows, two for each layer under an adapter.
    The first forward that meets a kind of layer copies once more for it.
    """

    def __init__(self, kernels: GpuKernels, segments: Sequence[Segment], pool: KVPool) -> None:
        self._kernels = kernels
        self._segments = segments
        self._pool = pool
        self._rows = sum(len(segment.tokens) for segment in segments)
        self._works: dict[LayerKind, tuple[Work, Tile]] = {}
        tokens = [token for segment in segments for token in segment.tokens]
        positions = [position for segment in segments for position in segment.new_positions]
        slots = np.concatenate([s.table.slots(s.end - len(s.tokens), s.end).numpy() for s in segments])
        ids, places, self.slots, wanted = self._bring(
            list(kernels.kinds),
            np.array(tokens, dtype=np.int32),
            np.array(positions, dtype=np.int32),
            slots.astype(np.int32),
            np.array(wanted_rows(segments), dtype=np.int32),
        )
        self.ids, self.positions, self.wanted = ids.long()[None], places.long()[None], wanted.long()

    def write(self, store: LayerStore, key: Tensor, value: Tensor) -> None:
        """Keep the new rows' key and value, [1, kv_heads, rows, dim] each."""
        kv_write(_rows(key), _rows(value), _kept(store), self.slots)

    def attend(
        self,
        store: LayerStore,
        reach: Reach,
        query: Tensor,
        *,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Query [1, heads, rows, key_dim]; returns [1, rows, heads, value_dim]. The new rows are written already."""
        kept = _kept(store)
        layout = kept.layout
        head_bytes = max(layout.key_dim, layout.value_dim) * query.element_size()
        kind = LayerKind(reach, query.shape[1] // layout.kv_heads, layout.kv_heads, head_bytes)
        if kind not in self._works:
            self._bring([kind])
            self._kernels.kinds[kind] = None
        work, chosen = self._works[kind]
        return tree_attention(_rows(query), kept, work, scale=scale, softcap=softcap, sinks=sinks, tile=chosen)[None]

    def _bring(self, kinds: Sequence[LayerKind], *others: Array) -> list[Tensor]:
        """Work for these kinds, and `others`, in one copy."""
        most = max(len(segment.tokens) for segment in self._segments)
        tiles = [self._kernels.tile(kind, most) for kind in kinds]
        places = Places()
        cuttings: list[Cuttings] = [
            cut(self._segments, kind.reach, self._kernels.cut(kind, chosen), places, self._rows)
            for kind, chosen in zip(kinds, tiles, strict=True)
        ]
        tables = [side for found in cuttings for side in (found.items, found.rows)]
        numbers = np.array([*places.numbers, 0], dtype=np.int32)
        pages, *rest = _copied([numbers, *tables, *others], self._pool.device)
        for kind, chosen, found in zip(kinds, tiles, cuttings, strict=True):
            items, rows, *rest = rest
            self._works[kind] = Work(items, rows, pages, found.partials, self._pool.page_size), chosen
        return rest


def _copied(arrays: Sequence[Array], device: torch.device) -> list[Tensor]:
    """The arrays on the device, views of one tensor."""
    starts, length = [], 0
    for array in arrays:
        starts.append(length)
        length += -(-array.size // _ALIGNED) * _ALIGNED
    packed = np.zeros(length, dtype=np.int32)
    for start, array in zip(starts, arrays, strict=True):
        packed[start : start + array.size] = array.reshape(-1)
    there = torch.from_numpy(packed).to(device)
    return [there[s : s + array.size].view(array.shape) for s, array in zip(starts, arrays, strict=True)]


def _rows(x: Tensor) -> Tensor:
    """[1, heads, rows, dim] as [rows, heads, dim], the dims side by side."""
    rows = x[0].transpose(0, 1)
    return rows if rows.stride(2) == 1 else rows.contiguous()


def _kept(store: LayerStore) -> Kept:
    kept = store.kept
    if kept is None:
        raise UnsupportedModel(f"kv_format {store.kind.name!r} is none that the GPU kernels read")
    return kept
