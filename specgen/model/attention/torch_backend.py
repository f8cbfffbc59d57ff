"""Attention in plain torch, segment by segment; it carries every model and every KV format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from specgen.kernels.backends import Backend
from specgen.kernels.reference import tree_attention
from specgen.kv.formats import KVFormat, LayerStore
from specgen.kv.pool import KVPool
from specgen.model.attention.base import AttendingLayer, ForwardBatch, Route
from specgen.model.attention.inputs import input_tensors
from specgen.model.attention.masks import dense_mask, first_key, segment_mask, visible_keys
from specgen.model.attention.reach import Reach
from specgen.model.attention.rowwise import VisibleKeys, row_by_row
from specgen.model.checks.architecture import Architecture
from specgen.model.segment import Segment

_PACKED_HEADS_ROWS = 64


@dataclass(frozen=True, slots=True)
class TorchBackend:
    """Carries every model by one of the routes; see `base`."""

    route: Route = "direct"
    batch_invariant: bool = False
    kernels: Backend = "torch"

    @property
    def name(self) -> str:
        """See `AttentionBackend`."""
        return "torch" if self.route == "direct" else f"torch-{self.route}"

    def unusable(self, architecture: Architecture, kv_format: KVFormat) -> str | None:
        """See `AttentionBackend`."""
        return architecture.no_dense_mask if self.route == "dense" else architecture.no_interface

    def invariant(self) -> TorchBackend | None:
        """Each row alone over exactly the keys that it sees (`rowwise`); a model's own code attends to all at once."""
        return None if self.route == "dense" else replace(self, batch_invariant=True)

    def begin(self, segments: Sequence[Segment], pool: KVPool) -> TorchBatch:
        """See `AttentionBackend`."""
        return _BATCHES[self.route](segments, pool, invariant=self.batch_invariant)


class TorchBatch(ForwardBatch):
    """A forward whose segments attend one after another, over views of the pool where their pages lie in a row."""

    def __init__(self, segments: Sequence[Segment], pool: KVPool, *, invariant: bool = False) -> None:
        self.segments = segments
        self.pool = pool
        self.ids, self.position_ids, self.wanted = input_tensors(segments, pool.device)
        self._invariant = invariant
        self._rows = [len(segment.tokens) for segment in segments]
        self._slots = _slots(segments)
        # Layers of one reach share them.
        self._spans: dict[tuple[int, Reach], tuple[int, slice | Tensor]] = {}
        self._masks: dict[tuple[int, Reach], Tensor | None] = {}
        self._visible: dict[tuple[int, Reach], list[VisibleKeys]] = {}

    def write(self, store: LayerStore, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """See `ForwardBatch`."""
        store.write(self._slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
        return key, value

    def attend(self, layer: AttendingLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `ForwardBatch`."""
        store, reach = layer.store, layer.reach
        queries = query[0].transpose(0, 1)
        queries = store.rotate_query(queries) if store.rotated else queries
        outputs = []
        for index, mine in enumerate(queries.split(self._rows)):
            start, span = self._span(index, reach)
            outputs.append(self._over(index, start, layer, mine, *store.read(span)))
        packed = _joined(outputs)
        return _returned(store.rotate_output(packed) if store.rotated else packed)

    def _span(self, index: int, reach: Reach) -> tuple[int, slice | Tensor]:
        """The first position that a segment's rows look at, and the slots from there to its end."""
        place = index, reach
        if place not in self._spans:
            segment = self.segments[index]
            start = first_key(segment, reach)
            self._spans[place] = start, segment.table.span(start, segment.end)
        return self._spans[place]

    def _over(self, index: int, start: int, layer: AttendingLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One segment: query [rows, heads, dim] over key and value [keys, kv_heads, dim], which begin at position
        `start`. Returns [heads, rows, value_dim]."""
        segment, place = self.segments[index], (index, layer.reach)
        attend = partial(_attend, scale=layer.scale, softcap=layer.softcap, sinks=layer.sinks)
        if self._invariant:
            if place not in self._visible:
                self._visible[place] = visible_keys(segment, start, layer.reach)
            return row_by_row(attend, query, key, value, self._visible[place], segment.table.length - start)
        if place not in self._masks:
            mask = segment_mask(segment, start, layer.reach)
            self._masks[place] = None if mask is None else mask.to(self.pool.device)
        return attend(*(side.transpose(0, 1) for side in (query, key, value)), visible=self._masks[place])


class GatheredBatch(TorchBatch):
    """A forward whose cache gives back the keys and values of all segments, side by side."""

    def write(self, store: LayerStore, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """See `ForwardBatch`. Returns [1, kv_heads, keys of all segments, dim] each."""
        TorchBatch.write(self, store, key, value)
        parts = [store.read_plain(segment.table.span(0, segment.end)) for segment in self.segments]
        keys, values = (torch.cat(side).transpose(0, 1).unsqueeze(0) for side in zip(*parts, strict=True))
        return keys, values

    def attend(self, layer: AttendingLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `ForwardBatch`. Key and value: [1, kv_heads, keys of all segments, dim] each."""
        ends = [segment.end for segment in self.segments]
        parts = zip(
            query[0].transpose(0, 1).split(self._rows),
            key[0].transpose(0, 1).split(ends),
            value[0].transpose(0, 1).split(ends),
            strict=True,
        )
        outputs = []
        for index, (mine, keys, values) in enumerate(parts):
            if self._invariant:
                # Contiguous: a row's keys lie alike whatever made them.
                keys, values = keys.contiguous(), values.contiguous()
            outputs.append(self._over(index, 0, layer, mine, keys, values))
        return _returned(_joined(outputs))


class DenseBatch(GatheredBatch):
    """A forward whose model attends by itself."""

    def __init__(self, segments: Sequence[Segment], pool: KVPool, *, invariant: bool = False) -> None:
        super().__init__(segments, pool, invariant=invariant)
        self.mask = dense_mask(segments, pool.dtype).to(pool.device)


_BATCHES: Mapping[Route, type[TorchBatch]] = {"direct": TorchBatch, "gathered": GatheredBatch, "dense": DenseBatch}


def _slots(segments: Sequence[Segment]) -> slice | Tensor:
    """The slots of all rows."""
    spans = [segment.table.span(segment.end - len(segment.tokens), segment.end) for segment in segments]
    if len(spans) == 1:
        return spans[0]
    return torch.cat([torch.arange(s.start, s.stop) if isinstance(s, slice) else s for s in spans])


def _joined(outputs: Sequence[Tensor]) -> Tensor:
    """[rows, heads, value_dim] of each segment's [heads, rows, value_dim]."""
    return (outputs[0] if len(outputs) == 1 else torch.cat(list(outputs), dim=1)).transpose(0, 1)


def _returned(packed: Tensor) -> Tensor:
    # Contiguous as transformers' own functions return it: some models call `view` on it.
    return packed.contiguous().unsqueeze(0)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    visible: Tensor | None = None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    if softcap is None and sinks is None:
        return _sdpa(query, key, value, visible, scale)
    return tree_attention(query, key, value, visible, scale=scale, softcap=softcap, sinks=sinks)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    heads, rows, _ = query.shape
    groups = heads // key.shape[0]
    if rows <= _PACKED_HEADS_ROWS:
        # Query heads of one group become rows over their shared key head, so that keys are never copied.
        query = query.reshape(key.shape[0], groups * rows, -1)
        visible = None if visible is None else visible.repeat(groups, 1)
    elif groups > 1:
        key, value = key.repeat_interleave(groups, dim=0), value.repeat_interleave(groups, dim=0)
    mask = None if visible is None else visible[None]
    output = F.scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=mask, scale=scale)
    return output.reshape(heads, rows, -1)
