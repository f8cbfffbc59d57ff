"""The likeliest tokens of rows of logits: the greedy draw, and what a drafter may learn from beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from specgen.kernels import reference
from specgen.kernels.backends import pick


def top_tokens(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row, in one pass over the logits where there are kernels; see `reference`."""
    backend = pick("top_tokens", logits.device, logits.dtype)
    if backend == "triton":
        from specgen.kernels.triton import top_tokens as triton

        return triton.top_tokens(logits, count)
    if backend == "cpu":
        found: tuple[Tensor, Tensor] = torch.ops.specgen.top_tokens(logits, count)
        return found
    return reference.top_tokens(logits, count)


def on_host(values: Tensor, ids: Tensor, drawn: Tensor | None = None) -> tuple[Tensor, Tensor, list[int]]:
    """What `top_tokens` gave and tokens drawn beside it, int64[n], on the CPU.

    In one copy, which is the only time that a step waits for a GPU.
    """
    if values.device.type == "cpu":
        return values, ids, [] if drawn is None else drawn.tolist()
    rest = [] if drawn is None else [drawn.to(torch.int32)]
    flat = torch.cat([values.view(torch.int32).flatten(), ids.to(torch.int32).flatten(), *rest]).cpu()
    scores, tokens, *others = flat.split([values.numel(), ids.numel(), *map(len, rest)])
    there = scores.view(torch.float32).view(values.shape), tokens.long().view(ids.shape)
    return *there, others[0].tolist() if others else []
