"""Tokens drawn at many rows at once, on the device; what `specgen.sampling.sampler.Sampler` draws one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Warp(NamedTuple):
    """Settings that vectorise, in the order in which they apply; the defaults change nothing."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


class Draw(NamedTuple):
    """One draw: of which row of logits, under which random key of a position, and how warped."""

    row: int
    key: int
    warp: Warp


def draw(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """int64[len(draws)] on the device of logits [rows, vocab]; -1 where no token is left. By the GPU kernel."""
    from specgen.kernels.triton import sample_rows as gpu

    return gpu.draw(logits, draws)
