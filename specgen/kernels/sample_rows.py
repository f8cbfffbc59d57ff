"""Tokens sampled at many rows at once, on the device of the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from specgen.kernels import reference
from specgen.kernels.backends import pick


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


def sample_rows(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """A token for each draw, int64[len(draws)] on the device of logits [rows, vocab]; -1 where none is left.

    See `reference.sample_rows`.
    """
    if pick("sample_rows", logits.device, logits.dtype) == "triton":
        from specgen.kernels.triton import sample_rows as triton

        return triton.sample_rows(logits, draws)
    return reference.sample_rows(logits, draws)
