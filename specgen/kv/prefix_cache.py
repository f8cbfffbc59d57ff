"""The prefix cache: a radix tree over pages of committed tokens, shared by reference with the sequences that read them.

A node is one page: the ids it holds, below the path of pages before it. Nodes with fewer ids than a page are leaves.
Only committed tokens are ever published, and rows that were published are never written again. A partly filled page
may still be written behind its ids, by the one table that published it; everyone else copies the rows it needs, or
takes the page over, out of the tree, when nobody else refers to it.

Ids are compared, never their hashes alone. A node whose page was evicted stays in the tree while a tier keeps a copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from specgen.errors import OutOfPages
from specgen.kv.eviction import EvictionQueue
from specgen.kv.lease import Lease, Pin
from specgen.kv.offload.page_files import PageHeader
from specgen.kv.offload.page_names import PageNames
from specgen.kv.offload.tiers import Kept, PageCopy, Tiers
from specgen.kv.pool import BlockTable, KVPool
from specgen.kv.radix_tree import CacheKey, PageNode, descend
from specgen.kv.tree_check import check_tree


@dataclass(slots=True)
class PrefixStats:
    """Counts since the cache was made. Tokens are those of sequences that were admitted, the last one included.

    evicted_pages left the pool; restored_pages came back from a tier.
    """

    queries: int = 0
    hits: int = 0
    queried_tokens: int = 0
    cached_tokens: int = 0
    evicted_pages: int = 0
    restored_pages: int = 0


class PrefixCache:
    """The pages worth keeping of one pool. Touched from the engine's thread alone.

    max_pages: most pages it refers to, those in use not counted off; `None` = as many as the pool spares.
    tiers: where evicted pages go; `None` = nowhere. names: of the files of the disk tier, if there is one.
    """

    def __init__(
        self,
        pool: KVPool,
        *,
        max_pages: int | None = None,
        tiers: Tiers | None = None,
        names: PageNames | None = None,
    ) -> None:
        self.pool = pool
        self.stats = PrefixStats()
        self.pins: list[Pin] = []
        self._max_pages = pool.pages if max_pages is None else max_pages
        self.tiers = tiers
        self._names = names
        self._roots: dict[CacheKey, PageNode] = {}
        self._by_page: dict[int, PageNode] = {}
        self._by_copy: dict[PageCopy, PageNode] = {}
        self._queue = EvictionQueue(self._is_evictable, self._by_page)
        self._clock = count(1)
        pool.attach(self)
        pool.ask(self)

    def match(self, key: CacheKey, ids: Sequence[int]) -> Lease:
        """The longest cached prefix of `ids`, short of the last one, whose logits are wanted.

        Whole pages are shared, after those that a tier keeps have come back where that is quicker than computing them.
        Of the next page the rows that fit are copied; or, if nobody else refers to it and all of it fits, the page
        itself is handed over and leaves the tree.
        """
        limit = len(ids) - 1
        path = self._hold(key, ids, limit)
        pages = [node.page for node in path if node.page is not None]
        tokens = len(path) * self.pool.page_size
        node = path[-1] if path else self._roots.get(key)
        if node is not None and tokens < limit:
            page, length = self._part(node, tuple(ids[tokens : min(limit, tokens + self.pool.page_size)]))
            if page is not None:
                pages.append(page)
                tokens += length
        self.stats.queries += 1
        self.stats.hits += tokens > 0
        self.stats.queried_tokens += len(ids)
        self.stats.cached_tokens += tokens
        return Lease(self.pool, tuple(pages), tokens)

    def length(self, key: CacheKey, ids: Sequence[int]) -> int:
        """How many tokens of whole pages in the pool `match` would find now. Changes nothing."""
        return len(self._walk(key, ids, len(ids) - 1)) * self.pool.page_size

    def missing_pages(self, key: CacheKey, ids: Sequence[int], tokens: int) -> int:
        """What to ask `pool.has` for before `match` and a table of `tokens` tokens.

        The matched pages need not be taken; but those of them that are idle cannot be evicted for the rest.
        """
        path = self._walk(key, ids, len(ids) - 1)
        return self.pool.pages_for(tokens) - len(path) + sum(map(self._idle, path))

    def publish(self, key: CacheKey, ids: Sequence[int], table: BlockTable, *, tail: bool = False) -> None:
        """Offer the committed KV of `table`, which stands for `ids[:table.length]`, to others.

        Whole pages, and with `tail` the partly filled one. A page is hung below pages of the same table alone: so
        whoever refers to a page of the tree refers to all before it, and every idle page can be evicted, leaves first.
        """
        self._publish(key, ids, table, tail=tail, foreign=False)
        self.evict(len(self._by_page) - self._max_pages)

    def retire(self, key: CacheKey, ids: Sequence[int], table: BlockTable) -> None:
        """Publish all of `table` and release it."""
        # Below pages of others too, which would not do if the table went on referring to its own.
        self._publish(key, ids, table, tail=True, foreign=True)
        table.release()
        self.evict(len(self._by_page) - self._max_pages)

    def _publish(self, key: CacheKey, ids: Sequence[int], table: BlockTable, *, tail: bool, foreign: bool) -> None:
        size = self.pool.page_size
        node = self.root(key)
        now = next(self._clock)
        for index, start in enumerate(range(0, table.length, size)):
            part = tuple(ids[start : min(start + size, table.length)])
            child = node.children.get(part)
            if child is None or child.page is None:
                known = len(part) < size and (not tail or node.nearest(part)[0] == len(part))
                if known or (index and not foreign and node.page != table.pages[index - 1]):
                    break
                child = self._hang(node, part, table.pages[index])
            child.used = now
            node = child
        self.tidy(key)

    def pin(self, key: CacheKey, ids: Sequence[int]) -> Pin:
        """Keep the whole pages of `ids` that are cached now."""
        held = [node.page for node in self._hold(key, ids, len(ids)) if node.page is not None]
        return Pin(self.pool, held, self.pins)

    def yield_pins(self, pages: int) -> bool:
        """Release pins, the oldest first, until `pages` pages can be taken: when otherwise no request could run."""
        while self.pins and not self.pool.has(pages):
            self.pins[0].release()
        return self.pool.has(pages)

    @property
    def held_pages(self) -> Iterator[int]:
        """The pages the tree refers to."""
        return iter(self._by_page)

    @property
    def has_room(self) -> bool:
        """Whether it may refer to one page more without giving one up."""
        return len(self._by_page) < self._max_pages

    @property
    def pages(self) -> int:
        """How many pages the tree refers to."""
        return len(self._by_page)

    def evict(self, count: int) -> None:
        """Give up `count` pages, least recently used first, or all that nobody else refers to."""
        while count > 0 and (node := self._queue.take()):
            self._give_up(node)
            count -= 1

    def idled(self, page: int) -> None:
        """Nobody but the tree refers to `page` any more."""
        self._queue.put(self._by_page[page])

    def clear(self) -> None:
        """Forget everything that is not in use or pinned, in the tiers too."""
        for node in list(self.nodes()):
            self._unkeep(node)
        while idle := self._queue.take():
            self._give_up(idle, keep=False)

    def forget(self) -> None:
        """`clear`, of what is pinned too: the model that computed it is another now. While nothing is in use."""
        for pin in list(self.pins):
            pin.release()
        self.clear()

    def rename(self, names: PageNames) -> None:
        """Pages are of another model from now on. After `forget`."""
        self._names = names if self._names is not None else None

    def check(self) -> None:
        """Raise RuntimeError if the tree is not what it says."""
        check_tree(self.pool, self.nodes(), self._by_page, self._by_copy)
        if any(self._is_evictable(node) and not node.queued for node in self._by_page.values()):
            raise RuntimeError("prefix cache: a page could be evicted and is not queued")
        if self.tiers is not None:
            self.tiers.check()

    def _walk(self, key: CacheKey, ids: Sequence[int], limit: int) -> list[PageNode]:
        """The nodes of the whole pages within `ids[:limit]` that are in the pool."""
        size = self.pool.page_size
        node = self._roots.get(key)
        path: list[PageNode] = []
        for start in range(0, limit - size + 1, size):
            node = node.children.get(tuple(ids[start : start + size])) if node else None
            if node is None or node.page is None:
                break
            path.append(node)
        return path

    def _hold(self, key: CacheKey, ids: Sequence[int], limit: int) -> list[PageNode]:
        """The same, used now, and what tiers gave back behind them; one reference to each page is the caller's."""
        path = self._walk(key, ids, limit)
        now = next(self._clock)
        for node in path:
            node.used = now
        self.pool.share([node.page for node in path if node.page is not None])
        last = path[-1] if path else self._roots.get(key)
        if self.tiers is not None and last is not None:
            run = self._away(last, ids[len(path) * self.pool.page_size : limit])
            path += self._restore(run[: self.tiers.worthwhile([node.copy for node in run if node.copy])], now)
        return path

    def _away(self, node: PageNode, ids: Sequence[int]) -> list[PageNode]:
        """The nodes below `node` along whole pages of `ids` that a tier keeps."""
        size = self.pool.page_size
        run: list[PageNode] = []
        for start in range(0, len(ids) - size + 1, size):
            child = node.children.get(tuple(ids[start : start + size]))
            if child is None or child.copy is None:
                break
            run.append(child)
            node = child
        return run

    def _restore(self, run: Sequence[PageNode], now: int) -> list[PageNode]:
        """Bring nodes back to the pool, as far as there are pages and the copies are sound."""
        restored: list[PageNode] = []
        for node in run:
            after = restored[-1].page if restored else node.parent.page if node.parent else None
            try:
                (page,) = self.pool.take(1, after)
            except OutOfPages:
                break
            # Taking a page may have evicted others, and those may have pushed this one out of its tier.
            if self.tiers is None or node.copy is None or not self.tiers.fetch(node.copy, self.pool, page):
                self.pool.drop([page])
                if node.copy is not None:
                    self._unkeep(node)
                break
            self.house(node, page)
            node.used = now
            restored.append(node)
            self.stats.restored_pages += 1
        return restored

    def _part(self, node: PageNode, ids: tuple[int, ...]) -> tuple[int | None, int]:
        """A page that begins with the most of `ids` that any child does, for one sequence alone, and how many."""
        length, child = node.nearest(ids)
        if child is None or child.page is None:
            return None, 0
        child.used = next(self._clock)
        if length == len(child.ids) < self.pool.page_size and self._idle(child):
            page = child.page
            self.pool.share([page])
            self._forget(child)
            self.tidy(child.key)
            return page, length
        # Held while a page is taken, which may evict.
        self.pool.share([child.page])
        source = child.page
        try:
            (page,) = self.pool.take(1, node.page)
            start, target = source * self.pool.page_size, page * self.pool.page_size
            self.pool.move(torch.arange(start, start + length), torch.arange(target, target + length))
        except OutOfPages:
            return None, 0
        finally:
            self.pool.drop([source])
        return page, length

    def _hang(self, node: PageNode, ids: tuple[int, ...], page: int) -> PageNode:
        """The child `ids` of `node` with a page of its own."""
        # A partly filled page that the new one says all of; maybe the same page, filled further since. Nothing longer
        # stands beside one, so if there is one it is the nearest.
        length, contained = node.nearest(ids)
        if contained is not None and length == len(contained.ids) < len(ids):
            self._forget(contained)
        child = node.children.get(ids) or node.child(ids)
        self.house(child, page)
        return child

    def keep(self, node: PageNode, rows: Sequence[Tensor]) -> bool:
        """Give a node that is not in the pool a copy in the tiers; whether one took it."""
        if self.tiers is not None:
            self._note(node, self.tiers.keep(rows, self._header(node)))
        return node.copy is not None

    def store(self, node: PageNode) -> None:
        """Give the page of a node a file, though it is in the pool or in memory; one that has a file is used now."""
        if self.tiers is not None and (node.page is not None or node.copy is not None):
            self._note(node, self.tiers.store(node.copy, self.rows(node), self._header(node)))

    def adopt(self, node: PageNode, header: PageHeader) -> None:
        """The file of a node's page stands in the disk tier's folder already."""
        if self.tiers is not None:
            self._note(node, Kept(self.tiers.adopt(header)))

    def rows(self, node: PageNode) -> list[Tensor] | None:
        """The KV of a node in the pool, as views."""
        return None if node.page is None else self.pool.rows_of(node.page)

    def copied_rows(self, node: PageNode) -> list[Tensor] | None:
        """The KV of a node that a tier keeps; a copy that is damaged is forgotten."""
        if node.copy is None or self.tiers is None:
            return None
        rows = self.tiers.rows(node.copy)
        if rows is None:
            self._unkeep(node)
        return rows

    def house(self, node: PageNode, page: int) -> None:
        """Put a node into the pool, on a page in use. What memory keeps of it goes, what the disk keeps stays good."""
        self.pool.shelve(page)
        self._by_page[page] = node
        node.page = page
        if node.parent is not None:
            node.parent.resident += 1
        if node.copy is not None and self.tiers is not None and not self.tiers.settle(node.copy):
            del self._by_copy[node.copy]
            node.copy = None

    def _unhouse(self, node: PageNode) -> None:
        if node.page is None:
            return
        page, node.page = node.page, None
        del self._by_page[page]
        if node.parent is not None:
            node.parent.resident -= 1
            self._queue.put(node.parent)
        self.pool.unshelve(page)

    def _give_up(self, node: PageNode, *, keep: bool = True) -> None:
        """Evict a node: to a tier, or for good."""
        self.stats.evicted_pages += 1
        whole = len(node.ids) == self.pool.page_size
        if keep and whole and node.copy is None and node.page is not None:
            self.keep(node, self.pool.rows_of(node.page))
        if node.copy is None:
            self._forget(node)
        else:
            self._unhouse(node)
        self.tidy(node.key)

    def _header(self, node: PageNode) -> PageHeader | None:
        return self._names.header(node) if self._names is not None else None

    def _note(self, node: PageNode, kept: Kept) -> None:
        """The tiers keep so much of `node` now, and had to let go of others."""
        if node.copy is not None and node.copy is not kept.copy:
            del self._by_copy[node.copy]
        node.copy = kept.copy
        if kept.copy is not None:
            self._by_copy[kept.copy] = node
        for copy in kept.lost:
            if (other := self._by_copy.get(copy)) is not None:
                self._unkeep(other)

    def _forget(self, node: PageNode) -> None:
        """Take a node with no child in the pool out of the tree, and all that tiers keep of it and below it."""
        for gone in reversed(list(descend([node]))):
            if gone.parent is not None and gone.parent.children.get(gone.ids) is gone:
                self._unhouse(gone)
                gone.parent.remove(gone)
            self._discard(gone)

    def _unkeep(self, node: PageNode) -> None:
        """No tier keeps `node` any more."""
        if node.page is None:
            self._forget(node)
            self.tidy(node.key)
        else:
            self._discard(node)

    def _discard(self, node: PageNode) -> None:
        """Drop what a tier keeps of `node`, if one does."""
        if node.copy is not None and self.tiers is not None:
            kept, node.copy = node.copy, None
            del self._by_copy[kept]
            self.tiers.discard(kept)

    def tidy(self, key: CacheKey) -> None:
        """Forget a key below which nothing hangs."""
        root = self._roots.get(key)
        if root is not None and not root.children:
            del self._roots[key]

    def _idle(self, node: PageNode) -> bool:
        return node.page is not None and self.pool.references(node.page) == 1

    def _is_evictable(self, node: PageNode) -> bool:
        return not node.resident and self._idle(node)

    def root(self, key: CacheKey) -> PageNode:
        """Where the pages of `key` hang."""
        return self._roots.setdefault(key, PageNode((), None, key))

    def nodes(self) -> Iterator[PageNode]:
        """All of the tree, parents before children."""
        return descend(child for root in self._roots.values() for child in root.children.values())
