"""Attention for packed forwards, at the seams that transformers offers.

DIRECT    The model calls transformers' `AttentionInterface`. Our function reads the pool, segment by segment.
GATHERED  The same, for models that transform what the cache gives back (MLA expands latents): the cache returns the
          rows of all segments side by side, our function reads each segment's part.
DENSE     The model computes attention itself: the cache returns all segments side by side, and a dense mask keeps
          them apart.

In all three `PackedCache.update` writes the new rows to the pool, and every row sees the same keys. What a model asks
of its attention beyond that, our function refuses by name rather than ignore.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, PreTrainedConfig, PreTrainedModel

from specgen.errors import UnsupportedModel
from specgen.kernels.reference import tree_attention
from specgen.kv.formats import LayerStore
from specgen.kv.pool import KVPool
from specgen.kv.segment import Segment
from specgen.model.row_attention import Seen, row_by_row, seen_in_chain, seen_in_mask

_PACKED_HEADS_ROWS = 64
_names = (f"specgen-{number}" for number in itertools.count())
# What models hand to an attention function without its result depending on it.
_IDLE = frozenset({"dropout", "output_attentions", "output_hidden_states", "output_router_logits", "position_ids"})
_IDLE |= {"sliding_window", "use_cache"}


class Seam(Enum):
    """How a packed forward reaches a model's attention; see the module's docstring."""

    DIRECT = "direct"
    GATHERED = "gathered"
    DENSE = "dense"


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
    """The segments of one packed forward, with what all layers share: slots and masks. Lives for one forward."""

    def __init__(self, segments: Sequence[Segment], pool: KVPool, *, gathered: bool) -> None:
        self.segments = segments
        self.pool = pool
        self.gathered = gathered
        self.rows = sum(len(segment.tokens) for segment in segments)
        writes = [s.table.span(s.end - len(s.tokens), s.end) for s in segments]
        self.write = writes[0] if len(writes) == 1 else _concatenated(writes)
        self._views: dict[tuple[int, Reach], tuple[slice | Tensor, Tensor | None]] = {}
        self._seen: dict[tuple[int, Reach], tuple[slice | Tensor, list[Seen], int]] = {}

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

    def seen(self, index: int, reach: Reach) -> tuple[slice | Tensor, list[Seen], int]:
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
    def offsets(self) -> Tensor:
        """int64[rows]: each row's position less its row number."""
        positions = [p for s in self.segments for p in s.positions[s.tail - len(s.tokens) :]]
        return (torch.tensor(positions) - torch.arange(self.rows)).to(self.pool.device)


def _first_seen(segment: Segment, reach: Reach) -> int:
    """The first position of the prefix that any row sees."""
    earliest = min(segment.positions[segment.tail - len(segment.tokens) :])
    return min(segment.table.length, reach.oldest(earliest))


def _seen_rows(segment: Segment, start: int, reach: Reach) -> list[Seen]:
    prefix, rows = segment.table.length, len(segment.tokens)
    if segment.visible is None and list(segment.positions) == list(range(prefix, prefix + segment.tail)):
        return seen_in_chain(start, segment.end, [reach.oldest(p) for p in segment.positions[-rows:]])
    mask = _mask(segment, start, reach)
    if mask is None:
        mask = torch.ones(1, segment.end - start, dtype=torch.bool)
    return seen_in_mask(mask, prefix - start)


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


class PackedCache(Cache):
    """The cache object that a packed forward hands to the model: it writes new KV to the pool."""

    is_compileable = False

    def __init__(self, batch: Batch, stores: Sequence[int | None]) -> None:
        super().__init__(layers=[])
        self.batch = batch
        self.stores = stores

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [1, kv_heads, rows, dim] to the pool; return what the model is to attend to."""
        batch = self.batch
        store = _stored(batch.pool, self.stores, layer_idx)
        store.write(batch.write, key_states[0].transpose(0, 1), value_states[0].transpose(0, 1))
        if not batch.gathered:
            return key_states, value_states
        parts = [store.read_plain(segment.table.span(0, segment.end)) for segment in batch.segments]
        keys, values = (torch.cat(side).transpose(0, 1).unsqueeze(0) for side in zip(*parts, strict=True))
        return keys, values

    def get_seq_length(self, layer_idx: int | None = None) -> int | Tensor:  # type: ignore[override]
        """Zero for the model, to which positions are given.

        A layer that asks for itself numbers its rows from here on (Llama 4's temperature): each gets its position.
        """
        return 0 if layer_idx is None else self.batch.offsets


def _stored(pool: KVPool, stores: Sequence[int | None], layer: int) -> LayerStore:
    store = stores[layer]
    if store is None:
        raise UnsupportedModel(f"layer {layer} attends, though the model's own cache holds nothing of it")
    return pool.layers[store]


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


class PackedAttention:
    """The attention function of one model, registered with transformers under a name of its own."""

    def __init__(
        self,
        model: PreTrainedModel,
        reaches: Sequence[Reach],
        stores: Sequence[int | None],
        *,
        invariant: bool = False,
    ) -> None:
        self._invariant = invariant
        self._configs = tuple(_nested(model.config))
        self._reaches = reaches
        self._stores = stores
        self._batch: Batch | None = None
        self._name = next(_names)
        itself = weakref.ref(self)
        AttentionInterface.register(self._name, lambda *args, **kwargs: itself()(*args, **kwargs))  # type: ignore[misc]
        weakref.finalize(self, AttentionInterface._global_mapping.pop, self._name, None)

    @contextmanager
    def over(self, batch: Batch) -> Iterator[None]:
        """Route the model's attention here for one forward; the user's own calls keep their implementation."""
        before = [config._attn_implementation for config in self._configs]
        self._batch = batch
        # Sets it on the nested configs too, so they are put back from the outermost inwards.
        self._configs[0]._attn_implementation = self._name
        try:
            yield
        finally:
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation = name
            self._batch = None

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """transformers' attention function: query [1, heads, rows, dim]; returns [1, rows, heads, value_dim]."""
        layer: Any = module.layer_idx
        batch = self._batch
        if batch is None:
            raise RuntimeError(f"attention {self._name} is called outside a packed forward")
        reach = self._reaches[layer]
        if (surprise := _surprise(attention_mask, reach, kwargs)) is not None:
            raise UnsupportedModel(f"layer {layer} ({type(module).__name__}) {surprise}")
        store = _stored(batch.pool, self._stores, layer)
        turned = store.turned and not batch.gathered
        queries = query[0].transpose(0, 1)
        if turned:
            queries = store.turn_query(queries)
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        attend = partial(_attend, scale=scale, softcap=softcap, sinks=s_aux)
        outputs = []
        row = column = 0
        for index, segment in enumerate(batch.segments):
            given = [t[0, :, column : column + segment.end].transpose(0, 1) for t in (key, value)]
            mine = queries[row : row + len(segment.tokens)]
            row, column = row + len(segment.tokens), column + segment.end
            if self._invariant:
                span, seen, prefix = batch.seen(index, reach)
                # Contiguous: a row's keys lie alike whatever made them.
                keys, values = (t.contiguous() for t in given) if batch.gathered else store.read(span)
                outputs.append(row_by_row(attend, mine, keys, values, seen, prefix))
            else:
                span, visible = batch.view(index, reach)
                keys, values = given if batch.gathered else store.read(span)
                by_head = (t.transpose(0, 1) for t in (mine, keys, values))
                outputs.append(attend(*by_head, visible=visible))
        packed = (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)).transpose(0, 1)
        if turned:
            packed = store.turn_output(packed)
        # Contiguous as transformers' own functions return it: some models call `view` on it.
        return packed.contiguous().unsqueeze(0), None


def _nested(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """The config and all configs inside it, outermost first."""
    yield config
    for name in config.sub_configs:
        if isinstance(inner := getattr(config, name, None), PreTrainedConfig):
            yield from _nested(inner)


def _surprise(attention_mask: Tensor | None, reach: Reach, kwargs: dict[str, Any]) -> str | None:
    """What a layer asks of its attention that a packed forward does not do; `None` when there is nothing."""
    if attention_mask is not None:
        return "builds an attention mask of its own, which cannot be packed"
    if (window := kwargs.get("sliding_window")) != reach.window:
        return f"looks back over {window} tokens, but its KV cache says {reach.window}"
    # Nearly all values are None or False, so that the names need not be looked at.
    unknown = [name for name, value in kwargs.items() if value is not None and value is not False and name not in _IDLE]
    return f"asks its attention for {', '.join(unknown)}, which cannot be packed" if unknown else None


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
