"""Rows whose arithmetic does not depend on their neighbours.

A matrix product over k rows may round a row differently from a product over one, so drafting, batch-mates and chunks
show in the last bits; where two tokens are nearly even, or where a KV format rounds to codes, they show in the text.
With `batch_invariant=True` a row is computed alike whatever rows stand beside it:

Linear layers work in blocks of sizes that were seen to give the same bits: which ones, each layer's shape is asked at
load. Activation functions and rotary angles are computed in blocks of one size, since the end of a tensor, where no
vector of the processor is full, has another arithmetic than its middle. Mixtures of experts, whose products are as
large as the rows that chose an expert, see one row at a time. Attention: see `specgen.model.attention.rowwise`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, activations
from transformers.pytorch_utils import Conv1D

from specgen.errors import UnsupportedModel
from specgen.kernels.blocks import in_blocks
from specgen.model.packed_linear import PackedLinear

_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
_PROBED_ROWS = 192  # a multiple of every size
_PROBED_ROWS_OF_HEADS = 64
_HEAD_OUTPUTS = 1 << 14
# Half precision hides most differences of a sum's order, so more sums are looked at.
_PROBED_NUMBERS = {torch.bfloat16: 1 << 19, torch.float16: 1 << 19}
_MOST_PROBED_ROWS = 4096
_POINTWISE_ROWS = 16
_ACTIVATIONS = (nn.modules.activation.__name__, activations.__name__)

Forward = Callable[..., Any]


class InvariantLayers:
    """The layers of a model that mix rows in their arithmetic, made not to while the context is open.

    Raises UnsupportedModel, naming the layer, when no block size treats all its rows alike.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        blocks = [module for module in model.modules() if mixes_experts(module)]
        inside = {id(module) for block in blocks for module in block.modules()}
        self._forwards: list[tuple[nn.Module, Forward]] = [
            (block, partial(_one_by_one, block.forward)) for block in blocks
        ]
        sizes: dict[object, tuple[int, ...]] = {}
        for name, module in model.named_modules():
            if id(module) in inside:
                continue
            if isinstance(module, PackedLinear):
                continue
            if isinstance(module, nn.Linear | Conv1D):
                kind = (type(module), type(module.weight), module.weight.shape, module.weight.dtype)
                if kind not in sizes:
                    sizes[kind] = _sizes_alike(module)
                if not sizes[kind]:
                    reason = f"{name} ({type(module).__name__}) rounds a row by its place among others"
                    raise UnsupportedModel(f"batch_invariant=True cannot be kept: {reason}; take batch_invariant=False")
                self._forwards.append((module, partial(_in_blocks, module.forward, sizes[kind])))
            elif (forward := _pointwise(module)) is not None:
                self._forwards.append((module, forward))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Replace the layers' forwards; put back on the way out what was there."""
        before = [module.__dict__.get("forward") for module, _ in self._forwards]
        for module, forward in self._forwards:
            module.__dict__["forward"] = forward
        try:
            yield
        finally:
            for (module, _), earlier in zip(self._forwards, before, strict=True):
                if earlier is None:
                    del module.__dict__["forward"]
                else:
                    module.__dict__["forward"] = earlier


def _in_blocks(forward: Forward, sizes: tuple[int, ...], x: Tensor) -> Tensor:
    """A layer's forward over [..., dim], in blocks of rows."""
    # Contiguous: a strided tensor takes another path through the same operation.
    x = x.contiguous()
    if not x.numel() or x.shape[:-1].numel() in sizes:
        answer: Tensor = forward(x)
        return answer
    output = in_blocks(forward, x.reshape(-1, x.shape[-1]), sizes)
    return output.reshape(*x.shape[:-1], -1)


def _pointwise(module: nn.Module) -> Forward | None:
    """The forward to take for an activation function or a rotary embedding; `None` for any other module."""
    if type(module).__module__ in _ACTIVATIONS and not any(True for _ in module.parameters()):
        return partial(_in_blocks, module.forward, (_POINTWISE_ROWS,))
    if "Rotary" in type(module).__name__ and list(signature(module.forward).parameters)[1:2] == ["position_ids"]:
        return partial(_angles, module.forward)
    return None


def _angles(forward: Forward, x: Tensor, position_ids: Tensor, *args: object, **kwargs: object) -> object:
    """A rotary embedding's forward over position_ids [batch, rows], in blocks of rows."""
    rows = position_ids.shape[-1]
    padded = F.pad(position_ids, (0, -rows % _POINTWISE_ROWS))
    blocks = [forward(x, ids, *args, **kwargs) for ids in padded.split(_POINTWISE_ROWS, dim=-1)]
    if isinstance(blocks[0], Tensor):
        return torch.cat(blocks, dim=-2)[..., :rows, :]
    return tuple(torch.cat(parts, dim=-2)[..., :rows, :] for parts in zip(*blocks, strict=True))


def _one_by_one(forward: Forward, x: Tensor, *args: object, **kwargs: object) -> object:
    """A block's forward over [..., rows, dim], one row at a time."""
    if x.shape[-2] == 1:
        return forward(x, *args, **kwargs)
    outputs = [forward(row, *args, **kwargs) for row in x.split(1, dim=-2)]
    if isinstance(outputs[0], Tensor):
        return torch.cat(outputs, dim=-2)
    return tuple(torch.cat(parts, dim=-2) for parts in zip(*outputs, strict=True))


def mixes_experts(module: nn.Module) -> bool:
    """Whether a module routes rows to experts that are its children, and does no more: no attention stands inside."""
    stacked = any(
        name == "experts" or any(weight.ndim > 2 for weight in child.parameters(recurse=False))
        for name, child in module.named_children()
    )
    return stacked and not any(hasattr(inner, "layer_idx") for inner in module.modules())


@torch.inference_mode()
def _sizes_alike(module: nn.Module) -> tuple[int, ...]:
    """The block sizes that give rows the same bits as one another and wherever a row stands; the largest such set."""
    x = _probe(module)
    families: list[tuple[Tensor, list[int]]] = []
    for size in _SIZES:
        if len(x) % size:
            continue
        output = in_blocks(module.forward, x, (size,))
        for known, family in families:
            if torch.equal(known, output):
                family.append(size)
                break
        else:
            families.append((output, [size]))
    # The more sizes the better; of single ones a middling one, neither much padding nor many calls.
    families.sort(key=lambda found: (len(found[1]), found[1][0] <= _POINTWISE_ROWS, found[1][0]), reverse=True)
    for output, sizes in families:
        # Blocks of several sizes put a row in several places; one size alone must be asked.
        if len(sizes) > 1 or torch.equal(in_blocks(module.forward, x.roll(1, 0), sizes).roll(-1, 0), output):
            return tuple(sizes)
    return ()


def _probe(module: Any) -> Tensor:
    """Random rows for a linear layer: enough of them that another order of summation shows in some number."""
    weight = module.weight
    width = int(weight.shape[0] if isinstance(module, Conv1D) else module.in_features)
    outputs = max(1, weight.numel() // width)
    least = _PROBED_ROWS if outputs < _HEAD_OUTPUTS else _PROBED_ROWS_OF_HEADS
    rows = min(_MOST_PROBED_ROWS, max(1, _PROBED_NUMBERS.get(weight.dtype, 0) // outputs))
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.get_default_dtype()
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows + -rows % least, width, generator=generator).to(weight.device, dtype)
