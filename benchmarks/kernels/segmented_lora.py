"""What adapters add to a layer's output, one and eight of them in a step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.kernels.case import Case, usable
from specgen.kernels.segmented_lora import add_segmented_lora

_RANK = 16
_SHAPES = ((8, 1, 2048, 2048), (64, 8, 2048, 2048))


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """rows under adapters, inputs x outputs."""
    for rows, adapters, inputs, outputs in _SHAPES:
        x = torch.randn(rows, inputs, device=device, dtype=dtype)
        y = torch.zeros(rows, outputs, device=device, dtype=dtype)
        each = rows // adapters
        bounds = [edge for number in range(adapters) for edge in (number * each, (number + 1) * each)]
        downs = [torch.randn(_RANK, inputs, device=device, dtype=dtype) for _ in range(adapters)]
        ups = [torch.randn(_RANK, outputs, device=device, dtype=dtype) for _ in range(adapters)]
        yield Case(
            f"{rows} rows, {adapters} adapters of rank {_RANK}, {inputs} x {outputs}",
            {
                backend: partial(add_segmented_lora, y, x, bounds, downs, ups, backend=backend)
                for backend in usable("segmented_lora", device, dtype)
            },
        )
