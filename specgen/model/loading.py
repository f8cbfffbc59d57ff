"""From a path or a name to a model and its tokenizer."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from specgen.errors import InvalidRequest
from specgen.types import AnyTokenizer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp64": "float64"}
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
_WHERE = (
    *("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download", "proxies"),
    *("trust_remote_code", "gguf_file"),
)
"""Of transformers' options those that say which files are meant: a model's are its tokenizer's too."""

_GGUF = ".gguf"
_OWN = {"dtype": "dtype", "torch_dtype": "dtype", "pretrained_model_name_or_path": "model"}


def dtype_of(name: str | torch.dtype | None) -> torch.dtype | str:
    """A torch dtype from its name; `None` and "auto" leave it to the checkpoint. Raises InvalidRequest otherwise."""
    if name is None or name == "auto":
        return "auto"
    if isinstance(name, torch.dtype) and name in _DTYPES.values():
        return name
    text = str(name).removeprefix("torch.")
    if text not in _DTYPES or isinstance(name, torch.dtype):
        meant = _SHORT.get(text) or next(iter(difflib.get_close_matches(text, _DTYPES, 1)), None)
        hint = f"; did you mean {meant!r}?" if meant else ""
        raise InvalidRequest(f"dtype is {name!r}; choices: auto, {', '.join(_DTYPES)}{hint}", param="dtype")
    return _DTYPES[text]


def default_device() -> str:
    """The accelerator if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str | torch.device | None) -> None:
    """Raise InvalidRequest for a device that there is not."""
    try:
        torch.empty(0, device=device or default_device())
    except (RuntimeError, AssertionError, TypeError) as error:  # torch's ways to say so
        raise InvalidRequest(f"device {device!r} cannot be used: {error}", param="device") from error


def check_model_options(options: object) -> None:
    """Raise InvalidRequest for what is no mapping of transformers' options, or holds what has a name of its own."""
    if not isinstance(options, Mapping):
        message = f"model_options is {options!r}; it must be a mapping of options of transformers' from_pretrained"
        raise InvalidRequest(message, param="model_options")
    for name, own in _OWN.items():
        if name in options:
            message = f"model_options holds {name!r}, which has an argument of its own: {own}="
            raise InvalidRequest(message, param="model_options")


def check_source(source: Any, options: Mapping[str, Any]) -> None:
    """Raise InvalidRequest for a source that names no model, as far as its config tells; no weights are read."""
    place, options = located(source, options)
    if "gguf_file" in options or (Path(place) / "adapter_config.json").exists():
        return  # transformers finds the config in the GGUF file, or with the adapter's base
    chosen = {name: value for name, value in options.items() if name in _WHERE}
    try:
        AutoConfig.from_pretrained(place, **{"trust_remote_code": False, **chosen})
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        raise _not_loaded(source, error) from error


def load_model(
    source: str | Path, *, dtype: str | torch.dtype | None, device: str | torch.device | None, **options: Any
) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained`, on the device, ready to be wrapped; a path may be that of a GGUF file.
    Raises InvalidRequest naming the source when there is no such model, when it would run code of its own, or when its
    quantiser is not installed or cannot do what is asked for."""
    kind = dtype_of(dtype)
    check_device(device)
    place, options = located(source, options)
    placed = options.get("device_map") is not None
    if placed and device is not None:
        told = f"device_map={options['device_map']!r} says where the weights go, and so does device={device!r}"
        raise InvalidRequest(f"{told}; give one of them", param="device_map")
    # Where nothing is said, transformers asks whoever sits at the terminal.
    options = {"trust_remote_code": False, **options}
    try:
        model = AutoModelForCausalLM.from_pretrained(place, dtype=kind, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise _not_loaded(source, error) from error
    if file := options.get("gguf_file"):
        # A folder holds many: the tokenizer is found by this name, and servers call the model by it.
        model.name_or_path = str(Path(place, file))
    if placed:
        return model
    try:
        torch.nn.Module.to(model, device or default_device())
    except (RuntimeError, AssertionError) as error:  # too small, or gone meanwhile
        raise InvalidRequest(f"device {device!r} cannot be used: {error}", param="device") from error
    return model


def load_tokenizer(source: str | Path | PreTrainedModel, **options: object) -> AnyTokenizer | None:
    """The tokenizer beside a model, inside a GGUF file, or where a loaded model came from; None where there is none.

    options: those of the model; what says where its files are is followed. Raises InvalidRequest for a tokenizer whose
    files cannot be read.
    """
    origin = source.name_or_path if isinstance(source, PreTrainedModel) else source
    if not origin:
        return None
    place, options = located(origin, options)
    where = {name: value for name, value in options.items() if name in _WHERE}
    try:
        return AutoTokenizer.from_pretrained(place, **{"trust_remote_code": False, **where})
    except Exception as error:  # of a damaged file whatever its reader raises
        folder = Path(place, str(where.get("subfolder") or ""))
        has_files = "gguf_file" in where or any((folder / name).exists() for name in _VOCABULARIES)
        if isinstance(error, OSError | ValueError) and not has_files:
            return None
        message = f"the tokenizer of {str(origin)!r} cannot be loaded: {error}"
        raise InvalidRequest(message, param="model") from error


def located(source: object, options: Mapping[str, object]) -> tuple[str | Path, dict[str, object]]:
    """The folder or name, and the options, that transformers wants for a source: of a GGUF file its folder and
    `gguf_file`. Raises InvalidRequest for what is no source, where there is no such file, or where what reads it is not
    installed."""
    found = dict(options)
    if isinstance(source, PreTrainedModel):
        raise InvalidRequest("model is loaded already; give it to specgen.wrap(model, tokenizer)", param="model")
    if not isinstance(source, str | Path) or not str(source):
        raise InvalidRequest(f"model is {source!r}; it must be a path or a name", param="model")
    path = Path(source).expanduser()
    if str(source).startswith("~"):
        source = path
    is_path = path.is_absolute() or str(source).startswith(("./", "../"))
    if is_path and not path.exists() and path.suffix.lower() != _GGUF:
        raise InvalidRequest(f"model {str(source)!r} cannot be loaded: there is no such folder", param="model")
    if path.suffix.lower() == _GGUF:
        if "gguf_file" in found and found["gguf_file"] != path.name:
            message = f"model is {str(source)!r} and gguf_file is {found['gguf_file']!r}; name the file once"
            raise InvalidRequest(message, param="model")
        if not path.is_file():
            message = f"model {str(source)!r}: there is no such file; one of a hub's is named by gguf_file"
            raise InvalidRequest(message, param="model")
        source, found["gguf_file"] = path.parent, path.name
    if found.get("gguf_file") is None:
        found.pop("gguf_file", None)
        _check_no_gguf(path)
        return source, found
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        needs = f"model {str(path)!r} is a GGUF file, which needs {' and '.join(missing)}"
        raise InvalidRequest(f"{needs}: pip install 'specgen-llm[gguf]'", param="model")
    if Path(source).is_dir() and not Path(source, str(found["gguf_file"])).is_file():
        raise InvalidRequest(f"model {str(source)!r} has no file {found['gguf_file']!r}", param="model")
    return source, found


def _check_no_gguf(path: Path) -> None:
    """A folder of GGUF files alone is no model before one of them is named."""
    if not path.is_dir() or (path / "config.json").exists():
        return
    if files := sorted(file.name for file in path.glob(f"*{_GGUF}")):
        message = f"model {str(path)!r} holds GGUF files: {', '.join(files)}; give the path of one"
        raise InvalidRequest(message, param="model")


def _not_loaded(source: str | Path, error: Exception) -> InvalidRequest:
    return InvalidRequest(f"model {str(source)!r} cannot be loaded: {error}", param="model")
