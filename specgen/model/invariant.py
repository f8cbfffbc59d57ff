"""Rows whose arithmetic does not depend on their neighbours.

A matrix product over k rows may round a row differently from a product over one, so drafting, batch-mates and chunks
show in the last bits, and where two tokens are nearly even they show in the text. Two changes end that: every linear
layer sees blocks of one fixed number of rows, and every row attends alone, over exactly the keys it sees, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

ROWS_PER_BLOCK = 16


class BlockedLinears:
    """The linear layers of a model, made to work in blocks of `ROWS_PER_BLOCK` rows while the context is open."""

    def __init__(self, model: nn.Module) -> None:
        self._forwards: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = [
            (module, partial(_blocked, partial(type(module).forward, module)))
            for module in model.modules()
            if type(module) in (nn.Linear, Conv1D)
        ]

    @contextmanager
    def blocked(self) -> Iterator[None]:
        """Replace the layers' forwards; put them back on the way out."""
        for module, forward in self._forwards:
            module.__dict__["forward"] = forward
        try:
            yield
        finally:
            for module, _ in self._forwards:
                del module.__dict__["forward"]


def _blocked(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`forward` over [..., dim] in blocks of rows, the last one filled up with zeros."""
    if not x.numel():
        return forward(x)
    rows = x.reshape(-1, x.shape[-1])
    missing = -len(rows) % ROWS_PER_BLOCK
    blocks = F.pad(rows, (0, 0, 0, missing)).split(ROWS_PER_BLOCK)
    output = forward(blocks[0]) if len(blocks) == 1 else torch.cat([forward(block) for block in blocks])
    return output[: len(rows)].reshape(*x.shape[:-1], -1)
