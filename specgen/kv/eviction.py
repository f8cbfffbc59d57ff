"""The order in which pages leave the pool: least recently used first, of those that nobody but the tree refers to."""

from __future__ import annotations

from collections.abc import Callable, Sized
from heapq import heapify, heappop, heappush
from itertools import count

from specgen.kv.radix_tree import PageNode

_LEAST = 64


class EvictionQueue:
    """Nodes that may leave the pool. One that was used, or left, since it was put in is found out when its turn comes,
    so neither has to look for its place.

    evictable: whether a node may leave now. housed: the nodes in the pool; the queue stays below twice as many.
    """

    def __init__(self, evictable: Callable[[PageNode], bool], housed: Sized) -> None:
        self._evictable = evictable
        self._housed = housed
        self._heap: list[tuple[int, int, PageNode]] = []
        self._entries = count()

    def __len__(self) -> int:
        return len(self._heap)

    def put(self, node: PageNode) -> None:
        """Queue `node` if it may leave and stands in no queue."""
        if not node.queued and self._evictable(node):
            node.queued = True
            heappush(self._heap, (node.used, next(self._entries), node))
            if len(self._heap) > 2 * len(self._housed) + _LEAST:
                self._rebuild()

    def take(self) -> PageNode | None:
        """The node whose turn it is, no longer queued; `None` if none may leave."""
        while self._heap:
            used, _, node = heappop(self._heap)
            node.queued = False
            if node.used == used and self._evictable(node):
                return node
            self.put(node)
        return None

    def _rebuild(self) -> None:
        """Let go of nodes that left the pool or are in use."""
        for _, _, node in self._heap:
            node.queued = False
        self._heap = [entry for entry in self._heap if self._evictable(entry[2])]
        for _, _, node in self._heap:
            node.queued = True
        heapify(self._heap)
