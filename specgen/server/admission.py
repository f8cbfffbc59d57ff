"""Who may come in: rates and shares of keys, and a queue with an end. Asked before anything heavy is done."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Literal, TypeAlias

from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from specgen.errors import InvalidRequest
from specgen.server.auth import Caller
from specgen.server.config import ServerConfig
from specgen.server.pace import Pace, retry_seconds
from specgen.server.protocol.errors import ApiError, invalid

_RETRY_SECONDS = 1.0
_MOST_BODIES = 16
"""How many of the largest bodies may be held while they wait to be tokenised."""

Share: TypeAlias = Literal["sequences", "texts"]
"""What a key has a share of: sequences, and texts that are tokenised alone."""


class Place:
    """The place of one request in a gate. was_served: whether anything came of it."""

    def __init__(self, gate: AdmissionControl, sequences: int, size: int, entered: float) -> None:
        self._gate = gate
        self._preparing, self._size = sequences, size
        self.entered = entered
        self.was_served = False

    def started(self) -> None:
        """The engine has its sequences; doing so twice is harmless."""
        self._gate.preparing -= self._preparing
        self._gate.bytes -= self._size
        self._preparing = self._size = 0


class AdmissionControl:
    """Counts sequences in the server. `max_num_seqs` of them are the engine's, `max_queued` more may wait.

    preparing: those of them that the engine does not have yet, with bodies of so many bytes. A text to be tokenised
    counts as one sequence.
    """

    def __init__(self, config: ServerConfig, max_num_seqs: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = max_num_seqs + config.max_queued
        self._most_per_key = config.key_sequences
        self._most_bytes = _MOST_BODIES * config.body_bytes
        self._most_seconds = config.max_waiting_seconds
        self._by_key: Counter[tuple[str, Share]] = Counter()
        self._rate = _rate(config.key_rate)
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._empty = asyncio.Event()
        self._empty.set()
        self._pace = Pace(max_num_seqs, clock)
        self.bytes = 0
        self.is_draining = False
        self.sequences = 0
        self.preparing = 0

    @property
    def retry(self) -> float:
        """Seconds after which one who is sent away should ask again."""
        return retry_seconds(self._pace.wait(self.sequences + 1))

    def check_rate(self, caller: Caller) -> None:
        """Count a request of a key. Raises ApiError 503 while the server drains, 429 when there were too many."""
        if self.is_draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry=_RETRY_SECONDS)
        if self._rate and not self._limiter.hit(self._rate, caller.name):
            reset = self._limiter.get_window_stats(self._rate, caller.name).reset_time
            wait = max(_RETRY_SECONDS, reset - time.time())
            raise ApiError(429, f"more than {self._rate} with this key", code="rate_limit_exceeded", retry=wait)

    @contextmanager
    def place(self, caller: Caller, sequences: int, size: int = 0, share: Share = "sequences") -> Iterator[Place]:
        """Room for the sequences of a request, while it is there.

        size: bytes of its body, which are held until the engine has them. share: what is counted by key together.
        Raises ApiError 429 when there is none now, 400 when there never is.
        """
        self._check_size(sequences)
        self._check_key(caller, sequences, share)
        self._check_queue(sequences, size)
        place = Place(self, sequences, size, self._pace.now())
        self.sequences += sequences
        self.preparing += sequences
        self.bytes += size
        self._by_key[caller.name, share] += sequences
        self._empty.clear()
        self._pace.changed(self.sequences)
        try:
            yield place
        finally:
            place.started()
            self.sequences -= sequences
            self._by_key[caller.name, share] -= sequences
            # One that gave up while it waited tells nothing of how long the others take.
            self._pace.changed(self.sequences, sequences if place.was_served else 0, place.entered)
            if not self.sequences:
                self._empty.set()

    def _check_key(self, caller: Caller, sequences: int, share: Share) -> None:
        held, most = self._by_key[caller.name, share] + sequences, self._most_per_key
        if most is not None and held > most:
            retry = retry_seconds(self._pace.share(held - most, held - sequences))
            message = f"{held} {share} at once with this key; at most {most}"
            raise ApiError(429, message, code="too_many_sequences", retry=retry)

    def _check_queue(self, sequences: int, size: int) -> None:
        """Raise ApiError 429 where there is no room to wait, or no sense in it."""
        wait = self._pace.wait(self.sequences + sequences)
        message = None
        if self.sequences + sequences > self._most:
            message = f"no room for {sequences} more sequences"
        elif self.bytes and self.bytes + size > self._most_bytes:
            message = f"{self.bytes} bytes of other requests wait to be read"
        elif self._most_seconds is not None and wait > self._most_seconds:
            message = f"the queue takes about {wait:.0f} seconds; at most {self._most_seconds:g} may be waited"
        if message is not None:
            raise ApiError(429, f"the server is busy: {message}", code="queue_full", retry=retry_seconds(wait))

    def _check_size(self, sequences: int) -> None:
        """Raise ApiError 400 for more sequences than an idle server takes: to come again would not help."""
        for most, whose in ((self._most_per_key, " with one key"), (self._most, "")):
            if most is not None and sequences > most:
                raise invalid(f"{sequences} sequences, n for each prompt; at most {most} at once{whose}", "n")

    async def until_empty(self) -> None:
        """Wait until no request is left."""
        await self._empty.wait()


def _rate(text: str | None) -> RateLimitItem | None:
    if text is None:
        return None
    with suppress(ValueError):
        rate = parse(text)
        if rate.amount > 0:
            return rate
    raise InvalidRequest(f"key_rate is {text!r}; it must be like '100/minute'", param="key_rate")
