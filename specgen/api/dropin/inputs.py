"""What `generate` hands over for a prompt: which of its keywords an engine can do without, and where the padding is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, StaticCache

_CHANGE_NO_TEXT = ("cache_position", "logits_to_keep", "return_dict")


def not_read(model_kwargs: Mapping[str, object], config: GenerationConfig) -> str | None:
    """The first keyword that says something to the model's forward that an engine's would not hear; None if none does.

    Caches are told by their type, since releases name them differently. Options of the generation config are judged
    there. Whatever else is not known counts as something that is heard.
    """
    for name, value in model_kwargs.items():
        if value is None or name in _CHANGE_NO_TEXT or name in ("attention_mask", "position_ids"):
            continue
        if _is_scratch(value) or (hasattr(config, name) and isinstance(value, bool)):
            continue
        return name
    return None


def _is_scratch(value: object) -> bool:
    """Whether it is an empty cache that `generate` made for this call and that keeps tokens as they are."""
    if not isinstance(value, DynamicCache | StaticCache) or getattr(value, "_is_user_defined", False):
        return False
    return isinstance(value, Cache) and int(value.get_seq_length()) == 0


def left_paddings(prompts: Tensor, model_kwargs: Mapping[str, Any]) -> list[int] | None:
    """Length of the left padding of each row; None where mask or positions say anything else.

    prompts: int64[batch, length].
    """
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    if mask is None:
        starts = [0] * len(prompts)
    elif mask.shape != prompts.shape:
        return None
    else:
        hidden = mask.eq(0)
        starts = hidden.sum(dim=1).tolist()
        if any(start == prompts.shape[1] or not hidden[row, :start].all() for row, start in enumerate(starts)):
            return None
    if positions is not None and not _count_from(positions, starts, prompts.shape[1]):
        return None
    return starts


def _count_from(positions: Tensor, starts: list[int], length: int) -> bool:
    """Whether int64[..., 1 or batch, length] counts 0, 1, ... behind the padding of each row, on every axis."""
    if positions.dim() < 2 or positions.shape[-1] != length or positions.shape[-2] not in (1, len(starts)):
        return False
    expanded = positions.expand(*positions.shape[:-2], len(starts), length)
    return all(
        expanded[..., row, start:].eq(torch.arange(length - start, device=positions.device)).all()
        for row, start in enumerate(starts)
    )
