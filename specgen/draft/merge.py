"""One tree from several drafters' trees: the same path is one node, and who agrees on it is known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from specgen.tree import select
from specgen.types import EMPTY_TREE, TokenTree


@dataclass(frozen=True, slots=True)
class Draft:
    """A tree to verify, and of each of its nodes which drafters offered it."""

    tree: TokenTree = EMPTY_TREE
    offered_by: tuple[tuple[str, ...], ...] = ()

    def select(self, nodes: Iterable[int]) -> Draft:
        """The draft of `nodes` alone; parents must be among them."""
        kept = sorted(nodes)
        return Draft(select(self.tree, kept), tuple(self.offered_by[node] for node in kept))

    def nodes_of(self, drafter: str) -> list[int]:
        """The nodes that a drafter offered."""
        return [node for node, names in enumerate(self.offered_by) if drafter in names]


NO_DRAFT = Draft()


class Merged:
    """The union of trees as sets of paths. Parents come before their children; earlier trees come first.

    places: for each tree the node of the union that each of its nodes became.
    """

    def __init__(self, trees: Sequence[TokenTree]) -> None:
        self.places: list[list[int]] = []
        self._nodes: dict[tuple[int, int], int] = {}
        self._holders: list[int] = []
        for tree in trees:
            self._add(tree)

    def shared(self, tree: int) -> list[bool]:
        """For each node of a tree whether another tree holds it too."""
        return [self._holders[place] > 1 for place in self.places[tree]]

    def offered_by(self, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """For each node of the union the names of the trees that hold it. names: of each tree."""
        found: list[list[str]] = [[] for _ in self._holders]
        for name, places in zip(names, self.places, strict=True):
            for place in places:
                found[place].append(name)
        return tuple(map(tuple, found))

    def tree(self, confidences: Sequence[Sequence[float]]) -> TokenTree:
        """The union, given the confidence of each tree's nodes. Where several hold a node, the mean is taken: each
        of them is to be calibrated on the nodes that others hold too, so that agreement is in it already."""
        sums = [0.0] * len(self._holders)
        for places, confidence in zip(self.places, confidences, strict=True):
            for place, value in zip(places, confidence, strict=True):
                sums[place] += value
        return self._with([total / holders for total, holders in zip(sums, self._holders, strict=True)])

    def surest(self, confidences: Sequence[Sequence[float]]) -> TokenTree:
        """The union, each node as sure as the tree that is surest of it."""
        best = [0.0] * len(self._holders)
        for places, confidence in zip(self.places, confidences, strict=True):
            for place, value in zip(places, confidence, strict=True):
                best[place] = max(best[place], value)
        return self._with(best)

    def _with(self, confidence: Sequence[float]) -> TokenTree:
        return TokenTree(
            tuple(token for _, token in self._nodes), tuple(parent for parent, _ in self._nodes), tuple(confidence)
        )

    def _add(self, tree: TokenTree) -> None:
        nodes, holders = self._nodes, self._holders
        places: list[int] = []
        for token, parent in zip(tree.tokens, tree.parents, strict=True):
            key = (places[parent] if parent >= 0 else -1), token
            place = nodes.setdefault(key, len(holders))
            if place == len(holders):
                holders.append(0)
            holders[place] += 1
            places.append(place)
        self.places.append(places)
