"""How far back a layer's attention looks: full attention, a sliding window, or chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Reach:
    """How far back a layer looks: `window` tokens including itself, or the tokens of its own `chunk`; `None` = all."""

    window: int | None = None
    chunk: int | None = None

    def oldest(self, position: int) -> int:
        """The first position that a row at `position` may see."""
        if self.window is not None:
            return max(0, position - self.window + 1)
        return 0 if self.chunk is None else position // self.chunk * self.chunk

    def allows(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether positions `query` may see positions `key`, by broadcasting; causality is not looked at."""
        allowed = torch.ones(torch.broadcast_shapes(query.shape, key.shape), dtype=torch.bool)
        if self.window is not None:
            allowed &= key > query - self.window
        if self.chunk is not None:
            allowed &= key // self.chunk == query // self.chunk
        return allowed


EVERYTHING = Reach()
