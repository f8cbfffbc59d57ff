"""Train a student on cached states, so that a run that was cut off goes on where it stopped and ends the same."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from specgen import InvalidRequest
from specgen_eagle.muon import Muon
from specgen_eagle.precision import product_dtype, quick_halves
from specgen_eagle.recipe import TrainingRecipe
from specgen_eagle.states import Padded, States, batches

_CLIP = 1.0
_SHORTEST = 3  # two tokens, and one that follows them
_LAST_SHARE = 0.1
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


class Student(Protocol):
    """What is trained."""

    @property
    def kind(self) -> str:
        """What a manifest calls it."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The target's hidden states that it reads, besides those that the target's head reads."""

    @property
    def module(self) -> nn.Module:
        """Its weights; those that require a gradient are trained."""

    def loss(self, padded: Padded) -> Tensor:
        """Mean over the rows, with a gradient."""

    def hits(self, padded: Padded) -> tuple[list[int], list[int]]:
        """For each position of a draft: chains of first choices that are right up to there, and chains in all."""

    def save(self, folder: Path) -> None:
        """Write what a drafter loads."""


def _optimizers(student: nn.Module, rate: float, device: torch.device) -> list[torch.optim.Optimizer]:
    """Muon for matrices, AdamW for the norms."""
    trained = [weight for weight in student.parameters() if weight.requires_grad]
    matrices = [weight for weight in trained if weight.ndim == 2]
    others = [weight for weight in trained if weight.ndim != 2]
    dtype = torch.bfloat16 if quick_halves(device) else torch.float32
    return [
        Muon(matrices, rate, dtype=dtype, weight_decay=0.01),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.01),
    ]


class Trainer:
    """Updates of one student. `run` yields an evaluation every so often, after which the run can be taken up again.

    folder: where the state of the run is kept. curve: the evaluations so far.
    Raises InvalidRequest where there is nothing to train on, or to judge by.
    """

    def __init__(
        self, student: Student, model: Any, states: States, held_out: int, recipe: TrainingRecipe, folder: Path
    ) -> None:
        self.student = student
        self.recipe = recipe
        self._states = states
        self._device, self._dtype = model.device, product_dtype(model)
        conversations = range(len(states))
        self._training, self._held_out = conversations[held_out:], conversations[:held_out]
        for what, part in (("train on", self._training), ("judge by", self._held_out)):
            if not self._cut(list(part)):
                message = f"of {len(states)} conversations {held_out} are held out; of the {len(part)} to {what} none"
                raise InvalidRequest(f"{message} has more than {_SHORTEST - 1} tokens", param="held_out")
        self._optimizers = _optimizers(student.module, recipe.learning_rate, self._device)
        self._file = folder / "training.pt"
        self.step = 0
        self.curve: list[Point] = []
        self._resume()

    def run(self) -> Iterator[Point]:
        """Train to the end; nothing if it is reached."""
        recent: list[float] = []
        module = self.student.module
        for chosen in islice(self._batches(self.step), self.recipe.steps - self.step):
            with self._autocast():
                lost = self.student.loss(self._states.padded(chosen))
            lost.backward()
            nn.utils.clip_grad_norm_(module.parameters(), _CLIP)
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
        self.student.module.eval()
        found = []
        for chosen in self._cut(list(self._held_out)):
            with torch.no_grad(), self._autocast():
                found.append(self.student.hits(self._states.padded(chosen)))
        self.student.module.train()
        right, asked = ([sum(counts) for counts in zip(*part, strict=True)] for part in zip(*found, strict=True))
        return tuple(hit / max(1, of) for hit, of in zip(right, asked, strict=True))

    def _batches(self, step: int) -> Iterator[list[int]]:
        """Conversations of each update from `step` on, epoch after epoch, each in an order of its own."""
        epoch = 0
        while True:
            generator = torch.Generator().manual_seed(self.recipe.seed + epoch)
            order = [self._training[i] for i in torch.randperm(len(self._training), generator=generator).tolist()]
            cut = self._cut(order)
            shuffled = [cut[i] for i in torch.randperm(len(cut), generator=generator).tolist()]
            yield from shuffled[step:]
            step = max(0, step - len(shuffled))
            epoch += 1

    def _cut(self, order: list[int]) -> list[list[int]]:
        """Batches of conversations of similar lengths; conversations too short to learn from are left out."""
        order = [c for c in order if self._states.length(c) >= _SHORTEST]
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
        half = self._dtype != torch.float32
        return torch.autocast(self._device.type, dtype=self._dtype if half else torch.bfloat16, enabled=half)

    def _keep(self) -> None:
        kept = {
            "step": self.step,
            "curve": [(point.step, point.loss, point.survival) for point in self.curve],
            "student": self.student.module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }
        beside = self._file.with_suffix(".new")
        torch.save(kept, beside)
        beside.replace(self._file)

    def _resume(self) -> None:
        if not self._file.exists():
            return
        kept = torch.load(self._file, weights_only=True)
        self.student.module.load_state_dict(kept["student"])
        for optimizer, state in zip(self._optimizers, kept["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.step = kept["step"]
        self.curve = [Point(*point) for point in kept["curve"]]
