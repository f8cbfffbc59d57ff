"""The proof, at load, that a model's packed forward says what the model says alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specgen.errors import UnsupportedModel
from specgen.kv.pool import PAGE_SIZE
from specgen.model.checks.architecture import Architecture
from specgen.model.forward.base import Forward
from specgen.model.segment import Segment, tree_segment

EQUIVALENCE_PAGES = 2
"""Pages that the check needs at once."""

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


@torch.inference_mode()
def difference(forward: Forward, model: PreTrainedModel, architecture: Architecture) -> str | None:
    """How `forward`, on two sequences and a branching tree, differs from `model` run by transformers; `None` if it does
    not."""
    try:
        packed = _packed_logits(forward, architecture.vocab_size)
        alone = torch.stack([_alone(model, ids) for ids in _paths(architecture.vocab_size)])
    except UnsupportedModel as error:
        return str(error)
    except Exception as error:  # a model's own code may raise anything
        return f"its forward does not take packed rows ({type(error).__name__}: {error})"
    worst = _distance(packed, alone)
    if worst <= _tolerance(model, architecture, alone):
        return None
    return f"its packed forward differs from its own by {worst:.1%} in the logits"


def _distance(logits: Tensor, others: Tensor) -> float:
    """The largest relative difference of any row."""
    return float(((logits - others).norm(dim=-1) / others.norm(dim=-1)).max())


def _tolerance(model: PreTrainedModel, architecture: Architecture, alone: Tensor) -> float:
    exact = _TOLERANCE.get(architecture.dtype)
    if exact is not None:
        return exact
    longer = [_alone(model, (*ids, *ids), len(ids) - 1) for ids in _paths(architecture.vocab_size)]
    return max(_COARSE_TOLERANCE, _NOISE_FACTOR * _distance(torch.stack(longer), alone))


def _ids(thousandths: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    return tuple(vocab_size * n // 1000 for n in thousandths)


def _packed_logits(forward: Forward, vocab_size: int) -> Tensor:
    prompts = [_ids(prompt, vocab_size) for prompt in _PROMPTS]
    tables = [forward.pool.open() for _ in _PROMPTS]
    try:
        for table in tables:
            table.reserve(PAGE_SIZE)
        forward([Segment(t, p[:2], range(2)) for t, p in zip(tables, prompts, strict=True)])
        for table in tables:
            table.commit(2)
        trees: list[tuple[tuple[int, ...], tuple[int, ...]]] = [(_ids(_TREE, vocab_size), _PARENTS), ((), ())]
        return forward(
            [tree_segment(t, p[2:], *tree) for t, p, tree in zip(tables, prompts, trees, strict=True)]
        ).logits
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
