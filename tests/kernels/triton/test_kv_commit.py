"""The GPU kernel that moves accepted rows, against `BlockTable.commit`, in pools of every format."""

from __future__ import annotations

import pytest
import torch

from specgen.kv.formats import FORMATS, LayerShape
from specgen.kv.pool import KVPool

pytest.importorskip("triton")

from specgen.kernels.triton.kv_commit import kv_commit

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Two shapes, so that there are several stacks; sizes whose slots are no whole number of 8 bytes.
LAYERS = (LayerShape(2, 8, 8), LayerShape(2, 8, 8), LayerShape(1, 6, 10))
# Offsets behind the prefix: the first stays where it is; each next onto a row that the one before has left.
ACCEPTED = ((0, 2, 3, 7, 9), (1, 2, 3, 4, 5, 6), (5,), ())

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_move_as_commit_moves_them(kind: str) -> None:
    pools = [KVPool(LAYERS, 16, dtype=torch.float32, device=DEVICE, kind=FORMATS[kind](), page_size=4) for _ in "ab"]
    generator = torch.Generator().manual_seed(0)
    for mine, other in zip(*(pool.stacks for pool in pools), strict=True):
        noise = torch.randint(0, 255, mine.view(torch.uint8).shape, generator=generator, dtype=torch.uint8)
        for stack in (mine, other):
            stack.view(torch.uint8).copy_(noise)
    kernel, reference = pools
    moves, starts = [], [0]
    for prefix, accepted in enumerate(ACCEPTED):
        table = reference.open()
        table.reserve(prefix + 12)
        table.commit(prefix)
        slots = table.slots(0, prefix + 12).tolist()
        pairs = [(slots[prefix + offset], slots[prefix + place]) for place, offset in enumerate(accepted)]
        moves += [pair for pair in pairs if pair[0] != pair[1]]
        starts.append(len(moves))
        table.commit(0, accepted)
    kv_commit(
        kernel.stacks,
        torch.tensor(moves, dtype=torch.int32, device=DEVICE),
        torch.tensor(starts, dtype=torch.int32, device=DEVICE),
    )
    assert moves
    for found, expected in zip(kernel.stacks, reference.stacks, strict=True):
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
