"""Threads on which requests are read, tokenised and compiled before the engine has them: small texts overtake large
ones, and what waits for a grammar holds up nobody else."""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Literal, TypeVar

T = TypeVar("T")

Lane = Literal["small", "large", "compiling"]

SMALL_BYTES = 64 << 10
"""Of a body. Its text is tokenised within some ten milliseconds."""

_SMALL_THREADS = 4
_COMPILING_THREADS = 8
_MOST_LARGE_THREADS = 4


class Preparing:
    """The threads of one server, in lanes."""

    def __init__(self) -> None:
        large = max(1, min(_MOST_LARGE_THREADS, (os.cpu_count() or 1) // 4))
        self._lanes: dict[Lane, ThreadPoolExecutor] = {
            "small": ThreadPoolExecutor(_SMALL_THREADS, thread_name_prefix="specgen-prepare"),
            "large": ThreadPoolExecutor(large, thread_name_prefix="specgen-prepare-large"),
            # They wait for compilations, which have threads of their own.
            "compiling": ThreadPoolExecutor(_COMPILING_THREADS, thread_name_prefix="specgen-prepare-compiling"),
        }

    async def run(self, function: Callable[[], T], lane: Lane = "small") -> T:
        """What `function` returns or raises, without holding up the event loop."""
        work = _and_trim(function) if lane == "large" else function
        return await asyncio.get_running_loop().run_in_executor(self._lanes[lane], work)

    def close(self) -> None:
        """Let the threads go, as soon as they have finished what they do."""
        for threads in self._lanes.values():
            threads.shutdown(wait=False, cancel_futures=True)


def lane_of(size: int, *, compiles: bool) -> Lane:
    """Where a request with a body of `size` bytes is prepared."""
    if size > SMALL_BYTES:
        return "large"
    return "compiling" if compiles else "small"


def _and_trim(function: Callable[[], T]) -> Callable[[], T]:
    """`function`, and what it freed goes back to the system: the C library keeps gigabytes of small pieces."""

    def work() -> T:
        try:
            return function()
        finally:
            if (trim := _malloc_trim()) is not None:
                trim(0)

    return work


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # another C library, another system
        return None
