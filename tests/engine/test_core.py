"""The engine's loop, driven by hand: a test adds requests between steps and looks at what each step did."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from itertools import count, pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from specgen import (
    Drafter,
    DrafterMismatch,
    DrafterSetup,
    DraftHints,
    DraftSession,
    Engine,
    InvalidRequest,
    RequestCancelled,
    Result,
    SamplingParams,
    Speculation,
    TokenTree,
)
from specgen.draft import manager as drafting
from specgen.draft.backoff import DrafterBackoff, DrafterHistory
from specgen.draft.budget import AcceptanceModel, RowCost, likeliest, survivals, worthwhile
from specgen.draft.drafters.draft_model import DraftModel
from specgen.draft.drafters.ngram import NgramIndex, continuations
from specgen.draft.drafters.prediction import Prediction
from specgen.draft.drafters.prompt_lookup import PromptLookup
from specgen.draft.features import Wanted
from specgen.draft.merge import Merged
from specgen.engine.outputs import SequenceOutput
from specgen.engine.scheduler import ScheduledSequence, Scheduler
from specgen.kv.pool import BlockTable
from specgen.model.runner import load_runner
from specgen.sampling.sampler import PositionKeys, gumbel_argmax, processors
from specgen.testing import DrafterContract
from specgen.tree import chain, check, depths, path
from specgen.types import EMPTY_TREE, MAX_TREE_NODES
from tests.support.bench import PROMPTS, Bench, echoes, first_layers, greedy
from tests.support.tiny import VOCABULARY, build

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama")


@pytest.fixture(scope="module")
def smaller(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its last layer: right now and then."""
    return first_layers(model, 2)


class Letters:
    """A tokenizer whose token t is the character behind the space by t, but for some that are two characters long."""

    eos_token_id = None
    chat_template = None

    def __init__(self, pairs: Mapping[int, str] | None = None) -> None:
        self.pairs = pairs or {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) - 32 for letter in text]

    def decode(self, token_ids: Sequence[int], **options: bool) -> str:
        return "".join(self.pairs.get(token, chr(32 + token)) for token in token_ids)


def drafted_by(model: PreTrainedModel, *, kv_tokens: int = 2048, **options: int) -> DraftModel:
    return DraftModel(load_runner(model, kv_tokens=kv_tokens), VOCABULARY, **options)


def all_drafters(smaller: PreTrainedModel) -> dict[str, Drafter]:
    plain = DrafterSetup(VOCABULARY)
    return {
        "prediction": Prediction(plain),
        "prompt-lookup": PromptLookup(plain),
        "draft-model": drafted_by(smaller, depth=3, width=2),
        "echo-0": echoes(0.0),
        "echo-half": echoes(0.5),
        "echo-1": echoes(1.0, siblings=2, depth=6),
    }


# The same text, however it is drafted.

MODES: dict[str, Any] = {
    "off": "off",
    "auto": "auto",
    "everything, whatever it costs": {"adaptive": False},
    "one node": {"adaptive": False, "max_nodes": 1},
    "prediction": {"adaptive": False, "drafters": ["prediction"]},
    "prompt lookup": {"adaptive": False, "drafters": ["prompt-lookup"]},
    "draft model": {"adaptive": False, "drafters": ["draft-model"]},
    "echo, never right": {"adaptive": False, "drafters": ["echo-0"]},
    "echo, half right": {"adaptive": False, "drafters": ["echo-half"]},
    "echo, always right": {"adaptive": False, "drafters": ["echo-1"]},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy with penalties": {
        "repetition_penalty": 1.4,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.7,
        "logit_bias": {42: 1.5, 7: -4.0},
    },
    "sampled": {"temperature": 1.5, "seed": 11},
    "sampled and filtered": {"temperature": 2.5, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "seed": 2**64 - 1},
    "sampled with bans": {"temperature": 2.0, "typical_p": 0.9, "no_repeat_ngram_size": 2, "seed": 5},
}
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def bench(model: PreTrainedModel, smaller: PreTrainedModel) -> Bench:
    return Bench(model, all_drafters(smaller))


class Drawn:
    """Lets transformers' own loop draw our coins: all but the token that is drawn is banned, behind all else."""

    def __init__(self, setting: Mapping[str, Any], prompt: Sequence[int]) -> None:
        params = SamplingParams.of(setting)
        self.processors = processors(
            params, prompt_length=len(prompt), end_ids=(), encode=lambda word: [], custom=(), device=torch.device("cpu")
        )
        self.keys = None if params.seed is None else PositionKeys(params.seed)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        for processor in self.processors:
            scores = processor(ids, scores)
        if self.keys is None:
            return scores
        token = gumbel_argmax(scores[0], self.keys[ids.shape[1]])
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([token]), 0.0)


Truth = Callable[[str, int], tuple[int, ...]]


@pytest.fixture(scope="module")
def truth(model: PreTrainedModel) -> Truth:
    """What transformers' own generate says, one token per forward, for a setting and a prompt."""
    known: dict[tuple[str, int], tuple[int, ...]] = {}

    def look_up(setting: str, number: int) -> tuple[int, ...]:
        if (setting, number) not in known:
            drawn = LogitsProcessorList([Drawn(SETTINGS[setting], PROMPTS[number])])
            known[setting, number] = tuple(greedy(model, PROMPTS[number], NEW_TOKENS, logits_processor=drawn))
        return known[setting, number]

    return look_up


def options_of(setting: str, mode: str, expected: tuple[int, ...]) -> dict[str, Any]:
    """A request in a mode; those who know the truth are told it."""
    return {
        **SETTINGS[setting],
        "max_tokens": NEW_TOKENS,
        "speculation": MODES[mode],
        "prediction": list(expected),
    }


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("mode", MODES)
def test_no_drafter_changes_the_text(bench: Bench, truth: Truth, setting: str, mode: str) -> None:
    """Alone, on prompts that repeat themselves and prompts that do not; drafts are made and partly right."""
    drafted = accepted = 0
    for number in range(3):
        expected = truth(setting, number)
        result = bench.alone(PROMPTS[number], **options_of(setting, mode, expected))
        assert result.ids == expected
        drafted += result.stats.num_draft_tokens
        accepted += result.stats.num_accepted_draft_tokens
    if mode == "off":
        assert drafted == 0
    elif mode not in ("prompt lookup", "auto"):
        assert drafted > 0
        assert (accepted > 0) == (mode != "echo, never right")


@pytest.mark.parametrize("group", range(len(SETTINGS) * len(MODES) // 5))
def test_company_changes_nothing(bench: Bench, truth: Truth, group: int) -> None:
    """Eight at once, each drafted and sampled in its own way; they join at different steps, three leave midway."""
    rng = random.Random(group)
    cells = [(setting, mode) for mode in MODES for setting in SETTINGS]
    mine = cells[5 * group : 5 * group + 5]
    crowd = [(cell, number) for number, cell in enumerate(mine)]
    crowd += [(rng.choice(cells), number) for number in (5, 6, 7)]
    rng.shuffle(crowd)
    joining = sorted(rng.choices(range(12), k=len(crowd)))
    expected: dict[str, tuple[int, ...]] = {}
    leaving: dict[str, int] = {}
    step = 0
    while joining or bench.core.busy:
        while joining and joining[0] <= step:
            joining.pop(0)
            (setting, mode), number = crowd.pop()
            said = truth(setting, number)
            name = bench.add(PROMPTS[number], **options_of(setting, mode, said))
            expected[name] = said
            if number >= 5:
                leaving[name] = step + rng.randint(0, 6)
        for name in [name for name, when in leaving.items() if when == step]:
            bench.cancel(name)
        if bench.core.busy:
            bench.step()
        step += 1
    assert len(expected) == 8
    cancelled = 0
    for name, said in expected.items():
        result = bench.result(name)
        if result.finish_reason == "cancelled":
            cancelled += 1
            assert result.ids == said[: len(result.ids)]
            assert isinstance(result.error, RequestCancelled)
        else:
            assert (result.ids, result.finish_reason) == (said, "length")
    assert cancelled > 0
    assert bench.target.pool.free_pages == bench.target.pool.pages


@pytest.mark.parametrize("mode", ["off", "everything, whatever it costs"])
def test_samples_of_one_request_are_streams_of_their_own(bench: Bench, truth: Truth, mode: str) -> None:
    """Sample 0 is what n=1 says, sample i does not depend on n, and all differ."""
    expected = truth("sampled", 3)
    options = options_of("sampled", mode, expected)
    few, many = bench.add(PROMPTS[3], n=2, **options), bench.add(PROMPTS[3], n=4, **options)
    bench.run()
    texts = [bench.result(many, index).ids for index in range(4)]
    assert texts[0] == expected
    assert [bench.result(few, index).ids for index in range(2)] == texts[:2]
    assert len(set(texts)) == 4


def test_another_seed_is_another_text(bench: Bench) -> None:
    texts = {bench.alone(PROMPTS[0], temperature=1.5, max_tokens=12, seed=seed).ids for seed in range(8)}
    assert len(texts) == 8


def test_a_request_without_a_seed_says_which_it_got(bench: Bench) -> None:
    """So that a text that nobody planned to keep can be had again."""
    first = bench.alone(PROMPTS[0], temperature=1.5, max_tokens=12)
    assert bench.alone(PROMPTS[0], temperature=1.5, max_tokens=12, seed=first.seed).ids == first.ids
    assert bench.alone(PROMPTS[0], temperature=1.5, max_tokens=12).ids != first.ids


# What a step costs.


class Scripted(Drafter):
    """Offers what a function of the ids committed so far says, whatever budget it is given."""

    def __init__(self, tree: Callable[[list[int]], Any]) -> None:
        self.tree = tree
        self.sessions = 0

    def open(self, prompt: Sequence[int], hints: DraftHints) -> DraftSession:
        self.sessions += 1
        return _Scripted(self, prompt)

    def check(self) -> None:
        if self.sessions < 0:
            raise RuntimeError("a session was closed twice")


class _Scripted(DraftSession):
    def __init__(self, drafter: Scripted, prompt: Sequence[int]) -> None:
        self.drafter = drafter
        self.ids = list(prompt)

    def propose(self, max_nodes: int) -> TokenTree:
        return self.drafter.tree(self.ids)

    def commit(self, tokens: Sequence[int]) -> None:
        self.ids.extend(tokens)

    def close(self) -> None:
        self.drafter.sessions -= 1


EAGER = {"adaptive": False}
BUSH = TokenTree((1, 2, 3, 4, 5, 6, 7), (-1, -1, 0, 0, 1, 2, 5), (0.5,) * 7)


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


# Memory.


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


# Where a text ends.


@pytest.fixture(scope="module")
def certain(model: PreTrainedModel) -> Bench:
    """With a drafter that is always right, so that ends fall inside accepted blocks; one draws with Letters."""
    return Bench(model, {"echo": echoes(1.0, siblings=1, depth=7)}, tokenizer=Letters({24: "END"}))


def ended(bench: Bench, said: Sequence[int], **options: Any) -> list[Result]:
    """The same request with and without drafts; they must agree in everything but the steps."""
    found = []
    for speculation in ("off", EAGER):
        result = bench.alone(
            PROMPTS[0], prediction=list(said), speculation=speculation, **{"max_tokens": 24, **options}
        )
        assert (result.stats.num_accepted_draft_tokens > 0) == (speculation == EAGER)
        found.append(result)
    plain, drafted = found
    for name in ("ids", "text", "finish_reason", "stop"):
        assert getattr(plain, name) == getattr(drafted, name), name
    assert drafted.stats.num_spec_steps < plain.stats.num_spec_steps
    return found


@pytest.mark.parametrize("place", range(1, 12))
def test_an_end_token_inside_an_accepted_block_ends_the_text(
    certain: Bench, model: PreTrainedModel, place: int
) -> None:
    """It is the last of the ids and never shown; what the tree held behind it is forgotten."""
    said = greedy(model, PROMPTS[0], 24)
    end = said[place]
    first = said.index(end)
    if first == 0:
        pytest.skip("the first token ends the text: there is no block")
    for result in ended(certain, said, stop_token_ids=[end]):
        assert list(result.ids) == said[: first + 1]
        assert result.text == certain._builder.tokenizer.decode(said[:first])
        assert (result.finish_reason, result.stop) == ("stop", end)


def test_the_models_own_end_token_acts_alike_unless_it_is_ignored(model: PreTrainedModel) -> None:
    said = greedy(model, PROMPTS[0], 24)
    model.generation_config.eos_token_id = [said[4], 95]
    try:
        bench = Bench(model, {"echo": echoes(1.0, depth=7)})
        for result in ended(bench, said):
            assert (list(result.ids), result.stop) == (said[:5], said[4])
        for result in ended(bench, said, ignore_eos=True):
            assert (list(result.ids), result.finish_reason) == (said, "length")
    finally:
        model.generation_config.eos_token_id = None


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(("start", "length"), [(1, 1), (1, 3), (2, 5), (4, 2), (0, 7)])
def test_a_stop_string_inside_an_accepted_block_ends_the_text(
    certain: Bench, model: PreTrainedModel, start: int, length: int, include: bool
) -> None:
    """The ids end with the token that completes it; the text ends before it."""
    said = greedy(model, PROMPTS[0], 24)
    decode = certain._builder.tokenizer.decode
    text = decode(said)
    stop = decode(said[start : start + length])[: length + 1]
    at = text.index(stop)
    ids = next(said[:n] for n in range(1, 25) if len(decode(said[:n])) >= at + len(stop))
    for result in ended(certain, said, stop=[stop, "never"], include_stop_str_in_output=include):
        assert list(result.ids) == ids
        assert result.text == text[: at + len(stop) * include]
        assert (result.finish_reason, result.stop) == ("stop", stop)


def test_a_stop_string_may_end_inside_a_token(certain: Bench, model: PreTrainedModel) -> None:
    """Token 24 is the word END here: E alone stops, the rest of the token is not shown."""
    said = greedy(model, PROMPTS[0], 24)
    place = said.index(24)
    for result in ended(certain, said, stop="E"):
        assert list(result.ids) == said[: place + 1]
        assert result.text == certain._builder.tokenizer.decode(said[:place])


def test_a_beginning_of_a_stop_string_is_shown_when_the_text_ends(certain: Bench, model: PreTrainedModel) -> None:
    """It was held back, and nothing came to complete it."""
    said = greedy(model, PROMPTS[0], 24)
    text = certain._builder.tokenizer.decode(said[:6])
    for result in ended(certain, said, stop=[text[-1] + "\0"], max_tokens=6):
        assert (result.text, result.finish_reason) == (text, "length")


@pytest.mark.parametrize("most", range(2, 12))
def test_the_length_ends_the_text_inside_a_block(certain: Bench, model: PreTrainedModel, most: int) -> None:
    said = greedy(model, PROMPTS[0], 24)
    for result in ended(certain, said, max_tokens=most):
        assert (list(result.ids), result.finish_reason, result.stop) == (said[:most], "length", None)


def test_the_context_ends_the_text(model: PreTrainedModel) -> None:
    """Prompt and text fill it to the last token, and one token more of prompt is one less of text."""
    bench = Bench(model, {"echo": echoes(1.0)}, max_context=30)
    for length in (6, 7, 29):
        prompt = (PROMPTS[0] * 5)[:length]
        said = greedy(model, prompt, 30 - length)
        for options in ({"speculation": "off"}, {"speculation": EAGER}, {"max_tokens": 1000}):
            result = bench.alone(prompt, prediction=said, **options)
            assert (list(result.ids), result.finish_reason) == (said, "length")


def test_an_end_and_the_length_at_one_token_is_an_end(certain: Bench, model: PreTrainedModel) -> None:
    said = greedy(model, PROMPTS[0], 24)
    assert said[3] not in said[:3]
    for result in ended(certain, said, stop_token_ids=[said[3]], max_tokens=4):
        assert (result.finish_reason, result.stop) == ("stop", said[3])


# Processors and criteria: the calls of plain decoding, no more and no fewer.


class Diary:
    """Keeps account of its calls, and bans another token at each: it would show at once if calls were amiss."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.calls.append(ids[0].tolist())
        if len(self.calls) % 3 == 0:
            scores[:, scores[0].argmax()] = -float("inf")
        scores[:, (7 * len(self.calls)) % VOCABULARY] += 3.0
        return scores


@pytest.mark.parametrize("drafter", ["echo-half", "echo-1", "prompt-lookup", "draft-model"])
def test_a_stateful_processor_sees_the_calls_of_plain_decoding(
    model: PreTrainedModel, bench: Bench, drafter: str
) -> None:
    """The very ids, in order, as transformers' own generate shows them; also among others, and behind the penalties."""
    plain = Diary()
    expected = greedy(model, PROMPTS[0], 24, logits_processor=LogitsProcessorList([plain]), repetition_penalty=1.2)
    assert len(plain.calls) == 24
    mine = Diary()
    name = bench.add(
        PROMPTS[0],
        max_tokens=24,
        processors=[mine],
        repetition_penalty=1.2,
        prediction=expected,
        speculation={"adaptive": False, "drafters": [drafter]},
    )
    bench.step()
    bench.add(PROMPTS[3], max_tokens=12, speculation=EAGER)
    bench.add(PROMPTS[4], max_tokens=9, temperature=1.0, processors=[Diary()])
    bench.run()
    assert list(bench.result(name).ids) == expected
    assert mine.calls == plain.calls
    if drafter.startswith("echo"):
        assert bench.result(name).stats.num_accepted_draft_tokens > 3


def test_a_processor_may_keep_the_ids_it_is_shown(bench: Bench, model: PreTrainedModel) -> None:
    """Some keep the tensor, not a copy; later calls must not write into it."""
    kept: list[Tensor] = []

    def keep(ids: Tensor, scores: Tensor) -> Tensor:
        kept.append(ids)
        return scores

    said = greedy(model, PROMPTS[1], 24)
    result = bench.alone(PROMPTS[1], max_tokens=24, processors=[keep], prediction=said, speculation=EAGER)
    assert list(result.ids) == said
    assert [ids[0].tolist() for ids in kept] == [[*PROMPTS[1], *said[:n]] for n in range(24)]


@pytest.mark.parametrize(
    "end", [{"stop": "END"}, {"stop_token_ids": [24]}, {"max_tokens": 3}], ids=["string", "token", "length"]
)
def test_no_processor_is_called_behind_the_end(certain: Bench, model: PreTrainedModel, end: dict[str, Any]) -> None:
    """One call per token, though the tree held more."""
    said = greedy(model, PROMPTS[0], 24)
    calls = []

    def count(ids: Tensor, scores: Tensor) -> Tensor:
        calls.append(ids.shape[1])
        return scores

    options = {"max_tokens": 24, "prediction": said, "speculation": EAGER, "processors": [count], **end}
    result = certain.alone(PROMPTS[0], **options)
    assert result.stats.num_accepted_draft_tokens > 0
    assert calls == [len(PROMPTS[0]) + n for n in range(len(result.ids))]


def test_a_processor_runs_as_under_transformers_generate(bench: Bench) -> None:
    """Without gradients, with a row that may be written into, in float32."""
    weight = torch.nn.Parameter(torch.zeros(VOCABULARY))
    weight.data[33] = 1000.0

    def learned(ids: Tensor, scores: Tensor) -> Tensor:
        assert scores.dtype == torch.float32
        scores += weight
        scores.numpy()
        return scores

    assert bench.alone(PROMPTS[0], max_tokens=3, processors=[learned]).ids == (33, 33, 33)


class Fails:
    """Raises at its third call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            raise ZeroDivisionError("the third call")
        return scores


@pytest.mark.parametrize("where", ["processors", "stopping_criteria"])
def test_what_raises_fails_its_own_request_only(model: PreTrainedModel, where: str) -> None:
    """With what was said before; the others do not notice, and nothing is held."""
    said = greedy(model, PROMPTS[0], 12)
    drafter = Scripted(lambda ids: BUSH)
    bench = Bench(model, {"bush": drafter})
    fails = Fails()
    if where == "stopping_criteria":
        broken = bench.add(
            PROMPTS[0], max_tokens=12, stopping_criteria=[lambda ids, scores: fails(ids, scores) is None]
        )
    else:
        broken = bench.add(PROMPTS[0], max_tokens=12, processors=[fails])
    stays = bench.add(PROMPTS[3], max_tokens=12)
    bench.run()
    result = bench.result(broken)
    assert (result.finish_reason, list(result.ids)) == ("error", said[:2])
    assert isinstance(result.error, ZeroDivisionError)
    assert list(bench.result(stays).ids) == greedy(model, PROMPTS[3], 12)
    assert bench.core.counters.finished == {"error": 1, "length": 1}
    assert drafter.sessions == 0


class Watchful(Scripted):
    """One that looks at what the forward said."""

    wanted = Wanted(successors=1)


@pytest.mark.parametrize(
    ("owner", "name", "call", "said"),
    # One that ends is not published: all that it leaves is.
    [(BlockTable, "commit", 2, 0), (SequenceOutput, "features", 2, 0), (Scheduler, "publish", 1, 1)],
)
def test_what_fails_while_one_sequence_is_settled_is_its_own_end_only(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, call: int, said: int
) -> None:
    """The others have what they drew in that step, be it their last; who had spoken when it failed keeps that too."""
    drafter = Watchful(lambda ids: BUSH)
    bench = Bench(model, {"bush": drafter})
    ends, breaks, stays = (
        bench.add(prompt, max_tokens=most, logprobs=0)
        for prompt, most in ((PROMPTS[0], 1), (PROMPTS[3], 12), (PROMPTS[2], 12))
    )
    works, calls = getattr(owner, name), count(1)

    def breaks_once(*args: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise torch.OutOfMemoryError("no memory for this one")
        return works(*args, **options)

    monkeypatch.setattr(owner, name, breaks_once)
    outputs = bench.step()
    assert {output.request_id for output in outputs} == {ends, breaks, stays}
    result = bench.result(breaks)
    assert (result.finish_reason, list(result.ids)) == ("error", greedy(model, PROMPTS[3], 1)[:said])
    assert isinstance(result.error, torch.OutOfMemoryError)
    bench.run()
    assert list(bench.result(ends).ids) == greedy(model, PROMPTS[0], 1)
    assert list(bench.result(stays).ids) == greedy(model, PROMPTS[2], 12)
    assert bench.core.counters.finished == {"error": 1, "length": 2}
    assert (drafter.sessions, bench.target.pool.open_tables) == (0, 0)


def test_a_prompt_that_cannot_be_read_on_ends_alone(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(model, max_prefill_tokens=16)
    stays = bench.add(PROMPTS[0], max_tokens=12)
    bench.step()
    breaks = bench.add(PROMPTS[2], max_tokens=12)
    commit = BlockTable.commit

    def breaks_on_chunks(table: BlockTable, chain: int, accepted: Sequence[int] = ()) -> None:
        if chain == 16:
            raise RuntimeError("no chunk")
        commit(table, chain, accepted)

    monkeypatch.setattr(BlockTable, "commit", breaks_on_chunks)
    assert [output.request_id for output in bench.step()] == [stays, breaks]
    result = bench.result(breaks)
    assert (result.finish_reason, result.ids, str(result.error)) == ("error", (), "no chunk")
    bench.run()
    assert list(bench.result(stays).ids) == greedy(model, PROMPTS[0], 12)


def test_a_stopping_criterion_is_asked_after_every_token_as_by_transformers(
    certain: Bench, model: PreTrainedModel
) -> None:
    """With the same ids; the token at which it says stop is the last."""

    def criterion(diary: list[list[int]]) -> Callable[..., Tensor]:
        def stop(ids: Tensor, scores: Any, **others: Any) -> Tensor:
            diary.append(ids[0].tolist())
            return torch.tensor([len(diary) == 9])

        return stop

    plain: list[list[int]] = []
    expected = greedy(model, PROMPTS[0], 24, stopping_criteria=StoppingCriteriaList([criterion(plain)]))
    assert len(expected) == 9
    mine: list[list[int]] = []
    said = greedy(model, PROMPTS[0], 24)
    result = certain.alone(
        PROMPTS[0], max_tokens=24, prediction=said, speculation=EAGER, stopping_criteria=[criterion(mine)]
    )
    assert (list(result.ids), result.finish_reason, result.stop) == (expected, "stop", None)
    assert result.text == certain._builder.tokenizer.decode(expected)
    assert mine == plain


def test_each_sample_has_criteria_of_its_own(bench: Bench) -> None:
    """As it has processors of its own: one that counts its calls counts those of one sample."""

    class After:
        calls = 0

        def __call__(self, ids: Tensor, scores: Any) -> bool:
            self.calls += 1
            return self.calls == 5

    name = bench.add(PROMPTS[0], max_tokens=12, n=3, temperature=1.0, seed=1, stopping_criteria=[After()])
    bench.run()
    assert [len(bench.result(name, index).ids) for index in range(3)] == [5, 5, 5]


def test_each_sample_has_processors_of_its_own(bench: Bench) -> None:
    alone = bench.alone(PROMPTS[0], max_tokens=12, processors=[Diary()], temperature=1.0, seed=1)
    theirs = Diary()
    name = bench.add(PROMPTS[0], max_tokens=12, n=3, temperature=1.0, seed=1, processors=[theirs])
    bench.run()
    assert bench.result(name, 0).ids == alone.ids
    assert len({bench.result(name, index).ids for index in range(3)}) == 3
    assert theirs.calls == [], "the caller's own stays as it was"


# Drafters that break.


def raises(*_: object) -> Any:
    raise KeyError("drafter bug")


GARBAGE: dict[str, Any] = {
    "nothing": None,
    "a parent behind its child": TokenTree((1, 2), (1, -1), (1.0, 1.0)),
    "a parent far below the root": TokenTree((1,), (-2,), (1.0,)),
    "a token outside the vocabulary": TokenTree((VOCABULARY,), (-1,), (1.0,)),
    "a negative token": TokenTree((-1,), (-1,), (1.0,)),
    "two children with one token": TokenTree((1, 1), (-1, -1), (1.0, 1.0)),
    "more nodes than asked for": chain(tuple(range(64))),
    "no confidence": TokenTree((1,), (-1,)),
    "confidence that is no number": TokenTree((1,), (-1,), (float("nan"),)),
    "confidence over 1": TokenTree((1,), (-1,), (1.5,)),
    "words for tokens": TokenTree(("a",), (-1,), (1.0,)),  # type: ignore[arg-type]
    "fractions for tokens": TokenTree((1.5,), (-1,), (1.0,)),  # type: ignore[arg-type]
    "fractions for parents": TokenTree((1,), (-1.0,), (1.0,)),  # type: ignore[arg-type]
    "lists of lists": TokenTree(((1,),), (-1,), (1.0,)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("kind", GARBAGE)
@pytest.mark.parametrize("adaptive", [True, False])
def test_a_drafter_that_answers_garbage_is_switched_off(model: PreTrainedModel, kind: str, adaptive: bool) -> None:
    """The request goes on with the other drafters, and says what it says; the reason stands in its result."""
    said = greedy(model, PROMPTS[0], 16)
    broken = Scripted(lambda ids: GARBAGE[kind] if len(ids) > 8 else BUSH)
    bench = Bench(model, {"broken": broken, "echo": echoes(1.0)})
    with capture_logs() as logs:
        name = bench.add(PROMPTS[0], max_tokens=16, prediction=said, speculation={"adaptive": adaptive})
        other = bench.add(PROMPTS[3], max_tokens=16, speculation={"drafters": ["echo"]})
        bench.run()
    assert list(bench.result(name).ids) == said
    assert list(bench.result(other).ids) == greedy(model, PROMPTS[3], 16)
    shares = bench.result(name).stats.by_drafter
    assert shares["broken"].disabled
    assert shares["echo"].disabled is None
    assert adaptive or shares["echo"].accepted > 0
    assert [entry["drafter"] for entry in logs if entry["event"] == "drafter switched off"] == ["broken"]
    assert broken.sessions == 0


@pytest.mark.parametrize("method", ["propose", "commit"])
def test_a_drafter_that_raises_is_switched_off(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(_Scripted, method, raises)
    drafter = Scripted(lambda ids: BUSH)
    bench = Bench(model, {"broken": drafter})
    names = [bench.add(PROMPTS[number], max_tokens=8, speculation=EAGER) for number in (0, 3)]
    bench.run()
    for name, number in zip(names, (0, 3), strict=True):
        assert list(bench.result(name).ids) == greedy(model, PROMPTS[number], 8)
        assert "drafter bug" in str(bench.result(name).stats.by_drafter["broken"].disabled)
    assert drafter.sessions == 0, "even so, every session is closed"


def test_a_drafter_that_cannot_open_is_switched_off_for_the_request(model: PreTrainedModel) -> None:
    class Closed(Scripted):
        open = raises

    bench = Bench(model, {"broken": Closed(raises), "bush": Scripted(lambda ids: BUSH)})
    result = bench.alone(PROMPTS[0], max_tokens=8, speculation=EAGER)
    assert list(result.ids) == greedy(model, PROMPTS[0], 8)
    assert "drafter bug" in str(result.stats.by_drafter["broken"].disabled)
    assert result.stats.by_drafter["bush"].verified > 0


def test_a_drafter_that_cannot_close_does_no_harm(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Scripted, "close", raises)
    bench = Bench(model, {"broken": Scripted(lambda ids: BUSH)})
    assert list(bench.alone(PROMPTS[0], max_tokens=8).ids) == greedy(model, PROMPTS[0], 8)


def test_a_drafter_that_forgets_a_session_is_switched_off(model: PreTrainedModel) -> None:
    """One tree for two sessions: nobody can tell whose it is."""

    class Forgetful(Scripted):
        def propose(self, sessions: Sequence[DraftSession], max_nodes: Sequence[int]) -> list[TokenTree]:
            return [BUSH]

    bench = Bench(model, {"broken": Forgetful(raises)})
    names = [bench.add(PROMPTS[number], max_tokens=8, speculation=EAGER) for number in (0, 3)]
    bench.run()
    assert all(bench.result(name).stats.by_drafter["broken"].disabled for name in names)
    assert list(bench.result(names[1]).ids) == greedy(model, PROMPTS[3], 8)


def test_a_drafter_that_stalls_is_switched_off(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafting, "_STALL_SECONDS", 0.2)
    calls = []

    def slow(ids: list[int]) -> TokenTree:
        calls.append(len(ids))
        time.sleep(0.4 if len(calls) == 3 else 0)
        return BUSH

    bench = Bench(model, {"slow": Scripted(slow)})
    result = bench.alone(PROMPTS[0], max_tokens=12, speculation=EAGER)
    assert list(result.ids) == greedy(model, PROMPTS[0], 12)
    assert "took 0." in str(result.stats.by_drafter["slow"].disabled)
    assert len(calls) == 3, "it was asked again"


def test_a_first_answer_may_read_a_long_prompt(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafting, "_STALL_SECONDS", 0.2)
    monkeypatch.setattr(drafting, "_READING_SECONDS", 60.0)
    calls = []

    def slow(ids: list[int]) -> TokenTree:
        calls.append(len(ids))
        time.sleep(0.4 if len(calls) in (1, 3) else 0)
        return BUSH

    result = Bench(model, {"slow": Scripted(slow)}).alone(PROMPTS[0], max_tokens=12, speculation=EAGER)
    assert list(result.ids) == greedy(model, PROMPTS[0], 12)
    assert "took 0." in str(result.stats.by_drafter["slow"].disabled)
    assert len(calls) == 3, "the second time it has nothing to read"


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("answer", [raises, TokenTree((1, 2), (1, 0), (0.5, 0.5)), None])
def test_a_sessions_fault_leaves_the_drafter_to_others(model: PreTrainedModel, answer: Any, together: bool) -> None:
    """What is raised for all of a batch alone concerns all of it."""

    def tree(ids: list[int]) -> TokenTree:
        if ids[: len(PROMPTS[0])] != list(PROMPTS[0]):
            return BUSH
        found: TokenTree = answer() if answer is raises else answer
        return found

    class Together(Scripted):
        def propose(self, sessions: Sequence[DraftSession], max_nodes: Sequence[int]) -> list[TokenTree]:
            return [session.propose(most) for session, most in zip(sessions, max_nodes, strict=True)]

    bench = Bench(model, {"faulty": (Together if together else Scripted)(tree)})
    names = [bench.add(PROMPTS[number], max_tokens=8, speculation=EAGER) for number in (0, 3)]
    bench.run()
    for name, number in zip(names, (0, 3), strict=True):
        assert list(bench.result(name).ids) == greedy(model, PROMPTS[number], 8)
    at_fault, other = (bench.result(name).stats.by_drafter["faulty"] for name in names)
    assert at_fault.disabled
    assert bool(other.disabled) == (together and answer is raises)


def test_a_drafter_that_is_named_twice_has_one_session(model: PreTrainedModel) -> None:
    drafter = Scripted(lambda ids: BUSH)
    bench = Bench(model, {"bush": drafter})
    bench.alone(PROMPTS[0], max_tokens=4, speculation={"drafters": ["bush", "bush"]})
    assert drafter.sessions == 0


def test_a_new_request_gives_a_broken_drafter_another_chance(model: PreTrainedModel) -> None:
    answers = [raises]
    bench = Bench(model, {"moody": Scripted(lambda ids: answers[0](ids))})
    assert bench.alone(PROMPTS[0], max_tokens=4, speculation=EAGER).stats.by_drafter["moody"].disabled
    answers[0] = lambda ids: BUSH
    stats = bench.alone(PROMPTS[0], max_tokens=4, speculation=EAGER).stats.by_drafter["moody"]
    assert (stats.disabled, stats.verified > 0) == (None, True)


# How much is drafted.


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


# Trees from several drafters.


def paths(tree: TokenTree) -> dict[tuple[int, ...], float]:
    """Every path of a tree with its confidence."""
    return {tuple(tree.tokens[step] for step in path(tree, node)): tree.confidence[node] for node in range(len(tree))}


@pytest.mark.parametrize("seed", range(30))
def test_merged_trees_hold_every_path_once_with_the_mean_confidence(seed: int) -> None:
    rng = random.Random(seed)
    trees = []
    for _ in range(rng.randint(0, 4)):
        found: dict[tuple[int, int], int] = {}
        for _ in range(rng.randint(0, 12)):
            found.setdefault((rng.randrange(-1, len(found)), rng.randrange(3)), len(found))
        parents, tokens = zip(*found, strict=True) if found else ((), ())
        trees.append(TokenTree(tuple(tokens), tuple(parents), tuple(rng.random() for _ in found)))
    merged = Merged(trees)
    union = merged.tree([tree.confidence for tree in trees])
    check(union, 3)
    expected: dict[tuple[int, ...], list[float]] = {}
    for tree in trees:
        for step, confidence in paths(tree).items():
            expected.setdefault(step, []).append(confidence)
    assert paths(union) == pytest.approx({step: sum(every) / len(every) for step, every in expected.items()})
    for number, tree in enumerate(trees):
        assert merged.shared(number) == [len(expected[step]) > 1 for step in paths(tree)]


def test_agreement_is_learned_apart() -> None:
    """Alone a drafter is wrong; where another says the same it is right."""
    everyone = AcceptanceModel()
    here = AcceptanceModel(everyone)
    for _ in range(60):
        here.observe(TokenTree((1, 2), (-1, -1), (0.5, 0.5)), (1,), [True, False])
    assert here.survival(0.5, shared=True) > 0.95
    assert here.survival(0.5) < 0.05
    elsewhere = AcceptanceModel(everyone)
    agreed, alone = elsewhere.calibrated(chain((7, 8), 0.5), [True, False])
    assert (agreed, alone) == (elsewhere.survival(0.5, shared=True), elsewhere.survival(0.5))
    assert agreed > 0.9
    assert alone < 0.1


def test_a_fixed_budget_takes_the_likeliest_nodes_of_all_drafters(model: PreTrainedModel) -> None:
    """Not those of whoever comes first."""
    said = greedy(model, PROMPTS[0], 60)
    noise = echoes(0.0, siblings=3, depth=20, confidence=0.9)
    bench = Bench(model, {"noise": noise, "echo": echoes(1.0, siblings=0, depth=6)})
    speculation = {"adaptive": False, "max_nodes": 12}
    stats = bench.alone(PROMPTS[0], max_tokens=60, prediction=said, speculation=speculation).stats
    assert set(stats.per_step_drafted[:-2]) == {12}
    assert max(stats.per_step_accepted) == 6, "before: the noise had all twelve"


@pytest.mark.parametrize("seed", range(10))
def test_the_likeliest_nodes_come_with_their_parents(seed: int) -> None:
    rng = random.Random(seed)
    parents = tuple(rng.randrange(-1, node) if node else -1 for node in range(20))
    tree = TokenTree(tuple(range(20)), parents, tuple(rng.choice((0.2, 0.5, 1.0)) for _ in range(20)))
    for most in (0, 1, 7, 20, 63):
        nodes = likeliest(tree, most)
        assert len(nodes) == min(most, 20)
        assert all(parents[node] in (-1, *nodes) for node in nodes)


def test_several_drafters_share_one_tree(model: PreTrainedModel) -> None:
    """Two that say the same cost no more than one; each gets its share of the credit."""
    said = greedy(model, PROMPTS[0], 12)
    bench = Bench(model, {"a": echoes(1.0, siblings=0, depth=3), "b": echoes(1.0, siblings=0, depth=2)})
    result = bench.alone(PROMPTS[0], max_tokens=12, prediction=said, speculation=EAGER)
    assert result.stats.per_step_drafted == (3, 3, 3)
    shares = result.stats.by_drafter
    assert (shares["a"].verified, shares["a"].accepted) == (9, 9)
    assert (shares["b"].verified, shares["b"].accepted) == (6, 6)


# Looking up.


def test_the_index_finds_the_longest_and_latest_match_first() -> None:
    index = NgramIndex([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 2)
    assert index.matches([1, 2, 3]) == [(3, 3), (2, 6)]
    assert index.matches(index.ids) == [(3, 3), (2, 6)], "the end itself has nothing behind it"
    assert index.matches([7, 3]) == []
    assert index.matches([3]) == []


@pytest.mark.parametrize("seed", range(20))
def test_the_index_finds_what_a_search_by_hand_finds(seed: int) -> None:
    rng = random.Random(seed)
    ids = [rng.randrange(3) for _ in range(60)]
    index = NgramIndex(ids[:20], 2)
    index.extend(ids[20:])
    by_hand = []
    for end in range(2, len(ids)):
        length = 0
        while length < min(end, 16) and ids[end - 1 - length] == ids[-1 - length]:
            length += 1
        if length >= 2:
            by_hand.append((length, end))
    latest = sorted(by_hand, key=lambda match: match[1])[-8:]
    found = index.matches(index.ids)
    assert found == sorted(found, reverse=True)
    assert set(found) <= set(by_hand)
    assert set(latest[1:]) <= set(found), "the latest few of them all"


def test_continuations_branch_where_the_text_went_on_differently() -> None:
    index = NgramIndex([1, 2, 3, 4, 0, 1, 2, 3, 5, 0, 1, 2], 2)
    tree = continuations(index, index.matches(index.ids), 10, 2)
    check(tree, 10, 10)
    assert {(3, 4), (3, 5)} <= set(paths(tree))
    assert len(continuations(index, index.matches(index.ids), 1, 2)) == 1
    assert continuations(index, [], 10, 2) == EMPTY_TREE


def test_prompt_lookup_drafts_what_followed_before(model: PreTrainedModel) -> None:
    """In the prompt, and in the output once it repeats itself."""
    lookup = PromptLookup(DrafterSetup(VOCABULARY))
    session = lookup.open([1, 2, 3, 4, 5, 1, 2], DraftHints())
    assert session.propose(3).tokens == (3, 4, 5)
    session.commit([9, 9, 3, 4])
    assert session.propose(2).tokens == (5, 1)
    assert lookup.open([1, 2, 3], DraftHints()).propose(8) == EMPTY_TREE


def test_a_prediction_is_followed_and_found_again_behind_an_edit() -> None:
    drafter = Prediction(DrafterSetup(VOCABULARY))
    session = drafter.open([0], DraftHints((1, 2, 3, 4, 5, 6, 7, 8)))
    assert session.propose(3).tokens == (1, 2, 3)
    session.commit([1, 2])
    assert session.propose(3).tokens == (3, 4, 5)
    session.commit([60, 61])
    session.commit([5, 6])
    assert session.propose(3).tokens == (7, 8)
    assert drafter.open([0], DraftHints()).propose(8) == EMPTY_TREE


class TestPromptLookup(DrafterContract):
    vocab_size = VOCABULARY

    def drafter(self) -> Drafter:
        return PromptLookup(DrafterSetup(VOCABULARY))


class TestPrediction(DrafterContract):
    vocab_size = VOCABULARY

    def drafter(self) -> Drafter:
        return Prediction(DrafterSetup(VOCABULARY))


# The draft model.


class TestDraftModel(DrafterContract):
    vocab_size = VOCABULARY

    @pytest.fixture(autouse=True)
    def draft_with(self, smaller: PreTrainedModel) -> None:
        # In float32 a batch rounds otherwise than its parts, and the last digit of a confidence shows it.
        self.model = deepcopy(smaller).double()

    def drafter(self) -> Drafter:
        return drafted_by(self.model, kv_tokens=1024)


def test_the_model_as_its_own_draft_is_nearly_always_right(model: PreTrainedModel) -> None:
    """Its tree holds the very path that it will say; the draft is as deep as it may be and one forward per level."""
    model = deepcopy(model)
    model.lm_head.weight.data *= 8  # so that it is sure of what it says
    drafter = drafted_by(model, depth=4, width=2)
    bench = Bench(model, {"draft-model": drafter})
    said = greedy(model, PROMPTS[0], 60)
    result = bench.alone(PROMPTS[0], max_tokens=60, speculation=EAGER)
    assert list(result.ids) == said
    assert result.stats.mean_acceptance_length > 4
    assert drafter.model.forwards <= 4 * result.stats.num_spec_steps
    assert not drafter.model.pool.open_tables


def test_a_draft_model_drafts_for_the_whole_batch_at_once(model: PreTrainedModel) -> None:
    drafter = drafted_by(model, depth=4, width=2)
    bench = Bench(model, {"draft-model": drafter})
    for prompt in PROMPTS:
        bench.add(prompt, max_tokens=20, speculation=EAGER)
    bench.run()
    assert drafter.model.forwards <= 4 * bench.core.counters.steps


def test_a_draft_session_catches_up_on_what_it_was_not_asked_for(smaller: PreTrainedModel) -> None:
    """Whatever was committed in between, it answers as one that has read the whole text at once."""
    rng = random.Random(2)
    drafter = drafted_by(smaller)
    ids = [rng.randrange(VOCABULARY) for _ in range(9)]
    session = drafter.open(ids, DraftHints())
    for round in range(12):
        tree = session.propose(63) if round % 3 else EMPTY_TREE
        inside = [tree.tokens[node] for node in path(tree, rng.randrange(len(tree)))] if len(tree) else []
        step = [*inside, *(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 4)))]
        session.commit(step)
        ids += step
        fresh = drafter.open(ids[:-1], DraftHints())
        fresh.commit(ids[-1:])
        theirs, mine = fresh.propose(63), session.propose(63)
        assert (mine.tokens, mine.parents) == (theirs.tokens, theirs.parents)
        assert mine.confidence == pytest.approx(theirs.confidence, abs=1e-4)
        fresh.close()
        drafter.check()
    session.close()
    drafter.check()
    assert not drafter.model.pool.open_tables


def test_a_draft_session_reads_only_what_is_new(smaller: PreTrainedModel) -> None:
    """Behind an accepted path its rows stay: a step reads the bonus and grows the tree."""
    drafter = drafted_by(smaller, depth=3, width=1)
    session = drafter.open(PROMPTS[2][:-1], DraftHints())
    assert session.propose(3) == EMPTY_TREE, "the first token does not wait for the draft model to read the prompt"
    session.commit(PROMPTS[2][-1:])
    tree = session.propose(3)
    session.commit([*tree.tokens[:2], 5])
    rows = drafter.model.rows
    session.propose(3)
    assert drafter.model.rows - rows <= 1 + 2
    session.close()


def test_a_draft_model_without_room_says_nothing_and_harms_nobody(model: PreTrainedModel) -> None:
    """Its pool holds one text, three run; nothing is switched off, and room that comes free is used."""
    drafter = drafted_by(model, kv_tokens=64, depth=2, width=2)
    bench = Bench(model, {"draft-model": drafter})
    names = [bench.add(PROMPTS[number], max_tokens=40, speculation=EAGER) for number in (0, 2, 5)]
    bench.run()
    for name, number in zip(names, (0, 2, 5), strict=True):
        assert list(bench.result(name).ids) == greedy(model, PROMPTS[number], 40)
        assert bench.result(name).stats.by_drafter["draft-model"].disabled is None
    assert sum(bench.result(name).stats.num_accepted_draft_tokens for name in names) > 0
    assert not drafter.model.pool.open_tables


def test_a_text_longer_than_the_draft_models_context_goes_on_without_it(model: PreTrainedModel) -> None:
    short = first_layers(model, 2)
    short.config.max_position_embeddings = 24
    bench = Bench(model, {"draft-model": drafted_by(short)})
    result = bench.alone(PROMPTS[0], max_tokens=40, speculation=EAGER)
    assert list(result.ids) == greedy(model, PROMPTS[0], 40)
    assert sum(result.stats.per_step_drafted[:2]) > 0
    assert result.stats.per_step_drafted[-1] == 0
    assert result.stats.by_drafter["draft-model"].disabled is None


def test_a_draft_model_with_another_vocabulary_is_refused(model: PreTrainedModel) -> None:
    """When the engine is built, with both sizes and what to do."""
    other = first_layers(model, 1)
    other.resize_token_embeddings(VOCABULARY + 8)
    with pytest.raises(DrafterMismatch, match=f"vocabulary of {VOCABULARY + 8}, the target of {VOCABULARY}; choose"):
        Engine(model, kv_tokens=512, draft_model=other)
    with pytest.raises(InvalidRequest, match="needs the option model") as caught:
        Engine(model, kv_tokens=512, drafters=["draft-model"])
    assert caught.value.param == "model"


def test_a_deep_tree_is_cut_where_the_text_ends() -> None:
    tree = TokenTree((1, 2, 3, 4), (-1, 0, 1, -1), (1.0,) * 4)
    draft = Draft(tree, (("a",), ("a", "b"), ("b",), ("a",)))
    cut = Draft(TokenTree((1, 2, 4), (-1, 0, -1), (1.0,) * 3), (("a",), ("a", "b"), ("a",)))
    assert drafting._shallow(draft, 2) == cut
    assert drafting._shallow(draft, 3) is draft
    assert max(depths(tree)) == 3
    assert MAX_TREE_NODES == 63
    assert Speculation().max_nodes == MAX_TREE_NODES
