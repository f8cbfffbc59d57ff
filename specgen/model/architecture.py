"""What a model's layers keep between tokens, read from transformers' own cache, and whether we can pack it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from specgen.errors import UnsupportedModel
from specgen.kv.pool import LayerShape
from specgen.model.attention import Reach

_REACHES = {"DynamicLayer", "DynamicSlidingWindowLayer"}
_ALTERNATIVE = "run it with transformers' own generate"


@dataclass(frozen=True, slots=True)
class Architecture:
    """Per layer: the shape of one token's KV and how far back the layer looks."""

    shapes: tuple[LayerShape, ...]
    reaches: tuple[Reach, ...]
    dtype: torch.dtype


def refuse(model: PreTrainedModel, reason: str) -> UnsupportedModel:
    """The error for a model that specgen cannot verify exactly; names the model type and what to do instead."""
    return UnsupportedModel(f"model type {model.config.model_type!r}: {reason}; {_ALTERNATIVE}")


@torch.inference_mode()
def inspect_layers(model: PreTrainedModel) -> Architecture:
    """Run two tokens through the model as it is and read its cache.

    Raises UnsupportedModel, naming the layer, when a layer keeps anything but one key and one value per token.
    """
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    try:
        output = model(input_ids=ids, use_cache=True)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise refuse(model, f"a forward over two tokens fails ({type(error).__name__}: {error})") from error
    cache = getattr(output, "past_key_values", None)
    if not isinstance(cache, Cache):
        what = "state-space layers with their own cache" if hasattr(output, "cache_params") else "no KV cache"
        raise refuse(model, f"keeps {what}, which cannot be rolled back after a rejected draft")
    shapes, reaches = [], []
    for index, layer in enumerate(cache.layers):
        kind = type(layer).__name__
        keys: Tensor | None = getattr(layer, "keys", None)
        if kind not in _REACHES:
            raise refuse(model, f"layer {index} is a {kind}, which cannot be rolled back after a rejected draft")
        if keys is None:
            raise refuse(model, f"layer {index} keeps no KV of its own (shared KV layers are not packed)")
        shapes.append(LayerShape(keys.shape[1], keys.shape[3], layer.values.shape[3]))
        reaches.append(_reach(model, index, getattr(layer, "sliding_window", None)))
    return Architecture(tuple(shapes), tuple(reaches), keys.dtype)


def _reach(model: PreTrainedModel, layer: int, window: int | None) -> Reach:
    if window is None:
        return Reach()
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    kind = kinds[layer] if kinds else "sliding_attention"
    if kind == "chunked_attention":
        return Reach(chunk=config.attention_chunk_size)
    if kind != "sliding_attention":
        raise refuse(model, f"layer {layer} has the unknown type {kind!r}")
    return Reach(window=window)
