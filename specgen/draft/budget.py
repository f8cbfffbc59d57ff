"""How much to draft: measured cost of rows against the chance that a node survives.

Every number here is learned while the engine runs; none changes what is generated, only how fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from specgen.types import TokenTree

_SMOOTHING = 0.15
_ROW_PRIOR = 0.01
_OUTLIER = 4.0
_MOST_READING = 0.75
"""Of a forward's time: windows look back on less than the longest context that was measured."""


class RowCost:
    """Seconds that a forward over n rows takes on this machine, now.

    Steps are averaged in groups of similar size (powers of two) and interpolated between them; where nothing was
    measured yet, one row more is taken to cost a hundredth of the forward, or its share of the rows if that is less.

    A forward also reads the keys and values of what its rows hang under, which costs the same however many rows do:
    `context_seconds` for each token. Steps of more sequences have more rows and more to read; were it counted with the
    rows, rows would look dearer than they are.
    """

    def __init__(self, context_seconds: float = 0.0) -> None:
        self.context_seconds = context_seconds
        self._groups: dict[int, tuple[float, float]] = {}
        self._known: list[tuple[float, float]] | None = None

    def forget_rows(self) -> None:
        """Another forward runs from now on, whose rows cost something else; what they hang under costs the same."""
        self._groups, self._known = {}, None

    def observe(self, rows: int, seconds: float, context: int = 0) -> None:
        """A forward over `rows` rows, hung under `context` tokens in all, took `seconds`."""
        seconds -= min(context * self.context_seconds, _MOST_READING * seconds)
        self._known = None
        group = rows.bit_length()
        if group not in self._groups:
            self._groups[group] = (float(rows), seconds)
            return
        mean_rows, mean = self._groups[group]
        seconds = min(seconds, _OUTLIER * mean)
        self._groups[group] = (
            mean_rows + _SMOOTHING * (rows - mean_rows),
            mean + _SMOOTHING * (seconds - mean),
        )

    def seconds(self, rows: int) -> float:
        """Expected seconds of a forward over `rows` rows, without what they hang under; never less than for fewer rows.
        1 before any measurement."""
        # Asked for every node of a step, while it changes once in a step.
        points = self._known = self._known or self._points()
        if not points:
            return 1.0 + _ROW_PRIOR * rows
        first_rows, first = points[0]
        if rows <= first_rows:
            return first
        for (low_rows, low), (high_rows, high) in pairwise(points):
            if rows <= high_rows:
                return low + (high - low) * (rows - low_rows) / max(high_rows - low_rows, 1e-9)
        last_rows, last = points[-1]
        return last * (1.0 + min(_ROW_PRIOR, 1.0 / last_rows) * (rows - last_rows))

    @property
    def most_rows(self) -> float:
        """Rows of the largest forwards that were measured; 0 before any."""
        points = self._known = self._known or self._points()
        return points[-1][0] if points else 0.0

    def at_most(self, rows: int) -> float:
        """Seconds that a forward over `rows` rows hardly exceeds: beyond the largest that was measured each row
        more is taken to cost as much as those did. `seconds` says what is likely, and there may be several times
        too little."""
        measured = self.most_rows
        return self.seconds(rows) if rows <= measured or not measured else self.seconds(int(measured)) * rows / measured

    def reading(self, context: int, rows: int) -> float:
        """Expected seconds that a forward over `rows` rows takes besides, for what they hang under."""
        return min(context * self.context_seconds, _MOST_READING / (1.0 - _MOST_READING) * self.seconds(rows))

    def _points(self) -> list[tuple[float, float]]:
        """(rows, seconds), ascending in both: what was slow by accident is not believed to exceed a larger forward."""
        points: list[tuple[float, float]] = []
        fastest = math.inf
        for rows, seconds in sorted(self._groups.values(), reverse=True):
            fastest = min(fastest, seconds)
            points.append((rows, fastest))
        return points[::-1]


@dataclass(slots=True)
class _Tally:
    """Hits of trials, old ones fading."""

    hits: float = 0.0
    trials: float = 0.0

    def add(self, hit: bool) -> None:
        self.hits = self.hits * _FADE + hit
        self.trials = self.trials * _FADE + 1.0

    def mean(self, prior: float, weight: float) -> float:
        return (self.hits + weight * prior) / (self.trials + weight)


_FADE = 0.98
_BINS = 12
_PRIOR_WEIGHT = 4.0


class AcceptanceModel:
    """How often a drafter's node of a given confidence is right given that its parent is.

    Nodes that other drafters offer too are counted apart from those that this one offers alone. `parent` is the
    calibration over all sequences, which this one refines; it learns from every trial as well.
    """

    def __init__(self, parent: AcceptanceModel | None = None) -> None:
        self._parent = parent
        self._tallies = [[_Tally() for _ in range(_BINS + 1)] for _ in (False, True)]

    def survival(self, confidence: float, shared: bool = False) -> float:
        """Observed share of right nodes at this confidence, leaning on the confidence itself while there is little."""
        prior = self._parent.survival(confidence, shared) if self._parent else confidence
        return self._tallies[shared][round(confidence * _BINS)].mean(prior, _PRIOR_WEIGHT)

    def calibrated(self, tree: TokenTree, shared: Sequence[bool]) -> list[float]:
        """Observed survival in place of the drafter's confidence, node by node."""
        asked = list(zip(tree.confidence, shared, strict=True))
        known = {key: self.survival(*key) for key in set(asked)}
        return [known[key] for key in asked]

    def observe(self, tree: TokenTree, committed: Sequence[int], shared: Sequence[bool] | None = None) -> int:
        """Learn from what was committed: every node whose parent lies on the committed path was right or wrong.

        Nodes count whether or not they were verified, so drafters go on learning while nothing of theirs is taken.
        Returns how many committed tokens the tree held.
        """
        on_path = {-1: 0}
        longest = 0
        for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
            depth = on_path.get(parent)
            if depth is None or depth >= len(committed):
                continue
            hit = committed[depth] == token
            self._learn(tree.confidence[node], hit, shared is not None and shared[node])
            if hit:
                on_path[node] = depth + 1
                longest = max(longest, depth + 1)
        return longest

    def _learn(self, confidence: float, hit: bool, shared: bool) -> None:
        self._tallies[shared][round(confidence * _BINS)].add(hit)
        if self._parent:
            self._parent._learn(confidence, hit, shared)


def survivals(tree: TokenTree) -> list[float]:
    """Chance that each node is accepted: the product of the confidences on its path."""
    found: list[float] = []
    for parent, confidence in zip(tree.parents, tree.confidence, strict=True):
        found.append(confidence * (found[parent] if parent >= 0 else 1.0))
    return found


def likeliest(tree: TokenTree, most: int) -> list[int]:
    """The `most` nodes of highest survival; none comes without its parent."""
    if len(tree) <= most:
        return list(range(len(tree)))
    survival = survivals(tree)
    return sorted(range(len(tree)), key=lambda node: (-survival[node], node))[:most]


def worthwhile(
    trees: Sequence[TokenTree],
    base_rows: int,
    cost: RowCost,
    *,
    most: Sequence[int] | None = None,
    spent: float = 0.0,
) -> tuple[list[list[int]], float]:
    """For each tree the nodes to verify: those that make committed tokens per second, over the whole batch, largest.

    Nodes are taken in order of survival, so a node never comes without its parent, and at most `most[i]` of tree i.
    `base_rows` are verified anyway, and `spent` seconds of the step are gone. Every tree's sequence commits one token
    whatever is drafted. Answers that rate too.
    """
    room = [len(tree) for tree in trees] if most is None else list(most)
    offers = sorted(
        ((-survival, node, index) for index, tree in enumerate(trees) for node, survival in enumerate(survivals(tree)))
    )
    tokens = float(len(trees))
    best, taken = tokens / (spent + cost.seconds(base_rows)), 0
    chosen: list[tuple[int, int]] = []
    for minus_survival, node, index in offers:
        if not room[index]:
            continue
        room[index] -= 1
        chosen.append((index, node))
        tokens -= minus_survival
        rate = tokens / (spent + cost.seconds(base_rows + len(chosen)))
        if rate > best:
            best, taken = rate, len(chosen)
    nodes: list[list[int]] = [[] for _ in trees]
    for index, node in chosen[:taken]:
        nodes[index].append(node)
    return nodes, best
