"""From a path or a name to a model and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from specgen.errors import DrafterMismatch, InvalidRequest

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def dtype_of(name: str | torch.dtype | None) -> torch.dtype | str:
    """A torch dtype from its name; `None` and "auto" leave it to the checkpoint. Raises InvalidRequest otherwise."""
    if name is None or name == "auto":
        return "auto"
    if isinstance(name, torch.dtype):
        return name
    if name not in _DTYPES:
        raise InvalidRequest(f"dtype is {name!r}; choices: auto, {', '.join(_DTYPES)}", param="dtype")
    return _DTYPES[name]


def default_device() -> str:
    """The accelerator if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_model(
    source: str | Path, *, dtype: str | torch.dtype | None, device: str | torch.device | None, **options: Any
) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained`, on the device, ready to be wrapped. Raises InvalidRequest naming the
    source when there is no such model, or when its quantiser is not installed or cannot do what is asked for."""
    kind = dtype_of(dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=kind, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise InvalidRequest(f"model {str(source)!r} cannot be loaded: {error}", param="model") from error
    try:
        torch.nn.Module.to(model, device or default_device())
    except (RuntimeError, AssertionError) as error:  # torch's ways to say that there is no such device
        raise InvalidRequest(f"device {device!r} cannot be used: {error}", param="device") from error
    return model


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer beside a model, or None where there is none."""
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError):
        return None


def check_same_tokenizer(drafter: Any, target: Any) -> None:
    """Raise DrafterMismatch if two tokenizers spell differently; says nothing where one of them is missing."""
    if drafter is None or target is None:
        return
    ours, theirs = drafter.get_vocab(), target.get_vocab()
    if ours != theirs:
        odd = next((token for token in ours if theirs.get(token) != ours[token]), None)
        what = f"token {odd!r} is {ours[odd]}, the target's is {theirs.get(odd)}" if odd else "it lacks tokens"
        raise DrafterMismatch(f"drafter 'draft-model' has another vocabulary than the target: {what}")
