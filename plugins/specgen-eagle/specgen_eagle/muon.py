"""Muon, of which torch's own always multiplies in bfloat16: without products in it an update would take a minute."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_LEAST_NORM = 1e-7


class Muon(torch.optim.Optimizer):
    """Updates of matrices by the nearest orthogonal one of their momentum (Jordan et al. 2024), in steps as large as
    AdamW's (Liu et al. 2025, section 2.2): what `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` does.

    dtype: in which the orthogonal matrix is found.
    """

    def __init__(
        self, matrices: Iterable[Tensor], lr: float, *, dtype: torch.dtype, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update, with Nesterov's momentum."""
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                kept = cast(Tensor, state.setdefault("momentum_buffer", torch.zeros_like(matrix)))
                kept.lerp_(matrix.grad, 1 - momentum)
                update = orthogonal(matrix.grad.lerp(kept, momentum).to(self._dtype))
                matrix.mul_(1 - rate * group["weight_decay"])
                matrix.add_(update, alpha=-rate * 0.2 * math.sqrt(max(matrix.shape)))


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix whose singular values are about 1, by five Newton-Schulz iterations."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=_LEAST_NORM)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
