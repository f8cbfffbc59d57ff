"""How fast the queue moves: what a client should wait before it asks again."""

from __future__ import annotations

import time
from collections.abc import Callable

SHORTEST_SECONDS, LONGEST_SECONDS = 1.0, 600.0
_NEWEST = 0.1
"""Weight of the newest measurement in a running mean."""


class Pace:
    """Seconds between two sequences that leave while others wait, and seconds that one stays, as running means.

    room: how many sequences run at once.
    """

    def __init__(self, room: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._room = room
        self._clock = clock
        self._since: float | None = None
        self._between: float | None = None
        self._stay: float | None = None

    def now(self) -> float:
        """The time by this clock."""
        return self._clock()

    def changed(self, sequences: int, left: int = 0, entered: float = 0.0) -> None:
        """There are so many sequences now; `left` have gone, who came at `entered`."""
        now = self._clock()
        if left:
            self._stay = _mean(self._stay, now - entered)
            if self._since is not None:
                self._between = _mean(self._between, (now - self._since) / left)
        if sequences <= self._room:
            # Nobody waits: how fast they leave tells how fast they come.
            self._since = None
        elif left or self._since is None:
            self._since = now

    def wait(self, sequences: int) -> float:
        """Seconds until the last of so many sequences runs, by what was seen; 0 while nothing was."""
        return max(0, sequences - self._room) * (self._between or 0.0)

    def share(self, over: int, held: int) -> float:
        """Seconds until `over` of the `held` sequences of one key have left."""
        return over * (self._stay or 0.0) / max(1, held)


def retry_seconds(seconds: float) -> float:
    """What a client is told."""
    return min(LONGEST_SECONDS, max(SHORTEST_SECONDS, seconds))


def _mean(mean: float | None, newest: float) -> float:
    return newest if mean is None else mean + _NEWEST * (newest - mean)
