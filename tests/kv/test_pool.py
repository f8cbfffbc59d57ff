"""The pool's promises: references, idle pages, slots that stay together."""

from __future__ import annotations

import pytest
import torch

from specgen.errors import OutOfPages
from specgen.kv.formats import LayerShape
from specgen.kv.pool import KVPool


def make(pages: int = 8) -> KVPool:
    return KVPool([LayerShape(1, 2, 2)] * 2, pages, dtype=torch.float32, device=torch.device("cpu"), page_size=4)


class Shelf:
    """A reserve that gives up its pages in the order in which they became idle."""

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        self.held_pages: list[int] = []
        self.idle: list[int] = []
        pool.attach(self)
        pool.ask(self)

    def shelve(self, page: int) -> None:
        self.pool.shelve(page)
        self.held_pages.append(page)

    def idled(self, page: int) -> None:
        self.idle.append(page)

    def evict(self, count: int) -> None:
        for page in self.idle[:count]:
            self.held_pages.remove(page)
            self.pool.unshelve(page)
        del self.idle[:count]


def test_an_idle_page_counts_as_one_to_be_had_and_a_page_in_use_does_not() -> None:
    pool = make()
    shelf = Shelf(pool)
    table = pool.open()
    table.reserve(16)
    for page in table.pages[:3]:
        shelf.shelve(page)
    assert (pool.free_pages, pool.idle_pages) == (4, 0)
    assert not pool.has(5)
    table.trim(4)
    pool.check()
    assert (pool.free_pages, pool.idle_pages) == (5, 2)
    assert pool.has(7)
    assert not pool.has(8)
    taken = pool.take(7)
    assert (pool.free_pages, pool.idle_pages) == (0, 0)
    with pytest.raises(OutOfPages, match="1 pages wanted, 0 free of 8"):
        pool.take(1)
    pool.drop(taken)
    table.release()
    assert pool.idle_pages == 1
    pool.check()


def test_a_page_that_is_shared_again_is_no_longer_idle() -> None:
    pool = make()
    shelf = Shelf(pool)
    (page,) = pool.take(1)
    shelf.shelve(page)
    pool.drop([page])
    assert pool.idle_pages == 1
    pool.share([page])
    assert pool.idle_pages == 0
    pool.drop([page])
    assert (pool.idle_pages, shelf.idle) == (1, [page, page])


def test_check_finds_pages_that_nobody_holds() -> None:
    pool = make()
    pool.take(1)
    with pytest.raises(RuntimeError, match="page 0 has 1 references, its holders have 0"):
        pool.check()


def test_a_failed_reservation_changes_nothing() -> None:
    pool = make()
    table = pool.open()
    table.reserve(8)
    with pytest.raises(OutOfPages):
        table.reserve(33)
    assert len(table.pages) == 2
    assert pool.free_pages == 6
    table.release()
    table.release()
    pool.check()


def test_slots_stay_together_beside_a_growing_neighbour() -> None:
    pool = make(32)
    first, second = pool.open(), pool.open()
    for tokens in range(4, 44, 4):
        first.reserve(tokens)
        second.reserve(tokens)
    assert isinstance(first.span(0, 40), slice)
    assert isinstance(second.span(0, 40), slice)


def test_commit_moves_accepted_rows_into_place_in_every_layer() -> None:
    pool = make()
    table = pool.open()
    table.reserve(12)
    for store in pool.layers:
        numbers = torch.arange(8.0)[:, None, None].expand(8, 1, 2)
        store.write(table.slots(0, 8), numbers, -numbers)
    table.commit(2)
    table.commit(1, [1, 3, 5])
    assert table.length == 6
    for store in pool.layers:
        keys, values = store.read(table.span(0, 6))
        assert keys[:, 0, 0].tolist() == [0, 1, 2, 3, 5, 7]
        assert torch.equal(keys, -values)
