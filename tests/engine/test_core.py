"""The engine's loop, driven by hand: a test adds requests between steps and looks at what each step did."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from specgen.engine.scheduler import ScheduledSequence
from specgen.kv.pool import BlockTable
from tests.support.bench import PROMPTS, Bench, echoes, first_layers, greedy
from tests.support.core import BUSH, EAGER, MODES, Scripted, all_drafters, drafted_by
from tests.support.tiny import VOCABULARY, build

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama")


@pytest.fixture(scope="module")
def smaller(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its last layer: right now and then."""
    return first_layers(model, 2)


def test_a_step_is_one_forward_and_a_tree_of_n_nodes_is_n_more_rows(model: PreTrainedModel) -> None:
    """Whatever the batch; a prompt is its tokens, a text one row per step, a tree its nodes."""
    bench = Bench(model, {"bush": Scripted(lambda ids: BUSH)})
    rows = bench.target.rows
    bench.add(PROMPTS[0], max_tokens=16, speculation=EAGER)
    bench.add(PROMPTS[3], max_tokens=16, speculation="off")
    bench.step()
    assert bench.target.rows - rows == len(PROMPTS[0]) + len(PROMPTS[3]) + len(BUSH)
    rows = bench.target.rows
    bench.step()
    assert bench.target.rows - rows == 1 + 1 + len(BUSH)
    bench.run()


def test_the_first_tree_stands_under_the_prompt(model: PreTrainedModel) -> None:
    """A whole prompt and a tree below it are one forward: the first step may already commit several tokens."""
    said = greedy(model, PROMPTS[0], 12)
    bench = Bench(model, {"echo": echoes(1.0, siblings=0, depth=5)})
    bench.add(PROMPTS[0], max_tokens=12, prediction=said, speculation=EAGER)
    [output] = bench.step()
    assert list(output.tokens) == said[:6]
    bench.run()


def test_no_node_is_drafted_behind_the_last_token_that_may_be_said(model: PreTrainedModel) -> None:
    bench = Bench(model, {"echo": echoes(1.0, siblings=0, depth=8)})
    said = greedy(model, PROMPTS[0], 12)
    for most in (1, 2, 5, 9):
        rows = bench.target.rows
        result = bench.alone(PROMPTS[0], max_tokens=most, prediction=said, speculation=EAGER)
        assert list(result.ids) == said[:most]
        assert bench.target.rows - rows == len(PROMPTS[0]) + most - 1, "a row for each token but the last"


@pytest.mark.parametrize("most", [1, 3, 10, 63])
@pytest.mark.parametrize("adaptive", [True, False])
def test_a_request_bounds_its_trees(model: PreTrainedModel, most: int, adaptive: bool) -> None:
    """Over all drafters together."""
    drafters = {"a": echoes(1.0, siblings=3), "b": echoes(0.5, siblings=5, seed=1), "c": echoes(0.0)}
    bench = Bench(model, drafters)
    said = greedy(model, PROMPTS[0], 20)
    speculation = {"max_nodes": most, "adaptive": adaptive}
    result = bench.alone(PROMPTS[0], max_tokens=20, prediction=said, speculation=speculation)
    assert list(result.ids) == said
    assert max(result.stats.per_step_drafted) <= most
    if not adaptive:
        assert max(result.stats.per_step_drafted) == most


def test_a_long_prompt_is_read_in_chunks_while_others_speak(model: PreTrainedModel) -> None:
    """No forward reads more prompt than allowed, and every running stream gets its token in every step."""
    bench = Bench(model, {"bush": Scripted(lambda ids: BUSH)}, max_prefill_tokens=16)
    streams = [bench.add(PROMPTS[number], max_tokens=40, speculation=EAGER) for number in (0, 1)]
    bench.step()
    long = [token % VOCABULARY for token in range(3, 103)]
    slow = bench.add(long, max_tokens=5, speculation="off")
    others = 2 * (1 + len(BUSH))
    for number in range(7):
        rows = bench.target.rows
        outputs = bench.step()
        spoke = {output.request_id for output in outputs}
        assert set(streams) <= spoke
        assert (slow in spoke) == (number == 6), "100 tokens are seven chunks of 16"
        assert bench.target.rows - rows == others + (16 if number < 6 else 4)
    bench.run()
    assert list(bench.result(slow).ids) == greedy(model, long, 5)
    assert list(bench.result(streams[0]).ids) == greedy(model, PROMPTS[0], 40)


def test_prompts_share_the_room_for_prompts(model: PreTrainedModel) -> None:
    """In order of arrival; who finds none left waits."""
    bench = Bench(model, max_prefill_tokens=16)
    names = [bench.add(PROMPTS[number], max_tokens=3) for number in (2, 2, 0)]
    rows = bench.target.rows
    first: dict[str, int] = {}
    for step in range(8):
        before = len(bench.core.scheduler.running)
        for output in bench.step():
            first.setdefault(output.request_id, step)
        assert bench.target.rows - rows <= 16 + before
        rows = bench.target.rows
    bench.run()
    assert [first[name] for name in names] == [2, 4, 5]
    assert list(bench.result(names[2]).ids) == greedy(model, PROMPTS[0], 3)


def test_a_turn_stays_what_it_was_when_it_was_planned(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is committed of it afterwards."""
    bench = Bench(model, max_prefill_tokens=16)
    schedule, work = bench.core.scheduler.schedule, []

    def noted() -> list[ScheduledSequence]:
        scheduled = schedule()
        work.extend(scheduled)
        return scheduled

    monkeypatch.setattr(bench.core.scheduler, "schedule", noted)
    bench.alone(PROMPTS[2], max_tokens=3)
    expected = [(16, False), (16, False), (8, True), (1, True), (1, True)]
    assert [(item.num_tokens, item.complete) for item in work] == expected


def test_no_more_run_than_allowed(model: PreTrainedModel) -> None:
    bench = Bench(model, max_num_seqs=3)
    names = [bench.add(PROMPTS[number], max_tokens=4) for number in range(8)]
    while bench.core.busy:
        assert len(bench.step()) <= 3
        assert len(bench.core.scheduler.running) <= 3
    order = [name for name, _ in bench.results]
    assert order == names, "first come, first served"


def test_the_engine_counts_what_it_does(model: PreTrainedModel) -> None:
    bench = Bench(model, {"echo": echoes(1.0, siblings=0, depth=3)})
    said = greedy(model, PROMPTS[0], 12)
    name = bench.add(PROMPTS[0], max_tokens=12, prediction=said, speculation=EAGER)
    bench.cancel(bench.add(PROMPTS[1], max_tokens=12))
    bench.run()
    stats = bench.result(name).stats
    counters = bench.core.counters
    assert (counters.steps, counters.committed, counters.drafted, counters.accepted) == (3, 12, 9, 9)
    assert counters.finished == {"cancelled": 1, "length": 1}
    assert (stats.num_spec_steps, stats.per_step_accepted, stats.per_step_drafted) == (3, (3, 3, 3), (3, 3, 3))
    assert (stats.mean_acceptance_length, stats.draft_acceptance_rate) == (4.0, 1.0)
    assert stats.acceptance_histogram == (0, 0, 0, 3)
    share = stats.by_drafter["echo"]
    assert (share.offered, share.verified, share.accepted, share.disabled) == (9, 9, 9, None)
    assert bench.result(name).usage.total_tokens == len(PROMPTS[0]) + 12


@pytest.mark.parametrize("mode", ["off", "everything, whatever it costs"])
def test_preemption_changes_nothing(model: PreTrainedModel, smaller: PreTrainedModel, mode: str) -> None:
    """Eight texts of up to 80 tokens in a pool of 160: those admitted last give way and read their text again."""
    bench = Bench(model, all_drafters(smaller), kv_tokens=160)
    names = []
    for number, prompt in enumerate(PROMPTS):
        sampled = {"temperature": 1.5, "seed": number} if number % 2 else {}
        names.append(bench.add(prompt, max_tokens=40, speculation=MODES[mode], **sampled))
    bench.run()
    assert bench.core.scheduler.preemptions > 0
    roomy = Bench(model)
    for number, (name, prompt) in enumerate(zip(names, PROMPTS, strict=True)):
        sampled = {"temperature": 1.5, "seed": number} if number % 2 else {}
        expected = roomy.alone(prompt, max_tokens=40, **sampled)
        assert bench.result(name).ids == expected.ids
        assert sampled or list(expected.ids) == greedy(model, prompt, 40)
    assert roomy.core.scheduler.preemptions == 0


def test_a_text_may_fill_the_whole_pool(model: PreTrainedModel) -> None:
    """Drafting takes no page that the text needs."""
    bench = Bench(model, {"bush": Scripted(lambda ids: BUSH)}, kv_tokens=48)
    result = bench.alone(PROMPTS[0], speculation=EAGER)
    assert (result.finish_reason, result.usage.total_tokens) == ("length", 48)
    assert list(result.ids) == greedy(model, PROMPTS[0], 42)


def test_where_pages_run_out_texts_go_on_without_drafts(model: PreTrainedModel) -> None:
    """Two texts that fill the pool together still end, one after the other if need be."""
    bench = Bench(model, {"bush": Scripted(lambda ids: BUSH)}, kv_tokens=96)
    names = [bench.add(PROMPTS[number], max_tokens=60, speculation=EAGER) for number in (0, 3)]
    bench.run()
    for name, number in zip(names, (0, 3), strict=True):
        assert list(bench.result(name).ids) == greedy(model, PROMPTS[number], 60)


def test_a_cancelled_request_gives_everything_back_at_once(model: PreTrainedModel, smaller: PreTrainedModel) -> None:
    """Waiting, reading its prompt, or speaking; its other samples go with it, its neighbour stays."""
    drafter = drafted_by(smaller)
    bench = Bench(model, {"draft-model": drafter}, max_prefill_tokens=8, max_num_seqs=3)
    stays = bench.add(PROMPTS[0], max_tokens=20)
    bench.step()
    leaves = bench.add(PROMPTS[2], max_tokens=20, n=3)
    bench.step()
    free = bench.target.pool.free_pages
    outputs = bench.cancel(leaves)
    assert [output.result.finish_reason for output in outputs if output.result] == ["cancelled"] * 3
    assert bench.target.pool.free_pages > free
    assert len(bench.core.scheduler.running) == 1
    assert not bench.core.scheduler.waiting
    assert bench.cancel(leaves) == []
    assert bench.cancel("nobody") == []
    bench.run()
    assert list(bench.result(stays).ids) == greedy(model, PROMPTS[0], 20)
    assert not drafter.model.pool.open_tables


def test_a_request_is_queued_as_a_whole_or_not_at_all(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the second of three sequences cannot be made, the first gives back what it was given."""
    drafter = Scripted(lambda ids: BUSH)
    bench = Bench(model, {"bush": drafter})
    opened, faults = bench.target.pool.open, iter([None, torch.OutOfMemoryError("no memory for a table")])

    def opens_one() -> BlockTable:
        if fault := next(faults, None):
            raise fault
        return opened()

    monkeypatch.setattr(bench.target.pool, "open", opens_one)
    with pytest.raises(torch.OutOfMemoryError, match="no memory for a table"):
        bench.add(PROMPTS[0], max_tokens=4, n=3)
    assert not bench.core.busy
    assert (drafter.sessions, bench.target.pool.open_tables) == (0, 0)
    assert list(bench.alone(PROMPTS[0], max_tokens=4).ids) == greedy(model, PROMPTS[0], 4)
