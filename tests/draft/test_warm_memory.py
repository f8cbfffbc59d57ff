"""Drafters that keep what they saw beyond a request change no text: alone, in company, greedy and seeded."""

from __future__ import annotations

from typing import Any

import pytest
import specgen_suffix
from transformers import PreTrainedModel

from specgen import DrafterSetup
from specgen.draft.drafters.prompt_lookup import PromptLookup
from specgen.draft.drafters.recycling import Recycling
from tests.support.bench import PROMPTS, Bench, echoes, greedy
from tests.support.tiny import VOCABULARY, build

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = 24
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.5, "seed": 11},
    "filtered": {"temperature": 2.0, "top_k": 30, "repetition_penalty": 1.3, "seed": 5},
}
MODES: dict[str, dict[str, Any]] = {
    "alone": {"adaptive": False, "drafters": ["suffix"]},
    "with recycling": {"adaptive": False, "drafters": ["suffix", "recycling"], "max_nodes": 32},
    "with all": {"adaptive": False},
    "as it pays": {},
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama")


@pytest.fixture(scope="module")
def bench(model: PreTrainedModel) -> Bench:
    setup = DrafterSetup(VOCABULARY)
    drafters = {
        "suffix": specgen_suffix.suffix(DrafterSetup(VOCABULARY, options={"min_match": 1})),
        "recycling": Recycling(setup),
        "prompt-lookup": PromptLookup(setup),
        "echo": echoes(0.5),
    }
    return Bench(model, drafters)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_no_text_changes(bench: Bench, model: PreTrainedModel, setting: str, mode: str) -> None:
    """Each prompt alone, then all at once, half of them as another tenant's, over memory that earlier runs warmed."""
    options = SETTINGS[setting] | {"max_tokens": TOKENS}
    plain = [bench.alone(prompt, **options, speculation="off").ids for prompt in PROMPTS]
    if setting == "greedy":
        assert plain == [tuple(greedy(model, prompt, TOKENS)) for prompt in PROMPTS]
    for prompt, expected in zip(PROMPTS, plain, strict=True):
        assert bench.alone(prompt, **options, speculation=MODES[mode], prediction=expected).ids == expected
    names = [
        bench.add(prompt, **options, speculation=MODES[mode], cache_salt="ab"[number % 2])
        for number, prompt in enumerate(PROMPTS)
    ]
    bench.run()
    results = [bench.result(name) for name in names]
    assert [result.ids for result in results] == plain
    assert not any(share.disabled for result in results for share in result.stats.by_drafter.values())


def test_a_text_that_was_said_before_is_drafted_whole(model: PreTrainedModel) -> None:
    bench = Bench(model, {"suffix": specgen_suffix.suffix(DrafterSetup(VOCABULARY))})
    options = {"max_tokens": 40, "speculation": MODES["alone"], "temperature": 1.5, "seed": 3}
    first = bench.alone(PROMPTS[0], **options)
    again = bench.alone(PROMPTS[0], **options)
    stranger = bench.alone(PROMPTS[0], **options, cache_salt="another tenant")
    assert first.ids == again.ids == stranger.ids
    assert again.stats.mean_acceptance_length > 3 > first.stats.mean_acceptance_length
    assert stranger.stats.mean_acceptance_length == first.stats.mean_acceptance_length
