"""The likeliest tokens of rows of logits: the greedy draw, and what a drafter may learn from beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from specgen.kernels import reference
from specgen.kernels.cpu_kernels import available


def top_tokens(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """See `reference.top_tokens`; in one pass over the logits where there are CPU kernels."""
    if not available(logits.device, logits.dtype):
        return reference.top_tokens(logits, count)
    found: tuple[Tensor, Tensor] = torch.ops.specgen.top_tokens(logits, count)
    return found
