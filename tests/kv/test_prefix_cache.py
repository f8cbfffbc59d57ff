"""The prefix cache against a dictionary: whatever happens in whatever order, every token reads as what it is."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from specgen.kv.offload import page_files as pagefile
from specgen.kv.radix_tree import CacheKey
from tests.support.kv_world import KEYS, PAGE, World

# Few tokens, so that texts begin alike; long enough for several pages.
IDS = st.lists(st.integers(0, 1), min_size=1, max_size=6)
KEY = st.one_of(st.sampled_from(KEYS[:2]), st.sampled_from(KEYS))
COMMON = [0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 0, 0, 1, 0, 1, 0]
SHARED = st.integers(0, len(COMMON))
PICK = st.integers(0, 1000)


class CacheMachine(RuleBasedStateMachine):
    """Random traffic over a pool that is too small for it."""

    options: dict[str, Any] = {}  # noqa: RUF012 -- of this test's own subclasses
    on_disk = False

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp()) if self.on_disk else None
        self.world = World(folder=self.folder, **self.options)

    @rule(key=KEY, ids=IDS, shared=SHARED)
    def admit(self, key: CacheKey, ids: list[int], shared: int) -> None:
        self.world.admit(key, [*COMMON[:shared], *ids])

    @rule(key=KEY, ids=IDS, shared=SHARED)
    def serve(self, key: CacheKey, ids: list[int], shared: int) -> None:
        """Much traffic in few steps."""
        if reader := self.world.admit(key, [*COMMON[:shared], *ids]):
            self.world.read(reader, len(reader.ids))
            self.world.check()
            self.world.end(reader)

    @rule(key=KEY, ids=IDS, shared=SHARED)
    def match_and_release(self, key: CacheKey, ids: list[int], shared: int) -> None:
        self.world.look_up(key, [*COMMON[:shared], *ids])

    @rule(pick=PICK, ids=IDS)
    def next_turn(self, pick: int, ids: list[int]) -> None:
        if self.world.readers:
            reader = self.world.readers[pick % len(self.world.readers)]
            self.world.end(reader)
            self.world.admit(reader.key, [*reader.ids[:30], *ids])

    @rule(pick=PICK, count=st.integers(1, 12))
    def read(self, pick: int, count: int) -> None:
        if self.world.readers:
            self.world.read(self.world.readers[pick % len(self.world.readers)], count)

    @rule(pick=PICK, tokens=st.lists(st.integers(0, 1), max_size=4), wrong=st.integers(0, 2))
    def decode(self, pick: int, tokens: list[int], wrong: int) -> None:
        if self.world.readers:
            self.world.decode(self.world.readers[pick % len(self.world.readers)], tokens, wrong)

    @rule(pick=PICK)
    def finish_or_cancel(self, pick: int) -> None:
        if self.world.readers:
            self.world.end(self.world.readers[pick % len(self.world.readers)])

    @rule(pick=PICK)
    def preempt(self, pick: int) -> None:
        if self.world.readers:
            self.world.preempt(self.world.readers[pick % len(self.world.readers)])

    @rule(key=KEY, ids=IDS, shared=SHARED)
    def pin(self, key: CacheKey, ids: list[int], shared: int) -> None:
        self.world.pin(key, [*COMMON[:shared], *ids])

    @rule(pick=PICK)
    def unpin(self, pick: int) -> None:
        if self.world.pins:
            self.world.unpin(pick)

    @rule(pages=st.integers(1, 14))
    def yield_pins(self, pages: int) -> None:
        self.world.cache.yield_pins(pages)

    @rule(count=st.integers(1, 14))
    def evict(self, count: int) -> None:
        before, idle = self.world.pool.free_pages, self.world.pool.idle_pages
        self.world.cache.evict(count)
        assert self.world.pool.free_pages == before + min(count, idle)

    @rule(often=st.integers(0, 5))
    def clear(self, often: int) -> None:
        if not often:
            self.world.clear()

    @invariant()
    def all_is_well(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.finish()
            if self.folder:
                shutil.rmtree(self.folder)


class DiskMachine(CacheMachine):
    """The same with files that are damaged now and then."""

    on_disk = True

    def _file(self, pick: int) -> Path | None:
        files = sorted(self.folder.iterdir()) if self.folder else []
        return files[pick % len(files)] if files else None

    @rule(pick=PICK, at=PICK, kind=st.sampled_from(("flip", "cut", "delete", "swap")))
    def damage(self, pick: int, at: int, kind: str) -> None:
        if not (file := self._file(pick)):
            return
        raw = bytearray(file.read_bytes())
        if kind == "flip":
            raw[at * 7919 % len(raw)] ^= 1 << at % 8
            file.write_bytes(raw)
        elif kind == "cut":
            file.write_bytes(raw[: at % len(raw)])
        elif kind == "swap" and (other := self._file(at)):
            file.write_bytes(other.read_bytes())
            other.write_bytes(raw)
        else:
            file.unlink()

    @rule()
    def reopen(self) -> None:
        """Another engine finds what this one left."""
        world = self.world
        for reader in list(world.readers):
            world.end(reader)
        while world.pins:
            world.unpin(0)
        world.check()
        self.world = World(folder=self.folder, **self.options, numbers=world.numbers, published=world.published)


def machine(name: str, base: type[CacheMachine], **options: Any) -> Any:
    kind = type(name, (base,), {"options": options})
    few = settings(
        max_examples=20,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    kind.TestCase.settings = few  # type: ignore[attr-defined]
    return kind.TestCase  # type: ignore[attr-defined]


TestPoolAlone = machine("PoolAlone", CacheMachine)
TestLargePool = machine("LargePool", CacheMachine, pages=200)
TestFewPagesForTheCache = machine("FewPagesForTheCache", CacheMachine, max_pages=5)
TestHost = machine("Host", CacheMachine, host_pages=6)
TestHostNeverWorthIt = machine("HostNeverWorthIt", CacheMachine, host_pages=6, token_seconds=0.0)
TestDisk = machine("Disk", DiskMachine, disk_pages=8)
TestHostAndDisk = machine("HostAndDisk", DiskMachine, host_pages=3, disk_pages=8)


class SameHash(int):
    """An id whose hash says nothing."""

    def __hash__(self) -> int:
        return 7


def trace(id_type: type[int], seed: int, **options: Any) -> list[tuple[int, ...]]:
    """What a random run sees of the cache."""
    rng = random.Random(seed)
    world = World(**(options or {"host_pages": 4}))
    seen = []
    for _ in range(150):
        ids = [id_type(token) for token in [*COMMON[: rng.randint(0, 17)], *rng.choices((0, 1), k=rng.randint(1, 9))]]
        if rng.random() < 0.4 and (reader := world.admit(rng.choice(KEYS), ids)):
            seen.append((reader.table.length, *reader.table.pages))
        elif world.readers:
            reader = rng.choice(world.readers)
            action = rng.choice(
                (world.end, world.preempt, lambda r: world.read(r, 7), lambda r: world.decode(r, [1], 1))
            )
            action(reader)
        world.check()
    world.finish()
    return seen


@pytest.mark.parametrize("seed", range(3))
def test_with_a_constant_for_a_hash_nothing_changes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trace(int, seed)
    assert any(length for length, *_ in expected)
    monkeypatch.setattr(CacheKey, "__hash__", lambda self: 7)
    assert trace(SameHash, seed) == expected


@pytest.mark.parametrize("seed", range(3))
def test_with_a_constant_for_a_digest_files_are_missed_and_never_mistaken(
    seed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All pages want one file's name: what they read is checked after every step."""
    found = trace(int, seed, folder=tmp_path / "true", disk_pages=100)
    assert found == trace(int, seed, host_pages=100), "files that are found by their digests are as good as memory"
    monkeypatch.setattr(pagefile, "_digest", lambda text: "7" * 64)
    trace(int, seed, folder=tmp_path / "constant", disk_pages=100)
    world = World(folder=tmp_path / "true", disk_pages=100)
    assert world.admit(KEYS[0], COMMON)
    world.finish()


@pytest.mark.parametrize("mine", KEYS)
@pytest.mark.parametrize("other", KEYS)
@pytest.mark.parametrize("store", ["pool", "memory", "disk", "another's disk"])
def test_only_the_same_key_hits(mine: CacheKey, other: CacheKey, store: str, tmp_path: Path) -> None:
    """Both ways round: every pair of keys stands here twice."""
    options: dict[str, Any] = {"host_pages": 9} if store == "memory" else {}
    if "disk" in store:
        options = {"folder": tmp_path, "disk_pages": 100}
    world = World(**options)
    first = world.admit(mine, COMMON)
    assert first
    world.read(first, len(COMMON))
    world.end(first)
    if store != "pool":
        world.cache.evict(world.pages)
    if store == "another's disk":
        world = World(**options, numbers=world.numbers, published=world.published)
    second = world.admit(other, COMMON)
    assert second
    whole = len(COMMON) - 1
    assert second.table.length == ((whole if store == "pool" else whole // PAGE * PAGE) if mine == other else 0)
    world.check()


def test_a_partly_filled_page_is_copied_while_its_writer_goes_on_and_taken_over_afterwards() -> None:
    world = World()
    first = world.admit(KEYS[0], COMMON[:6])
    assert first
    world.read(first, 6)
    second = world.admit(KEYS[0], COMMON[:8])
    assert second
    assert second.table.length == 6
    assert first.table.pages[0] == second.table.pages[0]
    assert first.table.pages[1] != second.table.pages[1]
    page = first.table.pages[1]
    world.end(first)
    world.end(second)
    third = world.admit(KEYS[0], COMMON[:9])
    assert third
    assert third.table.length == 6
    assert third.table.pages[1] == page
    world.check()


def test_the_least_recently_used_goes_first_and_ends_before_beginnings() -> None:
    world = World(pages=12)
    texts = [[n] * 8 + [5] for n in range(3)]
    for text in texts:
        reader = world.admit(KEYS[0], text)
        assert reader
        world.read(reader, 8)
        world.end(reader)
    used = world.admit(KEYS[0], texts[0])
    assert used
    world.end(used)
    world.cache.evict(3)
    assert [world.cache.length(KEYS[0], text) for text in texts] == [8, 0, 4]


def test_pinned_pages_stay_and_go_only_where_nobody_could_run_otherwise() -> None:
    world = World(pages=4)
    reader = world.admit(KEYS[0], COMMON[:9])
    assert reader
    world.read(reader, 8)
    world.end(reader)
    world.pin(KEYS[0], COMMON[:9])
    assert world.pins[0].tokens == 8
    world.cache.evict(4)
    assert world.cache.length(KEYS[0], COMMON[:9]) == 8
    assert not world.pool.has(3)
    assert world.cache.yield_pins(3)
    assert world.pins[0].tokens == 0
    world.unpin(0)
    world.check()


def test_finding_a_page_to_evict_does_not_walk_the_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(pages=12)
    monkeypatch.setattr(world.cache, "nodes", lambda: pytest.fail("the tree is walked"))
    for n in range(40):
        reader = world.admit(KEYS[0], [n % 7, n % 3, *COMMON[: n % 11]])
        assert reader
        world.read(reader, 20)
        world.end(reader)
    assert world.cache.stats.evicted_pages
    assert len(world.cache._queue) <= 2 * world.cache.pages + 64


def test_pages_given_back_twice_are_an_error() -> None:
    world = World()
    (page,) = world.pool.take(1)
    world.pool.drop([page])
    with pytest.raises(RuntimeError, match=f"page {page} is given back though nobody refers to it"):
        world.pool.drop([page])
