"""The GPU kernel that writes keys and values, against what the formats themselves write.

Codes are compared to the bit, but where sums stand behind them: rotated heads, and the fits of 4-bit codes. There the
last bit of a sum may move a code, so what the codes stand for must be as near to the truth.
"""

from __future__ import annotations

import pytest
import torch

from specgen.kv.formats import FORMATS, LayerShape
from tests.support.attention import World

pytest.importorskip("triton")

from specgen.kernels.triton.kv_write import kv_write

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = (LayerShape(2, 64, 64), LayerShape(3, 40, 24), LayerShape(1, 128, 80))
TO_THE_BIT = ("native", "int8", "fp8")

pytestmark = pytest.mark.usefixtures("one_thread")


def pair(shape: LayerShape, kind: str, dtype: torch.dtype) -> tuple[World, World]:
    """Two pools alike: for the kernel and for the reference."""
    kernel, reference = (World(2, shape, dtype, FORMATS[kind](), device=DEVICE) for _ in range(2))
    return kernel, reference


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
def test_rows_are_kept_as_the_format_keeps_them(shape: LayerShape, kind: str, dtype: torch.dtype) -> None:
    here, there = pair(shape, kind, dtype)
    rows = 21
    _, key, value = here.new_rows(rows)
    key, value = (8 * side[0].transpose(0, 1) for side in (key, value))
    slots = torch.randperm(here.pool.capacity, generator=torch.Generator().manual_seed(1))[:rows]
    kept = here.store.kernel_planes
    assert kept is not None
    kv_write(key, value, kept, slots.to(DEVICE, torch.int32))
    there.store.write(slots, key, value)
    for found, expected in zip(here.store.planes, there.store.planes, strict=True):
        if kind in TO_THE_BIT:
            assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
        else:
            assert (found.view(torch.uint8) != expected.view(torch.uint8)).float().mean() < 2e-3
    for found, expected, truth in zip(
        here.store.read_plain(slots), there.store.read_plain(slots), (key, value), strict=True
    ):
        assert (found - truth).norm() <= 1.001 * (expected - truth).norm()


def test_every_e4m3_number_is_met() -> None:
    """Every code, and what lies between two: the middle, which goes to the even one, and a little beside it."""
    codes = torch.arange(0, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    x = torch.cat([codes, middles, middles * (1 + 2**-20), middles * (1 - 2**-20)])
    x = torch.cat([x, -x])
    # The largest of a vector is 448, so that its scale is one.
    vectors = torch.cat([x.reshape(-1, 1), torch.full((len(x), 1), 448.0)], dim=1)
    shape = LayerShape(1, 2, 2)
    here, there = (World(1, shape, torch.float32, FORMATS["fp8"](), device=DEVICE) for _ in range(2))
    slots = torch.arange(len(x))
    sides = vectors[:, None].to(DEVICE)
    kept = here.store.kernel_planes
    assert kept is not None
    kv_write(sides, sides, kept, slots.to(DEVICE, torch.int32))
    there.store.write(slots, sides, sides)
    found, expected = (world.store.planes[0].view(torch.uint8) for world in (here, there))
    assert torch.equal(found, expected)
    assert len(found[: len(x)].unique()) >= 254


def test_rows_without_a_slot_are_not_written() -> None:
    here, there = pair(SHAPES[0], "native", torch.bfloat16)
    _, key, value = here.new_rows(3)
    kept = here.store.kernel_planes
    assert kept is not None
    key, value = (side[0].transpose(0, 1) for side in (key, value))
    kv_write(key, value, kept, torch.tensor([5, -1, 9], dtype=torch.int32, device=DEVICE))
    there.store.write(torch.tensor([5, 9]), key[[0, 2]], value[[0, 2]])
    for found, expected in zip(here.store.planes, there.store.planes, strict=True):
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
