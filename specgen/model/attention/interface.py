"""Where a model's own code meets a backend: transformers' attention interface and its cache."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, Cache, PreTrainedConfig, PreTrainedModel

from specgen.errors import UnsupportedModel
from specgen.kv.formats import LayerStore
from specgen.kv.pool import KVPool
from specgen.model.attention.base import AttendingLayer, ForwardBatch
from specgen.model.attention.reach import Reach

_names = (f"specgen-{number}" for number in itertools.count())
# What models hand to an attention function without its result depending on it.
_IDLE = frozenset({"dropout", "output_attentions", "output_hidden_states", "output_router_logits", "position_ids"})
_IDLE |= {"sliding_window", "use_cache"}


class PackedCache(Cache):
    """The cache object that a packed forward hands to the model."""

    is_compileable = False

    def __init__(self, batch: ForwardBatch, stores: Sequence[int | None]) -> None:
        super().__init__(layers=[])
        self.batch = batch
        self.stores = stores

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Take [1, kv_heads, rows, dim]; return what the model is to attend to. See `ForwardBatch.write`."""
        return self.batch.write(_stored(self.batch.pool, self.stores, layer_idx), key_states, value_states)

    def get_seq_length(self, layer_idx: int | None = None) -> int | Tensor:  # type: ignore[override]
        """Zero for the model, to which positions are given.

        A layer that asks for itself numbers its rows from here on (Llama 4's temperature): each gets its position.
        """
        return 0 if layer_idx is None else self.batch.offsets


def packed_logits(
    model: PreTrainedModel,
    batch: ForwardBatch,
    stores: Sequence[int | None],
    cache_keyword: str,
    *,
    keeps_logits: bool = True,
) -> Tensor:
    """Run a model's own code over a batch; logits [wanted rows, vocab] as the model makes them.

    keeps_logits: whether it computes those of the wanted rows alone, when it is asked to. It traces in `torch.compile`.
    """
    logits: Tensor = model(
        input_ids=batch.ids,
        position_ids=batch.position_ids,
        attention_mask=batch.mask,
        use_cache=True,
        **{cache_keyword: PackedCache(batch, stores)},
        **({"logits_to_keep": batch.wanted} if keeps_logits else {}),
    ).logits[0]
    return logits if keeps_logits else logits[batch.wanted]


def _stored(pool: KVPool, stores: Sequence[int | None], layer: int) -> LayerStore:
    # Older releases end the cache before the layers that share the KV of earlier ones.
    store = stores[layer] if layer < len(stores) else None
    if store is None:
        raise UnsupportedModel(f"layer {layer} attends, though the model's own cache holds nothing of it")
    return pool.layers[store]


class AttentionRoute:
    """The attention function of one model, registered with transformers under a name of its own.

    What a model asks of its attention beyond what backends do is refused by name rather than ignored.
    """

    def __init__(self, model: PreTrainedModel, reaches: Sequence[Reach], stores: Sequence[int | None]) -> None:
        self._configs = tuple(_nested(model.config))
        self._reaches = reaches
        self._stores = stores
        self.batch: ForwardBatch | None = None
        self.name = next(_names)
        itself = weakref.ref(self)
        AttentionInterface.register(self.name, lambda *args, **kwargs: itself()(*args, **kwargs))  # type: ignore[misc]
        self.close = weakref.finalize(self, AttentionInterface._global_mapping.pop, self.name, None)
        """Take the name back, at the latest with this object: no forward goes this way any more."""

    def install(self) -> None:
        """Route the model's attention here for good."""
        self._configs[0]._attn_implementation = self.name

    @contextmanager
    def over(self, batch: ForwardBatch) -> Iterator[None]:
        """Route the model's attention here for one forward; the user's own calls keep their implementation."""
        before = [config._attn_implementation for config in self._configs]
        self.batch = batch
        # Sets it on the nested configs too, so they are put back from the outermost inwards.
        self._configs[0]._attn_implementation = self.name
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
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        """transformers' attention function: query [1, heads, rows, dim]; returns [1, rows, heads, value_dim]."""
        layer: Any = module.layer_idx
        batch = self.batch
        if batch is None:
            raise RuntimeError(f"attention {self.name} is called outside a packed forward")
        store = _stored(batch.pool, self._stores, layer)
        reach = self._reaches[layer]
        if (surprise := _surprise(attention_mask, reach, kwargs)) is not None:
            raise UnsupportedModel(f"layer {layer} ({type(module).__name__}) {surprise}")
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        return batch.attend(AttendingLayer(store, reach, scale, softcap, s_aux), query, key, value), None


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
