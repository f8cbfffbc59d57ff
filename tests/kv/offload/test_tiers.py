"""Pages in memory and on disk: what is damaged, cut short or foreign is a miss; nothing is ever read wrong."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch

from specgen.kv.offload import page_files as pagefile
from specgen.kv.offload.page_files import DamagedPage, PageFiles, PageHeader, decode, encode
from specgen.kv.offload.tiers import Kept, PageCopy, Tiers
from specgen.kv.radix_tree import CacheKey
from tests.support.kv_world import KEYS, PAGE, World

HEADER = PageHeader("me", {"tenant": "t"}, "f" * 64, (1, 2, 3, 4))
ROWS = [torch.arange(6.0).reshape(1, 2, 3), torch.tensor([[1, 2]], dtype=torch.uint8)]
TEXT = [0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 0, 0]


def numbered(number: int) -> PageHeader:
    return PageHeader("me", {}, "f" * 64, (number,))


def warm(world: World, ids: list[int] = TEXT) -> None:
    """Compute and publish a text, then push all of it out of the pool."""
    reader = world.admit(KEYS[0], ids)
    assert reader
    world.read(reader, len(ids))
    world.end(reader)
    world.cache.evict(world.pages)
    for stack in world.pool.stacks:
        stack.fill_(float("nan"))
    world.check()


def found(world: World, ids: list[int] = TEXT, key: CacheKey = KEYS[0]) -> int:
    """How many tokens are cached; what they hold is checked."""
    reader = world.admit(key, ids)
    assert reader
    length = reader.table.length
    world.check()
    world.end(reader)
    return length


def test_a_page_comes_back_as_it_was() -> None:
    header, rows = decode(encode(HEADER, ROWS))
    assert header == HEADER
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(rows, ROWS, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn])
def test_a_page_of_any_dtype_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    rows = [torch.randn(3, 4).to(dtype)]
    back = decode(encode(HEADER, rows))[1][0]
    assert back.dtype == dtype
    assert torch.equal(back.view(torch.uint8), rows[0].view(torch.uint8))


def test_any_flipped_bit_shows() -> None:
    raw = encode(HEADER, ROWS)
    for at in range(len(raw)):
        for bit in range(8):
            damaged = bytearray(raw)
            damaged[at] ^= 1 << bit
            with pytest.raises(DamagedPage):
                decode(bytes(damaged))


def test_any_cut_shows() -> None:
    raw = encode(HEADER, ROWS)
    for length in range(len(raw)):
        with pytest.raises(DamagedPage):
            decode(raw[:length])
    with pytest.raises(DamagedPage):
        decode(raw + b"\0")


def test_a_folder_is_found_again_and_leaves_other_files_alone(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    folder = PageFiles(tmp_path)
    foreign = PageHeader("someone else", {}, "f" * 64, (1,))
    assert folder.write(HEADER, ROWS).stored
    assert folder.write(foreign, ROWS).stored
    again = PageFiles(tmp_path)
    assert list(again.headers("me")) == [HEADER]
    assert again.read(HEADER)
    assert len(again) == 2
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"
    assert all(file.stat().st_mode & 0o077 == 0 for file in tmp_path.glob("*.kv.safetensors"))


def test_a_page_under_the_name_of_another_is_a_miss(tmp_path: Path) -> None:
    folder = PageFiles(tmp_path)
    folder.write(numbered(1), ROWS)
    folder.write(numbered(2), ROWS)
    one, two = (tmp_path / f"{numbered(n).name}.kv.safetensors" for n in (1, 2))
    two.write_bytes(one.read_bytes())
    assert folder.read(numbered(2)) is None
    assert folder.read(numbered(1)) is not None
    two.write_bytes(one.read_bytes())
    assert list(PageFiles(tmp_path).headers("me")) == [numbered(1)]


def test_the_least_recently_used_files_make_room(tmp_path: Path) -> None:
    size = len(encode(numbered(0), ROWS))
    folder = PageFiles(tmp_path, 3 * size)
    for number in range(3):
        folder.write(numbered(number), ROWS)
    folder.read(numbered(0))
    assert folder.write(numbered(3), ROWS).dropped == (numbered(1).name,)
    assert folder.bytes == sum(file.stat().st_size for file in tmp_path.iterdir()) == 3 * size
    for second, number in enumerate((3, 2, 0)):
        os.utime(tmp_path / f"{numbered(number).name}.kv.safetensors", (second, second))
    assert [header.ids for header in PageFiles(tmp_path, 2 * size).headers("me")] == [(2,), (0,)]


def test_after_a_failed_write_the_disk_is_left_in_peace_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = PageFiles(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(pagefile, "_private", lambda path, flags: os.open("/dev/full", os.O_WRONLY))
        assert not folder.write(HEADER, ROWS).stored
    assert not folder.write(HEADER, ROWS).stored
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 60)
    assert folder.write(HEADER, ROWS).stored


def test_what_a_killed_writer_left_goes_in_time(tmp_path: Path) -> None:
    PageFiles(tmp_path).write(HEADER, ROWS)
    part = tmp_path / f"{'a' * 64}.{'b' * 16}.part"
    part.write_bytes(b"half a page")
    assert list(PageFiles(tmp_path).headers("me")) == [HEADER]
    assert part.exists(), "another process may be writing it"
    os.utime(part, (1, 1))
    PageFiles(tmp_path)
    assert not part.exists()


@pytest.mark.parametrize("options", [{"host_pages": 8}, {"disk_pages": 100}, {"host_pages": 1, "disk_pages": 100}])
def test_evicted_pages_come_back(options: dict[str, int], tmp_path: Path) -> None:
    world = World(folder=tmp_path if "disk_pages" in options else None, **options)
    warm(world)
    assert world.pool.free_pages == world.pool.pages
    assert found(world) == 3 * PAGE
    assert world.cache.stats.restored_pages == 3
    assert found(world, key=KEYS[1]) == 0
    world.finish()
    assert list(tmp_path.iterdir()) == []


def test_what_a_tier_has_no_room_for_is_computed_again() -> None:
    world = World(host_pages=2)
    warm(world)
    assert found(world) == 2 * PAGE
    world.finish()


def test_pages_come_back_only_where_that_is_quicker() -> None:
    world = World(host_pages=8)
    warm(world)
    assert world.cache.tiers
    world.cache.tiers._host_reads.observe(1.0)
    world.token_seconds = 0.1 / PAGE
    assert found(world) == 0
    # Computed again meanwhile: nothing to compare, so begin anew.
    world.finish()
    warm(world)
    world.token_seconds = 10.0 / PAGE
    assert found(world) == 3 * PAGE
    world.finish()


def test_a_slow_tier_is_passed_over_where_what_stands_behind_it_does_not_make_up_for_it() -> None:
    tiers = Tiers(page_bytes=1, page_tokens=1, host_bytes=9, disk=None, token_seconds=lambda: 1.0)
    tiers._disk_reads.observe(3.0)
    tiers._host_reads.observe(0.1)
    slow, quick = PageCopy(None, name="file"), PageCopy(None, rows=[])
    assert tiers.worthwhile([quick, quick, slow, quick]) == 2
    assert tiers.worthwhile([slow, quick, quick, quick, quick]) == 5
    assert tiers.worthwhile([slow]) == 0
    for _ in range(200):
        tiers.worthwhile([slow])
    assert tiers.worthwhile([slow]) == 1, "it is tried again in the end"


def test_the_next_engine_finds_what_the_last_one_left(tmp_path: Path) -> None:
    first = World(folder=tmp_path, disk_pages=100)
    warm(first)
    second = World(folder=tmp_path, disk_pages=100, numbers=first.numbers, published=first.published)
    assert found(second) == 3 * PAGE
    assert found(second, key=KEYS[1]) == 0


def test_a_damaged_page_ends_the_prefix_and_goes(tmp_path: Path) -> None:
    world = World(folder=tmp_path, disk_pages=100)
    warm(world)
    assert world.cache.tiers
    (middle,) = (file for file in tmp_path.iterdir() if pagefile.read_header(file).ids == tuple(TEXT[PAGE : 2 * PAGE]))
    middle.write_bytes(middle.read_bytes()[:-1] + b"?")
    assert found(world) == PAGE
    assert world.cache.tiers.stats.damaged == 1
    assert not middle.exists()
    world.finish()


def test_a_page_published_again_with_more_ids_stands_for_one_node_only() -> None:
    """Also when another text has the same beginning."""
    world = World()
    first, second = world.admit(KEYS[0], [1, 1]), world.admit(KEYS[0], [1, 1, 0])
    assert first
    assert second
    world.read(first, 2)
    world.read(second, 3)
    first.ids += [0, 1, 1]
    world.read(first, 3)
    world.check()
    world.finish()


def sound(world: World) -> None:
    """The counts alone: what every page of a long text reads as would take too long to say."""
    world.pool.check()
    world.cache.check()


@pytest.fixture
def long() -> World:
    """A text of more pages than Python calls deep, the last half of them pushed out to memory."""
    pages = 2 * sys.getrecursionlimit()
    world = World(pages=pages + 1, host_pages=pages)
    table, ids = world.pool.open(), [n % 7 for n in range(pages * PAGE)]
    table.reserve(len(ids))
    table.commit(len(ids))
    world.cache.retire(KEYS[0], ids, table)
    world.cache.evict(pages // 2)
    assert world.cache.tiers
    assert (world.cache.pages, world.cache.tiers.stats.host_pages) == (pages // 2, pages // 2)
    sound(world)
    return world


def test_a_long_text_in_a_tier_can_be_forgotten(long: World) -> None:
    assert long.cache.tiers
    long.cache.evict(long.pages)
    assert long.cache.tiers.stats.host_pages == long.pages - 1
    long.cache.clear()
    sound(long)
    assert (long.cache.pages, long.cache.tiers.stats.host_pages) == (0, 0)
    assert list(long.cache.nodes()) == []


def test_a_long_text_goes_with_the_page_before_it_that_no_tier_takes(
    long: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is kept of it stands behind that page."""
    assert long.cache.tiers
    monkeypatch.setattr(long.cache.tiers, "keep", lambda rows, header: Kept(None))
    table, left = long.pool.open(), long.cache.pages
    table.reserve((long.pool.free_pages + 1) * PAGE)
    sound(long)
    assert (long.cache.pages, long.cache.tiers.stats.host_pages) == (left - 1, 0)
    table.release()
    sound(long)
