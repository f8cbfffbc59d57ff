"""Constraints of a stranger's plugin: the engine holds a sequence to them and knows nothing of grammars."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specgen import (
    ConstraintSetup,
    Drafter,
    DrafterSetup,
    DraftHints,
    Engine,
    EngineConfig,
    InvalidRequest,
    Matcher,
    Overloaded,
    RequestFailed,
    SamplingParams,
    UnknownName,
)
from specgen.draft.drafters.grammar import Grammar
from specgen.plugins.manager import load_plugins
from specgen.sampling.constraint import Constraints
from specgen.testing import DrafterContract, MatcherContract
from specgen.types import Constraint
from tests.support.constraints import Offers, Recital, Stairs
from tests.support.engines import watched
from tests.support.tiny import VOCABULARY, build

PROMPT = [9, 31, 40, 9, 31, 77]
OTHER = [12, 13, 14, 12, 13]
EAGER = {"adaptive": False, "max_nodes": 24}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama")


@pytest.fixture(scope="module")
def engine(model: PreTrainedModel) -> Iterator[Engine]:
    plugins = load_plugins(only=())
    plugins.register(Offers, "offers")
    with watched(Engine(model, plugins=plugins, kv_tokens=2048)) as engine:
        yield engine
        engine.check()


def stairs(width: int, start: int) -> Any:
    """The same as a processor of the caller's, which knows nothing but the ids."""

    def process(ids: Tensor, logits: Tensor) -> Tensor:
        block = int(ids[0, -1]) // width if ids.shape[1] > start else 0
        blocks = torch.arange(VOCABULARY) // width
        return logits.masked_fill((blocks < block) | (blocks > block + 1), -torch.inf)

    return process


@pytest.mark.parametrize("speculation", ["off", "auto", EAGER], ids=["off", "auto", "eager"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "seed": 4}], ids=["greedy", "seeded"])
def test_a_constraint_is_a_mask_and_an_end(engine: Engine, sampling: dict[str, Any], speculation: Any) -> None:
    options: dict[str, Any] = {**sampling, "max_tokens": 40}
    expected = engine.generate(PROMPT, **options, processors=[stairs(8, len(PROMPT))], speculation="off").ids
    last = next((n for n, token in enumerate(expected) if token // 8 == VOCABULARY // 8 - 1), len(expected))
    result = engine.generate(
        PROMPT, **options, constraint={"stairs": 8}, speculation=speculation, prediction=(*expected, 1, 2)
    )
    assert result.ids == expected[: last + 1]
    assert result.finish_reason == ("stop" if last < len(expected) else "length")


def test_end_ids_are_allowed_where_the_text_may_end_and_only_there(engine: Engine) -> None:
    wish = {95: 90.0}
    result = engine.generate(PROMPT, constraint={"stairs": 8}, stop_token_ids=[95], logit_bias=wish, max_tokens=60)
    assert result.stop == 95
    assert [token // 8 for token in result.ids[-2:]] == [1, 11]
    assert all(token // 8 == 0 for token in result.ids[:-2])


def test_what_is_forced_comes_in_few_steps(engine: Engine) -> None:
    """Of eight forced tokens the last ends the text, so its row is never asked."""
    off = engine.generate(PROMPT, constraint="recital", speculation="off")
    on = engine.generate(PROMPT, constraint="recital", speculation=EAGER)
    assert off.ids == on.ids == Recital.TEXT
    assert (off.finish_reason, off.stop) == ("stop", None)
    assert off.stats.num_spec_steps == len(Recital.TEXT)
    assert on.stats.num_spec_steps == 1
    assert on.stats.by_drafter["grammar"].accepted == len(Recital.TEXT) - 1


def test_samples_and_prompts_do_not_share_a_matcher(engine: Engine) -> None:
    options: dict[str, Any] = {"temperature": 2.0, "seed": 9, "max_tokens": 30, "constraint": {"stairs": 16}}
    results = engine.generate([PROMPT, OTHER], **options, n=3, speculation=EAGER)
    alone = [engine.generate(prompt, **options, n=3, speculation="off") for prompt in (PROMPT, OTHER)]
    assert [[r.ids for r in each] for each in results] == [[r.ids for r in each] for each in alone]
    assert len({r.ids for each in results for r in each}) > 3


@pytest.mark.parametrize("where", ["allowed", "may_end", "is_complete", "consume", "permitted"])
def test_a_matcher_that_raises_fails_its_own_request(engine: Engine, where: str) -> None:
    alone = engine.generate(OTHER, max_tokens=40, temperature=1.0, seed=2)
    other = engine.stream(OTHER, max_tokens=40, temperature=1.0, seed=2)
    with pytest.raises(RequestFailed, match=f"{where} is broken"):
        engine.generate(
            PROMPT, constraint={"broken": where}, max_tokens=30, prediction=[1, 2, 3] * 9, speculation=EAGER
        )
    assert other.results(30)[0].ids == alone.ids
    engine.check()


def test_a_matcher_that_forces_and_raises_goes_on_without(engine: Engine) -> None:
    result = engine.generate(PROMPT, constraint={"broken": "forced"}, max_tokens=12, speculation=EAGER)
    assert result.ids == engine.generate(PROMPT, constraint={"stairs": 8}, max_tokens=12).ids
    assert "forced is broken" in str(result.stats.by_drafter["grammar"].disabled)


def test_what_cannot_be_compiled_is_refused_by_name(engine: Engine) -> None:
    with pytest.raises(
        UnknownName, match="unknown constraint 'xml'; choices: broken, picky, recital, stairs"
    ) as caught:
        engine.generate(PROMPT, constraint={"xml": 1})
    assert caught.value.param == "constraint"
    with pytest.raises(InvalidRequest, match="constraint 'picky' refuses its value: 'deep'") as refused:
        engine.generate(PROMPT, constraint={"picky": "deep"})
    assert refused.value.param == "constraint"


def test_the_error_names_the_field_that_asked(engine: Engine) -> None:
    for asked in ({"picky": "deep"}, {"xml": 1}):
        ((kind, value),) = asked.items()
        with pytest.raises(InvalidRequest) as caught:
            engine.generate(PROMPT, constraint=Constraint.of({kind: value}, param="response_format"))
        assert caught.value.param == "response_format"


def test_a_constraint_is_what_it_was_when_it_was_asked_for() -> None:
    schema = {"b": [1, {"c": True}], "a": None}
    params = SamplingParams(constraint={"json_schema": schema})  # type: ignore[arg-type]
    assert params.constraint
    schema["b"] = 5
    assert params.constraint.value == {"b": [1, {"c": True}], "a": None}
    assert list(params.constraint.value) == ["b", "a"]
    params.constraint.value["b"].append(2)
    assert params.constraint.value["b"] == [1, {"c": True}]


def test_constraints_are_told_apart_as_json_tells_them_apart() -> None:
    values: list[Any] = [{"a": 1, "b": 1}, {"b": 1, "a": 1}, {"a": True, "b": 1}, {"a": 1.0, "b": 1}, None]
    found = {Constraint.of({"x": value}) for value in values}
    assert len(found) == len(values)
    assert Constraint.of({"x": {"a": 1, "b": 1}}, param="guided_json") in found
    assert Constraint.of("x") == Constraint.of({"x": None})


class TestStairs(MatcherContract):
    def matcher(self) -> Matcher:
        return Stairs(12)


class TestRecital(MatcherContract):
    def matcher(self) -> Matcher:
        return Recital()


class TestGrammarDrafter(DrafterContract):
    hints = DraftHints(forced=lambda: (4, 4, 5, 63, 0))

    def drafter(self) -> Drafter:
        return Grammar(DrafterSetup(self.vocab_size))


def test_the_grammar_drafter_has_no_options() -> None:
    with pytest.raises(UnknownName, match="option of drafter 'grammar': 'depth'; choices: none"):
        Grammar(DrafterSetup(10, options={"depth": 1}))


def test_without_a_constraint_nothing_is_forced() -> None:
    assert not Grammar(DrafterSetup(10)).open([1], DraftHints()).propose(8)


class Compiling:
    """Kinds whose compilation waits, is counted, and whose first one builds something."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.names: list[str] = []

    def slow(self, setup: ConstraintSetup, value: Any) -> Matcher:
        self.names.append(threading.current_thread().name)
        self.go.wait()
        return Stairs(8)

    def simple(self, setup: ConstraintSetup, value: Any) -> Matcher:
        self.names.append(threading.current_thread().name)
        return Stairs(8)


def test_a_constraint_is_compiled_within_its_time_on_a_thread_of_its_own() -> None:
    """Its tokenizer is built before, in nobody's time; who waits is told the limit; who finds no thread, that."""
    kinds = Compiling()
    offered = {"slow": kinds.slow, "json_object": kinds.simple}
    constraints = Constraints(offered, ConstraintSetup(None, VOCABULARY), seconds=0.05)
    try:
        with pytest.raises(InvalidRequest, match=r"'slow' is not compiled after 0\.05 seconds, the limit") as caught:
            constraints.compile(Constraint.of("slow", param="guided_regex"))
        assert caught.value.param == "guided_regex"
        assert kinds.names == ["MainThread", "specgen-constraint"]
        for _ in range(constraints._threads.places - 1):
            with pytest.raises(InvalidRequest):
                constraints.compile(Constraint.of("slow"))
        with pytest.raises(Overloaded):
            constraints.compile(Constraint.of("json_object"))
    finally:
        kinds.go.set()


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), "x", True])
def test_a_time_limit_that_is_none_is_refused(seconds: Any) -> None:
    with pytest.raises(InvalidRequest, match="constraint_seconds is"):
        EngineConfig(constraint_seconds=seconds)
