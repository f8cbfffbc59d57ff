"""One tree from several drafters' trees: the same path is one node, with the highest confidence anyone has in it."""

from __future__ import annotations

from collections.abc import Sequence

from specgen.types import EMPTY_TREE, TokenTree


def merge(trees: Sequence[TokenTree]) -> TokenTree:
    """The union of `trees` as sets of paths. Parents come before their children; earlier trees come first."""
    full = [tree for tree in trees if len(tree)]
    if len(full) <= 1:
        return full[0] if full else EMPTY_TREE
    tokens: list[int] = []
    parents: list[int] = []
    confidence: list[float] = []
    merged: dict[tuple[int, int], int] = {}
    for tree in full:
        places = {-1: -1}
        for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
            key = places[parent], token
            place = merged.get(key)
            if place is None:
                place = merged[key] = len(tokens)
                tokens.append(token)
                parents.append(key[0])
                confidence.append(0.0)
            confidence[place] = max(confidence[place], tree.confidence[node])
            places[node] = place
    return TokenTree(tuple(tokens), tuple(parents), tuple(confidence))
