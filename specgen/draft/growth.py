"""A tree while a model grows it, level by level: the likeliest nodes get children (EAGLE-2, Li et al. 2024, 4.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import TypeVar

import torch
from torch import Tensor

from specgen.draft.budget import likeliest, survivals
from specgen.tree import path, select
from specgen.types import TokenTree

_LEAST_SURVIVAL = 0.1

State = TypeVar("State")


class Growth:
    """Nodes with their chances given their parents. `picked` are those to grow next, -1 is the root.

    `depth` is 1 for children of the root. `row` numbers the nodes in the order in which they were picked: whoever
    computes them keeps what belongs to a node under that number.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.confidence: list[float] = []
        self.depth: list[int] = []
        self.row: dict[int, int] = {}
        self.picked = [-1]

    @property
    def tree(self) -> TokenTree:
        """All nodes."""
        return TokenTree(tuple(self.tokens), tuple(self.parents), tuple(self.confidence))

    def extend(self, chances: Sequence[Sequence[float]], tokens: Sequence[Sequence[int]]) -> None:
        """Hang children under each picked node: their tokens, and the chance of each given its parent."""
        for parent, here, ids in zip(self.picked, chances, tokens, strict=True):
            for chance, token in zip(here, ids, strict=True):
                self.tokens.append(token)
                self.parents.append(parent)
                self.confidence.append(min(1.0, chance))
                self.depth.append(self.depth[parent] + 1 if parent >= 0 else 1)

    def pick(self, width: int, least: float = _LEAST_SURVIVAL) -> list[int]:
        """Choose the likeliest `width` nodes of the deepest level to grow next, those that survive with a chance of
        `least` or more."""
        survival = survivals(self.tree)
        previous = set(self.picked)
        level = [node for node, parent in enumerate(self.parents) if parent in previous and node not in self.row]
        level.sort(key=lambda node: (-survival[node], node))
        self.picked = sorted(node for node in level[:width] if survival[node] >= least)
        for node in self.picked:
            self.row[node] = len(self.row)
        return self.picked

    def visible(self) -> Tensor:
        """bool[picked, rows]: which rows each picked node sees, its own and its ancestors'."""
        mask = torch.zeros(len(self.picked), len(self.row), dtype=torch.bool)
        tree = self.tree
        for index, node in enumerate(self.picked):
            mask[index, [self.row[ancestor] for ancestor in path(tree, node)]] = True
        return mask

    def rows_along(self, committed: Sequence[int]) -> list[int]:
        """Rows of the nodes that hold `committed`, as far as they were picked."""
        rows: list[int] = []
        below = {place: node for node, place in enumerate(zip(self.parents, self.tokens, strict=True))}
        node: int | None = -1
        for token in committed:
            node = below.get((node, token))  # type: ignore[arg-type]
            if node not in self.row:
                break
            rows.append(self.row[node])
        return rows

    def best(self, max_nodes: int) -> TokenTree:
        """The `max_nodes` likeliest nodes."""
        return select(self.tree, likeliest(self.tree, max_nodes))


def best_first(
    start: State, expand: Callable[[State], Sequence[tuple[int, float, State]]], max_nodes: int
) -> TokenTree:
    """The `max_nodes` nodes of highest product of confidences: whoever is taken brings its next sibling and its first
    child.

    expand: the children of a state as (token, confidence, state), most confident first; asked once per node.
    """
    tokens: list[int] = []
    parents: list[int] = []
    confidence: list[float] = []
    waiting: list[tuple[float, int, int, float, Sequence[tuple[int, float, State]]]] = []

    def wait(parent: int, survival: float, rank: int, siblings: Sequence[tuple[int, float, State]]) -> None:
        if rank < len(siblings) and (chance := survival * siblings[rank][1]) > 0.0:
            heappush(waiting, (-chance, parent, rank, survival, siblings))

    if max_nodes:
        wait(-1, 1.0, 0, expand(start))
    while waiting and len(tokens) < max_nodes:
        chance, parent, rank, survival, siblings = heappop(waiting)
        token, sure, state = siblings[rank]
        wait(parent, survival, rank + 1, siblings)
        wait(len(tokens), -chance, 0, expand(state))
        tokens.append(token)
        parents.append(parent)
        confidence.append(sure)
    return TokenTree(tuple(tokens), tuple(parents), tuple(confidence))
