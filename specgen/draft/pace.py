"""Whether a drafter is asked at all: what its answers bring against what they cost, sequence by sequence.

Nothing here changes what is generated, only how fast.
"""

from __future__ import annotations

import math

from specgen.types import MAX_TREE_NODES

_TRIALS = 4
"""Answers to judge by, be it those of other sequences."""
_DOUBT, _CURIOSITY = 0.5, 1.0
"""Standard deviations by which a mean may be too low: in a sequence, and in a new one, of which all learn."""
_NEGLIGIBLE = 0.01
_LEAST_LIKE, _MOST_LIKE = 0.5, 4.0
_ALIKE = 0.01
"""Sequences whose means differ by less, squared, are alike; two of them do not tell yet."""
_EARLY = 8
"""Answers of each sequence that all learn from: those that pay go on and would be heard far more often."""
_LONG, _SHORT = 60.0, 20.0
"""Answers that a mean reaches back over, over all sequences and in one."""
_FIRST_PAUSE = 8
_LONGEST_PAUSE, _LONGEST_PAUSE_OF_ALL = 256, 2048
"""Steps without an answer: in one sequence; and of all new ones together, each of which counts."""


class Pace:
    """Whether a drafter that costs time is worth asking in one sequence, with back-off where it is not.

    What an answer brings is counted in tokens, what it costs in seconds: what a token is worth changes from step to
    step, with who else runs. A drafter brings no token in many steps and several in others, and it does better in some
    texts than in others. `parent`, the pace over all sequences, measures either: what it expects
    counts in a new sequence as many answers as the noise within sequences is larger than the difference between them
    (the empirical Bayes estimate of Efron and Morris, 1975). The drafter is asked while what is expected, and some of
    the doubt about it, reach the cost. Where new sequences are not expected to pay, few of them ask, now and then.
    """

    def __init__(self, parent: Pace | None = None) -> None:
        self._parent = parent
        self._gain: float = parent._gain if parent else 0.0
        self._cost: float = parent._cost if parent else 0.0
        self._rows: float = parent._rows if parent else 0.0
        self._weight: float = min(parent._weight, parent._likeness) if parent else 0.0
        # Variance of one answer around its sequence's mean, and around the mean of all.
        self._noise = self._spread = 0.0
        self._sequences = 0
        # Seconds that the first answer of a sequence took longer, and the number of sequences and answers, of late.
        self._entry = self._opened = self._heard = 0.0
        self._answers = 0
        self._last: float | None = None
        self._pause = 0
        self._next_pause = _FIRST_PAUSE

    def ready(self, token_seconds: float) -> bool:
        """Ask the drafter in this step, where a token is worth `token_seconds`? Counts a step of the pause if not."""
        if not self._answers and self._parent:
            return self._parent._admits(token_seconds)
        return self._pays(self._weight, _DOUBT, token_seconds) or not self._rests()

    def observe(self, gained: float, seconds: float, token_seconds: float, row_seconds: float = 0.0) -> None:
        """A proposal that took `seconds`, and its rows `row_seconds`, brought `gained` tokens, each worth
        `token_seconds`."""
        if self._parent:
            self._parent._count(seconds, first=not self._answers)
        if self._cost and not self._answers:
            # The first answer may have read a prompt. That is paid once, and tells nothing of the next.
            seconds = min(seconds, self._cost)
        if self._parent and self._answers < _EARLY:
            self._parent._learn(gained, seconds, row_seconds, self._last, _LONG)
        self._learn(gained, seconds, row_seconds, self._last, _SHORT)
        self._answers += 1
        self._last = gained
        if self._pays(self._weight, _DOUBT, token_seconds):
            self._next_pause = max(_FIRST_PAUSE, self._next_pause // 2)
        elif not self._pause:
            self._begin_pause()

    @property
    def _likeness(self) -> float:
        """How many answers of a sequence's own the mean over all counts for."""
        most = min(_MOST_LIKE, 2.0 * self._sequences)
        between = self._spread - self._noise
        return most if between <= _ALIKE else min(most, max(_LEAST_LIKE, self._noise / between))

    def _admits(self, token_seconds: float) -> bool:
        """May a new sequence ask?"""
        if self._pays(self._likeness, _CURIOSITY, token_seconds, self._entry * self._opened / max(1.0, self._heard)):
            self._next_pause = _FIRST_PAUSE
            return True
        if self._rests():
            return False
        self._begin_pause()
        return True

    def _pays(self, weight: float, doubt: float, token_seconds: float, besides: float = 0.0) -> bool:
        if self._cost <= _NEGLIGIBLE * token_seconds:
            return True
        if self._weight < _TRIALS:
            return self._cost <= MAX_TREE_NODES * token_seconds
        noise = self._parent._noise if self._parent else self._noise
        return (self._gain + doubt * math.sqrt(noise / weight)) * token_seconds >= self._cost + self._rows + besides

    def _count(self, seconds: float, *, first: bool) -> None:
        """An answer of some sequence, perhaps its first."""
        if first:
            fade = 1.0 - 1.0 / _LONG
            self._opened, self._heard = self._opened * fade + 1.0, self._heard * fade
            self._entry += (max(0.0, seconds - self._cost) - self._entry) / self._opened
        self._heard += 1.0

    def _rests(self) -> bool:
        """Is this a step of the pause? Counts it."""
        resting = self._pause > 0
        self._pause -= resting
        return resting

    def _begin_pause(self) -> None:
        longest = _LONGEST_PAUSE if self._parent else _LONGEST_PAUSE_OF_ALL
        self._pause, self._next_pause = self._next_pause, min(2 * self._next_pause, longest)

    def _learn(self, gained: float, seconds: float, row_seconds: float, last: float | None, reach: float) -> None:
        """`last` is what the same sequence gained before: two answers differ by twice the noise, squared."""
        self._weight = min(self._weight + 1.0, reach)
        share = 1.0 / self._weight
        if last is None:
            self._sequences += 1
        else:
            self._noise += ((gained - last) ** 2 / 2 - self._noise) / max(1.0, self._weight - 1.0)
        missed = gained - self._gain
        self._gain += share * missed
        self._spread += share * (missed * (gained - self._gain) - self._spread)
        self._rows += share * (row_seconds - self._rows)
        self._cost = self._cost + share * (seconds - self._cost) if self._cost else seconds
