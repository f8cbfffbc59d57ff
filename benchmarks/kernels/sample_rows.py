"""Tokens drawn at many rows after temperature, top-k, top-p and min-p."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.kernels.case import Case, usable
from specgen.kernels import reference
from specgen.kernels.draws import Draw, Warp

_SHAPES = ((1, 49_152), (16, 49_152), (16, 151_936))
_WARPS = {"plain": Warp(), "warped": Warp(0.8, 40, 0.95, 0.05)}


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """rows x vocab."""
    ways: dict[str, Any] = {"torch": reference.sample_rows}
    backends = usable("sample_rows", device, dtype)
    if "triton" in backends:
        from specgen.kernels.triton.sample_rows import sample_rows

        ways["triton"] = sample_rows
    for rows, vocab in _SHAPES:
        logits = torch.randn(rows, vocab, device=device, dtype=dtype)
        for name, warp in _WARPS.items():
            draws = [Draw(row, 7 * row + 1, warp) for row in range(rows)]
            yield Case(
                f"{rows} x {vocab}, {name}", {backend: partial(ways[backend], logits, draws) for backend in backends}
            )
