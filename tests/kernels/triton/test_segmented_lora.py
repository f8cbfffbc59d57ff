"""What adapters add to rows on a GPU: near float64, on their own rows alone, a row alike in any company."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from specgen.kernels.triton.segmented_lora import segmented_lora

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Inputs and outputs: whole blocks; more than one piece, and parts of blocks; less than one.
SIZES = ((128, 64), (1100, 100), (5, 7))
RANKS = (1, 4, 17)
# A gap before, between and behind; more rows than a tile.
BOUNDS = (1, 4, 4, 5, 7, 26)
ROWS = 29
NEAR = {torch.float32: 1e-5, torch.float16: 1e-2}

pytestmark = pytest.mark.usefixtures("one_thread")


def world(size: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    inputs, outputs = size
    torch.manual_seed(inputs)
    y, x = (torch.randn(ROWS, width).to(DEVICE, dtype) for width in (outputs, inputs))
    downs = [(torch.randn(rank, inputs) / inputs**0.5).to(DEVICE, dtype) for rank in RANKS]
    return y, x, downs, [torch.randn(rank, outputs).to(DEVICE, dtype) for rank in RANKS]


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_each_adapter_adds_to_its_own_rows_alone(size: tuple[int, int], dtype: torch.dtype) -> None:
    y, x, downs, ups = world(size, dtype)
    expected = y.double()
    for first, stop, down, up in zip(BOUNDS[::2], BOUNDS[1::2], downs, ups, strict=True):
        expected[first:stop] += x[first:stop].double() @ down.double().T @ up.double()
    found = y.clone()
    segmented_lora(found, x, BOUNDS, downs, ups)
    assert (found.double() - expected).abs().max() <= NEAR[dtype] * expected.abs().max()
    for row in (0, 5, 6, 26, 27, 28):
        assert torch.equal(found[row], y[row])


def test_a_row_has_the_same_bits_in_any_company() -> None:
    y, x, downs, ups = world((1100, 100), torch.float32)
    together = y.clone()
    segmented_lora(together, x, BOUNDS, downs, ups)
    for row in (7, 12, 25):
        alone = y[row : row + 1].clone()
        segmented_lora(alone, x[row : row + 1], (0, 1), downs[2:], ups[2:])
        assert torch.equal(alone[0], together[row])


def test_without_rows_nothing_happens() -> None:
    y, x, downs, ups = world(SIZES[0], torch.float32)
    found = y.clone()
    segmented_lora(found, x, (3, 3), downs[:1], ups[:1])
    assert torch.equal(found, y)
