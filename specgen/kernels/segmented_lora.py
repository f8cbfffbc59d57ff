"""What adapters add to a layer's output, for rows of many adapters in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specgen.kernels import reference
from specgen.kernels.backends import Backend


def add_segmented_lora(
    y: Tensor,
    x: Tensor,
    bounds: Sequence[int],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    *,
    backend: Backend,
) -> None:
    """Add in place what `reference.segmented_lora` answers.

    backend: in the kernels a row's bits do not depend on the rows beside it; y, x and the weights are then of one dtype
    that they can take, and contiguous.
    """
    if backend == "triton":
        from specgen.kernels.triton import segmented_lora as triton

        triton.segmented_lora(y, x, bounds, downs, ups)
    elif backend == "cpu":
        torch.ops.specgen.segmented_lora(y, x, bounds, downs, ups)
    else:
        y.copy_(reference.segmented_lora(y, x, bounds, downs, ups))
