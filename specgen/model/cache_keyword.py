"""What a model calls its KV cache, as an argument and in its output: `past_key_values` in transformers before 5.24,
`cache` from there on, `cache_params` in older state space models.

Models with code of their own keep the older names under a newer transformers, so the model is asked, not the release.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PreTrainedModel

_NAMES = ("cache", "past_key_values", "cache_params")


def cache_keyword(model: PreTrainedModel) -> str:
    """The argument of `model.forward` that takes a KV cache, by its signature."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in _NAMES if name in parameters), "past_key_values")


def cache_of(output: object) -> Any:
    """The KV cache in what a model's forward returned; `None` without one.

    Reads what is stored: newer outputs answer to the older names too, and warn.
    """
    stored = vars(output)
    return next((stored[name] for name in _NAMES if stored.get(name) is not None), None)
