"""What users call: engines, streams, threads and event loops, and the drop-in for `model.generate`."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from itertools import count
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor
from transformers import (
    AttentionInterface,
    EosTokenCriteria,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput

import specgen
from specgen import (
    Chat,
    ContextLengthExceeded,
    Engine,
    EngineClosed,
    InvalidRequest,
    RequestCancelled,
    RequestFailed,
    Result,
    SamplingParams,
    Speculation,
    StepOutput,
    Stream,
)
from specgen.api import kept_engine as api
from specgen.api.kept_engine import engine_of
from specgen.engine import thread as runner
from specgen.engine.request import Request
from specgen.kv.pool import BlockTable
from specgen.plugins.manager import load_plugins
from tests.support.bench import greedy
from tests.support.engines import close_kept
from tests.support.letters import SECONDS, Letters, engine_threads, in_thread, until
from tests.support.tiny import VOCABULARY, build

PROMPT = [9, 31, 40, 9, 31, 77]
PROMPTS = ([9, 31, 40, 9, 31, 77], [5], [3, 4, 3, 4, 3, 4, 3], [88, 1, 60, 61])


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_engine_stays() -> Iterator[None]:
    """The engine that the one-line helpers keep ends with the test."""
    yield
    close_kept()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama")


@pytest.fixture
def engine(model: PreTrainedModel) -> Iterator[Engine]:
    with Engine(model, Letters(), kv_tokens=4096) as engine:
        yield engine
        if not engine._runner._closed:
            engine.check()


def read(stream: Stream, said: list[int]) -> None:
    """Append what a stream says, as far as it comes."""
    for output in stream:
        said += output.tokens


# Prompts and results.


def test_a_prompt_is_ids_or_text_or_messages(engine: Engine, model: PreTrainedModel) -> None:
    expected = greedy(model, PROMPT, 8)
    text = Letters().decode(PROMPT)
    assert list(engine.generate(PROMPT, max_tokens=8).ids) == expected
    assert list(engine.generate(text, max_tokens=8).ids) == expected
    chat = [{"role": "user", "content": "hi"}]
    assert list(engine.generate(chat, max_tokens=8).ids) == greedy(model, Letters().encode("<user>hi<bot>"), 8)


def test_a_result_tells_all_about_a_text(engine: Engine, model: PreTrainedModel) -> None:
    result = engine.generate(PROMPT, max_tokens=8, seed=7)
    assert list(result.ids) == greedy(model, PROMPT, 8)
    assert result.text == Letters().decode(result.ids)
    assert (result.finish_reason, result.stop, result.error, result.index, result.seed) == ("length", None, None, 0, 7)
    assert (result.usage.prompt_tokens, result.usage.completion_tokens, result.usage.total_tokens) == (6, 8, 14)
    assert result.stats.num_spec_steps + result.stats.num_accepted_draft_tokens == 8


def test_several_prompts_and_samples_come_back_in_their_order(engine: Engine, model: PreTrainedModel) -> None:
    results = engine.generate([list(prompt) for prompt in PROMPTS], max_tokens=6)
    assert [list(result.ids) for result in results] == [greedy(model, prompt, 6) for prompt in PROMPTS]
    samples = engine.generate(PROMPT, max_tokens=6, n=3, temperature=1.5, seed=1)
    assert [sample.index for sample in samples] == [0, 1, 2]
    grid = engine.generate(["abc", "de"], max_tokens=6, n=2, temperature=1.5, seed=1)
    assert [len(row) for row in grid] == [2, 2]
    assert engine.generate("de", max_tokens=6, n=2, temperature=1.5, seed=1)[1].ids == grid[1][1].ids


def test_several_chats_are_several_prompts(engine: Engine) -> None:
    chats = [Chat([{"role": "user", "content": text}]) for text in ("a", "bc")]
    expected = [engine.generate(chat, max_tokens=4).ids for chat in chats]
    assert [result.ids for result in engine.generate(chats, max_tokens=4)] == expected


def test_prompts_of_one_call_have_processors_of_their_own(engine: Engine) -> None:
    """One that counts its calls counts those of one text."""

    class Counting:
        calls = 0

        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            self.calls += 1
            scores[:, self.calls] = 1e9
            return scores

    results = engine.generate([PROMPT, PROMPT], max_tokens=5, processors=[Counting()])
    assert [result.ids for result in results] == [(1, 2, 3, 4, 5)] * 2


# Streams.


def test_a_stream_hands_out_what_each_step_adds(engine: Engine) -> None:
    expected = engine.generate(PROMPT, max_tokens=20)
    outputs = list(engine.stream(PROMPT, max_tokens=20))
    assert all(output.tokens for output in outputs)
    assert tuple(token for output in outputs for token in output.tokens) == expected.ids
    assert "".join(output.text for output in outputs) == expected.text
    assert [output.result is not None for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert outputs[-1].result is not None
    assert outputs[-1].result.ids == expected.ids


def test_a_stream_of_several_samples_tells_them_apart(engine: Engine) -> None:
    expected = engine.generate(PROMPT, max_tokens=9, n=3, temperature=1.5, seed=1)
    texts: dict[int, list[int]] = {0: [], 1: [], 2: []}
    stream = engine.stream(PROMPT, max_tokens=9, n=3, temperature=1.5, seed=1)
    for output in stream:
        texts[output.index] += output.tokens
    assert [tuple(texts[index]) for index in range(3)] == [result.ids for result in expected]
    assert [result.ids for result in stream.results()] == [result.ids for result in expected]


def test_results_wait_no_longer_than_they_are_told(engine: Engine) -> None:
    slow = Slow(0.05)
    stream = engine.stream(PROMPT, max_tokens=100, processors=[slow])
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=f"request {stream.request_id} is not finished after 0.2 s"):
        stream.results(timeout=0.2)
    assert 0.15 < time.monotonic() - started < 3
    stream.cancel()
    [result] = stream.results(SECONDS)
    assert result.finish_reason == "cancelled"


class Slow:
    """A processor that takes its time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.calls = 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        time.sleep(self.seconds)
        return scores


def test_cancelling_ends_a_text_where_it_stands(engine: Engine, model: PreTrainedModel) -> None:
    """The stream ends, with what was said; cancelling again, or what is finished, is harmless."""
    stream = engine.stream(PROMPT, max_tokens=110, processors=[Slow(0.01)])
    first = next(stream)
    stream.cancel()
    rest = list(stream)
    [result] = stream.results()
    said = [token for output in (first, *rest) for token in output.tokens]
    assert (result.finish_reason, list(result.ids)) == ("cancelled", said)
    assert said == greedy(model, PROMPT, 110)[: len(said)]
    assert len(said) < 110
    assert isinstance(result.error, RequestCancelled)
    stream.cancel()
    assert stream.results() == [result]


def test_a_stream_that_is_left_early_is_cancelled_by_its_with_block(engine: Engine) -> None:
    with engine.stream(PROMPT, max_tokens=110, processors=[Slow(0.01)]) as stream:
        next(stream)
    [result] = stream.results(SECONDS)
    assert result.finish_reason == "cancelled"


def test_a_stream_that_is_dropped_is_cancelled(engine: Engine) -> None:
    """Nobody can read it any more."""
    stream = engine.stream(PROMPT, max_tokens=110, processors=[Slow(0.01)])
    next(stream)
    del stream
    until(lambda: engine.counters.finished.get("cancelled"))


def test_what_a_processor_raises_arrives_as_it_is(engine: Engine, model: PreTrainedModel) -> None:
    def broken(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] == len(PROMPT) + 3:
            raise ZeroDivisionError("as expected")
        return scores

    expected = [greedy(model, PROMPT, 3), greedy(model, PROMPTS[2], 40)]
    other = engine.stream(PROMPTS[2], max_tokens=40)
    stream = engine.stream(PROMPT, max_tokens=20, processors=[broken])
    said = []
    with pytest.raises(ZeroDivisionError, match="as expected") as caught:
        read(stream, said)
    assert caught.value.__notes__ == [f"raised in request {stream.request_id}, sample 0"]
    assert said == expected[0]
    with pytest.raises(ZeroDivisionError, match="as expected"):
        stream.results()
    with pytest.raises(ZeroDivisionError, match="as expected"):
        engine.generate([PROMPTS[1], PROMPT], max_tokens=20, processors=[broken])
    assert list(other.results(SECONDS)[0].ids) == expected[1]


def test_what_was_prepared_is_run_later(engine: Engine) -> None:
    """Its length is known before."""
    prepared = [engine.prepare(list(prompt), max_tokens=7) for prompt in PROMPTS]
    assert [len(request.ids) for request, _ in prepared] == [len(prompt) for prompt in PROMPTS]
    assert engine.counters.steps == 0
    results = [stream.results(SECONDS)[0] for stream in engine.start(*prepared)]
    assert [result.ids for result in results] == [
        result.ids for result in engine.generate([list(prompt) for prompt in PROMPTS], max_tokens=7)
    ]


def test_what_says_nothing_of_speculation_drafts_as_its_engine_does(model: PreTrainedModel) -> None:
    """By keywords and by params, which may say otherwise, "auto" too."""
    silent: dict[str, Any] = {"max_tokens": 30, "prediction": tuple(greedy(model, PROMPT, 30))}

    def drafted(engine: Engine, **options: Any) -> list[bool]:
        results = [engine.generate(PROMPT, **options), engine.generate(PROMPT, SamplingParams(**options))]
        return [result.stats.num_draft_tokens > 0 for result in results]

    with Engine(model, kv_tokens=512, speculation="off") as off:
        assert drafted(off, **silent) == [False, False]
        assert drafted(off, **silent, speculation={"adaptive": False}) == [True, True]
        request, _ = off.prepare(PROMPT, SamplingParams(speculation=Speculation()))
        assert request.speculation == Speculation()
        request, _ = off.prepare(PROMPT, SamplingParams())
        assert request.speculation == Speculation(max_nodes=0)
    with Engine(model, kv_tokens=512, speculation={"adaptive": False}) as eager:
        assert drafted(eager, **silent) == [True, True]
        assert drafted(eager, **silent, speculation="off") == [False, False]


def test_a_traced_stream_tells_who_guessed_what(engine: Engine) -> None:
    """Accepted nodes hold the tokens that were committed; every node has someone who offered it."""
    options: dict[str, Any] = {"max_tokens": 30, "speculation": {"adaptive": False}, "prediction": (5, 5, 5)}
    expected = engine.generate(PROMPT, max_tokens=30).ids
    options["prediction"] = (*expected[:9], 1, *expected[12:])
    outputs = list(engine.stream(PROMPT, trace=True, **options))
    traces = [output.trace for output in outputs if output.trace]
    assert traces
    for output in outputs:
        if trace := output.trace:
            assert [trace.tree.tokens[node] for node in trace.accepted] == list(output.tokens[: len(trace.accepted)])
            assert len(trace.drafters) == len(trace.tree)
            assert all(trace.drafters)
    names = {name for trace in traces for node in trace.accepted for name in trace.drafters[node]}
    assert "prediction" in names
    assert tuple(token for output in outputs for token in output.tokens) == expected
    assert not any(output.trace for output in engine.stream(PROMPT, **options))


def test_load_tells_who_runs_and_who_waits(model: PreTrainedModel) -> None:
    with Engine(model, kv_tokens=512, max_num_seqs=1) as engine:
        assert (engine.load.running, engine.load.waiting, engine.load.used_pages) == (0, 0, 0)
        streams = [engine.stream(PROMPT, max_tokens=100, processors=[Slow(0.01)]) for _ in range(3)]
        next(streams[0])
        engine.check()  # behind it on the engine's thread all three are queued
        assert (engine.load.running, engine.load.waiting) == (1, 2)
        assert 0 < engine.load.used_pages <= engine.load.total_pages
        for stream in streams:
            stream.cancel()
        until(lambda: not engine.load.running + engine.load.waiting)
        assert engine.load.prefix_queried >= len(PROMPT)


# Event loops.


async def test_a_stream_is_read_by_async_for(engine: Engine) -> None:
    expected = engine.generate(PROMPT, max_tokens=20).ids
    stream = engine.stream(PROMPT, max_tokens=20)
    said = [token async for output in stream for token in output.tokens]
    assert tuple(said) == expected
    assert (await stream.aresults())[0].ids == expected


async def test_a_loop_serves_many_streams_and_stays_awake(engine: Engine) -> None:
    """Waiting for results blocks nobody, even where outputs lie unread."""
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.005)

    ticking = asyncio.create_task(tick())
    streams = [engine.stream(prompt, max_tokens=60, processors=[Slow(0.003)]) for prompt in PROMPTS]
    results = await asyncio.wait_for(asyncio.gather(*(stream.aresults() for stream in streams)), SECONDS)
    ticking.cancel()
    assert [len(result[0].ids) for result in results] == [60] * 4
    assert ticks > 10, "the loop stood still"


async def test_several_tasks_may_wait_for_one_stream(engine: Engine) -> None:
    """One reads it, others wait for its end."""
    stream = engine.stream(PROMPT, max_tokens=30)

    async def read() -> int:
        return sum([len(output.tokens) async for output in stream])

    waiting = asyncio.gather(stream.aresults(), read(), stream.aresults())
    first, count, second = await asyncio.wait_for(waiting, SECONDS)
    assert count == 30
    assert first == second


async def test_a_task_that_is_cancelled_leaves_the_request_to_its_with_block(engine: Engine) -> None:
    stream = engine.stream(PROMPT, max_tokens=110, processors=[Slow(0.01)])

    async def read() -> None:
        async with stream:
            async for _ in stream:
                pass

    task = asyncio.create_task(read())
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    [result] = await asyncio.wait_for(stream.aresults(), SECONDS)
    assert result.finish_reason == "cancelled"


def test_a_loop_that_ends_while_a_stream_runs_harms_nobody(engine: Engine, model: PreTrainedModel) -> None:
    """What was waited for there comes to nobody; the engine goes on, and so may the stream on another loop."""
    expected = [greedy(model, PROMPT, 40), greedy(model, PROMPTS[1], 5)]
    stream = engine.stream(PROMPT, max_tokens=40, processors=[Slow(0.01)])

    async def wait_a_little() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stream.aresults(), 0.05)

    asyncio.run(wait_a_little())
    assert list(engine.generate(PROMPTS[1], max_tokens=5).ids) == expected[1]
    [result] = asyncio.run(asyncio.wait_for(stream.aresults(), SECONDS))
    assert list(result.ids) == expected[0]


# Threads.


def test_many_threads_at_once_get_what_each_would_get_alone(engine: Engine) -> None:
    """Greedy, sampled and cancelled, from sixteen threads."""

    def options(number: int) -> dict[str, Any]:
        sampling = {"temperature": 1.5, "seed": number} if number % 3 else {}
        return {"prompt": list(PROMPTS[number % 4]), "max_tokens": 5 + number % 7, **sampling}

    alone = [engine.generate(**options(number)).ids for number in range(48)]

    def ask(number: int) -> tuple[int, ...]:
        if number % 5 == 0:
            with engine.stream(PROMPT, max_tokens=100) as left:
                next(left)
        return engine.generate(**options(number)).ids

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(48), timeout=SECONDS)) == alone
    until(lambda: not engine._core.busy)


def test_requests_of_several_threads_share_forwards(engine: Engine) -> None:
    forwards = engine.target.forwards
    streams = [engine.stream(list(prompt), max_tokens=50, speculation="off") for prompt in PROMPTS * 2]
    for stream in streams:
        stream.results(SECONDS)
    assert engine.target.forwards - forwards < 8 * 50 / 2


def test_a_step_that_fails_fails_those_who_ran_and_nobody_else(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when memory runs out: what waits is served, and so is what comes later."""
    with Engine(model, kv_tokens=1024, max_num_seqs=1) as engine:
        forward, calls = engine.target.forward, []

        def fails_once(segments: Any) -> Any:
            calls.append(segments)
            if len(calls) == 3:
                raise MemoryError("no memory for this step")
            return forward(segments)

        monkeypatch.setattr(engine.target, "forward", fails_once)
        with capture_logs():
            first = engine.stream(PROMPT, max_tokens=10)
            second = engine.stream(PROMPTS[1], max_tokens=10)
            with pytest.raises(RequestFailed, match="no memory for this step") as caught:
                first.results(SECONDS)
            assert isinstance(caught.value.__cause__, MemoryError)
            assert list(second.results(SECONDS)[0].ids) == greedy(model, PROMPTS[1], 10)
        assert list(engine.generate(PROMPT, max_tokens=10).ids) == greedy(model, PROMPT, 10)
        engine.check()


def test_a_request_that_can_be_queued_only_in_part_fails_as_a_whole(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of its samples runs, and nothing is held for them."""
    pool = engine.target.pool
    opened, faults = pool.open, iter([None, torch.OutOfMemoryError("no memory for a table")])

    def opens_one() -> BlockTable:
        if fault := next(faults, None):
            raise fault
        return opened()

    monkeypatch.setattr(pool, "open", opens_one)
    with capture_logs():
        stream = engine.stream(PROMPT, max_tokens=5, n=3, temperature=1.0)
        with pytest.raises(RequestFailed, match="could not be queued: .*no memory for a table"):
            stream.results(SECONDS)
    assert list(engine.generate(PROMPT, max_tokens=5, speculation="off").ids) == greedy(engine.model, PROMPT, 5)
    assert (engine.counters.steps, engine.counters.finished) == (5, {"length": 1})
    assert pool.open_tables == 0


def test_a_stream_that_failed_takes_nothing_more() -> None:
    stream = Stream("one", 2, lambda request_id: None)
    stream.fail(RequestFailed("no more"))
    for index in range(2):
        stream.put(StepOutput("one", index, (5,), "a"))
    with pytest.raises(RequestFailed, match="no more"):
        next(stream)
    with pytest.raises(RequestFailed, match="no more"):
        stream.results(0)


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_a_commit_that_fails_takes_no_token_from_the_others(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Neither the last one of who ends in that step, nor one of who goes on, though memory may come back."""
    commit, calls = BlockTable.commit, count(1)

    def fails_once(table: BlockTable, chain: int, accepted: Sequence[int] = ()) -> None:
        if next(calls) == 3:
            raise error("no memory for this commit")
        commit(table, chain, accepted)

    with Engine(model, kv_tokens=1024) as engine:
        monkeypatch.setattr(BlockTable, "commit", fails_once)
        lengths = (1, 10, 10)
        built = [engine.prepare(prompt, max_tokens=n) for prompt, n in zip(PROMPTS[:3], lengths, strict=True)]
        with capture_logs():
            ends, goes_on, fails = engine.start(*built)
            for stream, prompt, length in zip((ends, goes_on), PROMPTS, lengths, strict=False):
                whole, said = list(stream.results(SECONDS)[0].ids), []
                read(stream, said)
                assert said == whole == greedy(model, prompt, length)
            with pytest.raises(RequestFailed, match="no memory for this commit") as caught:
                fails.results(SECONDS)
        assert isinstance(caught.value.__cause__, error)
        assert list(engine.generate(PROMPT, max_tokens=10).ids) == greedy(model, PROMPT, 10)
        engine.check()


def test_what_the_cache_cannot_take_over_is_lost_to_it_alone(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose pages they were has its text, though they were taken from it on the way, and they are free in the end."""

    def full(*args: object) -> None:
        raise MemoryError("no memory in the cache")

    prompts = PROMPTS[0], PROMPTS[3]
    with Engine(model, kv_tokens=96) as engine, capture_logs() as logs:
        monkeypatch.setattr(engine._core.prefix, "retire", full)
        streams = engine.start(*(engine.prepare(prompt, max_tokens=60, speculation="off") for prompt in prompts))
        found = [list(stream.results(SECONDS)[0].ids) for stream in streams]
        assert found == [greedy(model, prompt, 60) for prompt in prompts]
        assert engine.load.preemptions > 0
        assert [line["event"] for line in logs] == ["what a sequence leaves could not be cached"] * (
            engine.load.preemptions + 2
        )
        engine.check()
        assert engine.failed_steps == engine.target.pool.open_tables == 0


def test_plugins_watch_requests_steps_and_ends(model: PreTrainedModel) -> None:
    """On the engine's thread, in order; one that raises does not disturb."""
    seen: list[tuple[str, Any]] = []

    class Watcher:
        @specgen.hookimpl
        def on_request(self, request: Request) -> None:
            seen.append(("request", request.id))

        @specgen.hookimpl
        def on_step(self, outputs: Sequence[StepOutput]) -> None:
            seen.append(("step", sum(len(output.tokens) for output in outputs)))
            raise KeyError("observer bug")

        @specgen.hookimpl
        def on_finish(self, result: Result) -> None:
            seen.append(("finish", (result.request_id, threading.current_thread().name)))

    plugins = load_plugins()
    plugins.register(Watcher(), "watcher")
    with Engine(model, plugins=plugins, kv_tokens=512) as engine, capture_logs():
        result = engine.generate(PROMPT, max_tokens=5, speculation="off")
    expected = [("request", result.request_id), *[("step", 1)] * 5, ("finish", (result.request_id, "specgen-engine"))]
    assert seen == expected
    assert plugins.failures == {"watcher": 5}


# Beginnings and ends.


def test_a_closed_engine_says_so(model: PreTrainedModel) -> None:
    """What ran is cancelled with what it said; new requests are refused; closing twice is harmless."""
    engine = Engine(model, kv_tokens=512)
    running = engine.stream(PROMPT, max_tokens=110, processors=[Slow(0.01)])
    next(running)
    engine.close()
    [result] = running.results(SECONDS)
    assert result.finish_reason == "cancelled"
    assert isinstance(result.error, EngineClosed)
    assert 0 < len(result.ids) < 110
    with pytest.raises(EngineClosed, match="closed; open a new one"):
        engine.generate(PROMPT)
    with pytest.raises(EngineClosed):
        engine.stream(PROMPT)
    engine.close()
    engine.check()
    running.cancel()
    assert not engine.target.pool.open_tables


def test_leaving_the_with_block_closes(model: PreTrainedModel) -> None:
    with Engine(model, kv_tokens=512) as engine:
        assert len(engine.generate(PROMPT, max_tokens=3).ids) == 3
        assert engine_threads() == 1
    assert engine_threads() == 0
    with pytest.raises(EngineClosed):
        engine.generate(PROMPT)


def test_an_engine_that_never_ran_can_be_checked_and_closed(model: PreTrainedModel) -> None:
    engine = Engine(model, kv_tokens=512)
    assert engine_threads() == 0
    engine.check()
    engine.close()
    engine.check()


def test_closing_from_many_threads_at_once_is_harmless(model: PreTrainedModel) -> None:
    engine = Engine(model, kv_tokens=512)
    stream = engine.stream(PROMPT, max_tokens=110, processors=[Slow(0.005)])
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: engine.close(), range(8), timeout=SECONDS))
    assert stream.results(SECONDS)[0].finish_reason == "cancelled"
    assert engine_threads() == 0


def test_an_idle_engine_has_no_thread_and_starts_another(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_IDLE_SECONDS", 0.02)
    with Engine(model, kv_tokens=512) as engine:
        expected = engine.generate(PROMPT, max_tokens=3).ids
        until(lambda: engine_threads() == 0)
        engine.check()
        assert engine.generate(PROMPT, max_tokens=3).ids == expected


def test_what_an_idle_engine_is_asked_holds_up_no_request(model: PreTrainedModel) -> None:
    """It is answered on the engine's thread; others get in line meanwhile."""
    asked, answered = threading.Event(), threading.Event()

    def ask() -> str:
        asked.set()
        assert answered.wait(SECONDS)
        return threading.current_thread().name

    with Engine(model, kv_tokens=512) as engine:
        name = in_thread(lambda: engine._runner.call(ask))
        assert asked.wait(SECONDS)
        try:
            stream = in_thread(lambda: engine.stream(PROMPT, max_tokens=3)).result(5)
        finally:
            answered.set()
        assert name.result(SECONDS) == "specgen-engine"
        assert list(stream.results(SECONDS)[0].ids) == greedy(model, PROMPT, 3)


def test_the_engines_thread_may_ask_its_own_engine(model: PreTrainedModel) -> None:
    """A plugin does, which watches the ends of requests."""
    found: list[int] = []

    class Asks:
        @specgen.hookimpl
        def on_finish(self, result: Result) -> None:
            found.append(engine.prefix.stats.queries)

    plugins = load_plugins()
    plugins.register(Asks(), "asks")
    engine = Engine(model, plugins=plugins, kv_tokens=512)
    assert len(engine.stream(PROMPT, max_tokens=3).results(SECONDS)[0].ids) == 3
    until(lambda: found)
    engine.close()
    assert found == [1]


@pytest.mark.parametrize("error", [KeyError, SystemExit])
def test_whoever_asks_gets_what_that_raised(engine: Engine, error: type[BaseException]) -> None:
    """And it ends nothing else."""

    def raises() -> None:
        raise error("asked for it")

    with pytest.raises(error, match="asked for it"):
        engine._runner.call(raises)
    stream = engine.stream(PROMPT, max_tokens=60, ignore_eos=True, processors=[Slow(0.01)])
    next(stream)
    with pytest.raises(error, match="asked for it"):
        in_thread(lambda: engine._runner.call(raises)).result(SECONDS)
    assert len(stream.results(SECONDS)[0].ids) == 60
    assert engine.failure is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_death_of_the_engines_thread_is_told_to_those_who_asked(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it died, and afterwards."""
    inside, dies = threading.Event(), threading.Event()

    def step() -> None:
        inside.set()
        assert dies.wait(SECONDS)
        raise SystemExit("killed")

    engine = Engine(model, kv_tokens=512)
    monkeypatch.setattr(engine._core, "step", step)
    with capture_logs():
        stream = engine.stream(PROMPT, max_tokens=3)
        assert inside.wait(SECONDS)
        asking = [in_thread(lambda: engine.prefix.stats), in_thread(engine.check)]
        until(lambda: len(engine._runner._commands) == 2)
        dies.set()
        for asked in asking:
            with pytest.raises(EngineClosed, match="the engine's thread ended: SystemExit") as caught:
                asked.result(SECONDS)
            assert isinstance(caught.value.__cause__, SystemExit)
        with pytest.raises(RequestFailed, match="the engine's thread ended"):
            stream.results(SECONDS)
        with pytest.raises(EngineClosed, match="the engine's thread ended: SystemExit"):
            engine.check()
        with pytest.raises(EngineClosed):
            engine.generate(PROMPT)
        engine.close()
    until(lambda: engine_threads() == 0)


@pytest.mark.parametrize("closed", [True, False])
def test_nothing_stays_of_an_engine_that_is_dropped(closed: bool) -> None:
    """Not the thread, nor the model, nor the name of its attention function."""
    model = build("llama")
    engine = Engine(model, kv_tokens=512, draft_model=model)
    attention = engine.target.packed.wrapped.route.name
    assert attention in AttentionInterface._global_mapping
    assert len(engine.generate(PROMPT, max_tokens=3).ids) == 3
    if closed:
        engine.close()
    left = weakref.ref(model), weakref.ref(engine), weakref.ref(engine.target.pool)
    del model, engine
    gc.collect()
    until(lambda: engine_threads() == 0)
    gc.collect()
    assert [reference() for reference in left] == [None] * 3
    assert attention not in AttentionInterface._global_mapping


def test_the_model_stays_as_it_was(model: PreTrainedModel) -> None:
    """Its weights, its configs, its own generate, even while the engine lives."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    config, generation = deepcopy(model.config.to_dict()), deepcopy(model.generation_config.to_dict())
    attention = model.config._attn_implementation
    expected = greedy(model, PROMPT, 10)
    with specgen.wrap(model, Letters(), kv_tokens=512) as engine:
        assert list(engine.generate(PROMPT, max_tokens=10, temperature=1.0, repetition_penalty=1.2).ids)
        assert greedy(model, PROMPT, 10) == expected
        assert model.config._attn_implementation == attention
    assert model.config.to_dict() == config
    assert model.generation_config.to_dict() == generation
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_one_line_generates_and_keeps_the_engine(model: PreTrainedModel) -> None:
    """For the same model the same engine; another model's takes its place."""
    expected = greedy(model, PROMPT, 6)
    assert list(specgen.generate(model, PROMPT, max_tokens=6).ids) == expected
    [first] = api._latest
    assert list(specgen.generate(model, [PROMPT], max_tokens=6)[0].ids) == expected
    assert api._latest == [first]
    assert specgen.generate(model, PROMPT, tokenizer=Letters(), max_tokens=6).text == Letters().decode(expected)
    other = build("llama", seed=1)
    assert list(specgen.generate(other, PROMPT, max_tokens=6).ids) == greedy(other, PROMPT, 6)
    assert [engine.model for engine in api._latest] == [other]
    # Whoever still holds the former engine, another thread in the midst of a call for instance, may finish with it.
    assert list(first.generate(PROMPT, max_tokens=6).ids) == expected
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None


def test_threads_that_come_at_once_share_the_engine_of_one_line(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them have found none when the first begins to make it."""
    made: list[Engine] = []
    threads, lock = 4, threading.Lock()
    all_look = threading.Barrier(threads)

    class Together:
        """A lock that nobody gets before all want it."""

        def __enter__(self) -> None:
            all_look.wait(SECONDS)
            lock.acquire()

        def __exit__(self, *exc: object) -> None:
            lock.release()

    def wrap(*arguments: Any) -> Engine:
        made.append(Engine(*arguments))
        return made[-1]

    monkeypatch.setattr(api, "_making", Together())
    monkeypatch.setattr(api, "wrap", wrap)
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda _: api.engine_of(model), range(threads)))
    assert len(made) == 1
    assert found == made * threads
    assert api._latest == made


def test_a_caller_may_use_the_model_while_the_engine_runs(model: PreTrainedModel) -> None:
    """The engine's forwards go through a twin that shares the weights."""
    expected = greedy(model, PROMPT, 12)
    with Engine(model, kv_tokens=512) as engine:
        assert engine.target.model is not model
        assert engine.target.model.lm_head.weight is model.lm_head.weight
        stream = engine.stream(PROMPT, max_tokens=200, ignore_eos=True)
        for _ in range(5):
            assert greedy(model, PROMPT, 12) == expected
        assert list(stream.results()[0].ids[:12]) == expected


def test_a_stream_keeps_its_engine(model: PreTrainedModel) -> None:
    stream = Engine(model, kv_tokens=512).stream(PROMPT, max_tokens=40, ignore_eos=True)
    gc.collect()
    assert len(stream.results()[0].ids) == 40


def test_engines_of_one_model_do_not_disturb_one_another(model: PreTrainedModel) -> None:
    with Engine(model, kv_tokens=512) as one, Engine(model, kv_tokens=512) as two:
        expected = greedy(model, PROMPT, 10)
        for _ in range(3):
            assert list(one.generate(PROMPT, max_tokens=10).ids) == expected
            assert list(two.generate(PROMPT, max_tokens=10).ids) == expected


# The drop-in for model.generate.


@pytest.fixture(scope="module")
def speaking() -> PreTrainedModel:
    """A model with end tokens, one of which it says now and then."""
    model = build("llama")
    model.generation_config.eos_token_id = [42, 2]
    return model


def padded(prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """A batch with padding on the left, as a tokenizer makes it."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


class Nudge(LogitsProcessor):
    """Stateful: each call raises another token, depending on what the batch's row says last."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        favoured = (input_ids[:, -1] * 5 + self.calls * 11) % VOCABULARY
        return scores.scatter_add(1, favoured[:, None], torch.full((len(scores), 1), 4.0))


BATCH = [*PROMPTS, [42, 7], [60, 61, 62, 60, 61, 62, 60, 61]]
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"max_new_tokens": 20},
    "by the length of the whole": {"max_length": 17},
    "one token": {"max_new_tokens": 1},
    "penalties over padding": {"max_new_tokens": 20, "repetition_penalty": 1.6, "min_new_tokens": 12},
    "bans": {
        "max_new_tokens": 20,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[24], [42, 42]],
        "suppress_tokens": [7],
    },
    "ends": {"max_new_tokens": 20, "eos_token_id": [24, 79]},
    "an end by force": {"max_new_tokens": 9, "forced_eos_token_id": 2, "exponential_decay_length_penalty": (3, 1.4)},
    "an own processor": {"max_new_tokens": 20, "logits_processor": LogitsProcessorList([Nudge()])},
    "no cache": {"max_new_tokens": 6, "use_cache": False},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("rows", [1, 2, 6])
def test_the_drop_in_returns_what_transformers_returns(speaking: PreTrainedModel, name: str, rows: int) -> None:
    """Token by token, padding included: prompts of other lengths, rows that end early."""
    batch = padded(BATCH[:rows])
    expected = speaking.generate(**batch, do_sample=False, **deepcopy(SETTINGS[name]))
    found = speaking.generate(
        **batch, do_sample=False, custom_generate=specgen.custom_generate, **deepcopy(SETTINGS[name])
    )
    assert found.dtype == expected.dtype
    assert found.tolist() == expected.tolist()


def test_rows_that_end_early_are_filled_with_padding(speaking: PreTrainedModel) -> None:
    """The check above would say little if none did."""
    batch = padded(BATCH)
    found = speaking.generate(**batch, do_sample=False, max_new_tokens=20, custom_generate=specgen.custom_generate)
    ends = [42 in row[batch["input_ids"].shape[1] :].tolist() for row in found]
    assert True in ends
    assert False in ends


def test_the_drop_in_says_what_the_weights_say_now() -> None:
    """A model that is trained between two calls, or whose weights are read from a file."""
    model = build("llama")
    ids = torch.tensor([PROMPT])
    asked: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def both() -> list[int]:
        found = model.generate(ids, custom_generate=specgen.custom_generate, **asked)
        assert found.equal(model.generate(ids, **asked))
        said = specgen.generate(model, PROMPT, temperature=0.0, max_tokens=8).ids
        assert list(said) == found[0, len(PROMPT) :].tolist()
        return list(found[0].tolist())

    first, engine = both(), engine_of(model)
    assert engine_of(model) is engine
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.randn_like(model.lm_head.weight))
    assert both() != first
    model.load_state_dict(before)
    assert both() == first
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    assert both() != first


def test_without_a_mask_there_is_no_padding(speaking: PreTrainedModel) -> None:
    ids = torch.tensor([PROMPT])
    expected = speaking.generate(ids, do_sample=False, max_new_tokens=8)
    assert speaking.generate(ids, do_sample=False, max_new_tokens=8, custom_generate=specgen.custom_generate).equal(
        expected
    )


def test_a_dictionary_is_returned_when_asked_for(speaking: PreTrainedModel) -> None:
    batch = padded(BATCH)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8}
    found = speaking.generate(
        **batch, return_dict_in_generate=True, custom_generate=specgen.custom_generate, **settings
    )
    assert isinstance(found, GenerateDecoderOnlyOutput)
    assert found.sequences.equal(speaking.generate(**batch, **settings))


@pytest.mark.parametrize(
    "criteria",
    [
        [MaxLengthCriteria(max_length=12)],
        [MaxLengthCriteria(max_length=25)],
        [EosTokenCriteria(eos_token_id=torch.tensor([24, 36]))],
    ],
    ids=["shorter", "longer", "ends"],
)
def test_criteria_of_the_caller_take_the_place_of_the_configs(speaking: PreTrainedModel, criteria: list[Any]) -> None:
    """As in transformers."""
    batch = padded(BATCH)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 9}
    expected = speaking.generate(**batch, stopping_criteria=StoppingCriteriaList(criteria), **settings)
    found = speaking.generate(
        **batch,
        stopping_criteria=StoppingCriteriaList(criteria),
        custom_generate=specgen.custom_generate,
        **settings,
    )
    assert found.tolist() == expected.tolist()
    assert expected.tolist() != speaking.generate(**batch, **settings).tolist()


def test_a_criterion_of_the_caller_sees_rows_as_transformers_shows_them(speaking: PreTrainedModel) -> None:
    """Padding included; it ends each row by itself."""

    class Sum:
        """Ends a row whose ids make a number that 7 divides, padding counted with them."""

        def __call__(self, input_ids: Tensor, scores: Any, **others: Any) -> Tensor:
            return (input_ids.sum(dim=1) + input_ids.shape[1]) % 7 == 0

    batch = padded(BATCH)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20}
    expected = speaking.generate(**batch, stopping_criteria=StoppingCriteriaList([Sum()]), **settings)
    found = speaking.generate(
        **batch, stopping_criteria=StoppingCriteriaList([Sum()]), custom_generate=specgen.custom_generate, **settings
    )
    assert found.tolist() == expected.tolist()
    assert expected.tolist() != speaking.generate(**batch, **settings).tolist()


def test_sampling_is_repeatable_under_torchs_own_seed(speaking: PreTrainedModel) -> None:
    """Rows of one prompt differ; other seeds say other things; filters hold."""

    def sample(seed: int, **settings: Any) -> Tensor:
        torch.manual_seed(seed)
        return speaking.generate(
            **padded(BATCH[:2]),
            do_sample=True,
            temperature=1.5,
            max_new_tokens=12,
            num_return_sequences=3,
            custom_generate=specgen.custom_generate,
            **settings,
        )

    first = sample(1)
    assert first.shape[0] == 6
    assert sample(1).equal(first)
    assert not sample(2).equal(first)
    assert len({tuple(row) for row in first.tolist()}) == 6
    greedily = speaking.generate(**padded(BATCH[:2]), do_sample=False, max_new_tokens=12)
    assert sample(3, top_k=1)[0].tolist()[: greedily.shape[1]] == greedily[0].tolist()


@pytest.mark.parametrize("speculation", ["off", {"adaptive": False}, {"max_nodes": 3}])
def test_the_drop_in_takes_the_speculation(speaking: PreTrainedModel, speculation: Any) -> None:
    batch = padded(BATCH)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20}
    found = speaking.generate(**batch, custom_generate=specgen.custom_generate, speculation=speculation, **settings)
    assert found.tolist() == speaking.generate(**batch, **settings).tolist()
    [engine] = api._latest
    assert (engine.counters.drafted == 0) == (speculation == "off")


def test_a_text_that_is_cut_short_is_an_error_and_no_shorter_text(speaking: PreTrainedModel) -> None:
    """Here because its engine is closed under it."""
    slow = Slow(0.01)

    def generate() -> Tensor:
        return speaking.generate(
            torch.tensor([PROMPT]),
            min_new_tokens=100,
            max_new_tokens=100,
            logits_processor=LogitsProcessorList([slow]),
            custom_generate=specgen.custom_generate,
        )

    with ThreadPoolExecutor(1) as pool:
        text = pool.submit(generate)
        until(lambda: slow.calls > 3)
        api._latest.pop().close()
        with pytest.raises(EngineClosed):
            text.result(SECONDS)


@pytest.mark.parametrize(("options", "context"), [({"max_context": 20}, 20), ({"kv_tokens": 32}, 32)])
def test_a_text_that_the_context_ends_is_an_error_and_no_shorter_text(
    model: PreTrainedModel, options: dict[str, int], context: int
) -> None:
    """One that ends by itself is returned, whatever was asked for."""
    api._latest.append(Engine(model, **options))

    def generate(**settings: Any) -> list[int]:
        ids, room = torch.tensor([PROMPT]), 200
        text = model.generate(ids, max_new_tokens=room, custom_generate=specgen.custom_generate, **settings)
        return text[0, len(PROMPT) :].tolist()

    new = context - len(PROMPT)
    with pytest.raises(ContextLengthExceeded) as caught:
        generate()
    assert caught.value.param == "max_new_tokens"
    assert str(caught.value) == (
        f"a prompt of {len(PROMPT)} tokens and 200 new ones are longer than the engine's context of {context}, "
        f"and after {new} new ones the text had not ended"
    )
    plain = greedy(model, PROMPT, new)
    assert generate(eos_token_id=plain[5]) == plain[: plain.index(plain[5]) + 1]


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "beams": ({"num_beams": 2}, "num_beams", "num_beams=2 is not supported by specgen; leave it out"),
    "speculation": ({"speculation": "fast"}, "speculation", "speculation is 'fast'; choices: 'auto', 'off'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_drop_in_cannot_do_is_refused_by_name(speaking: PreTrainedModel, name: str) -> None:
    settings, param, message = REFUSED[name]
    given = {"input_ids": torch.tensor([PROMPT]), "max_new_tokens": 3, **settings}
    with pytest.raises(InvalidRequest, match=message) as caught:
        speaking.generate(**given, custom_generate=specgen.custom_generate)
    assert caught.value.param == param


# What a notebook shows.


def test_what_is_shown_of_an_engine_and_its_answers_is_short(model: PreTrainedModel) -> None:
    with Engine(model, Letters(), kv_tokens=256) as engine:
        assert repr(engine) == (
            "<Engine LlamaForCausalLM, float32 on cpu, 256 tokens of native KV, 0 running, 0 waiting>"
        )
        result = engine.generate(PROMPT, max_tokens=100, speculation="off", ignore_eos=True)
        assert repr(result) == f"<Result {result.text[:80] + '...'!r}, length, 100 tokens, 1.00 tokens per forward>"
        stream = engine.stream(PROMPT, max_tokens=3)
        stream.results()
        shown = repr(stream)
        assert shown == f"<Stream {stream.request_id}, finished, {len(list(stream))} outputs unread>"


# For asyncio.


async def test_agenerate_answers_as_generate(engine: Engine) -> None:
    options: dict[str, Any] = {"max_tokens": 9, "temperature": 0.8, "seed": 3}
    expected = engine.generate(list(PROMPTS), **options)
    assert [one.ids for one in await engine.agenerate(list(PROMPTS), **options)] == [one.ids for one in expected]
    alone, sync = await asyncio.gather(engine.agenerate(PROMPT, **options), engine.agenerate(PROMPT, n=2, **options))
    assert alone.ids == expected[0].ids
    assert [one.ids for one in sync] == [one.ids for one in engine.generate(PROMPT, n=2, **options)]
    with pytest.raises(InvalidRequest, match="max_tokens is 0"):
        await engine.agenerate(PROMPT, max_tokens=0)


async def test_a_cancelled_task_cancels_its_requests(engine: Engine) -> None:
    task = asyncio.create_task(engine.agenerate([PROMPT, PROMPTS[1]], max_tokens=110, processors=[Slow(0.01)]))
    await asyncio.to_thread(until, lambda: engine.load.running)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(until, lambda: engine.counters.finished == {"cancelled": 2})


async def test_the_first_of_several_that_fails_ends_agenerate(engine: Engine) -> None:
    def fails(ids: Tensor, scores: Tensor) -> Tensor:
        if ids[0, 0] == PROMPTS[1][0]:
            raise ZeroDivisionError("mine")
        return Slow(0.01)(ids, scores)

    with pytest.raises(ZeroDivisionError, match="mine"):
        await engine.agenerate([PROMPT, PROMPTS[1]], max_tokens=110, processors=[fails])
    await asyncio.to_thread(until, lambda: not engine.load.running)
