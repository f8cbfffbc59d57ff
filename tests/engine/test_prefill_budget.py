"""How many rows of prompts stand in a step: by their number, and by time while others decode."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count, pairwise

import pytest
from transformers import PreTrainedModel

from specgen import Engine
from specgen.draft.budget import RowCost
from specgen.engine.core import EngineCore
from specgen.engine.prefill_budget import PrefillBudget
from specgen.model.runner import load_runner
from tests.support.tiny import build

LONG = [5 + n % 60 for n in range(110)]


class PerRow(RowCost):
    """Every row takes as long as the last one, whatever is measured."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        super().observe(1 << 20, seconds * (1 << 20))
        self.each = seconds

    def observe(self, rows: int, seconds: float, context: int = 0) -> None:
        pass

    def seconds(self, rows: int) -> float:
        return self.each * rows


def budget(cost: RowCost, seconds: float | None = 0.2, most: int = 512) -> PrefillBudget:
    return PrefillBudget(most, seconds, lambda: cost)


def test_nobody_decodes_and_a_step_is_full() -> None:
    assert budget(PerRow(1.0)).rows(0, 0) == 512


def test_as_many_rows_as_the_time_allows_beside_those_that_decode() -> None:
    assert budget(PerRow(0.002)).rows(10, 0) == 90
    assert budget(PerRow(0.002)).rows(60, 0) == 40
    assert budget(PerRow(0.0001)).rows(10, 0) == 512
    assert budget(PerRow(0.002), None).rows(10, 0) == 512, "rows alone"


def test_what_rows_hang_under_takes_its_time_too() -> None:
    cost = PerRow(0.002)
    cost.context_seconds = 0.00001
    assert budget(cost).rows(10, 10_000) == 40


def test_a_prompt_goes_on_however_slow_the_machine_is() -> None:
    assert budget(PerRow(60.0)).rows(1, 0) == 16
    assert budget(PerRow(60.0), most=5).rows(1, 0) == 5


def test_before_any_measurement_steps_are_small() -> None:
    assert budget(RowCost()).rows(1, 0) == 16


def test_beyond_what_was_measured_rows_are_not_believed_to_be_cheap() -> None:
    """32 rows took 0.05 s. 512 may take 0.8 s, though a hundredth for each row more is what is likely: 0.29 s."""
    cost = RowCost()
    cost.observe(32, 0.05)
    assert cost.at_most(32) == cost.seconds(32) == pytest.approx(0.05)
    assert cost.at_most(512) == pytest.approx(0.8)
    assert budget(cost).rows(8, 0) == 128 - 8
    cost.observe(128, 0.08)
    assert budget(cost).rows(8, 0) == 320 - 8, "it grows as larger steps turn out to be cheap"
    assert all(fewer <= more for fewer, more in pairwise(map(cost.at_most, range(1, 600))))


def test_steps_that_take_longer_than_expected_become_smaller_and_grow_again() -> None:
    """Deep in a long prompt each row looks back on all of it."""
    cut = budget(PerRow(0.0019))
    for _ in range(20):
        cut.observe(100, 0, 0.38)
    assert cut.rows(1, 0) == 51
    for _ in range(20):
        cut.observe(100, 0, 0.1)
    assert cut.rows(1, 0) == 104, "what is quicker than expected the cost itself learns"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama", max_position_embeddings=512)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """No forward takes any time: expected is what the test says."""
    ticks = count()
    monkeypatch.setattr("specgen.engine.core.time.perf_counter", lambda: next(ticks) * 1e-9)


def prompt_rows(engine: Engine, cost: RowCost) -> Callable[[], list[int]]:
    """Gives the engine this cost; answers the rows of the prompt's steps beside one that decodes."""
    core: EngineCore = engine._core
    core.drafting.cost = cost
    schedule, seen = core.scheduler.schedule, []

    def noted() -> list[object]:
        work = schedule()
        counts = [item.num_tokens for item in work]
        if len(work) == 2 and 1 in counts:
            seen.append(max(counts))
        return list(work)

    core.scheduler.schedule = noted  # type: ignore[method-assign, assignment]
    return lambda: seen


@pytest.fixture
def beside(model: PreTrainedModel, clock: None) -> Callable[..., tuple[list[int], list[list[int]]]]:
    """A long prompt that comes while another text is written: rows of its steps, and both texts."""

    def run(cost: RowCost, **options: object) -> tuple[list[int], list[list[int]]]:
        with Engine(model, drafters=[], kv_tokens=1024, batch_invariant=False, prefix_cache=False, **options) as engine:
            rows = prompt_rows(engine, cost)
            with engine.stream([7, 8, 9], max_tokens=60, temperature=0, ignore_eos=True) as first:
                next(iter(first))
                long = list(engine.generate(LONG, max_tokens=8, temperature=0, ignore_eos=True).ids)
                return rows(), [list(first.results()[0].ids), long]

    return run


def test_chunks_beside_a_stream_are_cut_by_time_and_change_no_token(
    model: PreTrainedModel, beside: Callable[..., tuple[list[int], list[list[int]]]]
) -> None:
    whole, texts = beside(PerRow(0.005), inter_token_seconds=None)
    assert whole[:1] == [110]
    cut, same = beside(PerRow(0.005))
    assert cut[:3] == [39, 39, 32], "40 rows in 0.2 s, one of which decodes"
    assert same == texts
    small, same = beside(PerRow(0.005), inter_token_seconds=0.001)
    assert small[:7] == [16, 16, 16, 16, 16, 16, 14]
    assert same == texts


def test_alone_a_prompt_is_read_at_once(model: PreTrainedModel) -> None:
    with Engine(model, drafters=[], kv_tokens=1024, prefix_cache=False) as engine:
        engine._core.drafting.cost = PerRow(60.0)
        steps = engine.counters.steps
        engine.generate(LONG, max_tokens=1)
        assert engine.counters.steps == steps + 1


def test_without_drafters_rows_are_measured_too(model: PreTrainedModel) -> None:
    target = load_runner(model, kv_tokens=512)
    assert EngineCore(target, {}).drafting.cost.most_rows == 0
    core = EngineCore(target, {}, inter_token_seconds=0.2)
    assert core.drafting.cost.most_rows == 32
    assert target.forwards == 0, "what is measured is not counted"
