"""Metadata of a forward as int32 arrays, copied to the device at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Tensors begin where Triton may take it that vectors can be loaded: at multiples of 16 bytes.
_ALIGNED = 4

Array = NDArray[np.int32]


class Packed:
    """Arrays side by side in one, which is `numbers`, int32."""

    def __init__(self, arrays: Sequence[Array]) -> None:
        self._shapes = [array.shape for array in arrays]
        self._starts = [0, *accumulate(-(-array.size // _ALIGNED) * _ALIGNED for array in arrays)]
        self.numbers: Array = np.zeros(self._starts[-1], dtype=np.int32)
        for start, array in zip(self._starts, arrays, strict=False):
            self.numbers[start : start + array.size] = array.reshape(-1)

    def views(self, there: Tensor) -> list[Tensor]:
        """The arrays in `there`, which begins with `numbers`."""
        places = zip(self._starts, self._shapes, strict=False)
        return [there[start : start + prod(shape)].view(shape) for start, shape in places]


def to_device(numbers: Array, device: torch.device, into: Tensor | None) -> Tensor:
    """The numbers on the device. The host does not wait for that."""
    here = torch.from_numpy(numbers)
    if device.type == "cuda":
        here = here.pin_memory()
    if into is None:
        return here.to(device, non_blocking=True)
    into[: len(here)].copy_(here, non_blocking=True)
    return into


def padded(values: Sequence[int] | Array, count: int, value: int = 0) -> Array:
    """int32[count, ...]: the values, then `value`."""
    given = np.asarray(values, dtype=np.int32)
    whole = np.full((count, *given.shape[1:]), value, dtype=np.int32)
    whole[: len(given)] = given
    return whole
