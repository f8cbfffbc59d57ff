"""The response cache: who is answered from it, who shares a run, and that both say what the model says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from transformers import PreTrainedModel

import specgen
from specgen import Engine, EngineConfig, InvalidRequest, RequestFailed, Result, SamplingParams, StepOutput
from specgen.engine.request import Request
from specgen.engine.response_cache import ResponseCache, ResponseReport, response_key
from specgen.plugins.manager import Plugins, load_plugins
from specgen.types import SpeculativeStats, Usage
from tests.support.constraints import Offers
from tests.support.letters import Letters, until
from tests.support.tiny import build

PROMPT = [9, 31, 40, 9, 31, 77]
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 8}
SEEDED: dict[str, Any] = {"temperature": 1.0, "max_tokens": 8, "seed": 3}
SECONDS = 30

# Another value for everything that may change an answer, beside SEEDED.
OTHERWISE: dict[str, Any] = {
    "temperature": 0.5,
    "top_k": 5,
    "top_p": 0.5,
    "min_p": 0.1,
    "typical_p": 0.5,
    "repetition_penalty": 1.5,
    "presence_penalty": 1.0,
    "frequency_penalty": 1.0,
    "logit_bias": {5: 1.0},
    "allowed_token_ids": (5, 6, 7),
    "banned_token_ids": (5,),
    "bad_words": ("z",),
    "no_repeat_ngram_size": 2,
    "min_tokens": 2,
    "max_tokens": 7,
    "ignore_eos": True,
    "stop": ("zz",),
    "stop_token_ids": (5,),
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "seed": 4,
    "n": 2,
    "logprobs": 1,
    "constraint": {"stairs": 8},
    "cache_salt": "other",
    "trace": True,
}
ALIKE: dict[str, Any] = {"speculation": "off", "prediction": (5, 6)}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama")


@pytest.fixture
def engine(model: PreTrainedModel) -> Iterator[Engine]:
    with Engine(model, Letters(), kv_tokens=1024, response_cache_bytes=1 << 20, plugins=offering()) as engine:
        yield engine
        engine.check()
        assert not any((engine._runner._runs._by_key, engine._runner._runs._by_request))
        assert not engine._runner._runs._by_listener


def offering() -> Plugins:
    """With constraints that need no tokenizer."""
    plugins = load_plugins()
    plugins.register(Offers, "offers")
    return plugins


class Gate:
    """Lets one forward through at a time, when it is told to."""

    def __init__(self, engine: Engine) -> None:
        self.waiting = False
        self._permits = threading.Semaphore(0)
        self._open = False
        forward = engine.target.forward

        def held(segments: Any) -> Any:
            if not self._open:
                self.waiting = True
                self._permits.acquire(timeout=SECONDS)
                self.waiting = False
            return forward(segments)

        engine.target.forward = held  # type: ignore[method-assign]

    def step(self) -> None:
        """One forward, and all that follows from it, up to the next."""
        until(lambda: self.waiting)
        self.waiting = False
        self._permits.release()
        until(lambda: self.waiting)

    def open(self) -> None:
        self._open = True
        self._permits.release()


@contextmanager
def held(engine: Engine) -> Iterator[Gate]:
    gate = Gate(engine)
    try:
        yield gate
    finally:
        gate.open()


def answer(result: Result) -> tuple[Any, ...]:
    """All that identical requests have in common."""
    return (
        result.index,
        result.text,
        result.ids,
        result.finish_reason,
        result.stop,
        result.seed,
        result.logprobs,
        result.usage.prompt_tokens,
        result.usage.completion_tokens,
    )


def several(found: Result | list[Result]) -> list[Result]:
    return found if isinstance(found, list) else [found]


def said(outputs: list[StepOutput]) -> dict[int, tuple[str, list[int]]]:
    """By index, text and tokens of a stream."""
    return {
        index: (
            "".join(output.text for output in outputs if output.index == index),
            [token for output in outputs if output.index == index for token in output.tokens],
        )
        for index in {output.index for output in outputs}
    }


# Answered from the cache.


@pytest.mark.parametrize(
    "options", [GREEDY, SEEDED, {**SEEDED, "n": 3, "logprobs": 2}, {**GREEDY, "stop": "a", "max_tokens": 30}]
)
def test_an_identical_request_runs_nothing(engine: Engine, model: PreTrainedModel, options: dict[str, Any]) -> None:
    first = several(engine.generate(PROMPT, **options))
    steps = engine.counters.steps
    again = several(engine.generate(PROMPT, **options))
    assert engine.counters.steps == steps
    assert [answer(result) for result in again] == [answer(result) for result in first]
    assert all(result.usage.cached_tokens == len(PROMPT) for result in again)
    assert all(result.stats == SpeculativeStats() for result in again)
    assert {result.request_id for result in again}.isdisjoint(result.request_id for result in first)
    assert len({result.request_id for result in again}) == 1
    with Engine(model, Letters(), kv_tokens=1024) as plain:
        uncached = several(plain.generate(PROMPT, **options))
        if options is not GREEDY and "seed" in options:
            assert [answer(result) for result in uncached] == [answer(result) for result in first]
        assert [(r.ids, r.text) for r in uncached] == [(r.ids, r.text) for r in first]
        assert plain.responses.stats == ResponseReport()
    assert engine.responses.stats == replace(engine.responses.stats, hits=1, misses=1, shared=0, responses=1)


def test_a_stream_is_answered_too(engine: Engine) -> None:
    options = {**SEEDED, "n": 2}
    first = list(engine.stream(PROMPT, **options))
    with engine.stream(PROMPT, **options) as stream:
        assert said(list(stream)) == said(first)
        assert [result.index for result in stream.results()] == [0, 1]
    assert engine.responses.stats.hits == 1


@pytest.mark.parametrize("name", OTHERWISE)
def test_whatever_changes_the_answer_is_a_miss(engine: Engine, model: PreTrainedModel, name: str) -> None:
    changed = {**SEEDED, name: OTHERWISE[name]}
    engine.generate(PROMPT, **SEEDED)
    found = several(engine.generate(PROMPT, **changed))
    assert engine.responses.stats.misses == 2
    with Engine(model, Letters(), kv_tokens=1024, plugins=offering()) as plain:
        plainly = several(plain.generate(PROMPT, **changed))
        assert [(r.text, r.ids, r.seed) for r in found] == [(r.text, r.ids, r.seed) for r in plainly]
    engine.generate(PROMPT, **SEEDED)
    engine.generate(PROMPT, **changed)
    assert engine.responses.stats.hits == 2


def test_every_option_is_either_in_the_key_or_left_out_on_purpose() -> None:
    code = {"processors", "stopping_criteria", "plugin_processors"}
    in_the_cache_key = {"adapter"}
    assert {*OTHERWISE, *ALIKE, *code, *in_the_cache_key} == set(SamplingParams.__struct_fields__)


@pytest.mark.parametrize("name", ALIKE)
def test_what_changes_no_token_does_not_part_requests(engine: Engine, name: str) -> None:
    engine.generate(PROMPT, **SEEDED)
    engine.generate(PROMPT, **SEEDED, **{name: ALIKE[name]})
    assert engine.responses.stats.hits == 1


def test_other_prompts_and_ends_are_misses(engine: Engine, model: PreTrainedModel) -> None:
    engine.generate(PROMPT, **GREEDY)
    engine.generate([*PROMPT[:-1], 78], **GREEDY)
    engine.generate(PROMPT[:-1], **GREEDY)
    assert engine.responses.stats.hits == 0
    ends = model.generation_config.eos_token_id
    try:
        model.generation_config.eos_token_id = engine.generate(PROMPT, **GREEDY).ids[2]
        assert engine.generate(PROMPT, **GREEDY).finish_reason == "stop"
    finally:
        model.generation_config.eos_token_id = ends


def test_models_formats_adapters_and_tenants_have_keys_of_their_own(engine: Engine) -> None:
    request, samples = engine._builder.build(PROMPT, SamplingParams(**GREEDY), copies=False)
    own = engine._core.key(request)
    changes = [{name: "x"} for name in ("model", "kv_format", "adapter", "revision", "tenant")]
    keys = [response_key(request, key, samples[0].stops) for key in (own, *(replace(own, **c) for c in changes))]
    assert len(set(keys)) == 6


def test_chance_is_never_kept(engine: Engine) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "max_tokens": 8}
    assert len({engine.generate(PROMPT, **options).ids for _ in range(4)}) > 1
    assert engine.responses.stats == ResponseReport()


@pytest.mark.parametrize("name", ["processors", "stopping_criteria", "plugin_processors"])
def test_a_request_with_code_of_its_own_always_runs(engine: Engine, name: str) -> None:
    calls: list[int] = []

    def code(ids: Any, scores: Any) -> Any:
        calls.append(1)
        return False if name == "stopping_criteria" else scores

    engine._builder.plugin_processors["code"] = lambda tokenizer: code  # type: ignore[index]
    value: Any = {"code": {}} if name == "plugin_processors" else (code,)
    for _ in range(2):
        engine.generate(PROMPT, **GREEDY, **{name: value})
    assert len(calls) == 16
    assert engine.responses.stats == ResponseReport()


def test_what_was_asked_is_copied(engine: Engine) -> None:
    bias = {5: 1.0}
    first = engine.generate(PROMPT, **GREEDY, logit_bias=bias)
    bias[5] = 100.0
    assert engine.generate(PROMPT, **GREEDY, logit_bias=bias).ids != first.ids
    assert engine.generate(PROMPT, **GREEDY, logit_bias={5: 1.0}).ids == first.ids
    assert engine.responses.stats.hits == 1


def test_a_pin_computes_though_the_answer_is_known(engine: Engine) -> None:
    prompt = PROMPT * 8
    engine.generate(prompt, temperature=0.0, max_tokens=1)
    engine.prefix.clear()
    with engine.prefix.pin(prompt) as pinned:
        assert pinned.tokens == 48


def test_observers_hear_of_every_request_and_of_every_step_once(model: PreTrainedModel) -> None:
    seen: dict[str, list[Any]] = {"request": [], "tokens": [], "finish": []}

    class Watcher:
        @specgen.hookimpl
        def on_request(self, request: Request) -> None:
            seen["request"].append(request.id)

        @specgen.hookimpl
        def on_step(self, outputs: Any) -> None:
            seen["tokens"] += [token for output in outputs for token in output.tokens]

        @specgen.hookimpl
        def on_finish(self, result: Result) -> None:
            seen["finish"].append(result.request_id)

    plugins = load_plugins()
    plugins.register(Watcher(), "watcher")
    with Engine(model, plugins=plugins, kv_tokens=512, response_cache_bytes=1 << 20) as engine:
        results = [*engine.generate([PROMPT, PROMPT], **GREEDY), engine.generate(PROMPT, **GREEDY)]
    ids = [result.request_id for result in results]
    assert seen == {"request": ids, "tokens": list(results[0].ids), "finish": ids}
    assert not plugins.failures


# Shared runs.


@pytest.mark.parametrize("options", [GREEDY, {**SEEDED, "n": 3}])
def test_twins_share_one_run(engine: Engine, model: PreTrainedModel, options: dict[str, Any]) -> None:
    with Engine(model, Letters(), kv_tokens=1024, prefix_cache=False) as plain:
        (alone,) = plain.generate([PROMPT], speculation="off", **options)
        rows = plain.target.rows
    before = engine.target.rows
    found = engine.generate([PROMPT, PROMPT, PROMPT], speculation="off", **options)
    assert engine.target.rows - before <= rows
    for one in found:
        assert [r.ids for r in several(one)] == [r.ids for r in several(alone)]
    first, *others = ([answer(result) for result in several(one)] for one in found)
    assert others == [first, first]
    assert several(found[1])[0].usage.cached_tokens == len(PROMPT)
    stats = engine.responses.stats
    assert (stats.misses, stats.shared, stats.hits, stats.responses) == (1, 2, 0, 1)


def test_a_late_twin_gets_what_was_said_and_then_what_follows(engine: Engine) -> None:
    options = {**SEEDED, "n": 2, "speculation": "off"}
    with held(engine) as gate:
        first = engine.stream(PROMPT, **options)
        for _ in range(3):
            gate.step()
        late = engine.stream(PROMPT, **options)
        gate.step()
        early = [next(late) for _ in range(4)]
        assert all(output.request_id == late.request_id for output in early)
        gate.open()
        assert said([*early, *late]) == said(list(first))
        assert [answer(r) for r in late.results()] == [answer(r) for r in first.results()]
    assert engine.responses.stats.shared == 1


@pytest.mark.parametrize("leaver", [0, 1])
@pytest.mark.parametrize(("cancels", "dropped"), [(1, False), (2, False), (0, True), (1, True)])
def test_a_twin_that_leaves_does_not_end_the_other(engine: Engine, leaver: int, cancels: int, dropped: bool) -> None:
    """Nor if it says so twice, as a with block and the end of its stream do."""
    expected = engine.generate(PROMPT, **GREEDY)
    engine.responses.clear()
    with held(engine) as gate:
        twins = [engine.stream(PROMPT, **GREEDY, speculation="off") for _ in range(2)]
        gate.step()
        gate.step()
        gone = twins.pop(leaver)
        gone_id = gone.request_id
        for _ in range(cancels):
            gone.cancel()
        if dropped:
            del gone
        gate.step()
        assert engine._runner._runs.heard_by(gone_id) is None
        gate.open()
        (result,) = twins[0].results(SECONDS)
        assert result.ids == expected.ids
        if not dropped:
            (cut,) = gone.results(SECONDS)
            assert cut.finish_reason == "cancelled"
            assert cut.request_id == gone_id
            assert gone_id in str(cut.error)
            assert 0 < len(cut.ids) < len(expected.ids)
            assert expected.text.startswith(cut.text)
    assert engine.generate(PROMPT, **GREEDY).ids == expected.ids
    assert engine.responses.stats.hits == 1


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_run_ends_with_its_last_listener_and_is_not_kept(engine: Engine, order: tuple[int, int]) -> None:
    with held(engine) as gate:
        twins = [engine.stream(PROMPT, temperature=0.0, max_tokens=100) for _ in range(2)]
        gate.step()
        for index in order:
            twins[index].cancel()
        gate.open()
        for stream in twins:
            (result,) = stream.results(SECONDS)
            assert result.finish_reason == "cancelled"
            assert stream.request_id in str(result.error)
    assert engine.responses.stats.responses == 0
    assert engine.counters.finished == {"cancelled": 1}
    assert engine.generate(PROMPT, temperature=0.0, max_tokens=100).finish_reason == "length"


def test_a_twin_may_leave_when_some_samples_are_finished(engine: Engine) -> None:
    """It has those already; the others end where they stand."""
    options: dict[str, Any] = {
        "temperature": 1.0,
        "seed": 2,
        "n": 4,
        "max_tokens": 60,
        "stop_token_ids": tuple(range(60)),
    }
    expected = engine.generate(PROMPT, **options)
    assert len({len(result.ids) for result in expected}) > 1
    engine.responses.clear()
    with held(engine) as gate:
        stays, leaves = (engine.stream(PROMPT, **options, speculation="off") for _ in range(2))
        while not leaves._results:
            gate.step()
        leaves.cancel()
        gate.open()
        assert [r.ids for r in stays.results(SECONDS)] == [r.ids for r in expected]
        for result, whole in zip(leaves.results(SECONDS), expected, strict=True):
            assert result.ids == whole.ids[: len(result.ids)]
            assert (result.finish_reason == "cancelled") == (result.ids != whole.ids)


def test_a_run_that_fails_fails_all_its_listeners_and_is_not_kept(engine: Engine) -> None:
    forward, calls = engine.target.forward, []

    def fails_once(segments: Any) -> Any:
        calls.append(segments)
        if len(calls) == 3:
            raise MemoryError("no memory for this step")
        return forward(segments)

    engine.target.forward = fails_once  # type: ignore[method-assign]
    twins = engine._runner.submit(
        *(engine._builder.build(PROMPT, SamplingParams(**GREEDY), copies=False) for _ in range(2))
    )
    with capture_logs():
        for stream in twins:
            with pytest.raises(RequestFailed, match=f"{stream.request_id} failed: .*no memory"):
                stream.results(SECONDS)
    assert engine.responses.stats.responses == 0
    assert len(engine.generate(PROMPT, **GREEDY).ids) == 8


def test_closing_ends_all_listeners(model: PreTrainedModel) -> None:
    engine = Engine(model, kv_tokens=512, response_cache_bytes=1 << 20)
    with held(engine) as gate:
        twins = [engine.stream(PROMPT, temperature=0.0, max_tokens=100) for _ in range(3)]
        gate.step()
        twins[0].cancel()
        gate.step()
        closing = threading.Thread(target=engine.close)
        closing.start()
        until(lambda: engine._runner._closed)
        gate.open()
        closing.join(SECONDS)
    assert {stream.results(SECONDS)[0].finish_reason for stream in twins} == {"cancelled"}
    engine.check()


def test_many_threads_that_ask_the_same_are_answered_alike(engine: Engine) -> None:
    found: list[Result] = []
    requests = [{**SEEDED, "seed": seed % 3, "max_tokens": 20} for seed in range(24)]
    threads = [threading.Thread(target=lambda o=o: found.append(engine.generate(PROMPT, **o))) for o in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert len(found) == 24
    assert len({result.ids for result in found}) == len({result.seed for result in found}) == 3
    stats = engine.responses.stats
    assert (stats.misses, stats.hits + stats.shared) == (3, 21)


def test_nothing_is_kept_or_shared_unless_asked_for(model: PreTrainedModel) -> None:
    with Engine(model, kv_tokens=512) as engine:
        engine.generate([PROMPT, PROMPT], **GREEDY)
        assert engine.counters.finished == {"length": 2}
        assert engine.responses.stats == ResponseReport()


def test_the_drop_in_takes_the_engine_as_it_is(model: PreTrainedModel) -> None:
    ids = torch.tensor([PROMPT, PROMPT])
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 8}
    expected = model.generate(ids, **options)
    with Engine(model, kv_tokens=512, response_cache_bytes=1 << 20) as engine, pytest.MonkeyPatch.context() as patch:
        patch.setattr("specgen.api.kept_engine._latest", [engine])
        for _ in range(2):
            assert torch.equal(model.generate(ids, custom_generate=specgen.custom_generate, **options), expected)
        assert engine.responses.stats.misses == 1


# The cache alone.


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def result(tokens: int = 4, index: int = 0) -> Result:
    usage = Usage(3, tokens)
    return Result("id", index, "x" * tokens, tuple(range(tokens)), "length", None, usage, SpeculativeStats(), 0)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_an_answer_is_given_for_as_long_as_it_is_said(clock: Clock) -> None:
    cache = ResponseCache(1 << 16, 10.0, clock)
    cache.put(("a",), [result()])
    clock.now = 5.0
    cache.put(("b",), [result()])
    clock.now = 9.9
    assert cache.get(("a",))
    clock.now = 10.0
    assert cache.get(("a",)) is None, "being asked for does not keep it"
    assert cache.get(("b",))
    clock.now = 15.0
    assert cache.stats == ResponseReport(hits=2, expired=2)
    cache.put(("a",), [result()])
    assert cache.get(("a",))


def test_the_least_recently_used_make_room(clock: Clock) -> None:
    alone = ResponseCache(1 << 16, 10.0, clock)
    alone.put(("a",), [result()])
    size = alone.stats.bytes
    cache = ResponseCache(3 * size, 10.0, clock)
    for name in "abc":
        cache.put((name,), [result()])
    assert cache.stats.bytes == 3 * size
    cache.get(("a",))
    cache.put(("d",), [result()])
    assert [name for name in "abcd" if cache.get((name,))] == ["a", "c", "d"]
    cache.put(("long",), [result(10_000)])
    assert cache.get(("long",)) is None
    assert cache.stats.responses == 3, "one that fits nowhere makes nobody go"
    cache.put(("e",), [result(60)])
    assert cache.stats.bytes <= 3 * size
    assert cache.stats.evicted > 1
    cache.clear()
    assert (cache.stats.responses, cache.stats.bytes) == (0, 0)
    assert all(cache.get((name,)) is None for name in "abcde")


def test_bytes_are_those_of_all_that_is_kept() -> None:
    def size(key: tuple[Any, ...], *results: Result) -> int:
        cache = ResponseCache(1 << 30, 10.0)
        cache.put(key, results)
        return cache.stats.bytes

    ids = tuple(range(1000, 2000))
    least = size((), result())
    assert size((ids,), result()) - least >= 1000 * (8 + 28)
    assert size((), result(1000)) - least >= 1000 * (1 + 8)
    assert size((), result(), result(index=1)) > 1.5 * least - 200


def test_keys_are_compared_and_not_their_hashes() -> None:
    class SameHash(str):
        def __hash__(self) -> int:
            return 7

    cache = ResponseCache(1 << 16, 10.0)
    for count, name in enumerate("abc", 1):
        cache.put((SameHash(name),), [result(count)])
    for count, name in enumerate("abc", 1):
        (found,) = cache.get((SameHash(name),)) or [result(9)]
        assert len(found.ids) == count
    assert cache.get((SameHash("d"),)) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"response_cache_bytes": -1}, "response_cache_bytes is -1; it must be a whole number, at least 0"),
        ({"response_cache_bytes": None}, "response_cache_bytes is None"),
        ({"response_cache_bytes": 9, "response_cache_seconds": 0}, "response_cache_seconds is 0; it must be a finite"),
        ({"response_cache_bytes": 9, "response_cache_seconds": "1h"}, "response_cache_seconds is '1h'; it must be"),
        ({"response_cache_bytes": 9, "response_cache_seconds": float("nan")}, "response_cache_seconds is nan"),
        ({"response_cache_seconds": 5}, "response_cache_seconds is 5, but response_cache_bytes is 0; set it too"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        EngineConfig.of(options)


def test_the_clock_of_an_engine_that_is_told_how_long(model: PreTrainedModel, clock: Callable[[], float]) -> None:
    with Engine(model, kv_tokens=512, response_cache_bytes=1 << 20, response_cache_seconds=7) as engine:
        engine.responses._clock = clock
        engine.generate(PROMPT, **GREEDY)
        clock.now = 6.9  # type: ignore[attr-defined]
        engine.generate(PROMPT, **GREEDY)
        clock.now = 7.0  # type: ignore[attr-defined]
        engine.generate(PROMPT, **GREEDY)
        assert engine.responses.stats == replace(engine.responses.stats, hits=1, misses=2, expired=1, responses=1)
