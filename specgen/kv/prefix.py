"""The prefix cache: a radix tree over pages of committed tokens, shared by reference with the sequences that read them.

A node is one page: the ids it holds, below the path of pages before it. Nodes with fewer ids than a page are leaves.
Only committed tokens are ever published, and a published page is never written again, except by the one sequence
that takes a partly filled leaf over, which removes it from the tree.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import count

import torch

from specgen.errors import OutOfPages
from specgen.kv.pool import BlockTable, KVPool

_EVICTED_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class CacheKey:
    """Everything besides the ids that changes a token's KV, or that must not be shared.

    model, kv_format: fixed within one engine, kept for what goes to disk. adapter and its revision. tenant: a salt
    that the server derives; tenants never see one another's pages, not even by timing.
    """

    model: str = ""
    kv_format: str = ""
    adapter: str = ""
    revision: int = 0
    tenant: str = ""


@dataclass(slots=True, eq=False)
class Node:
    """One page of the tree. `pins` counts the pins on it and below it."""

    ids: tuple[int, ...]
    page: int | None
    parent: Node | None
    used: int = 0
    pins: int = 0
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    order: list[tuple[int, ...]] = field(default_factory=list)

    def add(self, child: Node) -> None:
        """Hang `child` below."""
        self.children[child.ids] = child
        insort(self.order, child.ids)

    def remove(self, child: Node) -> None:
        """Take `child` away."""
        del self.children[child.ids]
        del self.order[bisect_left(self.order, child.ids)]

    def nearest(self, ids: tuple[int, ...]) -> tuple[int, Node | None]:
        """The child that begins with most of `ids`, and how many: it stands beside `ids` in the children's order."""
        at = bisect_left(self.order, ids)
        best: tuple[int, Node | None] = (0, None)
        for neighbour in self.order[max(0, at - 1) : at + 1]:
            if (length := _common(neighbour, ids)) > best[0]:
                best = length, self.children[neighbour]
        return best


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass(frozen=True, slots=True)
class Lease:
    """A cached prefix: `tokens` ids whose KV is readable in `pages`, until they are released or a table adopts them."""

    pool: KVPool
    pages: tuple[int, ...] = ()
    tokens: int = 0

    def release(self) -> None:
        """Give the pages back. Not after a table has adopted them."""
        self.pool.drop(self.pages)


@dataclass(slots=True)
class PrefixStats:
    """Counts since the cache was made. Tokens are prompt tokens of matches."""

    queries: int = 0
    hits: int = 0
    queried_tokens: int = 0
    cached_tokens: int = 0
    evicted_pages: int = 0


class PrefixCache:
    """The pages worth keeping of one pool. Touched from the engine's thread alone.

    max_pages: most pages it refers to; `None` = as many as the pool spares.
    """

    def __init__(self, pool: KVPool, *, max_pages: int | None = None) -> None:
        self.pool = pool
        self.stats = PrefixStats()
        self._max_pages = pool.pages if max_pages is None else max_pages
        self._roots: dict[CacheKey, Node] = {}
        self._clock = count(1)
        self._held = 0
        pool.holders.add(self)
        pool.reserve = self

    def match(self, key: CacheKey, ids: Sequence[int]) -> Lease:
        """The longest cached prefix of `ids`, short of the last one, whose logits are wanted.

        Whole pages are shared. Of the next page the rows that fit are copied; or, if nobody else refers to it and all
        of it fits, the page itself is handed over and leaves the tree.
        """
        limit = len(ids) - 1
        path = self._walk(key, ids, limit)
        pages = [node.page for node in path if node.page is not None]
        self.pool.share(pages)
        tokens = len(path) * self.pool.page_size
        node = path[-1] if path else self._roots.get(key)
        if node is not None and tokens < limit:
            page, length = self._part(node, tuple(ids[tokens : min(limit, tokens + self.pool.page_size)]))
            if page is not None:
                pages.append(page)
                tokens += length
        self._count(len(ids), tokens)
        return Lease(self.pool, tuple(pages), tokens)

    def length(self, key: CacheKey, ids: Sequence[int]) -> int:
        """How many tokens of whole pages `match` would find now. Changes nothing."""
        return len(self._walk(key, ids, len(ids) - 1, touch=False)) * self.pool.page_size

    def publish(self, key: CacheKey, ids: Sequence[int], table: BlockTable, *, final: bool) -> None:
        """Offer the committed KV of `table`, which stands for `ids[:table.length]`, to others.

        Whole pages now; with `final`, when nobody will write to the table again, the partly filled one as well.
        """
        size = self.pool.page_size
        node = self._roots.setdefault(key, Node((), None, None))
        now = next(self._clock)
        for index, start in enumerate(range(0, table.length, size)):
            part = tuple(ids[start : min(start + size, table.length)])
            child = node.children.get(part)
            if child is None:
                if len(part) < size and (not final or node.nearest(part)[0] == len(part)):
                    break
                child = self._hang(node, part, table.pages[index])
            child.used = now
            node = child
        if self._held > self._max_pages:
            self.evict(self._held - self._max_pages)

    def pin(self, key: CacheKey, ids: Sequence[int]) -> int:
        """Keep the whole pages of `ids` that are cached now until `unpin`; returns how many tokens they hold."""
        path = self._walk(key, ids, len(ids))
        for node in path:
            node.pins += 1
        return len(path) * self.pool.page_size

    def unpin(self, key: CacheKey, ids: Sequence[int], tokens: int) -> None:
        """Undo a `pin` that returned `tokens`."""
        for node in self._walk(key, ids[:tokens], tokens):
            node.pins -= 1

    @property
    def held_pages(self) -> Iterator[int]:
        """The pages the tree refers to."""
        return (node.page for node in self._nodes() if node.page is not None)

    @property
    def evictable(self) -> int:
        """Pages that nobody else refers to. Whoever reads a page reads all before it, so these can go, leaves first."""
        return sum(1 for node in self._nodes() if self._idle(node))

    def evict(self, count: int) -> None:
        """Give up at least `count` pages, least recently used first, or all that nobody else refers to."""
        count = max(count, min(_EVICTED_AT_ONCE, self._held // 4))
        leaves = [(node.used, id(node), node) for node in self._nodes() if not node.children and self._idle(node)]
        heapify(leaves)
        while leaves and count > 0:
            _, _, node = heappop(leaves)
            parent = node.parent
            self._forget(node)
            count -= 1
            self.stats.evicted_pages += 1
            if parent is not None and not parent.children and self._idle(parent):
                heappush(leaves, (parent.used, id(parent), parent))
        self._roots = {key: root for key, root in self._roots.items() if root.children}

    def clear(self) -> None:
        """Give up everything that is not in use or pinned."""
        self.evict(self.pool.pages)

    def check(self) -> None:
        """Raise RuntimeError if the tree is not what it says."""
        nodes = list(self._nodes())
        if len(nodes) != self._held:
            raise RuntimeError(f"prefix cache: {len(nodes)} pages in the tree, {self._held} counted")
        for node in nodes:
            if node.parent is None or node.parent.children.get(node.ids) is not node:
                raise RuntimeError("prefix cache: a node is not its parent's child")
            if len(node.ids) < self.pool.page_size and node.children:
                raise RuntimeError("prefix cache: a partly filled page has pages behind it")
            if node.order != sorted(node.children):
                raise RuntimeError("prefix cache: the order of a node's children is off")
            if node.pins < max((child.pins for child in node.children.values()), default=0):
                raise RuntimeError("prefix cache: a page is pinned and one before it is not")

    def _walk(self, key: CacheKey, ids: Sequence[int], limit: int, *, touch: bool = True) -> list[Node]:
        """The nodes of the whole pages within `ids[:limit]`."""
        size = self.pool.page_size
        node = self._roots.get(key)
        path: list[Node] = []
        now = next(self._clock) if touch else 0
        for start in range(0, limit - size + 1, size):
            node = node.children.get(tuple(ids[start : start + size])) if node else None
            if node is None:
                break
            node.used = max(node.used, now)
            path.append(node)
        return path

    def _part(self, node: Node, ids: tuple[int, ...]) -> tuple[int | None, int]:
        """A page that begins with the most of `ids` that any child does, for one sequence alone, and how many."""
        length, child = node.nearest(ids)
        if child is None or child.page is None:
            return None, 0
        child.used = next(self._clock)
        if length == len(child.ids) < self.pool.page_size and self._idle(child):
            page = child.page
            self.pool.share([page])
            self._forget(child)
            return page, length
        # Held while a page is taken, which may evict.
        self.pool.share([child.page])
        try:
            (page,) = self.pool.take(1)
        except OutOfPages:
            return None, 0
        finally:
            self.pool.drop([child.page])
        start, target = child.page * self.pool.page_size, page * self.pool.page_size
        self.pool.move(torch.arange(start, start + length), slice(target, target + length))
        return page, length

    def _hang(self, node: Node, ids: tuple[int, ...], page: int) -> Node:
        length, child = node.nearest(ids)
        if child is not None and length == len(child.ids) < len(ids) and not child.pins:
            # A partly filled page whose ids all stand in the new one.
            self._forget(child)
        self.pool.share([page])
        self._held += 1
        added = Node(ids, page, node)
        node.add(added)
        return added

    def _forget(self, node: Node) -> None:
        if node.parent is not None:
            node.parent.remove(node)
        if node.page is not None:
            self.pool.drop([node.page])
        self._held -= 1

    def _idle(self, node: Node) -> bool:
        return node.page is not None and not node.pins and self.pool.references(node.page) == 1

    def _nodes(self) -> Iterator[Node]:
        stack = [child for root in self._roots.values() for child in root.children.values()]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def _count(self, queried: int, cached: int) -> None:
        self.stats.queries += 1
        self.stats.hits += cached > 0
        self.stats.queried_tokens += queried
        self.stats.cached_tokens += cached
