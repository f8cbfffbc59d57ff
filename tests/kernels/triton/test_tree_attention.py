"""The GPU kernel for attention over the paged pool, against its reference in float64.

Without a GPU Triton's interpreter runs it. Which cases catch what: groups that do not divide a tile, heads narrower
than a tile and of no power of two (tails of tiles); one row and 64, nothing committed and more than one span (both
ends of every loop); pages of other sizes; every way to see less; every KV format. All memory that nobody wrote is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from specgen.kv.formats import FORMATS, LayerShape
from specgen.kv.pool import BlockTable
from specgen.model.attention.reach import Reach
from specgen.model.segment import Segment, tree_segment
from tests.support.attention import REACHES, SCALE, World, chain, later, tree

pytest.importorskip("triton")

from specgen.kernels.triton.kv_splits import start_of, starts
from specgen.kernels.triton.tree_attention import ITEM, Tile, WorkItems, tree_attention
from specgen.model.attention.gpu_plan import Places, SplitPlan, SplitPolicy, cut

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TILE = Tile(lanes=16, keys=64, warps=4, stages=3)
NEAR = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# The reference rounds what codes stand for to bfloat16, the kernel does not.
NEAR_BY_CODES = {torch.float32: 2e-5, torch.bfloat16: 5e-2}
# Heads, heads that share a key, key and value numbers: a group that does not divide a tile; Llama's; odd numbers; a
# group wider than half a tile; single numbers; wide heads.
SHAPES = ((6, 2, 64, 64), (8, 2, 128, 128), (4, 2, 40, 24), (14, 1, 32, 80), (3, 1, 5, 3), (2, 1, 256, 192))
ALONE = SplitPolicy(tile_rows=4, programs=0, partials=0)
SPLIT = SplitPolicy(tile_rows=4, programs=64, partials=4096)
BY_PATH = replace(SPLIT, batch_invariant=True)

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class GpuWorld(World):
    cut: SplitPolicy = SPLIT
    device: torch.device = DEVICE
    split_plan: list[SplitPlan] = field(default_factory=list)

    def work(self, segments: Sequence[Segment], reach: Reach, rows: int) -> WorkItems:
        places = Places()
        how = replace(self.cut, tile_rows=TILE.lanes // (self.heads // self.shape.kv_heads))
        found = cut(segments, reach, how, places, rows)
        assert len(found.items) <= how.most_items(rows)
        self.split_plan.append(found)
        numbers = torch.tensor([*places.numbers, 0], dtype=torch.int32)
        items, table = (torch.from_numpy(side) for side in (found.items, found.rows))
        return WorkItems(*(t.to(DEVICE) for t in (items, table, numbers)), found.partials, self.page_size)

    def kernel(
        self,
        segments: Sequence[Segment],
        new: Sequence[Tensor],
        reach: Reach = REACHES[0],
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        query, key, value = (side[0].transpose(0, 1) for side in new)
        row = 0
        for segment in segments:
            count = len(segment.tokens)
            slots = segment.table.slots(segment.end - count, segment.end)
            self.store.write(slots, key[row : row + count], value[row : row + count])
            row += count
        kept = self.store.kernel_planes
        assert kept is not None
        options = {"scale": SCALE, "softcap": softcap or None, "sinks": sinks, "tile": TILE}
        return tree_attention(query, kept, self.work(segments, reach, len(query)), **options)


def world(
    sizes: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, kind: str = "native", **options: object
) -> GpuWorld:
    heads, kv_heads, key_dim, value_dim = sizes
    return GpuWorld(heads, LayerShape(kv_heads, key_dim, value_dim), dtype, FORMATS[kind](), **options)  # type: ignore[arg-type]


def several(here: GpuWorld) -> list[Segment]:
    """Every kind of segment: rows without a past, one row, a tree, a prompt's part, rows of a second forward."""
    earlier = here.sequence(20)
    here.kernel([tree(earlier, 1, 4)], here.new_rows(5))
    return [
        chain(here.sequence(0), 1),
        chain(here.sequence(37), 1),
        tree(here.sequence(30), 2, 7),
        chain(here.sequence(5), 11),
        later(earlier),
    ]


def check(
    here: GpuWorld, segments: Sequence[Segment], reach: Reach = REACHES[0], softcap: float = 0.0, *, sinks: bool = False
) -> None:
    given = torch.linspace(-1, 1, here.heads, device=DEVICE) if sinks else None
    new = here.new_rows(sum(len(segment.tokens) for segment in segments))
    found = here.kernel(segments, new, reach, softcap, given)
    exact = here.reference(segments, new[0], reach, softcap, given)
    assert found.dtype == here.dtype
    near = NEAR if here.kind.lossless else NEAR_BY_CODES
    assert (found.double() - exact).abs().max() <= near[here.dtype]


@pytest.mark.parametrize("how", [ALONE, SPLIT, BY_PATH], ids=["alone", "split", "by path"])
@pytest.mark.parametrize("reach", REACHES, ids=str)
def test_every_row_sees_its_own_path(reach: Reach, how: SplitPolicy) -> None:
    here = world(SHAPES[0], cut=how)
    check(here, several(here), reach)


def slow(*values: object) -> list[object]:
    """Cases that only `make test-all` runs."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *slow(torch.bfloat16, torch.float16)], ids=str)
def test_heads_of_every_size(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    here = world(sizes, dtype)
    check(here, [chain(here.sequence(9), 2), tree(here.sequence(33), 1, 3)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("sizes", [(4, 2, 40, 24), *slow(SHAPES[1])], ids=str)
def test_every_format(sizes: tuple[int, int, int, int], kind: str, dtype: torch.dtype) -> None:
    here = world(sizes, dtype, kind)
    check(here, [chain(here.sequence(9), 2), tree(here.sequence(33), 1, 3)], softcap=5.0, sinks=True)


@pytest.mark.parametrize(("softcap", "sinks"), [(5.0, False), (0.0, True), (5.0, True)])
@pytest.mark.parametrize("how", [ALONE, SPLIT], ids=["alone", "split"])
def test_soft_caps_and_sinks(softcap: float, sinks: bool, how: SplitPolicy) -> None:
    here = world(SHAPES[2], cut=how)
    check(here, several(here), Reach(window=9), softcap, sinks=sinks)


@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_pages_of_any_size(size: int) -> None:
    here = world(SHAPES[2], page_size=size, pages=1024 // size)
    check(here, [chain(here.sequence(9), 2), tree(here.sequence(33), 1, 3)])


@pytest.mark.parametrize("rows", [1, *slow(2, 63), 64])
@pytest.mark.parametrize("committed", [0, *slow(1, 31), 32])
def test_trees_of_any_size(rows: int, committed: int) -> None:
    here = world(SHAPES[2])
    check(here, [tree(here.sequence(committed), 1, rows - 1)])


@pytest.mark.parametrize("count", [1, 2, 9])
def test_many_sequences(count: int) -> None:
    here = world(SHAPES[2], pages=128)
    check(here, [tree(here.sequence(7 * n, room=16), 1, n) for n in range(count)])


@pytest.mark.parametrize("how", [ALONE, SPLIT, BY_PATH], ids=["alone", "split", "by path"])
def test_contexts_longer_than_a_span(how: SplitPolicy) -> None:
    here = world(SHAPES[2], cut=how, pages=128)
    check(here, [chain(here.sequence(601), 2), tree(here.sequence(510), 1, 5), chain(here.sequence(255), 3)])
    (found,) = here.split_plan
    assert bool(found.partials) == (how is not ALONE)
    assert found.items[:, 9].max() >= 1
    assert (found.items[:, 10] == 1).all() == (how is ALONE)


def test_every_kind_of_item_is_cut() -> None:
    """That rows which see ancestors by bits, by path and through pages alone all ran above, and both ways to finish."""
    fields = {name: ITEM.index(name) for name in ITEM}
    kinds = {}
    for name, how in {"alone": ALONE, "split": SPLIT, "by path": BY_PATH}.items():
        here = world(SHAPES[0], cut=how)
        here.work([*several(here), chain(here.sequence(300), 1)], REACHES[0], 40)
        items = here.split_plan[-1].items
        never = items[:, fields["path_start"]].max()
        kinds[name] = {
            "bits": bool((items[:, fields["shared"]] < never).any()),
            "path": bool((items[:, fields["path_start"]] < never).any()),
            "whole": bool(items[:, fields["whole"]].any()),
            "spans": bool((items[:, fields["whole"]] == 0).any()),
        }
    assert kinds == {
        "alone": {"bits": True, "path": False, "whole": True, "spans": False},
        "split": {"bits": True, "path": False, "whole": True, "spans": True},
        "by path": {"bits": False, "path": True, "whole": True, "spans": True},
    }


def test_spans_begin_alike_on_host_and_device() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(output: tl.tensor, COUNT: tl.constexpr) -> None:
        span = tl.arange(0, COUNT)
        tl.store(output + span, start_of(span))

    found = torch.empty(128, dtype=torch.int32, device=DEVICE)
    kernel[(1,)](found, 128)
    edges = starts(100_000)
    assert edges[:18].tolist() == [256 * n for n in range(17)] + [16 * 256 + 512]
    assert found[: len(edges)].tolist() == edges.tolist()


def test_rows_of_no_sequence_are_zero() -> None:
    here = world(SHAPES[0])
    query, *_ = here.new_rows(9)
    kept = here.store.kernel_planes
    assert kept is not None
    work = here.work([chain(here.sequence(3), 2)], Reach(), 9)
    found = tree_attention(query[0].transpose(0, 1), kept, work, scale=SCALE, tile=TILE)
    assert not found[2:].any()


def test_an_ancestor_too_far_behind_is_an_error() -> None:
    here = world(SHAPES[2], pages=128)
    table = here.sequence(3, room=128)
    wide = tree_segment(table, [1], [2] * 70, [-1] * 69 + [0])
    with pytest.raises(ValueError, match="row 65 has an ancestor more than 64 rows behind"):
        here.work([wide], Reach(), 71)


@pytest.mark.parametrize("kind", ["native", *slow("int4")])
@pytest.mark.parametrize("reach", [Reach(), *slow(Reach(window=7))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *slow(torch.bfloat16)], ids=str)
def test_a_row_has_the_same_bits_in_any_company(reach: Reach, kind: str, dtype: torch.dtype) -> None:
    """Rows of one text: read one by one, at once, and in a tree among others and beside another sequence."""
    here = world(SHAPES[0], dtype, kind, cut=BY_PATH, pages=256)
    count, prefix = 10, 250
    new = here.new_rows(count)

    def rows(index: Sequence[int]) -> list[Tensor]:
        return [side[:, :, list(index)] for side in new]

    def fresh() -> BlockTable:
        here.generator.manual_seed(1)
        return here.sequence(prefix)

    table = fresh()
    one_by_one = []
    for row in range(count):
        one_by_one.append(here.kernel([chain(table, 1)], rows([row]), reach))
        table.commit(1)
    alone = torch.cat(one_by_one)
    assert here.split_plan[-1].partials or reach.window
    for how in (ALONE, SPLIT):
        here.cut = how
        assert torch.equal(here.kernel([chain(fresh(), count)], rows(range(count)), reach), alone)
    here.cut = BY_PATH
    table = fresh()
    here.kernel([chain(table, 4)], rows(range(4)), reach)
    table.commit(4)
    # Row 4, then wrong ones (0, 1) beside 5, 6 below 5, wrong ones below both, 7 below 6, 8 below 7.
    order, parents = [0, 5, 1, 6, 2, 7, 8], [-1, -1, 0, 1, 2, 3, 5]
    other = chain(here.sequence(25), 3)
    segments = [other, tree_segment(table, [1], [2] * len(order), parents)]
    mixed = [torch.cat(sides, dim=2) for sides in zip(here.new_rows(3), rows([4, *order]), strict=True)]
    found = here.kernel(segments, mixed, reach)[3:]
    assert torch.equal(found[[0, 2, 4, 6, 7]], alone[4:9])
