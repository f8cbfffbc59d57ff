"""How much is drafted: what rows cost, what drafts bring, who is asked."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel

from specgen import (
    TokenTree,
)
from specgen.draft import manager as drafting
from specgen.draft.backoff import DrafterBackoff, DrafterHistory
from specgen.draft.budget import AcceptanceModel, RowCost, survivals, worthwhile
from specgen.tree import chain
from specgen.types import EMPTY_TREE
from tests.support.bench import PROMPTS, Bench, echoes, first_layers, greedy
from tests.support.core import Scripted, all_drafters
from tests.support.tiny import VOCABULARY, build

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama")


@pytest.fixture(scope="module")
def smaller(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its last layer: right now and then."""
    return first_layers(model, 2)


@pytest.fixture(scope="module")
def bench(model: PreTrainedModel, smaller: PreTrainedModel) -> Bench:
    return Bench(model, all_drafters(smaller))


class FixedCost:
    """A row costs two hundredths of a forward, on any machine; what it hangs under costs nothing."""

    def observe(self, rows: int, seconds: float, context: int = 0) -> None:
        pass

    def reading(self, context: int, rows: int) -> float:
        return 0.0

    def seconds(self, rows: int) -> float:
        return 1.0 + 0.02 * rows


def fixed(bench: Bench) -> Bench:
    bench.core.drafting.cost = FixedCost()  # type: ignore[assignment]
    return bench


def test_a_useless_drafter_is_dropped_within_a_few_dozen_steps(model: PreTrainedModel) -> None:
    """It promises much and is never right; other requests of the same engine profit from what was learned."""

    def lies(ids: list[int]) -> TokenTree:
        return chain([(said[(len(ids) - 6) % len(said)] + 1) % VOCABULARY] * 6, 0.95)

    said = greedy(model, PROMPTS[0], 100)
    bench = fixed(Bench(model, {"liar": Scripted(lies)}))
    result = bench.alone(PROMPTS[0], max_tokens=100)
    drafted = result.stats.per_step_drafted
    assert list(result.ids) == said
    assert drafted[0] > 0
    assert sum(drafted[:40]) < 80
    assert sum(drafted[40:]) == 0
    again = bench.alone(PROMPTS[0], max_tokens=40)
    assert max(again.stats.per_step_drafted) <= 1
    assert sum(again.stats.per_step_drafted[20:]) == 0
    assert again.stats.by_drafter["liar"].offered > 50, "it is still listened to, which costs next to nothing"


def test_a_drafter_that_is_right_is_used_the_more_the_longer(model: PreTrainedModel) -> None:
    """It promises little, and is always right: what is seen wins over what is said."""
    said = greedy(model, PROMPTS[0], 100)
    modest = Scripted(lambda ids: chain(said[len(ids) - 6 : len(ids) + 2] or [0], 0.3))
    bench = fixed(Bench(model, {"modest": modest}))
    stats = bench.alone(PROMPTS[0], max_tokens=100).stats
    assert stats.per_step_drafted[0] < 4
    assert max(stats.per_step_drafted) == 8
    share = stats.by_drafter["modest"]
    assert (share.verified, share.accepted) == (stats.num_draft_tokens, stats.num_accepted_draft_tokens)
    assert share.offered > share.verified, "what was offered and not verified earns nothing"


@pytest.mark.parametrize("adaptive", [True, False])
def test_a_slow_and_useless_drafter_is_asked_ever_less(model: PreTrainedModel, adaptive: bool) -> None:
    """Unless the request says to draft whatever it costs."""
    asked: list[int] = []

    def slow(ids: list[int]) -> TokenTree:
        asked.append(len(ids))
        time.sleep(0.02)
        return EMPTY_TREE

    bench = fixed(Bench(model, {"slow": Scripted(slow)}))
    result = bench.alone(PROMPTS[0], max_tokens=60, speculation={"adaptive": adaptive})
    assert list(result.ids) == greedy(model, PROMPTS[0], 60)
    assert len(asked) == 59 if not adaptive else 4 <= len(asked) < 20


def test_what_rows_cost_counts_against_a_drafter(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of five guesses are right, which is worth more than drafting takes, yet not more than drafting and rows."""
    said = greedy(model, PROMPTS[0], 100)
    seconds = [0.0]
    monkeypatch.setattr(drafting, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))

    def guess(ids: list[int]) -> TokenTree:
        seconds[0] += 0.5
        place = len(ids) - len(PROMPTS[0])
        wrong = place % 5 < 2
        return chain([(said[place] + wrong) % VOCABULARY], 0.6)

    class Dear(FixedCost):
        def __init__(self, row: float) -> None:
            self.row = row

        def seconds(self, rows: int) -> float:
            return 1.0 + self.row * rows

    def asked(row: float) -> float:
        bench = Bench(model, {"slow": Scripted(guess)})
        bench.core.drafting.cost = Dear(row)  # type: ignore[assignment]
        stats = bench.alone(PROMPTS[0], max_tokens=100).stats
        return stats.by_drafter["slow"].asked / stats.num_spec_steps

    assert asked(row=0.0) > 0.8
    assert asked(row=1.0) < 0.3


def test_trees_shrink_as_the_batch_grows() -> None:
    """Where rows cost time, the most promising nodes of the whole batch come first."""

    class Busy(FixedCost):
        def seconds(self, rows: int) -> float:
            return 1.0 + 0.1 * max(0, rows - 8)

    tree = chain(tuple(range(8)), 0.7)
    sizes = []
    for batch in (1, 2, 4, 16):
        chosen, _ = worthwhile([tree] * batch, batch, Busy())  # type: ignore[arg-type]
        sizes.append(sum(map(len, chosen)) / batch)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] >= 5
    assert sizes[-1] < 3


@pytest.mark.parametrize("seed", range(40))
def test_what_is_worth_its_row_is_closed_under_parents_and_grows_with_confidence(seed: int) -> None:
    """No node without its parent; no node left out that is likelier than one taken; none at all when rows are dear."""
    rng = random.Random(seed)
    trees = []
    for _ in range(rng.randint(1, 5)):
        size = rng.randint(0, 20)
        parents = tuple(rng.randrange(-1, node) if node else -1 for node in range(size))
        confidence = tuple(rng.choice((0.0, 0.1, 0.5, 0.9, 1.0)) for _ in range(size))
        trees.append(TokenTree(tuple(range(size)), parents, confidence))

    class Cost(FixedCost):
        def __init__(self, dear: float) -> None:
            self.dear = dear

        def seconds(self, rows: int) -> float:
            return 1.0 + self.dear * rows

    sizes = []
    for dear in (0.0, 0.01, 0.1, 0.5, 1e9):
        chosen, _ = worthwhile(trees, len(trees), Cost(dear))  # type: ignore[arg-type]
        taken, left = [], [0.0]
        for tree, nodes in zip(trees, chosen, strict=True):
            assert len(set(nodes)) == len(nodes)
            assert all(tree.parents[node] in (-1, *nodes) for node in nodes)
            for node, survival in enumerate(survivals(tree)):
                (taken if node in nodes else left).append(survival)
        assert min(taken, default=1.0) >= max(left) or not taken
        sizes.append(len(taken))
    assert sizes == sorted(sizes, reverse=True)
    positive = sum(survival > 0 for tree in trees for survival in survivals(tree))
    assert sizes[0] == positive, "where rows are free, everything that may be right is verified"


def test_the_choice_is_the_best_there_is() -> None:
    """Against all prefix-closed choices, for small trees: most tokens per second."""
    rng = random.Random(0)
    cost = RowCost()
    cost.observe(1, 1.0)
    cost.observe(9, 1.5)
    for _ in range(30):
        parents = tuple(rng.randrange(-1, node) if node else -1 for node in range(7))
        tree = TokenTree(tuple(range(7)), parents, tuple(rng.random() for _ in range(7)))
        survival = survivals(tree)

        def rate(nodes: Sequence[int], survival: list[float] = survival) -> float:
            return (1 + sum(survival[node] for node in nodes)) / cost.seconds(1 + len(nodes))

        every = [[node for node in range(7) if mask >> node & 1] for mask in range(2**7)]
        closed = [nodes for nodes in every if all(parents[node] in (-1, *nodes) for node in nodes)]
        chosen, expected = worthwhile([tree], 1, cost)
        assert rate(chosen[0]) == pytest.approx(max(map(rate, closed)))
        assert expected == pytest.approx(rate(chosen[0]))


def test_what_one_sequence_may_not_take_is_left_for_the_others() -> None:
    """And the time that is gone makes every further token cheaper."""

    class Steep(FixedCost):
        def seconds(self, rows: int) -> float:
            return 1.0 + 0.3 * rows

    sure, fair = chain((1, 2, 3, 4), 0.95), chain((5, 6, 7, 8), 0.9)
    chosen, _ = worthwhile([sure, fair], 2, Steep(), most=[1, 4])  # type: ignore[arg-type]
    assert chosen[0] == [0]
    assert chosen[1]
    few, many = (
        sum(map(len, worthwhile([chain(tuple(range(9)), 0.8)], 1, Steep(), spent=gone)[0]))  # type: ignore[arg-type]
        for gone in (0.0, 5.0)
    )
    assert few < many


def test_a_sequence_that_offers_more_gets_more_of_the_rows() -> None:
    """By marginal gain over the whole batch: the same rows, wherever they bring most."""

    class Busy(FixedCost):
        def seconds(self, rows: int) -> float:
            return 1.0 + 0.2 * max(0, rows - 8)

    sure, vague = chain(tuple(range(8)), 0.95), chain(tuple(range(8)), 0.4)
    chosen, _ = worthwhile([sure, vague, vague, EMPTY_TREE], 4, Busy())  # type: ignore[arg-type]
    assert len(chosen[0]) > 2 * len(chosen[1]) == 2 * len(chosen[2])


def test_sixty_wrong_nodes_a_step_cost_no_rows(model: PreTrainedModel) -> None:
    """However sure of itself, and however many requests it drafts for: at most some rows of the first steps."""
    bench = fixed(Bench(model, {"echo": echoes(0.0, siblings=1, depth=21, confidence=0.9)}))
    first = bench.alone(PROMPTS[0], max_tokens=100, prediction=greedy(model, PROMPTS[0], 100)).stats
    assert first.per_step_drafted[0] > 20
    assert sum(first.per_step_drafted) < 100
    assert sum(first.per_step_drafted[20:]) == 0
    share = first.by_drafter["echo"]
    assert share.offered >= 12 * share.asked, "it goes on offering as long as it is asked"
    assert share.offered < 24 * share.asked, "but is asked for no more than might be taken"
    truths = [greedy(model, prompt, 40) for prompt in PROMPTS]
    names = [bench.add(prompt, max_tokens=40, prediction=truth) for prompt, truth in zip(PROMPTS, truths, strict=True)]
    bench.run()
    for name, truth in zip(names, truths, strict=True):
        result = bench.result(name)
        assert list(result.ids) == truth
        assert result.stats.by_drafter["echo"].verified == result.stats.num_draft_tokens <= 2


def test_who_only_repeats_a_cheaper_drafter_is_asked_ever_less(model: PreTrainedModel) -> None:
    """Alone the same drafter pays, slow as it is."""
    said = greedy(model, PROMPTS[0], 100)

    def slow(ids: list[int]) -> TokenTree:
        time.sleep(0.02)
        return chain(said[len(ids) - 6 : len(ids) - 4] or [0], 0.9)

    def asked(drafters: Sequence[str]) -> dict[str, int]:
        bench = fixed(Bench(model, {"slow": Scripted(slow), "echo": echoes(1.0, siblings=0, depth=2)}))
        options = {"prediction": said, "speculation": {"drafters": drafters}}
        result = bench.alone(PROMPTS[0], max_tokens=100, **options)
        assert list(result.ids) == said
        return {name: share.asked for name, share in result.stats.by_drafter.items()}

    assert asked(["slow"])["slow"] >= 30
    both = asked(["slow", "echo"])
    assert both["echo"] >= 30
    assert both["slow"] <= 8


def test_the_cost_of_rows_is_learned_from_forwards() -> None:
    """Never falling, between the sizes that were seen, and following the machine when it changes."""
    cost = RowCost()
    assert cost.seconds(3) < cost.seconds(4), "before any forward, a row is worth something"
    for rows, seconds in ((1, 0.01), (10, 0.02), (100, 0.08)):
        for _ in range(20):
            cost.observe(rows, seconds)
    assert cost.seconds(1) == pytest.approx(0.01)
    assert cost.seconds(10) == pytest.approx(0.02)
    assert cost.seconds(5) == pytest.approx(0.01 + 0.01 * 4 / 9)
    assert cost.seconds(100) == pytest.approx(0.08)
    assert cost.seconds(200) > 0.08
    assert all(fewer <= more for fewer, more in pairwise(cost.seconds(rows) for rows in range(1, 300)))
    for _ in range(60):
        cost.observe(10, 0.06)
    assert cost.seconds(10) == pytest.approx(0.06, rel=0.05)
    assert all(fewer <= more for fewer, more in pairwise(cost.seconds(rows) for rows in range(1, 300)))


def test_a_row_more_costs_no_more_than_those_before_it() -> None:
    """Behind a prompt of hundreds of rows, too."""
    cost = RowCost()
    cost.observe(400, 0.4)
    assert cost.seconds(410) == pytest.approx(0.41)


def test_reading_what_rows_hang_under_is_not_counted_as_theirs() -> None:
    """Steps of more sequences have more rows and more to read: a row costs the same in either."""
    cost = RowCost(context_seconds=0.00001)
    for _ in range(20):
        cost.observe(2, 0.012, context=200)
        cost.observe(16, 0.040, context=1600)
    assert cost.seconds(2) == pytest.approx(0.010)
    assert cost.seconds(16) == pytest.approx(0.024)
    assert cost.reading(200, 2) == pytest.approx(0.002)
    cost.observe(2, 0.012, context=1_000_000)
    assert cost.seconds(2) > 0.0, "a forward is never all reading"
    assert cost.reading(1_000_000, 2) == pytest.approx(3 * cost.seconds(2)), "and never expected to be"


def test_an_engine_knows_what_its_context_costs(model: PreTrainedModel) -> None:
    """Measured over memory that was written to: what nobody wrote to is read in no time."""
    core = Bench(model, {"echo": echoes(0.5)}).core
    pool = core.target.pool
    for stack in pool.stacks:
        stack.view(torch.uint8).fill_(255)
    before = core.target.forwards, core.target.rows, pool.free_pages
    core._costs.measure_context(core.target)
    assert core.drafting.cost.context_seconds >= 0.0
    assert (core.target.forwards, core.target.rows, pool.free_pages) == before
    assert any((stack == 0).all(dim=-1).any() for stack in pool.stacks)


def test_rows_are_measured_again_while_requests_hold_the_pages(model: PreTrainedModel) -> None:
    """As after a compilation in the background: what finds no page is not measured, and nobody is sent away."""
    bench = Bench(model, {"echo": echoes(0.5)})
    core, pool = bench.core, bench.core.target.pool
    known = core.drafting.cost.context_seconds
    taken = pool.take(pool.free_pages)
    core._costs.measure(core.target)
    pool.drop(taken)
    assert core.drafting.cost.context_seconds == known
    assert list(bench.alone(PROMPTS[0], max_tokens=8).ids) == greedy(model, PROMPTS[0], 8)


def test_one_slow_forward_does_not_spoil_the_cost() -> None:
    """The machine did something else."""
    cost = RowCost()
    for _ in range(10):
        cost.observe(4, 0.01)
    cost.observe(4, 30.0)
    assert cost.seconds(4) < 0.02


def test_a_fast_measurement_of_many_rows_does_not_make_few_rows_dear() -> None:
    """Noise: 9 rows looked faster than 4, so 4 rows were slow by accident. The cost stays monotone."""
    cost = RowCost()
    cost.observe(4, 0.02)
    cost.observe(9, 0.01)
    assert [cost.seconds(rows) for rows in (4, 6, 9)] == [0.01, 0.01, 0.01]


def test_confidence_is_replaced_by_what_was_seen() -> None:
    """A liar sinks, a pessimist rises, and one request learns from another."""
    everyone = AcceptanceModel()
    here = AcceptanceModel(everyone)
    assert here.survival(0.9) == pytest.approx(0.9)
    for _ in range(60):
        assert here.observe(chain((1, 2), 0.9), (5, 6)) == 0
        assert here.observe(chain((1, 2), 0.2), (1, 2, 3)) == 2
    assert here.survival(0.9) < 0.05
    assert here.survival(0.2) > 0.95
    assert here.survival(0.55) == pytest.approx(0.55), "of another confidence nothing is known"
    elsewhere = AcceptanceModel(everyone)
    assert elsewhere.survival(0.9) < 0.1
    assert elsewhere.calibrated(chain((7,), 0.9), [False]) == [elsewhere.survival(0.9)]


def test_only_nodes_under_the_committed_path_are_judged() -> None:
    """The child of a wrong node was neither right nor wrong; nor was what hangs behind the last committed token."""
    calibration = AcceptanceModel()
    wrong_branch = TokenTree((9, 1, 2), (-1, 0, 1), (0.5, 0.25, 0.75))
    for _ in range(40):
        assert calibration.observe(wrong_branch, (4,)) == 0
        assert calibration.observe(chain((4, 8), 0.0), (4,)) == 1
    assert calibration.survival(0.5) < 0.1
    assert calibration.survival(0.25) == pytest.approx(0.25)
    assert calibration.survival(0.75) == pytest.approx(0.75)
    assert calibration.survival(0.0) > 0.8


def asked(pace: DrafterBackoff, gained: int, seconds: float, steps: int) -> int:
    """How often the drafter is asked in so many steps, when each proposal costs `seconds` and brings `gained`."""
    count = 0
    for _ in range(steps):
        if pace.ready(0.01):
            count += 1
            pace.observe(gained, seconds, token_seconds=0.01)
    return count


def test_a_slow_drafter_that_brings_nothing_is_asked_ever_less() -> None:
    pace = DrafterBackoff(DrafterHistory())
    counts = [asked(pace, gained=0, seconds=0.01, steps=100) for _ in range(6)]
    assert counts[0] <= 10
    assert counts[-1] <= 1
    assert sum(counts) > 5, "but it gets another chance now and then"


def test_a_drafter_that_pays_or_costs_nothing_is_always_asked() -> None:
    assert asked(DrafterBackoff(DrafterHistory()), gained=2, seconds=0.01, steps=100) == 100
    assert asked(DrafterBackoff(DrafterHistory()), gained=0, seconds=0.00005, steps=100) == 100


def test_new_sequences_know_that_a_drafter_did_not_pay() -> None:
    """Short requests would else give it four trials each, for ever; and yet it is tried now and then."""
    everyone = DrafterHistory()
    counts = [asked(DrafterBackoff(everyone), gained=0, seconds=0.01, steps=20) for _ in range(60)]
    assert counts[0] <= 5
    assert sum(counts[1:]) < 20
    assert sum(counts[30:]) > 0
    for _ in range(60):
        asked(DrafterBackoff(everyone), gained=4, seconds=0.01, steps=20)
    assert asked(DrafterBackoff(everyone), gained=4, seconds=0.01, steps=20) == 20


def test_a_drafter_that_pays_in_some_sequences_is_tried_in_each() -> None:
    """Two of three are no place for it; in the third it is asked in nearly every step all the same."""
    everyone = DrafterHistory()
    for number in range(60):
        good = number % 3 == 0
        count = asked(DrafterBackoff(everyone), gained=3 if good else 0, seconds=0.01, steps=50)
        assert count >= 45 if good else count <= 8


def test_an_answer_that_takes_longer_than_its_tree_could_save_is_one_trial_too_many() -> None:
    assert asked(DrafterBackoff(DrafterHistory()), gained=0, seconds=0.7, steps=8) == 1


def test_a_drafter_that_gets_better_is_asked_again() -> None:
    pace = DrafterBackoff(DrafterHistory())
    asked(pace, gained=0, seconds=0.01, steps=60)
    assert asked(pace, gained=4, seconds=0.01, steps=400) > 200
