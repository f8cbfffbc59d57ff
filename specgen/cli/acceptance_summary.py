"""What generating took, in figures."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specgen.types import Result


@dataclass(slots=True)
class Tally:
    """Sums over the answers of one session. Seconds include reading the prompt, not loading the model."""

    tokens: int = 0
    seconds: float = 0.0
    steps: int = 0
    verified: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    disabled: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Add the seconds that the block takes."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started

    def add(self, result: Result) -> None:
        """Count one answer in."""
        self.tokens += len(result.ids)
        self.steps += result.stats.num_spec_steps
        for name, drafter in result.stats.by_drafter.items():
            self.verified[name] += drafter.verified
            self.accepted[name] += drafter.accepted
            if drafter.disabled:
                self.disabled[name] = drafter.disabled

    @property
    def tokens_per_second(self) -> float:
        """0 before the first answer."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def acceptance_length(self) -> float:
        """Tokens per target forward after the prompt; 0 before the first answer."""
        return self.tokens / self.steps if self.steps else 0.0

    def __str__(self) -> str:
        figures = (
            f"{self.tokens} tokens in {self.seconds:.1f} s, {self.tokens_per_second:.1f} tokens/s, "
            f"acceptance length {self.acceptance_length:.2f}"
        )
        return "; ".join([figures, *self._drafters()])

    def _drafters(self) -> Iterator[str]:
        for name, verified in self.verified.items():
            if verified:
                yield f"{name}: {self.accepted[name]} of {verified} drafted tokens accepted"
        for name, reason in self.disabled.items():
            yield f"{name}: switched off ({reason})"


def report(result: Result, tally: Tally) -> dict[str, object]:
    """A result as `--json` prints it."""
    from dataclasses import asdict

    return {
        "text": result.text,
        "ids": list(result.ids),
        "finish_reason": result.finish_reason,
        "stop": result.stop,
        "seed": result.seed,
        "usage": {**asdict(result.usage), "total_tokens": result.usage.total_tokens},
        "seconds": round(tally.seconds, 4),
        "tokens_per_second": round(tally.tokens_per_second, 2),
        "acceptance_length": round(tally.acceptance_length, 4),
        "drafters": {name: asdict(drafter) for name, drafter in result.stats.by_drafter.items()},
    }
