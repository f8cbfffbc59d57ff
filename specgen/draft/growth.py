"""A tree while a model grows it, level by level: the likeliest nodes get children (EAGLE-2, Li et al. 2024, 4.1)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from heapq import heappop, heappush, nlargest
from typing import TypeVar

import torch
from torch import Tensor

from specgen.draft.budget import likeliest
from specgen.tree import path, select
from specgen.types import MAX_TREE_NODES, TokenTree

_LEAST_SURVIVAL = 0.1
_SMOOTHING = 0.1
_DOUBT = 0.02

State = TypeVar("State")


class Growth:
    """Nodes with their chances given their parents. `picked` are those to grow next, -1 is the root.

    `depth` is 1 for children of the root. `row` numbers the nodes in the order in which they were picked: whoever
    computes them keeps what belongs to a node under that number. `hope` is the chance that a picked node is accepted:
    no level below brings more tokens than that. `kept` nodes will be taken of the tree.
    """

    def __init__(self, kept: int = MAX_TREE_NODES) -> None:
        self.kept = kept
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.confidence: list[float] = []
        self.depth: list[int] = []
        self.survival: list[float] = []
        self.row: dict[int, int] = {}
        self.picked = [-1]
        self.hope = 1.0

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
                self.survival.append(self.confidence[-1] * (self.survival[parent] if parent >= 0 else 1.0))

    def pick(self, width: int, least: float = _LEAST_SURVIVAL) -> list[int]:
        """Choose the likeliest `width` nodes of the deepest level to grow next, those that survive with a chance of
        `least` or more. What is not among the `kept` likeliest now never will be, and its children even less."""
        survival = self.survival
        if len(survival) > self.kept:
            least = max(least, nlargest(self.kept, survival)[-1]) if self.kept else math.inf
        previous = set(self.picked)
        level = [node for node, parent in enumerate(self.parents) if parent in previous and node not in self.row]
        level.sort(key=lambda node: (-survival[node], node))
        self.picked = sorted(node for node in level[:width] if survival[node] >= least)
        self.hope = sum(survival[node] for node in self.picked)
        for node in self.picked:
            self.row[node] = len(self.row)
        return self.picked

    def row_parents(self) -> list[int]:
        """For each row the row of its node's parent, -1 for the root's."""
        return [self.row.get(self.parents[node], -1) for node in self.row]

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


class Levels:
    """What a level costs a drafter, measured, against what it may bring: trees grow no deeper than pays."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def pay(self, growths: Sequence[Growth], token_seconds: float) -> bool:
        """Whether a level below what is picked is worth its time, when a token is worth `token_seconds`; always if that
        is 0. A cost that keeps levels from growing is believed less and less, so that it is measured again."""
        if not token_seconds or token_seconds * sum(growth.hope for growth in growths) >= self._seconds:
            return True
        self._seconds *= 1.0 - _DOUBT
        return False

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Around the growing of a level."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self._seconds += _SMOOTHING * (seconds - self._seconds) if self._seconds else seconds


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
