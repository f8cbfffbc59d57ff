"""A draft model that is some layers of the target, distilled on its distribution (Men et al. 2024, "ShortGPT", show
how much a model says with layers left out; Hinton et al. 2015 for the soft targets)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specgen import InvalidRequest
from specgen_eagle.readout import logit_factor
from specgen_eagle.recipe import Recipe
from specgen_eagle.states import Padded


class PrunedStudent:
    """`module` is a causal LM with the target's embeddings and head, which stay as they are; see `Student`."""

    kind = "draft-model"
    layers = ()

    def __init__(self, model: Any, recipe: Recipe, keep: Sequence[int], tokenizer: Any = None) -> None:
        self._factor = logit_factor(model)
        self.module = prune(model, keep)
        self._dtype = model.dtype
        self._ahead = recipe.training.ahead
        self._tokenizer = tokenizer

    def loss(self, padded: Padded) -> Tensor:
        """Cross-entropy with the target's distribution, mean over rows."""
        scores, wanted, valid = self._read(padded)
        losses = -(torch.softmax(wanted, dim=-1) * torch.log_softmax(scores, dim=-1)).sum(dim=-1)
        return (losses * valid).sum() / valid.sum().clamp(min=1)

    def hits(self, padded: Padded) -> tuple[list[int], list[int]]:
        """Along the text, as if its first choices had been taken."""
        scores, wanted, valid = self._read(padded)
        hit = (scores.argmax(dim=-1) == wanted.argmax(dim=-1)) & valid
        right, asked = [], []
        alive = hit
        for step in range(self._ahead):
            right.append(int(alive.sum()))
            asked.append(int(valid[:, step:].sum()))
            alive = alive[:, :-1] & hit[:, step + 1 :]
        return right, asked

    def save(self, folder: Path) -> None:
        """A folder that transformers loads, in the target's dtype."""
        saved = copy.deepcopy(self.module).to(self._dtype)
        saved.save_pretrained(folder)
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(folder)

    def _read(self, padded: Padded) -> tuple[Tensor, Tensor, Tensor]:
        """The student's logits, the target's, [batch, longest, vocabulary] in float32, and which rows there are."""
        ids, states, lengths = padded
        places = torch.arange(ids.shape[1])
        valid = places[None] < lengths[:, None]
        scores = self.module(input_ids=ids, attention_mask=valid.long(), use_cache=False).logits.float()
        with torch.no_grad():
            weight = self.module.get_output_embeddings().weight
            wanted = self._factor * F.linear(states[:, :, -1].to(weight.dtype), weight).float()
        return scores, wanted, valid


def prune(model: Any, keep: Sequence[int]) -> Any:
    """A copy of `model` in float32 with the layers `keep` alone. Its layers train; embeddings and head do not.

    Raises InvalidRequest for layers that the target does not have, and for a target whose layers are not one list.
    """
    config = copy.deepcopy(model.config)
    decoder = model.get_decoder()
    count = config.get_text_config(decoder=True).num_hidden_layers
    if not isinstance(getattr(decoder, "layers", None), torch.nn.ModuleList) or config.get_text_config() is not config:
        raise InvalidRequest(f"{config.model_type} has no plain list of layers to prune", param="pruned.layers")
    if not keep or list(keep) != sorted({layer for layer in keep if 0 <= layer < count}):
        raise InvalidRequest(
            f"layers {list(keep)}: choose some of 0 to {count - 1}, each once, ascending", param="pruned.layers"
        )
    _cut_lists(config, count, keep)
    config.num_hidden_layers = len(keep)
    student = type(model)(config)
    try:
        student.load_state_dict(_kept_weights(model, decoder, keep))
    except RuntimeError as error:
        message = f"{config.model_type} builds layers by their places: {list(keep)} cannot be taken alone: {error}"
        raise InvalidRequest(message, param="pruned.layers") from error
    student.generation_config = copy.deepcopy(model.generation_config)
    student.float().requires_grad_(False)
    student.get_decoder().layers.requires_grad_(True)
    return student


def _cut_lists(config: Any, count: int, keep: Sequence[int]) -> None:
    """Of each list that says something of every layer, what it says of those that are kept."""
    for name, value in vars(config).items():
        # A model may have as many end tokens as layers.
        if isinstance(value, list | tuple) and len(value) == count and not name.endswith("token_id"):
            setattr(config, name, type(value)(value[layer] for layer in keep))


def _kept_weights(model: Any, decoder: Any, keep: Sequence[int]) -> dict[str, Tensor]:
    prefix = next(name for name, module in model.named_modules() if module is decoder.layers) + "."
    new_place = {str(layer): str(place) for place, layer in enumerate(keep)}
    kept = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith(prefix):
            kept[name] = tensor
            continue
        layer, rest = name.removeprefix(prefix).split(".", 1)
        if layer in new_place:
            kept[f"{prefix}{new_place[layer]}.{rest}"] = tensor
    return kept
