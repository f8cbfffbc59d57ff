"""The CPU kernel for attention over the paged pool, against its reference in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from specgen.kernels.cpu_backend import why_not
from specgen.kv.formats import LayerShape
from specgen.model.attention.cpu_plan import plan
from specgen.model.attention.reach import Reach
from specgen.model.segment import Segment, tree_segment
from tests.support.attention import REACHES, SCALE, World, chain, later, tree

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no CPU kernels: {why_not()}")

DTYPES = (torch.float32, torch.bfloat16)
NEAR = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
# Heads, heads that share a key, key and value numbers: SmolLM2's; odd ones; a group wider than a tile; one number.
SHAPES = ((9, 3, 64, 64), (4, 2, 40, 24), (20, 1, 32, 80), (2, 2, 128, 16), (3, 1, 5, 3))


class CpuWorld(World):
    def kernel(
        self, segments: Sequence[Segment], new: Sequence[Tensor], reach: Reach, softcap: float, sinks: Tensor | None
    ) -> Tensor:
        rows = [side[0].transpose(0, 1) for side in new]
        planes, limits = self.store.planes, (reach.window or 0, reach.chunk or 0)
        return torch.ops.specgen.tree_attention(*rows, *planes, plan(segments), SCALE, softcap, sinks, *limits)


def world(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> CpuWorld:
    heads, kv_heads, key_dim, value_dim = sizes
    return CpuWorld(heads, LayerShape(kv_heads, key_dim, value_dim), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("extras", [(0.0, False), (5.0, False), (0.0, True)])
def test_every_row_sees_its_own_path(
    sizes: tuple[int, int, int, int], reach: Reach, extras: tuple[float, bool], dtype: torch.dtype
) -> None:
    softcap, with_sinks = extras
    here = world(sizes, dtype)
    sinks = torch.linspace(-1, 1, here.heads) if with_sinks else None
    earlier = here.sequence(20)
    first = tree(earlier, 1, 4)
    here.kernel([first], here.new_rows(5), reach, softcap, sinks)
    segments = [
        chain(here.sequence(0), 1),
        chain(here.sequence(37), 1),
        tree(here.sequence(30), 2, 21),
        chain(here.sequence(5), 40),
        later(earlier),
        tree(here.sequence(0), 1, 63),
    ]
    new = here.new_rows(sum(len(segment.tokens) for segment in segments))
    found = here.kernel(segments, new, reach, softcap, sinks)
    exact = here.reference(segments, new[0], reach, softcap, sinks)
    assert (found.double() - exact).abs().max() <= NEAR[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("reach", REACHES)
def test_a_row_has_the_same_bits_in_any_company(
    sizes: tuple[int, int, int, int], reach: Reach, dtype: torch.dtype
) -> None:
    """Rows of one text: read one by one, at once, and in a tree among others and beside another sequence."""
    here = world(sizes, dtype)
    count = 12
    query, key, value = here.new_rows(count)
    runs = {"alone": here.sequence(0), "at once": here.sequence(0), "in a tree": here.sequence(0)}

    def rows(index: Sequence[int]) -> list[Tensor]:
        return [side[:, :, list(index)] for side in (query, key, value)]

    one_by_one = []
    for row in range(count):
        one_by_one.append(here.kernel([chain(runs["alone"], 1)], rows([row]), reach, 0.0, None))
        runs["alone"].commit(1)
    alone = torch.cat(one_by_one)
    assert torch.equal(here.kernel([chain(runs["at once"], count)], rows(range(count)), reach, 0.0, None), alone)

    table = runs["in a tree"]
    here.kernel([chain(table, 7)], rows(range(7)), reach, 0.0, None)
    table.commit(7)
    # Row 7, then wrong ones (0, 1) beside 8, 9 below 8, wrong ones below both, 10 below 9, 11 below 10.
    order, parents = [0, 8, 1, 9, 2, 10, 11], [-1, -1, 0, 1, 2, 3, 5]
    other = chain(here.sequence(25), 3)
    segments = [other, tree_segment(table, [1], [2] * len(order), parents)]
    new = [torch.cat(sides, dim=2) for sides in zip(here.new_rows(3), rows([7, *order]), strict=True)]
    found = here.kernel(segments, new, reach, 0.0, None)[3:]
    assert torch.equal(found[[0, 2, 4, 6, 7]], alone[7:])


def test_rows_of_no_sequence_are_zero_and_write_nothing() -> None:
    here = world(SHAPES[0], torch.float32)
    table = here.sequence(3)
    before = [stack.clone() for stack in here.pool.stacks]
    found = here.kernel([], here.new_rows(2), Reach(), 0.0, None)
    assert not found.any()
    for earlier, now in zip(before, here.pool.stacks, strict=True):
        assert torch.equal(earlier.nan_to_num(7.0), now.nan_to_num(7.0))
    assert table.length == 3


def test_new_rows_are_written_where_they_belong() -> None:
    here = world(SHAPES[0], torch.bfloat16)
    table = here.sequence(14)
    _, key, value = new = here.new_rows(4)
    here.kernel([tree(table, 1, 3)], new, Reach(), 0.0, None)
    for kept, written in zip(here.pool.layers[0].read(table.slots(14, 18)), (key, value), strict=True):
        assert torch.equal(kept, written[0].transpose(0, 1))
