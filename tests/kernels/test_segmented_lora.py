"""What adapters add to rows: the reference and the CPU kernel near float64, a row alike in any company."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from specgen.kernels import reference
from specgen.kernels.cpu_backend import why_not
from specgen.kernels.segmented_lora import add_segmented_lora

needs_kernels = pytest.mark.skipif(why_not() is not None, reason=f"no CPU kernels: {why_not()}")
DTYPES = (torch.float32, torch.bfloat16)
# Inputs and outputs: whole vectors, parts of them, enough for several tasks.
SIZES = ((64, 64), (576, 1536), (70, 100), (5, 7), (1, 1))
RANKS = (1, 4, 7, 64)
# The rows of each adapter: a gap before, between and behind them, one without rows.
BOUNDS = (1, 4, 4, 5, 7, 7, 9, 40)
ROWS = 43


def world(inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    torch.manual_seed(inputs)
    y, x = torch.randn(ROWS, outputs).to(dtype), torch.randn(ROWS, inputs).to(dtype)
    downs = [torch.randn(rank, inputs).to(dtype) for rank in RANKS]
    return y, x, downs, [torch.randn(rank, outputs).to(dtype) for rank in RANKS]


def exact(y: Tensor, x: Tensor, bounds: Sequence[int], downs: list[Tensor], ups: list[Tensor]) -> Tensor:
    return reference.segmented_lora(
        y.double(), x.double(), bounds, [d.double() for d in downs], [u.double() for u in ups]
    )


def added(y: Tensor, *rest: object, kernel: bool) -> Tensor:
    result = y.clone()
    add_segmented_lora(result, *rest, backend="cpu" if kernel else "torch")  # type: ignore[arg-type]
    return result


def test_each_adapter_adds_to_its_own_rows_alone() -> None:
    y, x, downs, ups = world(6, 5, torch.float64)
    found = reference.segmented_lora(y, x, BOUNDS, downs, ups)
    for row in range(ROWS):
        mine = [i for i in range(len(RANKS)) if BOUNDS[2 * i] <= row < BOUNDS[2 * i + 1]]
        expected = y[row] + sum((x[row] @ downs[i].T @ ups[i] for i in mine), torch.zeros(5, dtype=torch.float64))
        assert len(mine) <= 1
        assert torch.allclose(found[row], expected, rtol=1e-12)
        assert mine or torch.equal(found[row], y[row])


@pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=needs_kernels)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_numbers_are_near_those_of_float64(size: tuple[int, int], dtype: torch.dtype, kernel: bool) -> None:
    y, x, downs, ups = world(*size, dtype)
    truth = exact(y, x, BOUNDS, downs, ups)
    terms = exact(y.abs(), x.abs(), BOUNDS, [d.abs() for d in downs], [u.abs() for u in ups])
    # One rounding of the result, and in float32 one of each step on the way.
    bound = terms * 2.0**-23 * (size[0] + max(RANKS)) + truth.abs() * (2.0**-8 if dtype == torch.bfloat16 else 0)
    assert ((added(y, x, BOUNDS, downs, ups, kernel=kernel).double() - truth).abs() <= bound).all()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_a_row_has_the_same_bits_in_any_company(size: tuple[int, int], dtype: torch.dtype) -> None:
    y, x, downs, ups = world(*size, dtype)
    together = added(y, x, BOUNDS, downs, ups, kernel=True)
    for i, (down, up) in enumerate(zip(downs, ups, strict=True)):
        for row in range(BOUNDS[2 * i], BOUNDS[2 * i + 1]):
            alone = added(y[row : row + 1], x[row : row + 1], (0, 1), [down], [up], kernel=True)
            assert torch.equal(alone[0], together[row])


@needs_kernels
def test_rows_of_no_adapter_keep_their_bits() -> None:
    y, x, downs, ups = world(64, 64, torch.bfloat16)
    found = added(y, x, BOUNDS, downs, ups, kernel=True)
    base = [0, 5, 6, 7, 8, *range(40, ROWS)]
    assert torch.equal(found[base], y[base])
