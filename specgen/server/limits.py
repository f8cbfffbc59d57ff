"""Who may come in: rates and shares of keys, and a queue with an end. Asked before anything heavy is done."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from specgen.errors import InvalidRequest
from specgen.server.auth import Caller
from specgen.server.config import ServerConfig
from specgen.server.errors import ApiError, invalid

_RETRY_SECONDS = 1.0


class Gate:
    """Counts sequences in the server. `max_running` of them are the engine's, `max_queued` more may wait."""

    def __init__(self, config: ServerConfig, max_running: int) -> None:
        self._most = max_running + config.max_queued
        self._most_per_key = config.key_sequences
        self._by_key: Counter[str] = Counter()
        self._rate = _rate(config.key_rate)
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._empty = asyncio.Event()
        self._empty.set()
        self.is_draining = False
        self.sequences = 0

    def check_rate(self, caller: Caller) -> None:
        """Count a request of a key. Raises ApiError 503 while the server drains, 429 when there were too many."""
        if self.is_draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry=_RETRY_SECONDS)
        if self._rate and not self._limiter.hit(self._rate, caller.name):
            reset = self._limiter.get_window_stats(self._rate, caller.name).reset_time
            wait = max(_RETRY_SECONDS, reset - time.time())
            raise ApiError(429, f"more than {self._rate} with this key", code="rate_limit_exceeded", retry=wait)

    @contextmanager
    def place(self, caller: Caller, sequences: int) -> Iterator[None]:
        """Room for the sequences of a request, while it is there. Raises ApiError 429 when there is none now, 400 when
        there never is."""
        self._check_size(sequences)
        held = self._by_key[caller.name] + sequences
        if self._most_per_key is not None and held > self._most_per_key:
            message = f"{held} sequences at once with this key; at most {self._most_per_key}"
            raise ApiError(429, message, code="too_many_sequences", retry=_RETRY_SECONDS)
        if self.sequences + sequences > self._most:
            message = f"the server is busy: no room for {sequences} more sequences"
            raise ApiError(429, message, code="queue_full", retry=_RETRY_SECONDS)
        self.sequences += sequences
        self._by_key[caller.name] = held
        self._empty.clear()
        try:
            yield
        finally:
            self.sequences -= sequences
            self._by_key[caller.name] -= sequences
            if not self.sequences:
                self._empty.set()

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
