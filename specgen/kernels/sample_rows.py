"""Tokens sampled at many rows at once, on the device of the logits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from specgen.kernels import reference
from specgen.kernels.backends import pick
from specgen.kernels.draws import Draw


def sample_rows(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """A token for each draw, int64[len(draws)] on the device of logits [rows, vocab]; -1 where none is left.

    See `reference.sample_rows`.
    """
    if pick("sample_rows", logits.device, logits.dtype) == "triton":
        from specgen.kernels.triton import sample_rows as triton

        return triton.sample_rows(logits, draws)
    return reference.sample_rows(logits, draws)
