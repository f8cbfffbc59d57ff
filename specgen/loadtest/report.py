"""What samples say together: percentiles, rates, a table, a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from specgen.loadtest.client import Sample

_PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Report:
    """Figures of one run. Seconds; of a list, (median, 90th, 99th percentile)."""

    name: str
    requests: int
    errors: int
    seconds: float
    tokens: int
    first: tuple[float, ...]
    per_token: tuple[float, ...]
    gaps: tuple[float, ...]
    whole: tuple[float, ...]
    acceptance: float | None

    @property
    def rate(self) -> float:
        """Generated tokens a second, over the whole run."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def bars(self) -> dict[str, float]:
        """Flat names with a number each."""
        found = {
            "errors": float(self.errors),
            "tokens_per_second": self.rate,
            "requests_per_second": (self.requests - self.errors) / self.seconds if self.seconds else 0.0,
        }
        for name in ("first", "per_token", "gaps", "whole"):
            values = getattr(self, name)
            found |= {f"{name}_p{p}": value for p, value in zip(_PERCENTILES, values, strict=True)}
        return found if self.acceptance is None else {**found, "acceptance_length": self.acceptance}

    def lines(self) -> list[str]:
        """The same for people."""
        head = f"{self.name}: {self.requests} requests, {self.errors} errors, {self.seconds:.1f} s"
        rows = [
            ("time to first token", self.first),
            ("time per later token", self.per_token),
            ("between chunks", self.gaps),
            ("whole request", self.whole),
        ]
        table = [f"  {name:<21}" + "".join(f"{value * 1000:>11.1f}" for value in values) for name, values in rows]
        titles = f"  {'milliseconds':<21}" + "".join(f"{f'p{p}':>11}" for p in _PERCENTILES)
        tail = [f"  {self.rate:.1f} tokens/s"]
        if self.acceptance is not None:
            tail.append(f"  acceptance length {self.acceptance:.2f}")
        return [head, titles, *table, *tail]


def report(name: str, samples: Sequence[Sample]) -> Report:
    """Figures of a run; requests that failed count as errors and nowhere else."""
    good = [sample for sample in samples if not sample.error]
    started = min((sample.started for sample in samples), default=0.0)
    ended = max((sample.ended for sample in samples), default=0.0)
    accepted = [sample.acceptance for sample in good if sample.acceptance is not None]
    return Report(
        name=name,
        requests=len(samples),
        errors=len(samples) - len(good),
        seconds=ended - started,
        tokens=sum(sample.tokens for sample in good),
        first=percentiles([sample.first for sample in good]),
        per_token=percentiles([sample.per_token for sample in good if sample.tokens > 1]),
        gaps=percentiles([gap for sample in good for gap in sample.gaps]),
        whole=percentiles([sample.ended - sample.started for sample in good]),
        acceptance=statistics.fmean(accepted) if accepted else None,
    )


def percentiles(values: Sequence[float]) -> tuple[float, ...]:
    """The median, the 90th and the 99th percentile by nearest rank; zeros of nothing."""
    ranked = sorted(values)
    return tuple(ranked[-(-len(ranked) * p // 100) - 1] if ranked else 0.0 for p in _PERCENTILES)


def draw(reports: Sequence[Report], path: Path) -> None:
    """A picture: throughput, and time to the first token, of each run. Needs matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    names = [each.name for each in reports]
    left.bar(names, [each.rate for each in reports])
    left.set_ylabel("tokens/s")
    for place, percentile in enumerate(_PERCENTILES):
        right.plot(names, [each.first[place] * 1000 for each in reports], marker="o", label=f"p{percentile}")
    right.set_ylabel("time to first token, ms")
    right.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
