"""How many rows of prompts a step takes: by their number, and by time while other sequences wait for their tokens."""

from __future__ import annotations

from collections.abc import Callable

from specgen.draft.budget import RowCost

_FEWEST_ROWS = 16
"""Prompts go on, however slow the machine is."""

_SMOOTHING = 0.5
_SLOWEST = 8.0


class PrefillBudget:
    """Rows of prompts in a step. most_rows: at any time. seconds: what a step is wanted to take at most while others
    decode; `None` counts rows alone. cost: answers what rows cost at present.

    Where steps with prompts take longer than that says, as rows do that look back on a long prompt, or beside large
    draft trees, the next ones take fewer rows.
    """

    def __init__(self, most_rows: int, seconds: float | None, cost: Callable[[], RowCost]) -> None:
        self.most_rows = most_rows
        self._seconds = seconds
        self._cost = cost
        self._slowness = 1.0

    def rows(self, decoding: int, context: int) -> int:
        """Rows of prompts for the next step, beside `decoding` sequences that decode, with `context` tokens in all that
        rows hang under."""
        if self._seconds is None or not decoding:
            return self.most_rows
        fewest, most = min(_FEWEST_ROWS, self.most_rows), self.most_rows
        while fewest < most:
            rows = (fewest + most + 1) // 2
            if self._slowness * self._expected(decoding + rows, context) <= self._seconds:
                fewest = rows
            else:
                most = rows - 1
        return fewest

    def observe(self, rows: int, context: int, seconds: float) -> None:
        """A step of `rows` rows, some of them of prompts, took `seconds`. To be told before the cost is."""
        if rows > self._cost().most_rows:
            return  # what is expected there is no more than a bound, and the cost learns by this step
        ratio = seconds / max(1e-9, self._expected(rows, context))
        self._slowness += _SMOOTHING * (min(_SLOWEST, max(1.0, ratio)) - self._slowness)

    def _expected(self, rows: int, context: int) -> float:
        return self._cost().at_most(rows) + self._cost().reading(context, rows)
