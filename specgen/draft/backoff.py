"""Whether a drafter is asked at all: what its answers bring against what they cost, sequence by sequence.

Nothing here changes what is generated, only how fast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

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


@dataclass(slots=True)
class _Means:
    """Of answers, old ones fading: the tokens that they gained, the seconds that asking took, and those of their rows.

    weight: how many answers they are worth.
    """

    gain: float = 0.0
    seconds: float = 0.0
    row_seconds: float = 0.0
    weight: float = 0.0

    def add(self, gained: float, seconds: float, row_seconds: float, reach: float) -> float:
        """Another answer; the share that it has in the means, which reach back over `reach` answers."""
        self.weight = min(self.weight + 1.0, reach)
        share = 1.0 / self.weight
        self.gain += share * (gained - self.gain)
        self.seconds = self.seconds + share * (seconds - self.seconds) if self.seconds else seconds
        self.row_seconds += share * (row_seconds - self.row_seconds)
        return share

    def pay(self, token_seconds: float, *, doubt: float, besides: float = 0.0) -> bool:
        """Whether an answer is worth its time, and `besides` seconds, when it may gain `doubt` tokens more than is
        known, each worth `token_seconds`."""
        if self.seconds <= _NEGLIGIBLE * token_seconds:
            return True
        if self.weight < _TRIALS:
            return self.seconds <= MAX_TREE_NODES * token_seconds
        return (self.gain + doubt) * token_seconds >= self.seconds + self.row_seconds + besides


class _Pause:
    """Steps without an answer, twice as many each time, up to `longest`."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._left = 0
        self._next = _FIRST_PAUSE

    def begin(self) -> None:
        """Unless one goes on."""
        if not self._left:
            self._left, self._next = self._next, min(2 * self._next, self._longest)

    def shorten(self) -> None:
        """The next one, by half."""
        self._next = max(_FIRST_PAUSE, self._next // 2)

    def reset(self) -> None:
        """The next one is short again."""
        self._next = _FIRST_PAUSE

    def goes_on(self) -> bool:
        """Is this a step of it? Counts it."""
        resting = self._left > 0
        self._left -= resting
        return resting


class DrafterHistory:
    """A drafter's answers over all sequences: what is expected of it in a new one, and whether that may ask.

    An answer's tokens vary around its sequence's mean (`noise`, their variance), and around the mean of all (`spread`).
    """

    def __init__(self) -> None:
        self.means = _Means()
        self.noise = 0.0
        self._spread = 0.0
        self._sequences = 0
        self._pause = _Pause(_LONGEST_PAUSE_OF_ALL)
        # Of late: the seconds that first answers of sequences took longer than others, and the number of all answers.
        self._entries = self._heard = 0.0

    @property
    def likeness(self) -> float:
        """How many answers of a sequence's own the mean over all counts for."""
        most = min(_MOST_LIKE, 2.0 * self._sequences)
        between = self._spread - self.noise
        return most if between <= _ALIKE else min(most, max(_LEAST_LIKE, self.noise / between))

    def admits(self, token_seconds: float) -> bool:
        """May a new sequence ask? Where it is not expected to pay, few do, now and then."""
        doubt = _CURIOSITY * math.sqrt(self.noise / self.likeness) if self._sequences else 0.0
        # A first answer reads the prompt. What that costs is spread over as many answers as sequences ask for.
        if self.means.pay(token_seconds, doubt=doubt, besides=self._entries / max(1.0, self._heard)):
            self._pause.reset()
            return True
        if self._pause.goes_on():
            return False
        self._pause.begin()
        return True

    def count(self, seconds: float, *, first: bool) -> None:
        """An answer that took `seconds`, perhaps the first of its sequence."""
        if first:
            fade = 1.0 - 1.0 / _LONG
            self._entries = fade * self._entries + max(0.0, seconds - self.means.seconds)
            self._heard *= fade
        self._heard += 1.0

    def learn(self, gained: float, seconds: float, row_seconds: float, last: float | None) -> None:
        """An early answer. `last` is what the same sequence gained before: two answers differ by twice the noise,
        squared."""
        missed = gained - self.means.gain
        share = self.means.add(gained, seconds, row_seconds, _LONG)
        self._spread += share * (missed * (gained - self.means.gain) - self._spread)
        if last is None:
            self._sequences += 1
        else:
            self.noise += ((gained - last) ** 2 / 2 - self.noise) / max(1.0, self.means.weight - 1.0)


class DrafterBackoff:
    """Whether a drafter that costs time is worth asking in one sequence, with back-off where it is not.

    What an answer brings is counted in tokens, what it costs in seconds: what a token is worth changes from step to
    step, with who else runs. A drafter brings no token in many steps and several in others, and it does better in some
    texts than in others. The experience of all sequences counts in a new one as many answers as the noise within
    sequences is larger than the difference between them (the empirical Bayes estimate of Efron and Morris, 1975). The
    drafter is asked while what is expected, and some of the doubt about it, reach the cost.
    """

    def __init__(self, everyone: DrafterHistory) -> None:
        self._everyone = everyone
        self._means = replace(everyone.means, weight=min(everyone.means.weight, everyone.likeness))
        self._answers = 0
        self._last: float | None = None
        self._pause = _Pause(_LONGEST_PAUSE)

    def ready(self, token_seconds: float) -> bool:
        """Ask the drafter in this step, where a token is worth `token_seconds`? Counts a step of the pause if not."""
        if not self._answers:
            return self._everyone.admits(token_seconds)
        return self._pays(token_seconds) or not self._pause.goes_on()

    def observe(self, gained: float, seconds: float, token_seconds: float, row_seconds: float = 0.0) -> None:
        """A proposal that took `seconds`, and its rows `row_seconds`, brought `gained` tokens, each worth
        `token_seconds`."""
        self._everyone.count(seconds, first=not self._answers)
        if self._means.seconds and not self._answers:
            # The first answer may have read a prompt. That is paid once, and tells nothing of the next.
            seconds = min(seconds, self._means.seconds)
        if self._answers < _EARLY:
            self._everyone.learn(gained, seconds, row_seconds, self._last)
        self._means.add(gained, seconds, row_seconds, _SHORT)
        self._answers += 1
        self._last = gained
        if self._pays(token_seconds):
            self._pause.shorten()
        else:
            self._pause.begin()

    def _pays(self, token_seconds: float) -> bool:
        doubt = _DOUBT * math.sqrt(self._everyone.noise / self._means.weight)
        return self._means.pay(token_seconds, doubt=doubt)
