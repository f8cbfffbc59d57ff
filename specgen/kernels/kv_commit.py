"""Accepted rows of a tree moved to where they belong, in all layers of a pool."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specgen.kernels import reference
from specgen.kernels.backends import Backend


def kv_commit(stacks: Sequence[Tensor], source: Tensor, destination: Tensor, *, backend: Backend) -> None:
    """Copy slots onto slots in every stack [layers, slots, ...]; see `reference.kv_commit`.

    source, destination: int64[n] in host memory, of one sequence: ascending, each to a lower slot of its table's order.
    """
    if backend == "triton":
        from specgen.kernels.triton import kv_commit as triton

        moves = torch.stack([source, destination], dim=1).to(torch.int32)
        packed = torch.cat([torch.tensor([0, len(moves)], dtype=torch.int32), moves.flatten()]).to(stacks[0].device)
        triton.kv_commit(list(stacks), packed[2:].view(-1, 2), packed[:2])
    else:
        reference.kv_commit(stacks, source, destination)
