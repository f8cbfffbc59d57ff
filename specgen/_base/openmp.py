"""OpenMP's workers, of which each thread that calls torch keeps a team of its own.

libgomp lets a team spin between two parallel regions while all teams together are no larger than the machine. With two
teams it puts them to sleep at once, and every region waits for a wake-up: three times slower steps on two cores. So a
thread that is about to wait for another one gives up its team; its next parallel region makes a new one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

_SOFT = 1


def release_workers() -> None:
    """Give up the calling thread's idle workers. Nothing happens inside a parallel region, or without libgomp."""
    for pause in _pauses():
        pause(_SOFT)


@cache
def _pauses() -> tuple[Callable[[int], int], ...]:
    """`omp_pause_resource_all` (OpenMP 5.0, 3.2.44) of each libgomp in this process, found where it is loaded: another
    copy would know of no workers."""
    try:
        mapped = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ()
    paths = {line.split(maxsplit=5)[-1] for line in mapped if "/libgomp" in line}
    libraries = [ctypes.CDLL(path) for path in sorted(paths)]
    return tuple(library.omp_pause_resource_all for library in libraries if hasattr(library, "omp_pause_resource_all"))
