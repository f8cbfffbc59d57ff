"""Linear layers whose weights lie packed for the CPU kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from specgen.kernels.backends import pick


class PackedLinear(nn.Linear):
    """An `nn.Linear` that keeps a packed copy of its weight and computes with that."""

    packed: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]; a row's bits do not depend on the rows beside it."""
        output: Tensor = torch.ops.specgen.linear(x, [self.packed], [self.bias], [self.out_features])
        return output


@torch.no_grad()
def pack_linears(model: nn.Module) -> int:
    """Turn the linear layers of `model` that the CPU kernel can take into `PackedLinear`s; returns how many.

    Only plain ones: a subclass, a quantised weight, a hook or a forward of its own may mean something else.
    """
    packed: dict[int, Tensor] = {}
    count = 0
    for module in model.modules():
        if not isinstance(module, nn.Linear) or not _is_plain(module):
            continue
        weight = module.weight
        if id(weight) not in packed:
            packed[id(weight)] = torch.ops.specgen.pack_weight(weight.detach().contiguous())
        module.__class__ = PackedLinear
        module.__dict__["packed"] = packed[id(weight)]  # no buffer: it is no part of the model's state
        count += 1
    return count


def linears_together(x: Tensor, layers: Sequence[nn.Module]) -> list[Tensor]:
    """What each of `layers`, linear ones that read the same rows, makes of x: in one call if all of them are packed."""
    if not all(type(layer) is PackedLinear for layer in layers):
        return [layer(x) for layer in layers]
    packed = [layer for layer in layers if isinstance(layer, PackedLinear)]
    outputs = [layer.out_features for layer in packed]
    rows: Tensor = torch.ops.specgen.linear(x, [p.packed for p in packed], [p.bias for p in packed], outputs)
    return list(rows.split(outputs, dim=-1))


def _is_plain(module: nn.Linear) -> bool:
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    weight, bias = module.weight, module.bias
    plain = type(weight) is nn.Parameter and (bias is None or bias.dtype == weight.dtype)
    return plain and weight.numel() > 0 and pick("linear", weight.device, weight.dtype) == "cpu"
