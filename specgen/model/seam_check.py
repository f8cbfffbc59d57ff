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
from specgen.kv.segment import Segment, hung_rows
from specgen.model.architecture import Architecture, first_layer, refuse
from specgen.model.attention import EVERYTHING, Seam

_PROMPTS = ((3, 1, 4, 1, 5, 9, 2), (2, 7, 1))
_TREE = (6, 7, 8, 9, 10)
_PARENTS = (-1, 0, 0, -1, 3)
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_COARSE_TOLERANCE = 0.1
# Models that compute attention themselves, read line by line: they mask by the given mask and by nothing else. A window
# or a bias inside a model's own code would not show on the few tokens of the check.
_READ = ("codegen", "falcon", "gpt_neox_japanese", "gptj", "xglm")


class PackedModel(Protocol):
    """What the check needs of a target."""

    model: PreTrainedModel
    architecture: Architecture
    pool: KVPool
    seam: Seam

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Score all rows; see `Target.forward`."""


def choose_seam(target: PackedModel) -> Seam:
    """The first seam at which the packed forward equals the model's own, on two sequences and a branching tree.

    Raises UnsupportedModel with the first seam's difference or error when none does.
    """
    reasons = []
    for seam in _possible(target):
        target.seam = seam
        if (reason := _difference(target)) is None:
            return seam
        reasons.append(reason)
    raise refuse(target.model, reasons[0])


def _possible(target: PackedModel) -> tuple[Seam, ...]:
    model = target.model
    if any(hasattr(inspect.getmodule(type(module)), "ALL_ATTENTION_FUNCTIONS") for module in model.modules()):
        return Seam.DIRECT, Seam.GATHERED
    config = model.config
    if config.model_type not in _READ:
        own = "computes attention itself, not through transformers' attention interface, and maybe with a bias or window"
        raise refuse(model, f"{first_layer(model)} {own} (of such models these are known to work: {', '.join(_READ)})")
    if getattr(config, "alibi", False):
        raise refuse(model, f"{first_layer(model)} adds a bias that grows with distance (ALiBi), which is not packed")
    if set(target.architecture.reaches) != {EVERYTHING}:
        # A dense mask is one for all layers, so it cannot carry windows.
        raise refuse(model, f"{first_layer(model)} computes attention itself, over a window")
    return (Seam.DENSE,)


@torch.inference_mode()
def _difference(target: PackedModel) -> str | None:
    try:
        packed = _packed_logits(target)
    except UnsupportedModel as error:
        return str(error)
    except Exception as error:  # a model's own code may raise anything
        return f"its forward does not take packed rows ({type(error).__name__}: {error})"
    alone = torch.stack([_alone(target.model, ids) for ids in _paths()])
    worst = (packed - alone).abs().max().item()
    tolerance = _TOLERANCE.get(target.architecture.dtype, _COARSE_TOLERANCE)
    if worst <= tolerance * max(1.0, alone.abs().max().item()):
        return None
    return f"its packed forward differs from its own by {worst:.2g} in the logits"


def _packed_logits(target: PackedModel) -> Tensor:
    tables = [target.pool.open() for _ in _PROMPTS]
    try:
        for table in tables:
            table.reserve(PAGE_SIZE)
        target.forward([Segment(t, p[:2], range(2)) for t, p in zip(tables, _PROMPTS, strict=True)])
        for table in tables:
            table.commit(2)
        trees: list[tuple[tuple[int, ...], tuple[int, ...]]] = [(_TREE, _PARENTS), ((), ())]
        return target.forward(
            [hung_rows(t, p[2:], *tree) for t, p, tree in zip(tables, _PROMPTS, trees, strict=True)]
        )
    finally:
        for table in tables:
            table.release()


def _paths() -> list[tuple[int, ...]]:
    """The token sequences that the wanted rows of `_packed_logits` stand for, in order."""
    paths = [_PROMPTS[0]]
    for token, parent in zip(_TREE, _PARENTS, strict=True):
        paths.append((*paths[parent + 1], token))
    return [*paths, _PROMPTS[1]]


def _alone(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    logits: Tensor = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
    return logits[0, -1].float()
