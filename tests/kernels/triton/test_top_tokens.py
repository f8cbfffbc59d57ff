"""The GPU kernel for the likeliest tokens answers what the reference does, ties included."""

from __future__ import annotations

import pytest
import torch

from specgen.kernels import reference

pytest.importorskip("triton")

from specgen.kernels.triton.top_tokens import top_tokens

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def check(logits: torch.Tensor, count: int) -> None:
    for found, expected in zip(top_tokens(logits, count), reference.top_tokens(logits, count), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [1, 5, 4096, 4097, 10_007])
def test_the_largest_come_in_order(vocab: int, dtype: torch.dtype) -> None:
    """Less than a part, exactly one, one more, several."""
    torch.manual_seed(vocab)
    for count in (n for n in (1, 8) if n <= vocab):
        check(torch.randn(3, vocab, device=DEVICE).to(dtype), count)


def test_of_equals_the_lower_id_comes_first() -> None:
    torch.manual_seed(0)
    check(torch.randint(-2, 3, (2, 9000), device=DEVICE).float(), 8)
    zeros = torch.zeros(1, 5000, device=DEVICE)
    zeros[0, :4500] = -0.0
    check(zeros, 4)


def test_forbidden_tokens_come_last_and_none_twice() -> None:
    logits = torch.full((2, 9000), float("-inf"), device=DEVICE)
    logits[0, 8999] = 1
    values, ids = top_tokens(logits, 4)
    assert ids.tolist() == [[8999, 0, 1, 2], [0, 1, 2, 3]]
    assert values[0].tolist() == [1] + [float("-inf")] * 3


def test_rows_may_lie_apart() -> None:
    torch.manual_seed(1)
    check(torch.randn(8, 300, device=DEVICE)[::3], 5)
