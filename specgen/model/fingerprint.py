"""What must be equal for KV of one run to be used in another: model, weights, KV format, arithmetic."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from specgen.kv.pool import KVPool

_SAMPLES = 64


def model_name(model: PreTrainedModel) -> str:
    """A digest of the config."""
    return _digest([model.config.to_diff_dict()])


@torch.no_grad()
def model_digest(model: PreTrainedModel) -> str:
    """A digest that differs between models of other configs or weights: cheap, no seal. Reads every weight once."""
    config = {name: value for name, value in model.config.to_diff_dict().items() if name != "transformers_version"}
    return _digest([config, [[name, *_weight(tensor)] for name, tensor in sorted(model.named_parameters())]])


@torch.no_grad()
def kv_identity(model: PreTrainedModel, pool: KVPool, *, arithmetic: str, settings: object = ()) -> str:
    """A digest that differs where a token's KV may differ in any bit. Reads every weight once.

    settings: what else the model's answers depend on, such as the adapter that is active; see `ModelRunner.settings`.

    Versions and the kind of device are in it: they may round differently. Of the format counts what it makes of fixed
    vectors, so that a change of its code or of its calibration shows. Takes a page of the pool for a moment.
    """
    versions = [torch.__version__, transformers.__version__, pool.device.type]
    layout = [[list(rows.shape), str(rows.dtype)] for rows in pool.rows_of(0)]
    weights = [[name, *_weight(tensor)] for name, tensor in sorted(_tensors(model))]
    config = model.config.to_diff_dict()
    kinds = [arithmetic, pool.kind.name, pool.page_size, layout, settings]
    return _digest([versions, kinds, _probe(pool), config, weights])


def fingerprint(tensor: Tensor) -> list[int]:
    """Numbers that change with any byte of a tensor: cheap, for telling models apart, no seal."""
    data = tensor.detach().contiguous().flatten().view(torch.uint8)
    step = max(1, data.numel() // _SAMPLES)
    return [*tensor.shape, int(data.sum(dtype=torch.int64)), *data[::step].tolist()]


def _weight(tensor: Tensor) -> list[object]:
    """What tells a weight from others; of a quantised one that is made of tensors, those and how they are read."""
    if not is_traceable_wrapper_subclass(tensor):
        return [str(tensor.dtype), *fingerprint(tensor)]
    names, reading = tensor.__tensor_flatten__()
    parts = [[name, *_weight(getattr(tensor, name))] for name in names]
    return [type(tensor).__name__, list(tensor.shape), repr(reading), *parts]


def _tensors(model: PreTrainedModel) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _probe(pool: KVPool) -> list[list[int]]:
    """What the format makes of fixed keys and values, in every layer."""
    (page,) = pool.take(1)
    span = slice(page * pool.page_size, (page + 1) * pool.page_size)
    found: list[list[int]] = []
    generator = torch.Generator().manual_seed(0)
    for shape, store in zip(pool.shapes, pool.layers, strict=True):
        sides = [
            torch.randn(pool.page_size, shape.kv_heads, dim, generator=generator).to(pool.device, store.dtype)
            for dim in (shape.key_dim, shape.value_dim)
        ]
        store.write(span, *sides)
        found += [fingerprint(side) for side in store.read(span)]
    found += [fingerprint(rows) for rows in pool.rows_of(page)]
    pool.drop([page])
    return found


def _digest(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
