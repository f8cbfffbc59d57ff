"""The references against what stands above them: formats, the sampler, tables. So the kernels' law is the product's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from specgen.kernels import reference
from specgen.kernels.draws import Draw, Warp
from specgen.kernels.sample_rows import sample_rows
from specgen.kv.formats import FORMATS, LayerShape
from tests.support.attention import World
from tests.support.sampled_rows import sampled

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("vocab", [7, 300])
def test_rows_are_sampled_as_the_sampler_samples_them(vocab: int) -> None:
    torch.manual_seed(vocab)
    logits = 3 * torch.randn(20, vocab)
    draws, expected = sampled(logits)
    assert sample_rows(logits, draws).tolist() == expected
    assert len(set(expected)) > 3


def test_a_row_that_leaves_no_token_says_so() -> None:
    logits = torch.full((2, 5), float("-inf"))
    logits[1, 3] = -50.0
    draws = [Draw(row, 17, Warp(top_p=0.3)) for row in range(2)]
    assert reference.sample_rows(logits, draws).tolist() == [-1, 3]


@pytest.mark.parametrize("kind", FORMATS)
def test_keys_and_values_are_written_as_the_format_writes_them(kind: str) -> None:
    here, there = (World(2, LayerShape(2, 64, 40), torch.float32, FORMATS[kind]()) for _ in range(2))
    _, key, value = here.new_rows(9)
    key, value = (8 * side[0].transpose(0, 1) for side in (key, value))
    slots = torch.randperm(here.pool.capacity, generator=torch.Generator().manual_seed(1))[:9]
    slots[4] = -1
    reference.kv_write(key, value, here.store.kernel_planes, slots)
    there.store.write(slots[slots >= 0], key[slots >= 0], value[slots >= 0])
    for found, expected in zip(here.store.planes, there.store.planes, strict=True):
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_rows_move_in_every_layer_and_stack() -> None:
    stacks = [torch.arange(2 * 6 * 3.0).reshape(2, 6, 3), torch.arange(12).reshape(2, 6)]
    before = [stack.clone() for stack in stacks]
    reference.kv_commit(stacks, torch.tensor([3, 5]), torch.tensor([1, 2]))
    for stack, old in zip(stacks, before, strict=True):
        assert torch.equal(stack, old[:, [0, 3, 5, 3, 4, 5]])


def test_linear_layers_stand_side_by_side() -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(2, 3, 8), [torch.randn(outputs, 8) for outputs in (4, 5)]
    biases = [torch.randn(4), None]
    found = reference.linear(x, weights, biases)
    assert torch.equal(found[..., :4], functional.linear(x, weights[0], biases[0]))
    assert torch.equal(found[..., 4:], functional.linear(x, weights[1]))
    a, b = torch.randint(-9, 9, (2, 3, 4)).float(), torch.randint(-9, 9, (2, 4, 5)).float()
    assert torch.equal(reference.bmm(a, b), torch.stack([a[0] @ b[0], a[1] @ b[1]]))
