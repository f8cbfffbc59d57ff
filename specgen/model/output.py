"""What a packed forward answers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """logits: [wanted rows, vocab], segment by segment. hidden: [rows, width] per watched layer, of all rows."""

    logits: Tensor
    hidden: tuple[Tensor, ...] = ()
