"""What a step costs on this machine: measured when an engine is built, learned from every step since."""

from __future__ import annotations

from collections.abc import Sequence

from specgen.draft.manager import DraftManager
from specgen.engine.prefill_budget import PrefillBudget
from specgen.model.profiling import row_seconds
from specgen.model.runner import ModelRunner
from specgen.model.segment import Segment

_MEASURED_ROWS = (1, 2, 4, 8, 16, 32)
_MEASURED_CONTEXT = 1024


class StepCosts:
    """Tells the draft manager and the prefill budget what rows cost."""

    def __init__(self, drafting: DraftManager, prefill: PrefillBudget, *, compiled: bool) -> None:
        self._drafting = drafting
        self._prefill = prefill
        # Whether what is known is of a compiled forward.
        self._compiled = compiled

    def measure(self, target: ModelRunner) -> None:
        """Begin with what rows cost on this machine, so that not even the first tree is larger than it pays.

        Also while requests run: what finds no pages is not measured.
        """
        pool, cost = target.pool, self._drafting.cost
        self._compiled = target.compiled
        cost.forget_rows()
        for rows in _MEASURED_ROWS:
            if rows <= target.context_length and pool.has(pool.pages_for(rows)):
                cost.observe(rows, row_seconds(target.current, rows))

    def measure_context(self, target: ModelRunner) -> None:
        """What a forward takes longer for each token that its rows hang under. To be asked while no page is taken."""
        context = min(_MEASURED_CONTEXT, target.pool.capacity // 2, target.context_length - 1)
        more = row_seconds(target.current, 1, context) - self._drafting.cost.seconds(1)
        self._drafting.cost.context_seconds = max(0.0, more) / max(1, context)

    def follow(self, target: ModelRunner) -> None:
        """Measure again where the compiled forward has come since."""
        if target.compiled is not self._compiled:
            self.measure(target)

    def observe(self, segments: Sequence[Segment], seconds: float) -> None:
        """A forward over these segments took `seconds`, sampling included."""
        rows, context = sum(len(s.tokens) for s in segments), sum(s.table.length for s in segments)
        if any(not s.logits for s in segments):
            self._prefill.observe(rows, context, seconds)
        self._drafting.cost.observe(rows, seconds, context)

    def token_seconds(self) -> float:
        """What a token of a long prompt costs."""
        rows = self._prefill.most_rows
        return self._drafting.cost.at_most(rows) / rows
