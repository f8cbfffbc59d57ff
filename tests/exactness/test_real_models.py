"""The promise on a real model: whatever drafts and whoever shares the batch, the ids are those of plain decoding.

Plain greedy decoding is compared with `model.generate`, every other setting with speculation off. In float32: there two
tokens have to tie within some 1e-5 for a packed forward's rounding to choose between them. A test that fails says how
near to a tie it was.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.decode import first_layers
from benchmarks.harness import PROMPTS, Prompt, read_prompts
from specgen import Engine
from specgen.plugins.manager import load_plugins
from tests.support.real import MODES, SETTINGS, Bench, Job, Observer, Running

TOKENS, LONG = 32, 128
KV_TOKENS = 10240
RUNNING = 10
"""Sequences side by side: eight and two that are cancelled."""

QUICK_PROMPTS = ("qa-2", "math-1", "code_edit-1", "extraction-1")
PAIRS = (("qa-1", "filters"), ("math-1", "penalties"), ("code_edit-1", "moody"))
"""Prompt and setting of the quick tests."""
ALONE = ("prompt-lookup", "recycling", "draft-model", "echo-0", "echo-50", "echo-100")

PROMPT_COUNT, PARTS = 24, 12
"""The full matrix runs in parts, so that a failure is found early and a part can be run alone."""


@pytest.fixture(scope="module")
def prompts(smollm_tokenizer: PreTrainedTokenizerBase) -> dict[str, Prompt]:
    return {prompt.id: prompt for prompt in read_prompts(PROMPTS, smollm_tokenizer)}


@pytest.fixture(scope="module")
def observer() -> Observer:
    return Observer()


@pytest.fixture(scope="module")
def engine(smollm: PreTrainedModel, smollm_tokenizer: PreTrainedTokenizerBase, observer: Observer) -> Iterator[Engine]:
    with open_engine(smollm, smollm_tokenizer, observer, draft=first_layers(smollm, 8)) as engine:
        yield engine


def open_engine(
    model: PreTrainedModel, tokenizer: Any, observer: Observer, draft: PreTrainedModel | None = None
) -> Engine:
    plugins = load_plugins(only=())
    plugins.register(observer, "observer")
    drafters: dict[str, Any] = {"prompt-lookup": {}, "recycling": {}, "echo-0": {}, "echo-50": {}, "echo-100": {}}
    if draft is not None:
        drafters["draft-model"] = {"model": draft, "depth": 3, "width": 2}
    return Engine(model, tokenizer, plugins=plugins, drafters=drafters, kv_tokens=KV_TOKENS, max_num_seqs=RUNNING)


@pytest.fixture(scope="module")
def quick(engine: Engine) -> Bench:
    return Bench(engine, TOKENS)


@pytest.fixture(scope="module")
def long(engine: Engine) -> Bench:
    return Bench(engine, LONG)


@pytest.fixture(autouse=True)
def nothing_is_held_in_the_end(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "engine" in request.fixturenames:
        request.getfixturevalue("engine").check()


def test_greedy_says_what_transformers_says(quick: Bench, prompts: dict[str, Prompt]) -> None:
    modes = ("off", "prompt-lookup", "recycling", "draft-model", "echo-100", "auto")
    jobs = [Job(prompts[name], "greedy", mode) for name in QUICK_PROMPTS for mode in modes]
    quick.learn(jobs)
    running = quick.start(jobs)
    assert not (flaws := quick.flaws(running)), flaws
    assert accepted(running, "prompt-lookup") > 0
    assert accepted(running, "recycling") > 0
    assert {run.result().finish_reason for run in running} == {"stop", "length"}


@pytest.mark.parametrize("mode", ["prompt-lookup", "draft-model", "echo-50"])
def test_alone(quick: Bench, prompts: dict[str, Prompt], mode: str) -> None:
    assert_the_same_alone(quick, [Job(prompts[name], setting, mode) for name, setting in PAIRS])


def test_side_by_side_joining_at_different_steps_with_others_cancelled(
    quick: Bench, prompts: dict[str, Prompt], observer: Observer
) -> None:
    # Those that take the most steps come first, so that they are all there together for a while.
    (qa, filters), (maths, penalties), (code, moody) = ((prompts[name], setting) for name, setting in PAIRS)
    jobs = [
        Job(code, moody, "off"),
        Job(qa, filters, "echo-0"),
        Job(maths, penalties, "draft-model"),
        Job(code, moody, "prompt-lookup"),
        Job(prompts["extraction-1"], "greedy", "prompt-lookup"),
        Job(maths, penalties, "echo-50"),
        Job(code, moody, "together"),
        Job(qa, filters, "echo-100"),
    ]
    quick.learn(jobs)
    observer.widest = 0
    victims = quick.start([Job(qa, filters, "echo-0"), Job(code, moody, "off")])
    running: list[Running] = []
    for index, job in enumerate(jobs):
        for _ in range(1 + index % 2):
            next((running or victims)[-1].stream, None)
        running += quick.start([job])
        if index in (3, 6):
            victims[index // 4].stream.cancel()
    assert all(quick.is_cut(victim) for victim in victims)
    assert {victim.result().finish_reason for victim in victims} == {"cancelled"}
    assert not (flaws := quick.flaws(running)), flaws
    assert observer.widest >= 6


def test_bfloat16_is_kept_or_counted(
    demo_path: Path,
    smollm_tokenizer: PreTrainedTokenizerBase,
    prompts: dict[str, Prompt],
    record_property: Callable[[str, object], None],
) -> None:
    """Rounding chooses between tokens now and then, beside transformers always; where rows are invariant, drafts
    choose nothing."""
    model = AutoModelForCausalLM.from_pretrained(demo_path, dtype=torch.bfloat16).eval()
    with open_engine(model, smollm_tokenizer, Observer()) as engine:
        bench = Bench(engine, TOKENS)
        jobs = [Job(prompts[name], "greedy", "prompt-lookup") for name in QUICK_PROMPTS[:2]]
        bench.learn(jobs)
        on = [run.result() for run in bench.start(jobs)]
        off = [run.result() for run in bench.start(replace(job, mode="off") for job in jobs)]
        engine.check()
    assert any(result.stats.num_draft_tokens for result in on)
    same = sum(result.ids == plain.ids for result, plain in zip(on, off, strict=True))
    assert same == len(jobs) or not engine.target.batch_invariant
    as_transformers = sum(result.ids == bench.truth(job) for result, job in zip(on, jobs, strict=True))
    record_property("identical with drafts on and off", f"{same} of {len(jobs)}")
    record_property("identical with drafts and by transformers", f"{as_transformers} of {len(jobs)}")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ALONE)
def test_every_setting_alone(long: Bench, prompts: dict[str, Prompt], mode: str) -> None:
    assert_the_same_alone(long, [Job(prompts[name], s, mode) for name, s in zip(cycle(QUICK_PROMPTS), SETTINGS)])


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_prompt_setting_and_mode_side_by_side(long: Bench, prompts: dict[str, Prompt], part: int) -> None:
    """All jobs of some prompts at once, in an order that mixes them: one joins whenever another ends."""
    # The first prompt of each category, then the second ones.
    chosen = sorted(prompts.values(), key=lambda prompt: prompt.id.rsplit("-")[1])[:PROMPT_COUNT]
    assert {prompt.category for prompt in chosen} == {prompt.category for prompt in prompts.values()}
    jobs = [Job(prompt, s, mode) for prompt in chosen[part::PARTS] for s in SETTINGS for mode in MODES]
    random.Random(part).shuffle(jobs)
    long.learn(jobs, alone=False)
    running: list[Running] = []
    victims: list[Running] = []
    for index, job in enumerate(jobs):
        running += long.start([job])
        if index % 10 == 0:
            victims += long.start([replace(job, mode="echo-0")])
    for victim in victims:
        for _ in range(3):
            next(victim.stream, None)
        victim.stream.cancel()
    assert all(long.is_cut(victim) for victim in victims)
    assert not (flaws := long.flaws(running)), flaws
    for mode in ("prompt-lookup", "recycling", "echo-50", "echo-100", "together", "auto"):
        assert accepted(running, mode) > 0, mode
    assert drafted(running, "draft-model") > 0


def assert_the_same_alone(bench: Bench, jobs: Sequence[Job]) -> None:
    """Each job says the truth with nobody else there."""
    bench.learn(jobs)
    running: list[Running] = []
    for job in jobs:
        running += bench.start([job])
        running[-1].result()
    assert not (flaws := bench.flaws(running)), flaws
    assert drafted(running) > 0


def accepted(running: Sequence[Running], mode: str) -> int:
    """Draft tokens that the jobs of a mode accepted."""
    return sum(run.result().stats.num_accepted_draft_tokens for run in running if run.job.mode == mode)


def drafted(running: Sequence[Running], mode: str | None = None) -> int:
    """Draft tokens that were verified for the jobs of a mode, or for all."""
    return sum(run.result().stats.num_draft_tokens for run in running if mode in (None, run.job.mode))
