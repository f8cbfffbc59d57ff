"""What a model's layers keep between tokens, read from transformers' own cache, and whether we can pack it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from specgen.errors import UnsupportedModel
from specgen.kv.formats import NATIVE, KVFormat, LayerShape
from specgen.kv.pool import KVPool
from specgen.model.attention.reach import EVERYTHING, Reach
from specgen.model.cache_keyword import cache_of

_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
_ALTERNATIVE = "run it with transformers' own generate"
# Models that compute attention themselves, read line by line: they mask by the given mask and by nothing else. A window
# or a bias inside a model's own code would not show on the few tokens of the check at load.
_READ = ("codegen", "falcon", "gpt_neox_japanese", "gptj", "xglm")
_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a packed forward must know of a model.

    shapes: one token's KV in each layer of the pool.
    stores: for each layer of the model, the pool layer it writes to, or reads from when it shares an earlier layer's
        KV; `None` for a layer without attention.
    reaches: for each layer of the model, how far back it looks.
    dtype, device: of keys and values.
    vocab_size: length of a row of logits.
    no_interface: why attention cannot go through transformers' attention interface; `None` if it does.
    no_dense_mask: why it cannot be left to the model's own code under a dense mask; `None` if it can.
    """

    shapes: tuple[LayerShape, ...]
    stores: tuple[int | None, ...]
    reaches: tuple[Reach, ...]
    dtype: torch.dtype
    device: torch.device
    vocab_size: int
    no_interface: str | None
    no_dense_mask: str | None

    @property
    def shares_kv(self) -> bool:
        """Whether layers read the KV of earlier ones."""
        return len(set(self.stores)) < len(self.stores)

    def new_pool(self, pages: int, kind: KVFormat = NATIVE) -> KVPool:
        """A pool for the model's KV."""
        return KVPool(self.shapes, pages, dtype=self.dtype, device=self.device, kind=kind)


def refuse(model: PreTrainedModel, reason: str) -> UnsupportedModel:
    """The error for a model that specgen cannot verify exactly; names the model type and what to do instead."""
    return UnsupportedModel(f"model type {model.config.model_type!r}: {reason}; {_ALTERNATIVE}")


@torch.inference_mode()
def inspect_layers(model: PreTrainedModel) -> Architecture:
    """Run two tokens through the model as it is and read its cache.

    Raises UnsupportedModel, naming the layer, when a layer keeps anything but one key and one value per token.
    """
    cache, vocab_size = _two_tokens(model)
    config = model.config.get_text_config(decoder=True)
    layers: list[Any] = list(cache.layers)
    by_config = _layers_by_config(model, config)
    shapes: list[LayerShape] = []
    stores: list[int | None] = []
    reaches: list[Reach] = []
    for index, layer in enumerate(layers):
        if type(layer).__name__ == "DummyLayer":
            source = _shared_layer(config, index)
            stores.append(None if source is None else stores[source])
            reaches.append(EVERYTHING if source is None else reaches[source])
            continue
        if type(layer) not in _LAYERS or layer.keys is None:
            raise refuse(model, f"layer {index} ({_kind(config, index)}) {_state(layer)}")
        if index < len(by_config) and _window(by_config[index]) != _window(layer):
            # Such a model masks without its cache knowing, so generate, which builds the cache by the config, differs.
            told = f"looks back over {_window(by_config[index])} tokens by its config and {_window(layer)} by its cache"
            raise refuse(model, f"layer {index} ({_kind(config, index)}) {told}")
        stores.append(len(shapes))
        shapes.append(LayerShape(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]))
        reaches.append(_reach(model, config, index, _window(layer)))
    dtypes = {layer.keys.dtype for layer in layers if layer.keys is not None}
    if len(dtypes) != 1:
        raise refuse(model, f"its layers keep KV of {len(dtypes)} data types ({', '.join(map(str, dtypes))})")
    return Architecture(
        tuple(shapes),
        tuple(stores),
        tuple(reaches),
        dtypes.pop(),
        model.device,
        vocab_size,
        _no_interface(model),
        _no_dense_mask(model, reaches),
    )


def _two_tokens(model: PreTrainedModel) -> tuple[DynamicCache, int]:
    """The cache that the model itself makes, with two tokens in it, and the length of a row of logits."""
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    try:
        output = model(input_ids=ids, use_cache=True)
    except Exception as error:  # a model's own code may raise anything
        raise refuse(model, f"a forward over two tokens fails ({type(error).__name__}: {error})") from error
    cache = cache_of(output)
    if type(cache) is not DynamicCache:
        state = "keeps no KV cache" if cache is None else f"keeps its state in {type(cache).__name__}"
        raise refuse(model, f"{first_layer(model)} {state}, so that a rejected draft cannot be rolled back")
    return cache, output.logits.shape[-1]


def _no_interface(model: PreTrainedModel) -> str | None:
    if any(hasattr(inspect.getmodule(type(module)), "ALL_ATTENTION_FUNCTIONS") for module in model.modules()):
        return None
    return f"{first_layer(model)} computes attention itself, not through transformers' attention interface"


def _no_dense_mask(model: PreTrainedModel, reaches: Sequence[Reach]) -> str | None:
    if (own := _no_interface(model)) is None:
        return "the model calls transformers' attention interface, which builds no mask"
    if model.config.model_type not in _READ:
        return f"{own}, and maybe with a bias or window (of such models these are known to work: {', '.join(_READ)})"
    if getattr(model.config, "alibi", False):
        return f"{first_layer(model)} adds a bias that grows with distance (ALiBi), which is not packed"
    if set(reaches) != {EVERYTHING}:
        # A dense mask is one for all layers, so it cannot carry windows.
        return f"{first_layer(model)} computes attention itself, over a window"
    return None


def _layers_by_config(model: PreTrainedModel, config: PreTrainedConfig) -> list[object]:
    """The layers of the cache that transformers' generate would hand to the model."""
    try:
        return list(DynamicCache(config=config).layers)
    except Exception as error:  # a config may hold anything
        raise refuse(model, f"no KV cache can be built by its config ({type(error).__name__}: {error})") from error


def first_layer(model: PreTrainedModel) -> str:
    """Name the model's first layer by its class, for messages."""
    stacks = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module))
    stack = next(stacks, None)
    return f"layer 0 ({type(stack[0] if stack is not None else model).__name__})"


def context_limit(model: PreTrainedModel) -> int | None:
    """The longest text for which the packed forward is the model's own; `None` when positions have no end."""
    config = model.config.get_text_config(decoder=True)
    positions = (getattr(config, name, None) for name in _LIMITS)
    first = next((limit for limit in positions if isinstance(limit, int) and limit > 0), None)
    return min((limit for limit in (first, _longrope_limit(config)) if limit is not None), default=None)


def _longrope_limit(config: PreTrainedConfig) -> int | None:
    """LongRoPE rotates *all* rows of a forward differently once one of them is behind the original length.

    So a long text would change what is said of a short one beside it; behind that length nothing is exact.
    """
    ropes: dict[str, object] = getattr(config, "rope_parameters", None) or {}
    kinds = [
        kind for kind in (ropes, *ropes.values()) if isinstance(kind, dict) and kind.get("rope_type") == "longrope"
    ]
    limits = [kind.get("original_max_position_embeddings") for kind in kinds]
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


def _shared_layer(config: PreTrainedConfig, index: int) -> int | None:
    """The layer whose KV layer `index` reads: transformers shares within a layer type, from the last that stores."""
    modes = getattr(config, "kv_sharing_modes", None)
    if modes is None or modes[index] != "reuse":
        return None
    kinds = config.layer_types
    sources = (layer for layer in range(index) if modes[layer] == "store" and kinds[layer] == kinds[index])
    return max(sources, default=None)


def _kind(config: PreTrainedConfig, index: int) -> str:
    kinds = getattr(config, "layer_types", None)
    return str(kinds[index]) if kinds and index < len(kinds) else "attention"


def _window(layer: object) -> int | None:
    return getattr(layer, "sliding_window", None)


def _state(layer: object) -> str:
    if type(layer) is DynamicLayer:
        return "keeps no keys and values: its state is elsewhere and cannot be rolled back after a rejected draft"
    return f"keeps a {type(layer).__name__}, which cannot be rolled back after a rejected draft"


def _reach(model: PreTrainedModel, config: PreTrainedConfig, layer: int, window: int | None) -> Reach:
    if window is None:
        return EVERYTHING
    kinds = getattr(config, "layer_types", None)
    kind = kinds[layer] if kinds else "sliding_attention"
    if kind == "chunked_attention":
        return Reach(chunk=config.attention_chunk_size)
    if kind != "sliding_attention":
        raise refuse(model, f"layer {layer} has the unknown type {kind!r}")
    return Reach(window=window)
