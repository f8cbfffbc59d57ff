"""Attention for packed forwards, at the seams that transformers offers.

DIRECT    The model calls transformers' `AttentionInterface`. Our function reads the pool, segment by segment; where
          there are kernels, they do so for all segments at once.
GATHERED  The same, for models that transform what the cache gives back (MLA expands latents): the cache returns the
          rows of all segments side by side, our function reads each segment's part.
DENSE     The model computes attention itself: the cache returns all segments side by side, and a dense mask keeps
          them apart.

In all three the new rows are written to the pool, and every row sees the same keys. What a model asks of its attention
beyond that, our function refuses by name rather than ignore.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, PreTrainedConfig, PreTrainedModel

from specgen.errors import UnsupportedModel
from specgen.kernels.reference import tree_attention
from specgen.kv.formats import LayerStore
from specgen.kv.pool import KVPool
from specgen.model.attention.rowwise import row_by_row
from specgen.model.batch import Batch, PlannedBatch, Reach

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


class PackedCache(Cache):
    """The cache object that a packed forward hands to the model: it writes new KV to the pool, or leaves that to the
    kernel."""

    is_compileable = False

    def __init__(self, batch: Batch | PlannedBatch, stores: Sequence[int | None]) -> None:
        super().__init__(layers=[])
        self.batch = batch
        self.stores = stores

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [1, kv_heads, rows, dim] to the pool; return what the model is to attend to."""
        batch = self.batch
        if isinstance(batch, PlannedBatch) or batch.kernel:
            return key_states, value_states
        store = _stored(batch.pool, self.stores, layer_idx)
        if batch.gpu is not None:
            batch.gpu.write(store, key_states, value_states)
            return key_states, value_states
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
    # Older releases end the cache before the layers that share the KV of earlier ones.
    store = stores[layer] if layer < len(stores) else None
    if store is None:
        raise UnsupportedModel(f"layer {layer} attends, though the model's own cache holds nothing of it")
    return pool.layers[store]


class PackedAttention:
    """The attention function of one model, registered with transformers under a name of its own.

    invariant: compute each row as if it were alone, where the kernel does not do so anyway.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reaches: Sequence[Reach],
        stores: Sequence[int | None],
    ) -> None:
        self.batch_invariant = False
        self._configs = tuple(_nested(model.config))
        self._reaches = reaches
        self._stores = stores
        self.batch: Batch | PlannedBatch | None = None
        self._name = next(_names)
        itself = weakref.ref(self)
        AttentionInterface.register(self._name, lambda *args, **kwargs: itself()(*args, **kwargs))  # type: ignore[misc]
        self.close = weakref.finalize(self, AttentionInterface._global_mapping.pop, self._name, None)
        """Take the name back, at the latest with this object: no forward goes this way any more."""

    def install(self) -> None:
        """Route the model's attention here for good."""
        self._configs[0]._attn_implementation = self._name

    @contextmanager
    def over(self, batch: Batch) -> Iterator[None]:
        """Route the model's attention here for one forward; the user's own calls keep their implementation."""
        before = [config._attn_implementation for config in self._configs]
        self.batch = batch
        # Sets it on the nested configs too, so they are put back from the outermost inwards.
        self._configs[0]._attn_implementation = self._name
        try:
            yield
        finally:
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation = name
            self.batch = None

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
        batch = self.batch
        if batch is None:
            raise RuntimeError(f"attention {self._name} is called outside a packed forward")
        store = _stored(batch.pool, self._stores, layer)
        reach = self._reaches[layer]
        if (surprise := _surprise(attention_mask, reach, kwargs)) is not None:
            raise UnsupportedModel(f"layer {layer} ({type(module).__name__}) {surprise}")
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        if isinstance(batch, PlannedBatch) or batch.kernel:
            return _by_kernel(batch.plan, store, reach, (query, key, value), scale, softcap, s_aux), None
        if batch.gpu is not None:
            return batch.gpu.attend(store, reach, query, scale=scale, softcap=softcap, sinks=s_aux), None
        turned = store.turned and not batch.gathered
        queries = query[0].transpose(0, 1)
        if turned:
            queries = store.turn_query(queries)
        attend = partial(_attend, scale=scale, softcap=softcap, sinks=s_aux)
        outputs = []
        row = column = 0
        for index, segment in enumerate(batch.segments):
            given = [t[0, :, column : column + segment.end].transpose(0, 1) for t in (key, value)]
            mine = queries[row : row + len(segment.tokens)]
            row, column = row + len(segment.tokens), column + segment.end
            if self.batch_invariant:
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


def _by_kernel(
    plan: Tensor,
    store: LayerStore,
    reach: Reach,
    new: tuple[Tensor, Tensor, Tensor],
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Query, key and value, [1, heads, rows, dim] each, through the CPU kernel."""
    rows = [t[0].transpose(0, 1) for t in new]
    sinks = None if sinks is None else sinks.float()
    window, chunk = reach.window or 0, reach.chunk or 0
    output: Tensor = torch.ops.specgen.tree_attention(
        *rows, *store.planes, plan, scale, softcap or 0.0, sinks, window, chunk
    )
    return output.unsqueeze(0)


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
