"""Train a head on cached states, so that a run that was cut off goes on where it stopped and ends the same."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specgen_eagle.checkpoint import default_layers
from specgen_eagle.corpus import Conversation
from specgen_eagle.head import EagleHead, HeadConfig
from specgen_eagle.recipe import Recipe, TrainingRecipe
from specgen_eagle.states import States, batches
from specgen_eagle.unrolled import Batch, hits, loss, make_batch

_CLIP = 1.0
_LAST_SHARE = 0.1
_QUIET = 0.1
_BUCKETS = 16  # batches of similar lengths are made within pieces of so many


@dataclass(frozen=True)
class Point:
    """One evaluation. survival[j]: share of chains of j + 1 first choices that are right, on text held out."""

    step: int
    loss: float
    survival: tuple[float, ...]

    @property
    def acceptance(self) -> float:
        """Tokens a step would commit if it drafted one chain of first choices."""
        return 1.0 + sum(self.survival)


def new_head(model: Any, recipe: Recipe, corpus: Sequence[Conversation]) -> EagleHead:
    """A head for `model` before training: the target's shapes, and its own rows of the language-model head, which stay
    as they are. What it can say are the most frequent tokens of `corpus`."""
    torch.manual_seed(recipe.training.seed)
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
    head = EagleHead(HeadConfig(layers=layers, target_width=config.hidden_size, vocabulary=vocabulary, layer=layer))
    said = frequent(corpus, vocabulary, config.vocab_size)
    head.d2t.copy_(said - torch.arange(vocabulary))
    head.lm_head.weight.data.copy_(model.get_output_embeddings().weight[said].float())
    head.lm_head.weight.requires_grad_(False)
    _begin_as(head, model)
    return head


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


def _optimizers(head: EagleHead, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for matrices (Jordan et al. 2024), in steps of AdamW's size (Liu et al. 2025); AdamW for the norms."""
    trained = [weight for weight in head.parameters() if weight.requires_grad]
    matrices = [weight for weight in trained if weight.ndim == 2]
    others = [weight for weight in trained if weight.ndim != 2]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.01),
    ]


class Trainer:
    """Updates of one head. `run` yields an evaluation every so often, after which the run can be taken up again.

    folder: where the state of the run is kept. curve: the evaluations so far.
    """

    def __init__(
        self, head: EagleHead, model: Any, states: States, held_out: int, recipe: TrainingRecipe, folder: Path
    ) -> None:
        self.head = head
        self.recipe = recipe
        self._states = states
        self._embeddings = model.get_input_embeddings().weight.detach()
        self._target_head = model.get_output_embeddings().weight.detach()[head.tokens]
        conversations = range(len(states))
        self._training, self._held_out = conversations[held_out:], conversations[:held_out]
        self._optimizers = _optimizers(head, recipe.learning_rate)
        self._file = folder / "training.pt"
        self.step = 0
        self.curve: list[Point] = []
        self._resume()

    def run(self) -> Iterator[Point]:
        """Train to the end; nothing if it is reached."""
        recent: list[float] = []
        for batch in islice(self._batches(self.step), self.recipe.steps - self.step):
            with self._autocast():
                lost = loss(self.head, batch, self.recipe.ahead, self.recipe.decay)
            lost.backward()
            nn.utils.clip_grad_norm_(self.head.parameters(), _CLIP)
            for optimizer in self._optimizers:
                optimizer.param_groups[0]["lr"] = self._learning_rate()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            recent.append(lost.item())
            self.step += 1
            if self.step == self.recipe.steps or self.step % self.recipe.evaluate_every == 0:
                self.curve.append(Point(self.step, sum(recent) / len(recent), self.survival()))
                recent.clear()
                self._keep()
                yield self.curve[-1]

    def survival(self) -> tuple[float, ...]:
        """Of the text held out; see `Point`."""
        right, asked = [0] * self.recipe.ahead, [0] * self.recipe.ahead
        self.head.eval()
        for chosen in self._cut(list(self._held_out)):
            with self._autocast():
                found = hits(self.head, self._batch(chosen), self.recipe.ahead)
            for step, (hit, of) in enumerate(zip(*found, strict=True)):
                right[step] += hit
                asked[step] += of
        self.head.train()
        return tuple(hit / max(1, of) for hit, of in zip(right, asked, strict=True))

    def _batch(self, conversations: Sequence[int]) -> Batch:
        return make_batch(self._embeddings, self._target_head, self._states.padded(conversations))

    def _batches(self, step: int) -> Iterator[Batch]:
        """From update `step` on, epoch after epoch, each in an order of its own."""
        epoch = 0
        while True:
            generator = torch.Generator().manual_seed(self.recipe.seed + epoch)
            order = [self._training[i] for i in torch.randperm(len(self._training), generator=generator).tolist()]
            cut = self._cut(order)
            shuffled = [cut[i] for i in torch.randperm(len(cut), generator=generator).tolist()]
            for chosen in shuffled[step:]:
                yield self._batch(chosen)
            step = max(0, step - len(shuffled))
            epoch += 1

    def _cut(self, order: list[int]) -> list[list[int]]:
        """Batches of conversations of similar lengths; conversations too short to learn from are left out."""
        order = [c for c in order if self._states.length(c) > 2]
        average = max(1, self.recipe.tokens * len(self._states) // max(1, self._states.starts[-1]))
        piece = _BUCKETS * average
        cut = []
        for start in range(0, len(order), piece):
            together = sorted(order[start : start + piece], key=self._states.length)
            cut += batches(together, [self._states.length(c) for c in range(len(self._states))], self.recipe.tokens)
        return cut

    def _learning_rate(self) -> float:
        recipe = self.recipe
        if self.step < recipe.warmup:
            return recipe.learning_rate * (self.step + 1) / recipe.warmup
        done = (self.step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
        return recipe.learning_rate * (_LAST_SHARE + (1 - _LAST_SHARE) * (1 + math.cos(math.pi * done)) / 2)

    def _autocast(self) -> torch.autocast:
        """bfloat16 products where the target is in bfloat16; weights and their updates are float32."""
        dtype = self._embeddings.dtype
        half = dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self._embeddings.device.type, dtype=dtype if half else torch.bfloat16, enabled=half)

    def _keep(self) -> None:
        kept = {
            "step": self.step,
            "curve": [(point.step, point.loss, point.survival) for point in self.curve],
            "head": self.head.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }
        beside = self._file.with_suffix(".new")
        torch.save(kept, beside)
        beside.replace(self._file)

    def _resume(self) -> None:
        if not self._file.exists():
            return
        kept = torch.load(self._file, weights_only=True)
        self.head.load_state_dict(kept["head"])
        for optimizer, state in zip(self._optimizers, kept["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.step = kept["step"]
        self.curve = [Point(*point) for point in kept["curve"]]
