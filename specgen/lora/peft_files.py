"""PEFT's files of a LoRA adapter: where they may lie, what they may hold, and what they make of a model's layers.

peft itself reads the config and says which modules are meant and how they are scaled: it is asked to put the adapter
on a copy of the model that shares its memory. What it would do beyond adding to a linear layer is refused by name.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from specgen.errors import AdapterRefused
from specgen.lora.adapter import LoraLayer, LoraWeights, is_linear

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_CONFIG_BYTES = 1 << 20
# A file in float32 for a model of 16 bits, and its header.
_FILE_FACTOR, _HEADER_BYTES = 2, 1 << 20
_RUNS_CODE = ("auto_map", "trust_remote_code", "custom_pipelines")
# What peft's config may say and is applied exactly, or says nothing about the adapted forward.
_UNDERSTOOD = frozenset(
    {
        *("peft_type", "peft_version", "task_type", "inference_mode", "base_model_name_or_path", "revision"),
        *("auto_mapping", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules"),
        *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
        *("lora_bias", "bias", "fan_in_fan_out", "init_lora_weights", "eva_config"),
    }
)
_REASONS = {
    "modules_to_save": "modules that it replaces as a whole are no low-rank addition",
    "target_parameters": "a parameter outside of linear layers, as experts have them, sees no row of the step's",
    "trainable_token_indices": "it replaces rows of the embeddings",
    "layer_replication": "it changes the number of layers, and with it the KV",
    "alora_invocation_tokens": "rows before its invocation tokens would be base rows",
    "megatron_config": "it imports a package that the config names",
}
# Those that train against a base that they change would need the base changed.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
# A pattern that a stranger wrote must not keep the matcher busy.
_QUANTIFIERS, _MOST_QUANTIFIERS = re.compile(r"[*+{]"), 6
_NESTED = re.compile(r"[*+}][^(]*\)[*+{]")
_NAME = "default"


@dataclass(frozen=True, slots=True, eq=False)
class AdapterFiles:
    """An adapter as it was read. digest: sha256 over config and weights. base: the model that its config names."""

    digest: str
    rank: int
    base: str | None
    weights: LoraWeights


def locate(path: str | Path, root: str | Path | None) -> Path:
    """The folder that `path` means. Raises AdapterRefused where it, or a file in it, lies outside `root`."""
    pure = PurePath(path)
    if root is not None and (pure.is_absolute() or ".." in pure.parts or "\0" in str(path)):
        raise AdapterRefused(f"adapter path {str(path)!r} leads out of the adapter root; name a folder inside it")
    folder = Path(root or "", path).expanduser()
    if not folder.is_dir():
        raise AdapterRefused(f"adapter path {str(path)!r} is no folder; it must hold {CONFIG} and {WEIGHTS}")
    for place in (folder, folder / CONFIG, folder / WEIGHTS) if root is not None else ():
        if not place.resolve().is_relative_to(Path(root or "").expanduser().resolve()):
            raise AdapterRefused(
                f"adapter path {str(path)!r}: {place.name} is a link that leads out of the adapter root"
            )
    return folder


def check_folder(path: str | Path, root: str | Path | None = None) -> None:
    """Raise AdapterRefused for a path at which no adapter lies, or where what reads one is not installed. Needs no
    model."""
    folder = locate(path, root)
    if not (folder / CONFIG).is_file():
        raise AdapterRefused(f"adapter path {str(path)!r} holds no {CONFIG}")
    if find_spec("peft") is None:
        raise AdapterRefused("adapters need peft; pip install 'specgen-llm[lora]'")


def read_adapter(
    folder: Path, model: PreTrainedModel, *, fits: Collection[str], dtype: torch.dtype, max_rank: int, max_bytes: int
) -> AdapterFiles:
    """Read and check the adapter in `folder` for `model`, which is only looked at.

    fits: names of the layers that see the rows of a step. dtype: the model's. max_rank: of any layer. max_bytes: of
    the weights in memory. Raises AdapterRefused naming what does not fit.
    """
    if find_spec("peft") is None:
        raise AdapterRefused("adapters need peft; pip install 'specgen-llm[lora]'")
    config_bytes, weight_bytes = _bytes(folder, max_bytes)
    config = _config(folder, config_bytes)
    tensors = _tensors(folder, weight_bytes)
    layers = dict(_layers(folder, model, config, tensors, fits, dtype))
    rank = max(layer.rank for layer in layers.values())
    if rank > max_rank:
        raise _refused(folder, f"its rank is {rank}; the limit is {max_rank} (adapters={{'max_rank': {rank}}})")
    weights = LoraWeights(layers)
    if weights.bytes > max_bytes:
        raise _refused(folder, f"it takes {weights.bytes} bytes; the limit is {max_bytes}")
    digest = hashlib.sha256(config_bytes)
    digest.update(weight_bytes)
    return AdapterFiles(digest.hexdigest(), rank, config.base_model_name_or_path, weights)


def _refused(folder: Path, reason: str) -> AdapterRefused:
    return AdapterRefused(f"adapter {folder.name!r}: {reason}")


def _bytes(folder: Path, max_bytes: int) -> tuple[bytes, bytes]:
    """Both files, each read once, so that what is checked is what is used."""
    config, weights = folder / CONFIG, folder / WEIGHTS
    if not weights.is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
        if pickles:
            raise _refused(folder, f"{pickles[0]} is a pickle, which may run code when it is read; save as {WEIGHTS}")
        raise _refused(folder, f"there is no {WEIGHTS}")
    if not config.is_file():
        raise _refused(folder, f"there is no {CONFIG}")
    for path, most in ((config, _CONFIG_BYTES), (weights, _FILE_FACTOR * max_bytes + _HEADER_BYTES)):
        if (size := path.stat().st_size) > most:
            raise _refused(folder, f"{path.name} has {size} bytes; the limit is {most}")
    return config.read_bytes(), weights.read_bytes()


def _config(folder: Path, data: bytes) -> Any:
    """peft's own config. Everything that it says is understood, or refused by name."""
    from peft import LoraConfig

    try:
        values = json.loads(data)
    except ValueError as error:
        raise _refused(folder, f"{CONFIG} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise _refused(folder, f"{CONFIG} holds {type(values).__name__}, not an object")
    for name in _RUNS_CODE:
        if values.get(name):
            raise _refused(folder, f"{CONFIG} says {name}={values[name]!r}, which would run code; nothing here does")
    if values.get("peft_type") != "LORA":
        raise _refused(folder, f"its peft_type is {values.get('peft_type')!r}; it must be 'LORA'")
    usual: dict[str, object] = LoraConfig().to_dict()  # type: ignore[no-untyped-call]
    for name, value in values.items():
        if value and name not in _UNDERSTOOD and value != usual.get(name):
            reason = _REASONS.get(name, "it is not a low-rank addition to linear layers that is known here")
            raise _refused(folder, f"{name}={value!r} is not supported: {reason}")
    if values.get("bias", "none") != "none":
        raise _refused(folder, f"bias={values['bias']!r} is not supported: it replaces biases of the base; take 'none'")
    if values.get("init_lora_weights", True) not in _PLAIN_STARTS:
        told = "it was trained beside a changed base; let peft convert it when it is saved"
        raise _refused(folder, f"init_lora_weights={values['init_lora_weights']!r} is not supported: {told}")
    for pattern in _patterns(values):
        if len(_QUANTIFIERS.findall(pattern)) > _MOST_QUANTIFIERS or _NESTED.search(pattern):
            raise _refused(folder, f"the pattern {pattern!r} may take for ever to match; name the modules")
    known = {name: value for name, value in values.items() if name in _UNDERSTOOD}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Weights are never made here, so none need a beginning.
            return LoraConfig(**{**known, "peft_type": "LORA", "init_lora_weights": False, "eva_config": None})
    except (TypeError, ValueError, ImportError) as error:
        raise _refused(folder, f"peft refuses {CONFIG}: {error}") from error


def _patterns(values: Mapping[str, Any]) -> Iterator[str]:
    """What peft will match module names with."""
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        if isinstance(pattern := values.get(name), str):
            yield pattern
    for name in ("rank_pattern", "alpha_pattern"):
        yield from values.get(name) or ()


def _tensors(folder: Path, data: bytes) -> dict[str, Tensor]:
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise _refused(folder, f"{WEIGHTS} cannot be read, it is cut short or damaged: {error}") from None
    if not tensors:
        raise _refused(folder, f"{WEIGHTS} holds no tensors")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise _refused(folder, f"{name} is {tensor.dtype}; it must be a float")
        if not tensor.isfinite().all():
            raise _refused(folder, f"{name} holds NaN or infinity")
    return tensors


def _layers(
    folder: Path,
    model: PreTrainedModel,
    config: Any,
    tensors: Mapping[str, Tensor],
    fits: Collection[str],
    dtype: torch.dtype,
) -> Iterator[tuple[str, LoraLayer]]:
    """Name and layer of each module that peft adapts."""
    from peft.tuners.lora import LoraLayer as PeftLayer

    wrapped = _wrapped(folder, model, config, tensors)
    found: list[tuple[str, Any]] = [
        (n, module) for n, module in wrapped.named_modules() if isinstance(module, PeftLayer)
    ]
    for name, module in found:
        if not is_linear(module) or not module.lora_A:
            kind = type(module.get_base_layer()).__name__
            raise _refused(folder, f"it adapts {name} ({kind}), and only linear layers can be adapted")
        if name not in fits:
            told = "that layer does not see the rows of a step: it serves experts, reads cached rows or is not called"
            raise _refused(folder, f"it adapts {name}: {told}")
        base: Any = model.get_submodule(name)
        if base.weight.is_floating_point() and base.weight.dtype != dtype:
            raise _refused(folder, f"it adapts {name}, whose weight is {base.weight.dtype} in a model of {dtype}")
        yield name, _layer(folder, name, module, base, dtype)


def _wrapped(folder: Path, model: PreTrainedModel, config: Any, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `model` that shares its memory, with the adapter put on it by peft."""
    from peft import PeftModel, set_peft_model_state_dict

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # As peft loads it: only from 0.20 on do the names in a file fit a model without its wrapper.
            adapted = PeftModel(
                _copy_without_memory(model), config, _NAME, autocast_adapter_dtype=False, low_cpu_mem_usage=True
            )
            result: Any = set_peft_model_state_dict(adapted, dict(tensors), _NAME, low_cpu_mem_usage=True)
    except Exception as error:  # peft raises whatever it meets
        reason = " ".join(str(error).split())
        told = "modules that this model does not have, or not of these sizes; is it for another base?"
        raise _refused(folder, f"peft cannot put it on {model.config.model_type!r}: {reason} ({told})") from error
    if result.unexpected_keys:
        raise _refused(
            folder, f"{result.unexpected_keys[0]} belongs to no module of this model; is it for another base?"
        )
    missing = [key for key in result.missing_keys if f".{_NAME}" in key]
    if missing:
        raise _refused(folder, f"{WEIGHTS} has nothing for {missing[0]}, which {CONFIG} promises")
    return adapted.get_base_model()


def _copy_without_memory(model: PreTrainedModel) -> nn.Module:
    """The same modules around parameters of their own, which share the memory: peft marks parameters as frozen."""
    shared: dict[int, Tensor] = {id(tensor): nn.Parameter(tensor.detach(), False) for tensor in model.parameters()}
    shared |= {id(tensor): tensor for tensor in model.buffers()}
    return copy.deepcopy(model, memo=shared)


def _layer(folder: Path, name: str, module: Any, base: nn.Module, dtype: torch.dtype) -> LoraLayer:
    """What peft's layer computes, in our form."""
    variant = type(module.lora_variant.get(_NAME)).__name__
    if variant not in ("NoneType", "DoraLinearVariant"):
        raise _refused(folder, f"{name} is adapted by peft's {variant}, which is not supported")
    exact = torch.promote_types(dtype, torch.float32)
    down, up = (side[_NAME].weight.detach().to(exact) for side in (module.lora_A, module.lora_B))
    if not math.isfinite(scaling := module.scaling[_NAME]):
        raise _refused(folder, f"{name} is scaled by {scaling}")
    up = up * scaling
    gain = offset = None
    if variant == "DoraLinearVariant":
        magnitude = module.lora_magnitude_vector[_NAME].weight.detach().to(exact)
        gain = magnitude.flatten() / _norms(folder, name, base, up @ down)
        up = up * gain[:, None]
        if (bias := getattr(base, "bias", None)) is not None:
            offset = bias.detach().to(exact) * (1 - gain)
    if (bias := module.lora_B[_NAME].bias) is not None:
        offset = bias.detach().to(exact) * scaling
    kept = [None if t is None else t.to("cpu", dtype).contiguous() for t in (down, up.T, gain, offset)]
    return LoraLayer(*kept)  # type: ignore[arg-type]


def _norms(folder: Path, name: str, base: nn.Module, added: Tensor) -> Tensor:
    """The length of each output's weights with the adapter added, by which DoRA divides."""
    if type(base.weight) is not nn.Parameter or base.weight.dtype.itemsize < 2:
        raise _refused(
            folder, f"use_dora=True: {name} is quantised, and the length of its weights is not known exactly"
        )
    weight: Tensor = base.weight.detach().to(added.dtype)
    norms: Tensor = torch.linalg.vector_norm((weight.T if isinstance(base, Conv1D) else weight) + added, dim=1)
    return norms
