"""Heads in files: the `speculators` format and the layout of the public EAGLE-3 checkpoints are read, the first is
written, with fields and tensors of its own for parallel heads. What does not fit is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from specgen import DrafterMismatch, InvalidRequest
from specgen_eagle.head import EagleHead, HeadConfig

_LAYER_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "max_position_embeddings",
    "hidden_act",
)
_PREFIXES = ("midlayer.self_attn.", "midlayer.", "layers.0.self_attn.", "layers.0.", "model.")
_UNUSED = {"t2d", "embed_tokens.weight"}
_PARALLEL = "specgen_parallel"
"""The model type of parallel heads, which other engines do not know. Rows of the target's own head are not in them."""


def load_head(folder: Path, target: Any) -> EagleHead:
    """The head in `folder`, in the target's dtype, checked against the target's config.

    Raises InvalidRequest for files that are no head, DrafterMismatch for a head that belongs to another target.
    """
    text = target.config.get_text_config(decoder=True)
    config = _parse(_config(folder), text)
    weights = _weights(folder)
    head = EagleHead(config)
    _check_target(config, text)
    wanted = dict(head.state_dict())
    if "d2t" not in weights and config.vocabulary == text.vocab_size:
        weights["d2t"] = torch.zeros(config.vocabulary, dtype=torch.int64)
    weights["d2t"] = weights.get("d2t", torch.empty(0)).to(torch.int64)
    if config.parallel > 1 and len(weights["d2t"]) == config.vocabulary:
        weights.setdefault("lm_head.weight", _own_rows(target, weights["d2t"]))
    for name in sorted(wanted.keys() | weights.keys()):
        if name not in weights:
            raise InvalidRequest(f"{folder}: the head has no {name}", param="path")
        if name not in wanted:
            raise InvalidRequest(f"{folder}: the head has {name}, which is no part of an EAGLE-3 layer", param="path")
        if weights[name].shape != wanted[name].shape:
            shapes = f"{tuple(weights[name].shape)}; by its config it must be {tuple(wanted[name].shape)}"
            raise InvalidRequest(f"{folder}: {name} is {shapes}", param="path")
    head.load_state_dict(weights)
    said = head.tokens
    if len(said) and not 0 <= int(said.min()) <= int(said.max()) < text.vocab_size:
        raise DrafterMismatch(f"{folder}: d2t names tokens that the target, with {text.vocab_size}, has not")
    return head.to(target.device, target.dtype).eval().requires_grad_(False)


def save_head(head: EagleHead, folder: Path, target: Any, name: str) -> None:
    """Write config.json and model.safetensors (bfloat16) in the `speculators` format."""
    folder.mkdir(parents=True, exist_ok=True)
    config = head.config
    weights = {_speculators_name(key): tensor.detach() for key, tensor in head.state_dict().items()}
    if config.parallel > 1:
        # Such heads are trained with the target's own rows.
        del weights["lm_head.weight"]
    said = torch.zeros(target.config.get_text_config(decoder=True).vocab_size, dtype=torch.bool)
    said[head.tokens] = True
    tensors = {key: t.to(torch.bfloat16) if t.is_floating_point() else t for key, t in weights.items()} | {"t2d": said}
    save_file({key: t.contiguous().cpu() for key, t in tensors.items()}, folder / "model.safetensors")
    written = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": _PARALLEL if config.parallel > 1 else "eagle3",
        **({"parallel_tokens": config.parallel} if config.parallel > 1 else {}),
        "draft_vocab_size": config.vocabulary,
        "target_hidden_size": config.target_width,
        "norm_before_residual": config.norm_first,
        "eagle_aux_hidden_state_layer_ids": list(config.layers),
        "transformer_layer_config": {"model_type": "llama", "num_hidden_layers": 1, **config.layer},
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 5}],
            "verifier": {"name_or_path": name, "architectures": [type(target).__name__]},
        },
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def default_layers(count: int) -> tuple[int, ...]:
    """Near the bottom, in the middle and near the top of `count` layers, as EAGLE-3 has it."""
    return 2, count // 2, max(3, count - 3)


def _config(folder: Path) -> dict[str, Any]:
    try:
        raw: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{folder} holds no head: config.json cannot be read ({error})", param="path") from error
    return raw


def _parse(raw: Mapping[str, Any], target: Any) -> HeadConfig:
    """Either format's config."""
    kind = raw.get("speculators_model_type")
    if kind not in (None, "eagle3", _PARALLEL):
        raise InvalidRequest(f"speculators_model_type is {kind!r}; it must be 'eagle3' or {_PARALLEL!r}", param="path")
    if kind is None and not any("eagle3" in name.lower() for name in raw.get("architectures") or ()):
        named = raw.get("architectures")
        raise InvalidRequest(f"architectures is {named!r}; an EAGLE-3 head's says so", param="path")
    inner = raw.get("transformer_layer_config", raw)
    if (model_type := inner.get("model_type", "llama")) != "llama":
        raise InvalidRequest(f"the head's layer is of type {model_type!r}; it must be 'llama'", param="path")
    if (count := inner.get("num_hidden_layers", 1)) != 1:
        raise InvalidRequest(f"the head has {count} layers; it must have 1", param="path")
    if inner.get("attention_bias") or inner.get("mlp_bias"):
        raise InvalidRequest("the head's layer has biases, which are not supported", param="path")
    layers = raw.get("eagle_aux_hidden_state_layer_ids") or (raw.get("eagle_config") or {}).get(
        "eagle_aux_hidden_state_layer_ids"
    )
    width = raw.get("target_hidden_size") or target.hidden_size
    return HeadConfig(
        layers=tuple(layers or default_layers(target.num_hidden_layers)),
        target_width=width,
        vocabulary=raw.get("draft_vocab_size") or inner.get("draft_vocab_size") or inner["vocab_size"],
        layer={key: inner[key] for key in _LAYER_FIELDS if inner.get(key) is not None},
        norm_first=bool(raw.get("norm_before_residual", False)),
        parallel=_parallel(raw) if kind == _PARALLEL else 1,
    )


def _parallel(raw: Mapping[str, Any]) -> int:
    count = raw.get("parallel_tokens")
    if not isinstance(count, int) or not 2 <= count <= 16:
        raise InvalidRequest(f"parallel_tokens is {count!r}; it must be from 2 to 16", param="path")
    return count


def _own_rows(target: Any, d2t: Tensor) -> Tensor:
    """The target's head's rows of what the draft head can say."""
    rows = target.get_output_embeddings().weight.detach()
    tokens = d2t.to(rows.device) + torch.arange(len(d2t), device=rows.device)
    kept: Tensor = rows[tokens.clamp(0, len(rows) - 1)]
    return kept


def _check_target(config: HeadConfig, text: Any) -> None:
    if config.target_width != text.hidden_size:
        raise DrafterMismatch(
            f"the head reads states {config.target_width} wide, the target's are {text.hidden_size}; "
            "choose a head that was trained for this target"
        )
    if config.layer["hidden_size"] != text.hidden_size:
        raise DrafterMismatch(
            f"the head is {config.layer['hidden_size']} wide and takes its embeddings from the target, whose are "
            f"{text.hidden_size}"
        )
    if not all(0 <= layer <= text.num_hidden_layers for layer in config.layers):
        raise DrafterMismatch(f"the head reads layers {config.layers}; the target has {text.num_hidden_layers}")


def _weights(folder: Path) -> dict[str, Tensor]:
    """The tensors under our names. Only safetensors: a pickle would run code."""
    path = folder / "model.safetensors"
    if not path.is_file():
        raise InvalidRequest(f"{folder} has no model.safetensors; other files are not read", param="path")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InvalidRequest(f"{path} cannot be read: {error}", param="path") from error
    named = {_own_name(name): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in named.items() if name not in _UNUSED}


def _own_name(name: str) -> str:
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _speculators_name(name: str) -> str:
    first = name.partition(".")[0]
    if first in ("q_proj", "k_proj", "v_proj", "o_proj"):
        return f"layers.0.self_attn.{name}"
    if first in ("mlp", "input_layernorm", "hidden_norm", "post_attention_layernorm"):
        return f"layers.0.{name}"
    return name
