"""Products of batches, as mixtures of experts have them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.kernels.case import Case, usable
from specgen.kernels import reference

_SHAPES = ((8, 1, 512, 1024), (8, 8, 512, 1024))


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """batch x rows x inputs x columns."""
    for batch, rows, inputs, columns in _SHAPES:
        x = torch.randn(batch, rows, inputs, device=device, dtype=dtype)
        weight = torch.randn(batch, inputs, columns, device=device, dtype=dtype)
        ways = {"cpu": torch.ops.specgen.bmm, "torch": reference.bmm}
        calls = {backend: partial(ways[backend], x, weight) for backend in usable("bmm", device, dtype)}
        yield Case(f"{batch} x {rows} x {inputs} x {columns}", calls)
