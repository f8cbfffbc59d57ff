"""Microseconds of each kernel beside plain torch, one operation after another, in the shapes that models call them in.

The backends of a case are timed in turns, so that a machine's moods meet all of them; medians of all rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from statistics import median

import torch

from benchmarks import harness
from benchmarks.kernels.case import Case
from specgen.kernels.backends import BACKENDS

_ROUNDS = {False: 31, True: 3}
_SECONDS = 0.01


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the mean of as many as take a hundredth of a second."""
    calls = 1
    while True:
        started = time.perf_counter()
        for _ in range(calls):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
        if seconds >= _SECONDS:
            return seconds / calls
        calls *= 2


def measure(case: Case, device: torch.device, rounds: int) -> dict[str, float]:
    """Seconds of a case by each backend."""
    found: dict[str, list[float]] = {backend: [] for backend in case.calls}
    for _ in range(rounds):
        for backend, call in case.calls.items():
            found[backend].append(timed(call, device))
    return {backend: median(seconds) for backend, seconds in found.items()}


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    """Print a table for each operation asked for, all by default."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    options.add_argument("operations", nargs="*", metavar="OPERATION", help=f"out of: {', '.join(BACKENDS)}")
    options.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    options.add_argument("--quick", action="store_true", help="a small run that shows that everything works")
    args = options.parse_args(argv)
    if unknown := [name for name in args.operations if name not in BACKENDS]:
        options.error(f"there is no operation {unknown[0]!r}; choices: {', '.join(BACKENDS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in args.operations or BACKENDS:
        cases = import_module(f"benchmarks.kernels.{name}").cases(device, getattr(torch, args.dtype))
        lines: list[list[object]] = []
        for case in cases:
            seconds = measure(case, device, _ROUNDS[args.quick])
            best = next(iter(seconds.values()))
            lines.append([case.shape, *(f"{backend} {1e6 * s:.1f}" for backend, s in seconds.items())])
            lines[-1].append(f"{seconds['torch'] / best:.2f}")
        columns = max(map(len, lines)) - 2
        harness.table(f"{name}: microseconds on {device.type}", ["", *[""] * columns, "torch / best"], lines)


if __name__ == "__main__":
    main()
