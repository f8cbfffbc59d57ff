"""The likeliest tokens of rows of logits: the greedy draw, and what a drafter may learn from beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from specgen.kernels import gpu_kernels, reference
from specgen.kernels.cpu_kernels import available


def top_tokens(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """See `reference.top_tokens`; in one pass over the logits where there are kernels."""
    if gpu_kernels.available(logits.device, logits.dtype):
        from specgen.kernels.gpu import top_tokens as gpu

        return gpu.top_tokens(logits, count)
    if not available(logits.device, logits.dtype):
        return reference.top_tokens(logits, count)
    found: tuple[Tensor, Tensor] = torch.ops.specgen.top_tokens(logits, count)
    return found


def on_host(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What `top_tokens` gave, on the CPU; in one copy, which is the only time that a step waits for a GPU."""
    if values.device.type == "cpu":
        return values, ids
    both = torch.stack([values.view(torch.int32), ids.to(torch.int32)]).cpu()
    return both[0].view(torch.float32), both[1].long()
