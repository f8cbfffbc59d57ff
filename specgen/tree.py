"""Pure functions over `TokenTree`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from specgen.types import MAX_TREE_NODES, TokenTree


def chain(tokens: Sequence[int], confidence: float = 1.0) -> TokenTree:
    """The tree with one path."""
    return TokenTree(tuple(tokens), tuple(range(-1, len(tokens) - 1)), (confidence,) * len(tokens))


def children(tree: TokenTree) -> list[dict[int, int]]:
    """For the root, then for each node: its children as token -> node. Index with `node + 1`."""
    below: list[dict[int, int]] = [{} for _ in range(len(tree) + 1)]
    for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
        below[parent + 1][token] = node
    return below


def depths(tree: TokenTree) -> list[int]:
    """Depth of each node; the root's children have depth 1."""
    found: list[int] = []
    for parent in tree.parents:
        found.append(1 if parent < 0 else found[parent] + 1)
    return found


def path(tree: TokenTree, node: int) -> list[int]:
    """Nodes from the root's child down to `node`."""
    nodes = []
    while node >= 0:
        nodes.append(node)
        node = tree.parents[node]
    return nodes[::-1]


def select(tree: TokenTree, nodes: Iterable[int]) -> TokenTree:
    """The tree of `nodes` alone. A node whose parent is not among them is an error of the caller."""
    kept = sorted(nodes)
    renamed = {-1: -1} | {node: index for index, node in enumerate(kept)}
    return TokenTree(
        tuple(tree.tokens[node] for node in kept),
        tuple(renamed[tree.parents[node]] for node in kept),
        tuple(tree.confidence[node] for node in kept),
    )


def check(tree: TokenTree, vocab_size: int, max_nodes: int = MAX_TREE_NODES) -> None:
    """Raise ValueError, naming the node, unless `tree` keeps the contract of `TokenTree`."""
    if not len(tree.tokens) == len(tree.parents) == len(tree.confidence):
        raise ValueError(
            f"tree has {len(tree.tokens)} tokens, {len(tree.parents)} parents, {len(tree.confidence)} confidences"
        )
    if len(tree) > max_nodes:
        raise ValueError(f"tree has {len(tree)} nodes; at most {max_nodes} were asked for")
    seen: set[tuple[int, int]] = set()
    for node, (token, parent, confidence) in enumerate(zip(tree.tokens, tree.parents, tree.confidence, strict=True)):
        if not -1 <= parent < node:
            raise ValueError(f"node {node} has parent {parent}; parents come before their children")
        if not 0 <= token < vocab_size:
            raise ValueError(f"node {node} holds token {token}; the vocabulary has {vocab_size}")
        if not 0.0 <= confidence <= 1.0:
            raise ValueError(f"node {node} has confidence {confidence}; it must be 0 to 1")
        if (parent, token) in seen:
            raise ValueError(f"node {node} repeats token {token} under parent {parent}")
        seen.add((parent, token))
