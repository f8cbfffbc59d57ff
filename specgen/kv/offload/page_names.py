"""What the file of a node's page is called, and says: names are made from the root down."""

from __future__ import annotations

from dataclasses import asdict

from specgen.kv.offload.page_files import PageHeader, page_name, root_name
from specgen.kv.radix_tree import CacheKey, PageNode


class PageNames:
    """Headers of pages under one `identity`: of model, weights and KV format."""

    def __init__(self, identity: str) -> None:
        self.identity = identity

    def header(self, node: PageNode) -> PageHeader:
        """What the file of `node` says about itself."""
        return PageHeader(self.identity, asdict(node.key), self._parent(node), node.ids)

    def root(self, key: CacheKey) -> str:
        """The parent of the first pages of `key`."""
        return root_name(self.identity, asdict(key))

    def _parent(self, node: PageNode) -> str:
        """Each name is made once."""
        unnamed: list[PageNode] = []
        above = node.parent
        while above is not None and above.name is None:
            unnamed.append(above)
            above = above.parent
        name = above.name if above is not None else None
        for each in reversed(unnamed):
            name = self.root(each.key) if name is None else page_name(name, each.ids)
            each.name = name
        return name or ""
