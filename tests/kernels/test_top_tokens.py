"""The CPU kernel for the likeliest tokens answers what the reference does, ties included."""

from __future__ import annotations

import pytest
import torch

from specgen.kernels import reference
from specgen.kernels.cpu_backend import why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no CPU kernels: {why_not()}")

DTYPES = (torch.float32, torch.bfloat16)
WIDTHS = (1, 5, 64, 65, 4097, 49152, 50257)
COUNTS = (1, 2, 8, 50)


def kernel(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, ids = torch.ops.specgen.top_tokens(logits, count)
    return values, ids


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [0, 1, 3, 9])
def test_the_largest_come_in_order(rows: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    logits = torch.randn(rows, width).to(dtype)
    for count in (c for c in COUNTS if c <= width):
        for found, expected in zip(kernel(logits, count), reference.top_tokens(logits, count), strict=True):
            assert torch.equal(found, expected), count


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_equals_the_lower_id_comes_first(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for rows in (1, 20):
        logits = torch.randint(-3, 3, (rows, 20_000)).to(dtype)
        for count in COUNTS:
            assert torch.equal(kernel(logits, count)[1], reference.top_tokens(logits, count)[1]), count
    assert kernel(torch.zeros(1, 20_000, dtype=dtype), 1)[1].item() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_forbidden_tokens_come_last_and_none_twice(dtype: torch.dtype) -> None:
    logits = torch.full((2, 9_000), float("-inf"), dtype=dtype)
    logits[0, 8_999] = 1
    values, ids = kernel(logits, 4)
    assert ids.tolist() == [[8_999, 0, 1, 2], [0, 1, 2, 3]]
    assert values[0].tolist() == [1] + [float("-inf")] * 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_is_the_argmax(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    logits = torch.randn(32, 49152).to(dtype)[:, ::3]
    assert torch.equal(kernel(logits, 1)[1][:, 0], logits.argmax(dim=-1))
