"""New keys and values of a step into a layer of the pool."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.kernels.case import Case, usable
from specgen.kernels import reference
from specgen.kv.formats import FORMATS, LayerShape
from specgen.kv.pool import KVPool

_LAYER = LayerShape(8, 128, 128)
_ROWS = (1, 64)


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Rows, by the format that keeps them."""
    ways: dict[str, Any] = {"torch": reference.kv_write}
    backends = usable("kv_write", device, dtype)
    if "triton" in backends:
        from specgen.kernels.triton.kv_write import kv_write

        ways["triton"] = kv_write
    for name in ("native", "int8", "int4"):
        pool = KVPool([_LAYER], 64, dtype=dtype, device=device, kind=FORMATS[name]())
        planes = pool.layers[0].kernel_planes
        for rows in _ROWS:
            new = [torch.randn(rows, _LAYER.kv_heads, 128, device=device, dtype=dtype) for _ in "kv"]
            slots = torch.arange(rows, device=device)
            yield Case(
                f"{name}, {rows} rows", {backend: partial(ways[backend], *new, planes, slots) for backend in backends}
            )
