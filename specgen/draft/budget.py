"""How much to draft: measured cost of rows against the chance that a node survives.

Every number here is learned while the engine runs; none changes what is generated, only how fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from specgen.types import MAX_TREE_NODES, TokenTree

_SMOOTHING = 0.15
_ROW_PRIOR = 0.01
_OUTLIER = 4.0


class RowCost:
    """Seconds that a forward over n rows takes on this machine, now.

    Steps are averaged in groups of similar size (powers of two) and interpolated between them; where nothing was
    measured yet, one row more is taken to cost a hundredth of the forward.
    """

    def __init__(self) -> None:
        self._groups: dict[int, tuple[float, float]] = {}
        self._known: list[tuple[float, float]] | None = None

    def observe(self, rows: int, seconds: float) -> None:
        """A forward over `rows` rows took `seconds`."""
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
        """Expected seconds of a forward over `rows` rows; never less than for fewer rows. 1 before any measurement."""
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
        return last * (1.0 + _ROW_PRIOR * (rows - last_rows))

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


class Calibration:
    """How often a drafter's node of a given confidence is right given that its parent is.

    Nodes that other drafters offer too are counted apart from those that this one offers alone. `parent` is the
    calibration over all sequences, which this one refines; it learns from every trial as well.
    """

    def __init__(self, parent: Calibration | None = None) -> None:
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
    for survival, node, index in offers:
        if not room[index]:
            continue
        room[index] -= 1
        chosen.append((index, node))
        tokens -= survival
        rate = tokens / (spent + cost.seconds(base_rows + len(chosen)))
        if rate > best:
            best, taken = rate, len(chosen)
    nodes: list[list[int]] = [[] for _ in trees]
    for index, node in chosen[:taken]:
        nodes[index].append(node)
    return nodes, best


class Pace:
    """Whether a drafter that costs time is worth asking in one sequence, with back-off where it is not.

    `parent` is the pace over all sequences: a new one begins with its mean, which counts as two answers. Where the
    drafter did not pay of late, two answers of its own are enough to judge by. If it pays in hardly any sequence, new
    ones together wait for the parent's back-off before one of them asks, and one answer is enough.
    """

    def __init__(self, parent: Pace | None = None) -> None:
        self._parent = parent
        self._gain: float = parent._gain if parent else 0.0
        self._seconds: float = parent._seconds if parent else 0.0
        self._calls = 0
        self._pause = 0
        self._next_pause = _FIRST_PAUSE
        self._promise = 1.0
        doubted = parent is not None and parent.is_backing_off
        self._known = min(parent._calls, _KNOWN) if parent else 0
        self._waits = doubted and parent is not None and parent._promise < _LEAST_PROMISE
        self._trials = 1 if self._waits else _TRIALS_IN_DOUBT if doubted else _TRIALS

    @property
    def is_backing_off(self) -> bool:
        """Whether the drafter did not pay of late."""
        return self._next_pause > _FIRST_PAUSE

    def ready(self) -> bool:
        """Ask the drafter in this step? Counts a step of the pause if not."""
        if self._pause:
            self._pause -= 1
            return False
        return bool(self._calls) or self._parent is None or not self._waits or self._parent.ready()

    def observe(self, gained: int, seconds: float, token_seconds: float) -> None:
        """`gained` tokens came of a proposal that took `seconds`; a token is worth `token_seconds`."""
        if self._parent:
            self._parent.observe(gained, seconds, token_seconds)
        weight = max(_STEADY if self._parent else _SMOOTHING, 1.0 / (self._calls + self._known + 1))
        self._calls += 1
        self._gain += weight * (gained - self._gain)
        self._seconds += weight * (seconds - self._seconds)
        hopeless = seconds > MAX_TREE_NODES * token_seconds
        tried = self._calls >= self._trials
        pays = not hopeless and (self._gain + _NEGLIGIBLE) * token_seconds >= self._seconds
        if self._parent and (hopeless or self._calls == self._trials):
            self._parent._promise += _VERDICT * (pays - self._parent._promise)
        if pays or not (hopeless or tried):
            self._next_pause = max(_FIRST_PAUSE, self._next_pause // 2) if tried else _FIRST_PAUSE
            return
        self._pause, self._next_pause = self._next_pause, min(2 * self._next_pause, _LONGEST_PAUSE)


_KNOWN = 2
_STEADY = 0.05
"""A drafter brings no token in many steps and several in others: its mean shows over some twenty."""
_TRIALS = 4
_TRIALS_IN_DOUBT = 2
_LEAST_PROMISE = 0.1
_VERDICT = 0.4
_NEGLIGIBLE = 0.01
_FIRST_PAUSE = 8
_LONGEST_PAUSE = 256
