"""What adapters add to a layer's output, for rows of many adapters in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from specgen.kernels import reference


def add_segmented_lora(
    y: Tensor,
    x: Tensor,
    bounds: Sequence[int],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    *,
    kernel: Literal["cpu", "gpu"] | None,
) -> None:
    """Add in place what `reference.segmented_lora` answers.

    kernel: through which one, if any. In both a row's bits do not depend on the rows beside it; y, x and the weights
    are then of one dtype that it can take, and contiguous.
    """
    if kernel == "gpu":
        from specgen.kernels.triton.segmented_lora import segmented_lora

        segmented_lora(y, x, bounds, downs, ups)
    elif kernel == "cpu":
        torch.ops.specgen.segmented_lora(y, x, bounds, downs, ups)
    else:
        y.copy_(reference.segmented_lora(y, x, bounds, downs, ups))
