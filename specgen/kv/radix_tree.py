"""The radix tree's parts: whose pages they are, and one page's place among the others."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from specgen.kv.offload.tiers import PageCopy


@dataclass(frozen=True, slots=True)
class CacheKey:
    """Everything besides the ids that changes a token's KV, or that must not be shared.

    model, kv_format: fixed within one engine, kept for what goes to disk. adapter and its revision. tenant: a salt
    that the server derives; tenants never see one another's pages, not even by timing.
    """

    model: str = ""
    kv_format: str = ""
    adapter: str = ""
    revision: str = ""
    tenant: str = ""


@dataclass(slots=True, eq=False)
class PageNode:
    """One page of the tree: in the pool (`page`), kept by a tier (`copy`), or both; a root has neither, but a key.

    name: its file's, once that was asked for. resident: children that are in the pool.
    queued: whether it stands in the queue of those to evict.
    """

    ids: tuple[int, ...]
    parent: PageNode | None
    key: CacheKey
    name: str | None = None
    page: int | None = None
    copy: PageCopy | None = None
    used: int = 0
    resident: int = 0
    queued: bool = False
    children: dict[tuple[int, ...], PageNode] = field(default_factory=dict)
    order: list[tuple[int, ...]] = field(default_factory=list)

    def child(self, ids: tuple[int, ...]) -> PageNode:
        """A new node below, still without a page."""
        child = self.children[ids] = PageNode(ids, self, self.key)
        insort(self.order, ids)
        return child

    def remove(self, child: PageNode) -> None:
        """Take `child` away."""
        del self.children[child.ids]
        del self.order[bisect_left(self.order, child.ids)]

    def nearest(self, ids: tuple[int, ...]) -> tuple[int, PageNode | None]:
        """The child that begins with most of `ids`, and how many: it stands beside `ids` in the children's order."""
        at = bisect_left(self.order, ids)
        best: tuple[int, PageNode | None] = (0, None)
        for neighbour in self.order[max(0, at - 1) : at + 1]:
            if (length := _common(neighbour, ids)) > best[0]:
                best = length, self.children[neighbour]
        return best


def descend(nodes: Iterable[PageNode]) -> Iterator[PageNode]:
    """These nodes and all below them, parents before children."""
    # A stack, since a long text goes deeper than Python calls.
    stack = list(nodes)
    while stack:
        node = stack.pop()
        yield node
        stack.extend(node.children.values())


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
