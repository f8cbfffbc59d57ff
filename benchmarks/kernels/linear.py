"""Linear layers of a 0.1B and a 1B model: rows of a step through weights that are packed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.kernels.case import Case, usable
from specgen.kernels import reference
from specgen.kernels.backends import Backend

_SHAPES = ((1, 576, 1536), (32, 576, 1536), (1, 2048, 8192), (32, 2048, 8192))


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """rows x inputs x outputs."""
    for rows, inputs, outputs in _SHAPES:
        x = torch.randn(rows, inputs, device=device, dtype=dtype)
        weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
        calls: dict[Backend, Callable[[], object]] = {}
        for backend in usable("linear", device, dtype):
            if backend == "cpu":
                packed = torch.ops.specgen.pack_weight(weight)
                calls[backend] = partial(torch.ops.specgen.linear, x, [packed], [None], [outputs])
            else:
                calls[backend] = partial(reference.linear, x, [weight], [None])
        yield Case(f"{rows} x {inputs} x {outputs}", calls)
