"""Sequences over a pool and a prefix cache, beside a dictionary of what the KV of every token must read as."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from specgen.kv.formats import LayerShape
from specgen.kv.lease import Pin
from specgen.kv.offload.page_files import PageFiles
from specgen.kv.offload.page_names import PageNames
from specgen.kv.offload.persistence import PrefixStore
from specgen.kv.offload.tiers import Tiers
from specgen.kv.pool import BlockTable, KVPool
from specgen.kv.prefix_cache import PrefixCache
from specgen.kv.radix_tree import CacheKey

PAGE = 4
KEYS = (
    CacheKey(),
    CacheKey(tenant="a"),
    CacheKey(adapter="a"),
    CacheKey(adapter="a", revision="2"),
    CacheKey(kv_format="int8"),
    CacheKey(model="other"),
)
GARBAGE = -1.0


@dataclass(eq=False)
class Reader:
    """A sequence: `ids` are committed, the KV of the first `table.length` of them is written."""

    key: CacheKey
    ids: list[int]
    table: BlockTable


@dataclass
class World:
    """A pool of `pages` pages. A token's KV is a number that only its key and all ids up to it decide."""

    pages: int = 12
    max_pages: int | None = None
    host_pages: int = 0
    folder: Path | None = None
    disk_pages: int = 0
    token_seconds: float = 1e6
    numbers: dict[tuple[CacheKey, tuple[int, ...]], float] = field(default_factory=dict)
    published: set[tuple[CacheKey, tuple[int, ...]]] = field(default_factory=set)
    certain: set[tuple[CacheKey, tuple[int, ...]]] = field(default_factory=set)
    readers: list[Reader] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)

    def __post_init__(self) -> None:
        shapes = [LayerShape(1, 1, 1), LayerShape(2, 1, 3)]
        self.pool = KVPool(shapes, self.pages, dtype=torch.float64, device=torch.device("cpu"), page_size=PAGE)
        tiers = self._tiers() if self.host_pages or self.folder else None
        names = PageNames("test") if self.folder else None
        self.cache = PrefixCache(self.pool, max_pages=self.max_pages, tiers=tiers, names=names)
        if tiers is not None and tiers.disk is not None and names is not None:
            PrefixStore(self.cache, names).attach(tiers.disk)

    def _tiers(self) -> Tiers:
        size = self.pool.bytes_per_token * PAGE
        disk = PageFiles(self.folder, self.disk_pages * 2048) if self.folder else None
        return Tiers(
            page_bytes=size,
            page_tokens=PAGE,
            host_bytes=self.host_pages * size,
            disk=disk,
            token_seconds=lambda: self.token_seconds,
        )

    def number(self, key: CacheKey, ids: Sequence[int]) -> float:
        """What the KV of the last of `ids` reads as."""
        return self.numbers.setdefault((key, tuple(ids)), float(len(self.numbers)))

    def admit(self, key: CacheKey, ids: Sequence[int]) -> Reader | None:
        """A new sequence on its longest cached prefix, if it fits; what `has` promised must hold."""
        reader = Reader(key, list(ids), self.pool.open())
        if self.resume(reader):
            self.readers.append(reader)
            return reader
        reader.table.release()
        return None

    def resume(self, reader: Reader) -> bool:
        key, ids = reader.key, reader.ids
        if not self.pool.has(self.cache.missing_pages(key, ids, len(ids) + 1)):
            return False
        least = max(
            (n for n in range(0, len(ids), PAGE) if (key, tuple(ids[:n])) in self.certain and self._sure()), default=0
        )
        lease = self.cache.match(key, ids)
        assert lease.tokens < len(ids)
        assert least <= lease.tokens
        assert lease.tokens == 0 or (key, tuple(ids[: lease.tokens])) in self.published
        reader.table.adopt(lease.pages, lease.tokens)
        reader.table.reserve(len(ids) + 1)
        return True

    def look_up(self, key: CacheKey, ids: Sequence[int]) -> None:
        """A match whose pages nobody adopts."""
        lease = self.cache.match(key, ids)
        assert lease.tokens == 0 or (key, tuple(ids[: lease.tokens])) in self.published
        lease.release()

    def _sure(self) -> bool:
        return not self.cache.stats.evicted_pages

    def read(self, reader: Reader, count: int) -> None:
        """Compute the next pending tokens, as a chunk of a prompt, and publish."""
        count = min(count, len(reader.ids) - reader.table.length)
        if not self._reserve(reader, reader.table.length + count):
            return
        for place in range(reader.table.length, reader.table.length + count):
            self._write(reader, place, self.number(reader.key, reader.ids[: place + 1]))
        reader.table.commit(count)
        tail = reader.table.length == len(reader.ids)
        self.cache.publish(reader.key, reader.ids, reader.table, tail=tail)
        self._note(reader, whole=not tail)

    def decode(self, reader: Reader, tokens: Sequence[int], wrong: int) -> None:
        """A step of one pending token and a tree: `wrong` rejected rows before each row that is accepted."""
        table, start = reader.table, reader.table.length
        if len(reader.ids) - start != 1 or not self._reserve(reader, start + 1 + (wrong + 1) * len(tokens)):
            return
        self._write(reader, start, self.number(reader.key, reader.ids))
        accepted = []
        offset = 1
        for count in range(1, len(tokens) + 1):
            for _ in range(wrong):
                self._write(reader, start + offset, GARBAGE)
                offset += 1
            self._write(reader, start + offset, self.number(reader.key, [*reader.ids, *tokens[:count]]))
            accepted.append(offset)
            offset += 1
        table.commit(1, accepted)
        reader.ids += [*tokens, 0]

    def end(self, reader: Reader) -> None:
        """Finished or cancelled."""
        self.readers.remove(reader)
        self._note(reader, whole=False)
        self.certain.update((reader.key, tuple(reader.ids[:n])) for n in range(0, reader.table.length + 1, PAGE))
        self.cache.retire(reader.key, reader.ids, reader.table)

    def preempt(self, reader: Reader) -> None:
        """Its pages go, and it begins again if there is room; else it ends."""
        self.end(reader)
        reader.table = self.pool.open()
        if self.resume(reader):
            self.readers.append(reader)
        else:
            reader.table.release()

    def pin(self, key: CacheKey, ids: Sequence[int]) -> None:
        pin = self.cache.pin(key, ids)
        self.pins.append(pin)
        assert pin.tokens == 0 or (key, tuple(ids[: pin.tokens])) in self.published

    def unpin(self, index: int) -> None:
        self.pins.pop(index % len(self.pins)).release()

    def clear(self) -> None:
        self.cache.clear()
        self.certain.clear()

    def check(self) -> None:
        """All counts are right, and what everyone may read is what it must be."""
        self.pool.check()
        self.cache.check()
        for reader in self.readers:
            self._compare(reader.table.slots(0, reader.table.length), reader.key, reader.ids)
        for node in self.cache.nodes():
            ids: list[int] = []
            above = node
            while above.parent is not None:
                ids = [*above.ids, *ids]
                above = above.parent
            if node.page is not None:
                start = len(ids) - len(node.ids)
                slots = torch.arange(node.page * PAGE, node.page * PAGE + len(node.ids))
                self._compare(slots, node.key, ids, start)
            assert (node.key, tuple(ids)) in self.published
        # Each idle page can be given up: nothing that counts as free in `has` is kept back by something else.
        assert self.pool.has(self.pool.free_pages + self.pool.idle_pages)

    def finish(self) -> None:
        """Everything ends: no page is left in use."""
        for reader in list(self.readers):
            self.end(reader)
        while self.pins:
            self.unpin(0)
        self.check()
        assert self.pool.free_pages + self.pool.idle_pages == self.pool.pages
        self.clear()
        self.check()
        assert self.pool.free_pages == self.pool.pages
        assert not list(self.cache.nodes())

    def _reserve(self, reader: Reader, tokens: int) -> bool:
        if not self.pool.has(reader.table.missing_pages(tokens)):
            return False
        reader.table.reserve(tokens)
        return True

    def _write(self, reader: Reader, place: int, number: float) -> None:
        slots = reader.table.slots(place, place + 1)
        for shape, store in zip(self.pool.shapes, self.pool.layers, strict=True):
            key, value = (torch.full((1, shape.kv_heads, d), number) for d in (shape.key_dim, shape.value_dim))
            store.write(slots, key.double(), -value.double())

    def _compare(self, slots: torch.Tensor, key: CacheKey, ids: Sequence[int], start: int = 0) -> None:
        numbers = [self.numbers[key, tuple(ids[: place + 1])] for place in range(start, start + len(slots))]
        expected = torch.tensor(numbers, dtype=torch.float64)[:, None, None]
        for store in self.pool.layers:
            keys, values = store.read(slots)
            assert torch.equal(keys, expected.expand_as(keys))
            assert torch.equal(values, -expected.expand_as(values))

    def _note(self, reader: Reader, *, whole: bool) -> None:
        last = reader.table.length // PAGE * PAGE if whole else reader.table.length
        self.published.update((reader.key, tuple(reader.ids[:n])) for n in range(1, last + 1))
