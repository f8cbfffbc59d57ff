"""The likeliest tokens of rows of logits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.kernels.case import Case, usable
from specgen.kernels import reference

_SHAPES = ((1, 49_152, 1), (32, 49_152, 1), (32, 49_152, 8), (32, 151_936, 8))


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """rows x vocab, count."""
    ways: dict[str, Any] = {"torch": reference.top_tokens}
    backends = usable("top_tokens", device, dtype)
    if "cpu" in backends:
        ways["cpu"] = torch.ops.specgen.top_tokens
    if "triton" in backends:
        from specgen.kernels.triton.top_tokens import top_tokens

        ways["triton"] = top_tokens
    for rows, vocab, count in _SHAPES:
        logits = torch.randn(rows, vocab, device=device, dtype=dtype)
        yield Case(
            f"{rows} x {vocab}, {count}", {backend: partial(ways[backend], logits, count) for backend in backends}
        )
