"""Accepted rows that move behind the committed prefix, in every layer."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.kernels.case import Case, usable
from specgen.kernels.kv_commit import kv_commit
from specgen.kv.formats import LayerShape
from specgen.kv.pool import KVPool

_ROWS = (1, 6)


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Rows of a model with 32 layers."""
    pool = KVPool([LayerShape(8, 128, 128)] * 32, 16, dtype=dtype, device=device)
    for rows in _ROWS:
        source, destination = torch.arange(64, 64 + rows), torch.arange(rows)
        yield Case(
            f"{rows} rows, 32 layers",
            {
                backend: partial(kv_commit, pool.stacks, source, destination, backend=backend)
                for backend in usable("kv_commit", device, dtype)
            },
        )
