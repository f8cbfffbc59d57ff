"""The same text, however it is drafted, whoever shares the batch, greedy and seeded."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from specgen import (
    RequestCancelled,
    SamplingParams,
)
from specgen.sampling.sampler import PositionKeys, gumbel_argmax, processors
from tests.support.bench import PROMPTS, Bench, first_layers, greedy
from tests.support.core import MODES, all_drafters
from tests.support.tiny import build

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama")


@pytest.fixture(scope="module")
def smaller(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its last layer: right now and then."""
    return first_layers(model, 2)


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
