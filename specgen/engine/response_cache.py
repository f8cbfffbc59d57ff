"""The response cache: what identical requests were answered, kept for a while and up to some bytes.

Only answers that a request decides alone are kept: greedy ones, or with a seed, and without code of the caller's.
Keys are compared as a whole, never by their hash alone.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TypeAlias

import msgspec

from specgen.engine.request import Request, StopRules
from specgen.kv.radix_tree import CacheKey
from specgen.types import Result, SpeculativeStats

ResponseKey: TypeAlias = tuple[object, ...]
"""All that decides an answer, hashable. Two requests with equal keys are answered alike."""

_CODE = ("processors", "stopping_criteria", "plugin_processors")
_CHANGES_NO_TOKEN = ("speculation", "prediction")


def response_key(request: Request, key: CacheKey, stops: StopRules) -> ResponseKey | None:
    """The key of a request's answer; None where chance decides it, or code of the caller's, which may keep state.

    key: model, KV format, adapter, tenant. stops: the ends as they were resolved, with those of the model.
    """
    params = request.params
    by_chance = params.temperature != 0 and params.seed is None
    if by_chance or any(getattr(params, name) for name in _CODE):
        return None
    asked = msgspec.structs.asdict(params)
    settings = [(name, _frozen(value)) for name, value in asked.items() if name not in (*_CODE, *_CHANGES_NO_TOKEN)]
    return (key, request.ids, stops.end_ids, stops.max_length, *settings)


def _frozen(value: object) -> object:
    """A copy that nobody can change any more, equal where the values are."""
    if isinstance(value, Mapping):
        return frozenset(value.items())
    if isinstance(value, Set):
        return frozenset(value)
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def for_request(result: Result, request_id: str) -> Result:
    """A result as another request gets it: the same answer under its own id, for which nothing was computed.

    All of its prompt counts as cached and no step as its own, so that sums over results say what was computed.
    """
    usage = replace(result.usage, cached_tokens=result.usage.prompt_tokens)
    return replace(result, request_id=request_id, usage=usage, stats=SpeculativeStats())


@dataclass(frozen=True, slots=True)
class ResponseReport:
    """What the response cache did so far and holds now.

    Requests that could be answered from it: hits were, shared joined another that was running, misses ran.
    evicted answers had to make room, expired ones became too old.
    """

    hits: int = 0
    shared: int = 0
    misses: int = 0
    evicted: int = 0
    expired: int = 0
    responses: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Entry:
    results: tuple[Result, ...]
    bytes: int
    expires: float


class ResponseCache:
    """Finished answers, the least recently used dropped first. Thread-safe.

    max_bytes: most bytes of keys and answers as Python keeps them; 0 keeps nothing. seconds: how long an answer is
    given again, from when it was finished. clock: seconds that only grow.
    """

    def __init__(self, max_bytes: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._clock = clock
        self._lock = threading.Lock()
        # All live equally long, so the order of arrival is the order of expiry.
        self._entries: OrderedDict[ResponseKey, _Entry] = OrderedDict()
        self._by_use: OrderedDict[ResponseKey, None] = OrderedDict()
        self._report = ResponseReport()

    @property
    def enabled(self) -> bool:
        """Whether it keeps anything at all."""
        return self._max_bytes > 0

    @property
    def stats(self) -> ResponseReport:
        """Counts since the engine was built, and what is held now."""
        with self._lock:
            self._expire()
            return self._report

    def clear(self) -> None:
        """Forget all answers. Those that are being made are kept when they end."""
        with self._lock:
            self._entries.clear()
            self._by_use.clear()
            self._count(responses=-self._report.responses, bytes=-self._report.bytes)

    def get(self, key: ResponseKey) -> tuple[Result, ...] | None:
        """The results by index, or None. A hit is counted here, a miss by whoever runs the request."""
        with self._lock:
            self._expire()
            if (entry := self._entries.get(key)) is None:
                return None
            self._by_use.move_to_end(key)
            self._count(hits=1)
            return entry.results

    def put(self, key: ResponseKey, results: Sequence[Result]) -> None:
        """Keep the results of all samples, if there is room for them at all."""
        kept = tuple(for_request(result, "") for result in results)
        size = _size((key, kept))
        with self._lock:
            self._expire()
            self._drop(key)
            if size > self._max_bytes:
                return
            self._entries[key] = _Entry(kept, size, self._clock() + self._seconds)
            self._by_use[key] = None
            self._count(responses=1, bytes=size)
            while self._report.bytes > self._max_bytes:
                self._drop(next(iter(self._by_use)))
                self._count(evicted=1)

    def count_run(self, *, shared: bool) -> None:
        """A request that was not found runs, or joins one that does."""
        with self._lock:
            self._count(shared=int(shared), misses=int(not shared))

    def _expire(self) -> None:
        now = self._clock()
        while self._entries and (oldest := next(iter(self._entries.items())))[1].expires <= now:
            self._drop(oldest[0])
            self._count(expired=1)

    def _drop(self, key: ResponseKey) -> None:
        if (entry := self._entries.pop(key, None)) is not None:
            del self._by_use[key]
            self._count(responses=-1, bytes=-entry.bytes)

    def _count(self, **changes: int) -> None:
        self._report = replace(self._report, **{n: getattr(self._report, n) + by for n, by in changes.items()})


def _size(value: object) -> int:
    """Bytes of a value and all it refers to; what is referred to twice counts twice."""
    if value is None or isinstance(value, int | float | str):
        return sys.getsizeof(value)
    if is_dataclass(value):
        return sys.getsizeof(value) + sum(_size(getattr(value, field.name)) for field in fields(value))
    return sys.getsizeof(value) + sum(map(_size, value if isinstance(value, tuple | frozenset) else ()))
