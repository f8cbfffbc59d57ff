"""Which keys a row of a tree sees, as every backend is told: mask, rows alone, the CPU kernel's plan, the GPU's."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from specgen.kv.formats import LayerShape
from specgen.kv.pool import BlockTable, KVPool
from specgen.model.attention.cpu_plan import plan
from specgen.model.attention.gpu_plan import _straight
from specgen.model.attention.masks import first_key, segment_mask, visible_keys
from specgen.model.attention.reach import EVERYTHING, Reach
from specgen.model.attention.rowwise import VisibleKeys, row_by_row, visible_in_chain
from specgen.model.segment import Segment, ancestors, tree_segment

REACHES = (EVERYTHING, Reach(window=1), Reach(window=4), Reach(chunk=4))


@pytest.fixture
def table() -> BlockTable:
    """A sequence with seven committed tokens."""
    pool = KVPool([LayerShape(1, 4, 4)], 8, dtype=torch.float32, device=torch.device("cpu"))
    table = pool.open()
    table.reserve(96)
    table.commit(7)
    return table


def test_rows_of_a_chain_see_all_before_them_within_their_reach() -> None:
    assert visible_in_chain(0, 5, [0, 0]) == [VisibleKeys(0, 4), VisibleKeys(0, 5)]
    assert visible_in_chain(2, 7, [1, 3, 4]) == [VisibleKeys(0, 3), VisibleKeys(1, 4), VisibleKeys(2, 5)]


def test_rows_of_a_tree_see_a_run_of_the_prefix_and_their_ancestors(table: BlockTable) -> None:
    segment = Segment(table, (1, 2, 3, 4), (7, 8, 8, 7), (-1, 0, 0, -1))
    found = visible_keys(segment, 5, Reach(window=3))
    assert [(row.first, row.stop) for row in found] == [(0, 3), (1, 4), (1, 4), (0, 3)]
    assert [row.tail.tolist() for row in found if row.tail is not None] == [[0], [0, 1], [0, 2], [3]]


def test_rows_in_place_are_read_where_they_lie(table: BlockTable) -> None:
    segment = Segment(table, (1, 2), (7, 8), (-1, 0))
    assert visible_keys(segment, 0, EVERYTHING) == [VisibleKeys(0, 8), VisibleKeys(0, 9)]


def test_rows_of_a_later_forward_see_those_of_earlier_ones(table: BlockTable) -> None:
    segment = Segment(table, (3, 4), (7, 8, 9, 8), (-1, 0, 1, 0))
    assert visible_keys(segment, 0, EVERYTHING)[1].tail is not None
    mask = segment_mask(segment, 0, EVERYTHING)
    assert mask is not None
    assert mask[:, 7:].int().tolist() == [[1, 1, 1, 0], [1, 0, 0, 1]]


@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("seed", range(12))
def test_every_backend_is_told_the_same(table: BlockTable, reach: Reach, seed: int) -> None:
    """Random trees, some of whose rows came in an earlier forward."""
    draw = random.Random(seed)
    nodes = draw.randrange(1, 20)
    segment = tree_segment(
        table, [1] * draw.randrange(1, 4), [2] * nodes, [draw.randrange(-1, n) for n in range(nodes)]
    )
    late = draw.randrange(1, segment.tail + 1)
    segment = Segment(table, segment.tokens[-late:], segment.positions, segment.parents)
    start, prefix = first_key(segment, reach), table.length

    mask = segment_mask(segment, start, reach)
    seen = (
        [list(range(start, segment.end))] if mask is None else [(row.nonzero()[:, 0] + start).tolist() for row in mask]
    )

    alone = []
    for row in visible_keys(segment, start, reach):
        if row.tail is None:
            alone.append([*range(start + row.first, start + row.stop)])
        else:
            alone.append([*range(start + row.first, prefix), *(row.tail + prefix).tolist()])
    assert alone == seen

    parents = list(range(-1, segment.tail - 1)) if segment.parents is None else segment.parents
    positions = [*range(prefix), *segment.positions]
    paths = [[*range(prefix), *(prefix + row for row in path)] for path in ancestors(parents)[-late:]]
    oldest = [reach.oldest(position) for position in segment.new_positions]
    assert [[k for k in path if positions[k] >= first] for path, first in zip(paths, oldest, strict=True)] == seen

    straight, listed = (side[-late:] for side in _straight(parents))
    assert [[*range(n), *rest] for n, rest in zip(straight, listed, strict=True)] == ancestors(parents)[-late:]

    numbers = plan([segment]).tolist()
    starts = numbers[6]
    assert (starts == -1) == (segment.parents is None)
    if starts >= 0:
        edges = numbers[starts : starts + late + 1]
        assert [numbers[a:b] for a, b in pairwise(edges)] == ancestors(parents)[-late:]


def test_each_row_attends_over_its_own_keys() -> None:
    query, key, value = torch.randn(2, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    calls = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        calls.append((q.clone(), k.clone(), v.clone()))
        return q

    seen = [VisibleKeys(1, 4, torch.tensor([1])), VisibleKeys(0, 5, torch.tensor([0, 1]))]
    row_by_row(attend, query, key, value, seen, prefix=3)
    (_, first, _), (q, second, v) = calls
    assert torch.equal(first.transpose(0, 1), key[[1, 2, 4]])
    assert torch.equal(second.transpose(0, 1), key)
    assert torch.equal(v.transpose(0, 1), value)
    assert torch.equal(q[:, 0], query[1])
