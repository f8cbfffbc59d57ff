"""The proof, at load, that a model's packed forward says what the model says alone."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specgen.errors import UnsupportedModel
from specgen.kv.pool import PAGE_SIZE, KVPool
from specgen.model.attention.interface import Seam
from specgen.model.batch import EVERYTHING
from specgen.model.checks.architecture import Architecture, first_layer, refuse
from specgen.model.segment import Segment, tree_segment

# Thousandths of the vocabulary: ordinary tokens of any tokenizer, where special ones, which stand at both ends, make
# a model's answer hang on the last bit of a rounding.
_PROMPTS = ((314, 159, 265, 358, 97, 93, 238), (462, 643, 383))
_TREE = (279, 502, 88, 419, 716)
_PARENTS = (-1, 0, 0, -1, 3)
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
# Half precision: a pass over several rows rounds differently from a pass over one. How much, the model itself shows:
# the same row at the end of a text and in the middle of a longer one.
_COARSE_TOLERANCE = 0.05
_NOISE_FACTOR = 3.0
# Models that compute attention themselves, read line by line: they mask by the given mask and by nothing else. A window
# or a bias inside a model's own code would not show on the few tokens of the check.
_READ = ("codegen", "falcon", "gpt_neox_japanese", "gptj", "xglm")


class PackedModel(Protocol):
    """What the check needs of a target."""

    model: PreTrainedModel
    architecture: Architecture
    pool: KVPool
    seam: Seam
    vocab_size: int

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Score all rows; see `ModelRunner.forward`."""


def choose_seam(target: PackedModel) -> Seam:
    """The first seam at which the packed forward equals the model's own, on two sequences and a branching tree.

    Raises UnsupportedModel with the first seam's difference or error when none does.
    """
    reasons = []
    for seam in _possible(target):
        target.seam = seam
        if (reason := difference(target)) is None:
            return seam
        reasons.append(reason)
    raise refuse(target.model, reasons[0])


def _possible(target: PackedModel) -> tuple[Seam, ...]:
    model = target.model
    if any(hasattr(inspect.getmodule(type(module)), "ALL_ATTENTION_FUNCTIONS") for module in model.modules()):
        return Seam.DIRECT, Seam.GATHERED
    config = model.config
    if config.model_type not in _READ:
        own = (
            "computes attention itself, not through transformers' attention interface, and maybe with a bias or window"
        )
        raise refuse(model, f"{first_layer(model)} {own} (of such models these are known to work: {', '.join(_READ)})")
    if getattr(config, "alibi", False):
        raise refuse(model, f"{first_layer(model)} adds a bias that grows with distance (ALiBi), which is not packed")
    if set(target.architecture.reaches) != {EVERYTHING}:
        # A dense mask is one for all layers, so it cannot carry windows.
        raise refuse(model, f"{first_layer(model)} computes attention itself, over a window")
    return (Seam.DENSE,)


@torch.inference_mode()
def difference(target: PackedModel) -> str | None:
    """How the packed forward differs from the model's own; `None` if it does not."""
    try:
        packed = _packed_logits(target)
        alone = torch.stack([_alone(target.model, ids) for ids in _paths(target.vocab_size)])
    except UnsupportedModel as error:
        return str(error)
    except Exception as error:  # a model's own code may raise anything
        return f"its forward does not take packed rows ({type(error).__name__}: {error})"
    worst = _distance(packed, alone)
    if worst <= _tolerance(target, alone):
        return None
    return f"its packed forward differs from its own by {worst:.1%} in the logits"


def _distance(logits: Tensor, others: Tensor) -> float:
    """The largest relative difference of any row."""
    return float(((logits - others).norm(dim=-1) / others.norm(dim=-1)).max())


def _tolerance(target: PackedModel, alone: Tensor) -> float:
    exact = _TOLERANCE.get(target.architecture.dtype)
    if exact is not None:
        return exact
    longer = [_alone(target.model, (*ids, *ids), len(ids) - 1) for ids in _paths(target.vocab_size)]
    return max(_COARSE_TOLERANCE, _NOISE_FACTOR * _distance(torch.stack(longer), alone))


def _ids(thousandths: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    return tuple(vocab_size * n // 1000 for n in thousandths)


def _packed_logits(target: PackedModel) -> Tensor:
    prompts = [_ids(prompt, target.vocab_size) for prompt in _PROMPTS]
    tables = [target.pool.open() for _ in _PROMPTS]
    try:
        for table in tables:
            table.reserve(PAGE_SIZE)
        target.forward([Segment(t, p[:2], range(2)) for t, p in zip(tables, prompts, strict=True)])
        for table in tables:
            table.commit(2)
        trees: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
            (_ids(_TREE, target.vocab_size), _PARENTS),
            ((), ()),
        ]
        return target.forward(
            [tree_segment(t, p[2:], *tree) for t, p, tree in zip(tables, prompts, trees, strict=True)]
        )
    finally:
        for table in tables:
            table.release()


def _paths(vocab_size: int) -> list[tuple[int, ...]]:
    """The token sequences that the wanted rows of `_packed_logits` stand for, in order."""
    paths: list[tuple[int, ...]] = [_PROMPTS[0]]
    for token, parent in zip(_TREE, _PARENTS, strict=True):
        paths.append((*paths[parent + 1], token))
    return [_ids(path, vocab_size) for path in (*paths, _PROMPTS[1])]


def _alone(model: PreTrainedModel, ids: Sequence[int], row: int = -1) -> Tensor:
    logits: Tensor = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
    return logits[0, row].float()
