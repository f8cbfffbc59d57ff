"""Whether a prefix cache's tree is what it says: its invariants, node by node. Tests call it after every step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from specgen.kv.offload.tiers import PageCopy
from specgen.kv.pool import KVPool
from specgen.kv.radix_tree import PageNode


def check_tree(
    pool: KVPool, nodes: Iterable[PageNode], by_page: Mapping[int, PageNode], by_copy: Mapping[PageCopy, PageNode]
) -> None:
    """Raise RuntimeError naming what is off. by_page, by_copy: the nodes as the cache knows them."""
    nodes = list(nodes)
    for node in nodes:
        if fault := _fault(node, pool, by_page):
            raise RuntimeError(f"prefix cache: {fault}")
    seen = sum(node.page is not None for node in nodes)
    if seen != len(by_page):
        raise RuntimeError(f"prefix cache: {seen} pages in the tree, {len(by_page)} known")
    if {node.copy: node for node in nodes if node.copy is not None} != by_copy:
        raise RuntimeError("prefix cache: the copies that the tree knows are not those of its nodes")


def _fault(node: PageNode, pool: KVPool, by_page: Mapping[int, PageNode]) -> str | None:
    parent = node.parent
    if parent is None or parent.children.get(node.ids) is not node:
        return "a node is not its parent's child"
    if len(node.ids) < pool.page_size and (node.children or node.page is None):
        return "a partly filled page has pages behind it, or is not in the pool"
    if node.order != sorted(node.children):
        return "the order of a node's children is off"
    if node.resident != sum(child.page is not None for child in node.children.values()):
        return "the count of a node's children in the pool is off"
    if node.page is None:
        return "a node has no page and no tier keeps it" if node.copy is None or node.resident else None
    if by_page.get(node.page) is not node:
        return f"page {node.page} stands for two nodes"
    below = [child.page for child in node.children.values() if child.page is not None]
    if pool.references(node.page) == 1 and any(pool.references(page) > 1 for page in below):
        return "a page is in use and one before it is not"
    return None
