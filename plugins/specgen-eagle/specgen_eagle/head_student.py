"""An EAGLE-3 head as a student: what it begins as, its loss, its chains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from specgen import InvalidRequest
from specgen_eagle import parallel, unrolled
from specgen_eagle.checkpoint import default_layers, load_head, save_head
from specgen_eagle.corpus import Conversation
from specgen_eagle.head import EagleHead, HeadConfig
from specgen_eagle.precision import product_dtype
from specgen_eagle.readout import logit_factor
from specgen_eagle.recipe import Recipe
from specgen_eagle.states import Padded
from specgen_eagle.unrolled import Batch, make_batch

_QUIET = 0.1


class HeadStudent:
    """`module` is the head; see `Student`."""

    def __init__(self, model: Any, recipe: Recipe, corpus: Sequence[Conversation]) -> None:
        factor = logit_factor(model)
        self.module = new_head(model, recipe, corpus)
        if not recipe.head.start:
            self.module.norm.weight.data.mul_(factor)
        self.layers = self.module.config.layers
        self._model = model
        training = recipe.training
        self._loss: Callable[[EagleHead, Batch], Tensor]
        self._hits: Callable[[EagleHead, Batch], tuple[list[int], list[int]]]
        if self.module.config.parallel > 1:
            self.kind = "parallel"
            self._loss, self._hits = partial(parallel.loss, decay=training.decay), parallel.hits
        else:
            self.kind = "eagle3"
            self._loss = partial(unrolled.loss, ahead=training.ahead, decay=training.decay)
            self._hits = partial(unrolled.hits, ahead=training.ahead)
        dtype = product_dtype(model)
        self._embeddings = model.get_input_embeddings().weight.detach().to(dtype)
        self._target_head = (model.get_output_embeddings().weight.detach()[self.module.tokens] * factor).to(dtype)

    def loss(self, padded: Padded) -> Tensor:
        """Cross-entropy with the target's distribution over what the head can say, at all depths."""
        return self._loss(self.module, self._batch(padded))

    def hits(self, padded: Padded) -> tuple[list[int], list[int]]:
        """Each drafted position from the states that the head has in its place."""
        return self._hits(self.module, self._batch(padded))

    def save(self, folder: Path) -> None:
        """As `load_head` reads it."""
        save_head(self.module, folder, self._model, str(self._model.config.name_or_path or type(self._model).__name__))

    def _batch(self, padded: Padded) -> Batch:
        return make_batch(self._embeddings, self._target_head, padded)


def new_head(model: Any, recipe: Recipe, corpus: Sequence[Conversation]) -> EagleHead:
    """A head for `model` before training: the target's shapes, and its own rows of the language-model head, which stay
    as they are. What it can say are the most frequent tokens of `corpus`.

    Raises InvalidRequest for layers that the target does not have, and for a head to start with that does not fit."""
    torch.manual_seed(recipe.training.seed)
    if recipe.head.start:
        return _continued(load_head(Path(recipe.head.start), model), recipe.head.parallel, model)
    config = model.config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layer = {
        "hidden_size": config.hidden_size,
        "intermediate_size": recipe.head.intermediate or config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "head_dim": head_dim,
        "rms_norm_eps": getattr(config, "rms_norm_eps", 1e-6),
        "rope_parameters": dict(
            getattr(config, "rope_parameters", None) or {"rope_type": "default", "rope_theta": 1e4}
        ),
        "max_position_embeddings": config.max_position_embeddings,
    }
    vocabulary = min(recipe.head.vocabulary, config.vocab_size)
    layers = recipe.head.layers or default_layers(config.num_hidden_layers)
    if not all(0 <= layer <= config.num_hidden_layers for layer in layers):
        raise InvalidRequest(
            f"layers {list(layers)}: choose some of 0 to {config.num_hidden_layers}", param="head.layers"
        )
    head = EagleHead(
        HeadConfig(
            layers=layers,
            target_width=config.hidden_size,
            vocabulary=vocabulary,
            layer=layer,
            parallel=recipe.head.parallel,
        )
    )
    said = frequent(corpus, vocabulary, config.vocab_size)
    head.d2t.copy_(said - torch.arange(vocabulary))
    head.lm_head.weight.data.copy_(model.get_output_embeddings().weight[said].float())
    head.lm_head.weight.requires_grad_(False)
    _begin_as(head, model)
    _as_silent(head)
    return head


def _continued(started: EagleHead, ahead: int, model: Any) -> EagleHead:
    """A head that says `ahead` tokens and begins with the weights of `started`, in float32 as they are trained."""
    said = started.config.parallel
    if said not in (1, ahead):
        raise InvalidRequest(f"parallel is {ahead}; a head that says {said} at once goes on as one", param="recipe")
    head = EagleHead(msgspec.structs.replace(started.config, parallel=ahead))
    if said != ahead:
        _as_silent(head)
    head.load_state_dict(started.state_dict(), strict=said == ahead)
    if ahead > 1:
        head.lm_head.weight.data.copy_(model.get_output_embeddings().weight[head.tokens])
    head.lm_head.weight.requires_grad_(False)
    return head


def _as_silent(head: EagleHead) -> None:
    """What looks ahead begins by changing nothing."""
    if head.config.parallel > 1:
        nn.init.zeros_(head.ahead.weight)
        nn.init.zeros_(head.transition.out_proj.weight)


@torch.no_grad()
def _begin_as(head: EagleHead, model: Any) -> None:
    """Begin as the target's last layer, which reads its own input: the uppermost states, and of the token nothing.

    Weights are taken where names and shapes are the same; where they are not, training begins at random.
    """
    width = head.config.target_width
    head.fc.weight.zero_()
    head.fc.weight[:, -width:].copy_(torch.eye(*head.fc.weight[:, -width:].shape))
    decoder = model.get_decoder()
    found = {f"norm.{name}": weight for name, weight in getattr(decoder, "norm", nn.Module()).named_parameters()}
    layers = getattr(decoder, "layers", None)
    if layers is not None:
        found |= {name.removeprefix("self_attn."): weight for name, weight in layers[-1].named_parameters()}
    if "input_layernorm.weight" in found:
        found["hidden_norm.weight"] = found["input_layernorm.weight"]
    for name, weight in head.named_parameters():
        taken = found.get(name)
        if taken is not None and taken.shape == weight.shape:
            weight.copy_(taken)
        elif taken is not None and taken.ndim == 2 and weight.shape == (taken.shape[0], 2 * taken.shape[1]):
            weight[:, : taken.shape[1]].mul_(_QUIET)
            weight[:, taken.shape[1] :].copy_(taken)


def frequent(corpus: Sequence[Conversation], count: int, vocab_size: int) -> Tensor:
    """int64[count], ascending: the tokens that the corpus holds most often; of equals the lower ones."""
    counts = Counter(token for conversation in corpus for token in conversation.ids)
    order = sorted(range(vocab_size), key=lambda token: (-counts[token], token))
    return torch.tensor(sorted(order[:count]))
