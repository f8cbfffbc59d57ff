"""The GPU kernel that draws at many rows, against the sampler that draws one by one through transformers' warpers.

Decisions are compared with `==`. Only where logits tie at a cut may they differ: transformers' top-p keeps some of
equal tokens, as its sort happens to lay them, the kernel keeps all.
"""

from __future__ import annotations

import pytest
import torch

from specgen.kernels.draws import Draw, Warp
from tests.support.sampled_rows import sampled

pytest.importorskip("triton")

from specgen.kernels.triton.sample_rows import sample_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
POSITIONS = 6

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("vocab", [7, 300, pytest.param(5000, marks=pytest.mark.slow), 2100])
def test_what_is_drawn_is_what_the_sampler_draws(vocab: int) -> None:
    torch.manual_seed(vocab)
    logits = 3 * torch.randn(POSITIONS, vocab, device=DEVICE)
    draws, expected = sampled(logits)
    found = sample_rows(logits, draws).tolist()
    assert found == expected
    assert len(set(found)) > 3


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = torch.full((3, 40), float("-inf"), device=DEVICE)
    logits[0, 7] = -50.0
    logits[1, 3:5] = 1.0
    draws = [Draw(row, 17 * row - 5, Warp(top_p=0.3)) for row in range(3)]
    found = sample_rows(logits, draws).tolist()
    assert found[0] == 7
    assert found[1] in (3, 4)
    assert found[2] == -1, "nothing is left"


def test_half_precision_logits_are_read_as_they_are() -> None:
    torch.manual_seed(1)
    logits = torch.randn(4, 500, device=DEVICE).half()
    draws = [Draw(row, 2**63 - 1 - row, Warp(0.9, 20, 0.8)) for row in range(4)]
    assert torch.equal(sample_rows(logits, draws), sample_rows(logits.float(), draws))
