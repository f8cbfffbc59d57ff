"""From a path or a name to a model and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from specgen.errors import InvalidRequest

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")


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
    source when there is no such model, when it would run code of its own, or when its quantiser is not installed or
    cannot do what is asked for."""
    kind = dtype_of(dtype)
    placed = options.get("device_map") is not None
    if placed and device is not None:
        told = f"device_map={options['device_map']!r} says where the weights go, and so does device={device!r}"
        raise InvalidRequest(f"{told}; give one of them", param="device_map")
    # Where nothing is said, transformers asks whoever sits at the terminal.
    options = {"trust_remote_code": False, **options}
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=kind, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise InvalidRequest(f"model {str(source)!r} cannot be loaded: {error}", param="model") from error
    if placed:
        return model
    try:
        torch.nn.Module.to(model, device or default_device())
    except (RuntimeError, AssertionError) as error:  # torch's ways to say that there is no such device
        raise InvalidRequest(f"device {device!r} cannot be used: {error}", param="device") from error
    return model


def load_tokenizer(source: str | Path | PreTrainedModel, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer beside a model, or where a loaded model came from; None where there is none. Raises InvalidRequest
    for one whose files cannot be read."""
    place = source.name_or_path if isinstance(source, PreTrainedModel) else source
    if not place:
        return None
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
    except Exception as error:  # of a damaged file whatever its reader raises
        if any((Path(place) / name).exists() for name in _VOCABULARIES):
            raise InvalidRequest(f"the tokenizer of {str(place)!r} cannot be loaded: {error}", param="model") from error
        if isinstance(error, OSError | ValueError):
            return None
        raise
