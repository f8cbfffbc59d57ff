"""Accepted rows of a tree moved to where they belong, in all layers of a pool."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specgen.kernels import reference
from specgen.kernels.backends import Backend


def kv_commit(stacks: Sequence[Tensor], moves: Tensor, *, backend: Backend) -> None:
    """Copy slots onto slots in every stack [layers, slots, ...]; see `reference.kv_commit`.

    moves: int64[n, 2] in host memory, of one sequence: ascending, each to a lower slot of its table's order.
    """
    if backend == "triton":
        from specgen.kernels.triton import kv_commit as triton

        packed = torch.cat([torch.tensor([0, len(moves)]), moves.flatten()]).to(stacks[0].device, torch.int32)
        triton.kv_commit(list(stacks), packed[2:].view(-1, 2), packed[:2])
    else:
        reference.kv_commit(stacks, moves)
