"""Linear layers whose weights a quantiser of transformers keeps: which there are, and which cannot be exact."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specgen.model.checks.architecture import refuse

_ROWS = 16
_LOUD = 1000.0
_NOT_ITSELF = 0.1
# Seen by any product in float32, and lost in whatever rounds to a code or to half precision.
_NUDGE = 1 + 2**-14


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of each linear layer whose weight is anything but a plain tensor of floats."""
    for name, module in model.named_modules():
        if not isinstance(getattr(module, "in_features", None), int):
            continue
        weight = getattr(module, "weight", None)
        if type(weight) is not nn.Parameter or weight.dtype.itemsize < 2:
            yield name, module


@torch.inference_mode()
def check_quantised(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Raise UnsupportedModel, naming the layer, where a quantiser does more to a row than replace the weights.

    dtype: of what the layers read. Each quantised layer runs four times over a few rows.
    """
    generator = torch.Generator().manual_seed(0)
    for name, module in quantised_layers(model):
        x = torch.randn(_ROWS, module.in_features, generator=generator).to(model.device, dtype)
        if reason := _unfit(module, x):
            kind = type(getattr(module, "weight", module)).__name__
            raise refuse(model, f"{name} ({kind}) {reason}")


def _unfit(module: nn.Module, x: Tensor) -> str | None:
    if _mixes_rows(module, x):
        told = "quantises what it reads by one scale for all rows, so that a row depends on the rows beside it"
        return f"{told} (quantise by row, or the weights alone)"
    # Half precision promises less than this: there a last bit is nearly a step itself.
    if x.dtype in (torch.float32, torch.float64) and _rounds(module, x):
        told = "rounds what it reads, so that the last bit of a sum may become a whole step"
        return f"{told} (quantise the weights alone, or load it in bfloat16)"
    return None


def _mixes_rows(module: nn.Module, x: Tensor) -> bool:
    """Whether a row is lost among rows that are much louder."""
    first = module(x[:1])[0].float()
    beside = module(torch.cat([x[:1], _LOUD * x[1:]]))[0].float()
    return float((beside - first).norm()) > _NOT_ITSELF * float(first.norm())


def _rounds(module: nn.Module, x: Tensor) -> bool:
    """Whether most rows come out the same to the bit when their middling number changes a little."""
    middle = x.abs().median(dim=-1, keepdim=True).indices
    nudged = x.scatter(-1, middle, x.gather(-1, middle) * _NUDGE)
    same = (module(x) == module(nudged)).all(dim=-1)
    return bool(same.float().mean() > 0.5)
