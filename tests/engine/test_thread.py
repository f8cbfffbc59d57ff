"""The engine's thread: nothing that happens on it, or around it, lets anybody wait for ever."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

import specgen
from specgen import Drafter, DraftSession, Engine, EngineClosed, RequestFailed, Result, WouldDeadlock
from specgen.api import kept_engine as api
from specgen.engine import thread as runner
from specgen.engine.core import EngineCore
from specgen.engine.scheduler import Scheduler
from specgen.kv.pool import BlockTable
from specgen.lora.adapter import AdapterOptions
from specgen.lora.cache import AdapterCache
from specgen.plugins.manager import load_plugins
from tests.support.engines import close_kept
from tests.support.letters import SECONDS, engine_threads, in_thread, until
from tests.support.tiny import build

PROMPT, OTHER = [9, 31, 40, 9, 31, 77], [88, 1, 60, 61]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama")


@pytest.fixture
def engine(model: PreTrainedModel) -> Iterator[Engine]:
    with Engine(model, kv_tokens=1024) as engine:
        yield engine
        assert in_thread(engine.check).result(SECONDS) is None
        assert not engine._core.busy


@pytest.fixture(scope="module")
def said(model: PreTrainedModel) -> tuple[int, ...]:
    with Engine(model, kv_tokens=1024) as engine:
        return engine.generate(OTHER, max_tokens=6).ids


class Slow:
    """A processor that takes its time, and one call of which may raise."""

    def __init__(self, error: BaseException | None = None, at: int = 3) -> None:
        self.calls = 0
        self.error, self.at = error, at

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        if self.error is not None and self.calls == self.at:
            raise self.error
        time.sleep(0.01)
        return scores


def code(where: str, processor: Slow) -> Any:
    """The processor, or a criterion that does the same and never ends a text."""
    return processor if where == "processors" else lambda ids, scores: processor(ids, scores) is None


# Where an engine is made and asked.


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "plain": nullcontext,
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default device": lambda: default_device("meta"),
    "a device around": lambda: torch.device("meta"),
    "default dtype": lambda: default_dtype(torch.float64),
    "a small default dtype": lambda: default_dtype(torch.bfloat16),
    "deterministic": deterministic,
}
ASKED: tuple[dict[str, Any], ...] = (
    {"max_tokens": 8},
    {"max_tokens": 8, "temperature": 1.2, "seed": 5, "top_p": 0.9, "logit_bias": {5: 2.0}, "min_tokens": 3}
    | {"presence_penalty": 0.5, "banned_token_ids": [7], "allowed_token_ids": range(4, 90)},
)


@pytest.mark.parametrize("made", STATES)
def test_torchs_state_of_the_caller_changes_nothing(model: PreTrainedModel, made: str) -> None:
    """Neither where the engine is made nor where it is asked."""
    with Engine(model, kv_tokens=512) as plain:
        expected = [plain.generate(PROMPT, **asked).ids for asked in ASKED]
    with STATES[made]():
        engine = Engine(model, kv_tokens=512)
    with engine:
        for used in STATES.values():
            with used():
                assert [engine.generate(PROMPT, **asked).ids for asked in ASKED] == expected
                engine.check()
                engine.prefix.clear()


def test_an_engine_leaves_torchs_state_as_it_was(model: PreTrainedModel) -> None:
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        Engine(model, kv_tokens=512).close()
        assert torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
        assert torch.zeros(1).device.type == "meta"
    assert torch.is_grad_enabled()


def test_a_model_that_was_made_under_inference_mode_is_served(said: tuple[int, ...]) -> None:
    with torch.inference_mode():
        model = build("llama")
    with Engine(model, kv_tokens=512) as engine:
        assert engine.generate(OTHER, max_tokens=6).ids == said


# Steps that cannot be planned.

PLANNED: dict[str, tuple[Any, str]] = {
    "the plan": (Scheduler, "schedule"),
    "admission": (Scheduler, "_admit"),
    "pages of a running one": (BlockTable, "reserve"),
    "adapters that were lost": (EngineCore, "_end_lost"),
}


@pytest.mark.parametrize("where", PLANNED)
def test_a_request_that_can_never_be_planned_ends_with_the_error(
    engine: Engine, said: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Within a few tries, whether it runs already or not; nothing spins, and what comes later is served."""
    owner, name = PLANNED[where]
    calls: list[object] = []

    def breaks(*args: object, **options: object) -> None:
        calls.append(args)
        raise MemoryError("no memory for a plan")

    running = engine.stream(PROMPT, max_tokens=100, processors=[Slow()])
    next(running)
    with capture_logs(), monkeypatch.context() as patch:
        patch.setattr(owner, name, breaks)
        streams = [running, engine.stream(OTHER, max_tokens=6)]
        if where in ("admission", "pages of a running one"):
            # What concerns one of them alone.
            streams = streams[1:]
        for stream in streams:
            with pytest.raises(RequestFailed, match="no memory for a plan") as caught:
                stream.results(SECONDS)
            assert isinstance(caught.value.__cause__, MemoryError)
    assert len(calls) < 20
    running.cancel()
    assert engine.generate(OTHER, max_tokens=6).ids == said
    assert engine.failed_steps == 0


def test_a_plan_that_fails_once_is_made_again(
    engine: Engine, said: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule, calls = Scheduler.schedule, iter([1, 1, 0, 0, 1])

    def breaks(scheduler: Scheduler) -> Any:
        if next(calls, 0):
            raise MemoryError("no memory for a plan")
        return schedule(scheduler)

    monkeypatch.setattr(Scheduler, "schedule", breaks)
    with capture_logs():
        assert engine.generate(OTHER, max_tokens=6).ids == said


def test_who_cannot_be_admitted_takes_nobody_along(
    engine: Engine, said: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither those who run, nor those behind it; and the pages that it had are free."""
    assert engine._core.prefix
    match = engine._core.prefix.match

    def breaks(key: Any, ids: Sequence[int]) -> Any:
        lease = match(key, ids)
        if list(ids) == PROMPT * 4:
            reserve.append(lease)
        return lease

    reserve: list[Any] = []
    reserved = BlockTable.reserve

    def reserves(table: BlockTable, tokens: int) -> None:
        if tokens == len(PROMPT) * 4 + 1:
            raise MemoryError("no memory for pages")
        reserved(table, tokens)

    engine.generate(PROMPT * 4, max_tokens=1)  # so that it has cached pages to begin with
    monkeypatch.setattr(engine._core.prefix, "match", breaks)
    monkeypatch.setattr(BlockTable, "reserve", reserves)
    with capture_logs():
        first, broken, last = engine.start(*(engine.prepare(p, max_tokens=6) for p in (OTHER, PROMPT * 4, OTHER)))
        with pytest.raises(RequestFailed, match="no memory for pages"):
            broken.results(SECONDS)
        assert reserve
        assert [each.results(SECONDS)[0].ids for each in (first, last)] == [said, said]


def test_drafting_that_breaks_costs_no_text(
    engine: Engine, said: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*args: object, **options: object) -> None:
        raise KeyError("merging is broken")

    for name in ("_choose", "_merged", "propose"):
        with capture_logs(), monkeypatch.context() as patch:
            patch.setattr(engine._core.drafting, name, breaks)
            assert engine.generate(OTHER, max_tokens=6).ids == said


def test_a_text_whose_end_cannot_be_decoded_ends(model: PreTrainedModel) -> None:
    """The tokenizer is the caller's: it fails the request, and cannot end the engine's thread."""

    class Breaks:
        eos_token_id = None
        chat_template = None

        def encode(self, text: str, **options: bool) -> list[int]:
            return [5] * len(text)

        def decode(self, ids: Sequence[int], **options: bool) -> str:
            if len(ids) > 2 and threading.current_thread().name == "specgen-engine":
                raise ValueError("no such token")
            return "x" * len(ids)

    with Engine(model, Breaks(), kv_tokens=512) as engine, capture_logs():
        with pytest.raises(RequestFailed, match="no such token"):
            engine.generate(PROMPT, max_tokens=6)
        assert engine.failure is None
        engine.check()


def test_an_adapter_that_never_finds_room_fails_its_request(
    engine: Engine, said: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are pinned never go. Others are served."""
    from specgen.lora.adapter import Adapter
    from specgen.lora.cache import Presence

    adapter = Adapter("big", "1", "nowhere", None, False, 4, None, 10, None)
    request, samples = engine.prepare(PROMPT, max_tokens=6)
    from dataclasses import replace

    monkeypatch.setattr(AdapterCache, "presence", lambda cache, adapter: Presence.FULL)
    (stream,) = engine.start((replace(request, adapter=adapter), samples))
    with pytest.raises(RequestFailed, match="'big' has no room on the device"):
        stream.results(SECONDS)
    assert engine.generate(OTHER, max_tokens=6).ids == said


def test_a_fetch_that_ends_in_any_way_tells_those_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = AdapterCache(AdapterOptions(), torch.device("cpu"))
    from specgen.lora.adapter import Adapter

    adapter = Adapter("it", "1", "nowhere", None, False, 4, None, 10, None)
    adapter.coming = True

    def leaves(adapter: Adapter) -> None:
        raise SystemExit("a thread was told to end")

    monkeypatch.setattr(cache, "_put", leaves)
    with capture_logs():
        cache._fetch(adapter)
    assert not adapter.coming
    assert isinstance(adapter.failure, SystemExit)


# An engine that is asked from its own thread.


def asks(engine: Engine) -> dict[str, Callable[[], object]]:
    return {
        "generate": lambda: engine.generate(OTHER, max_tokens=1),
        "a batch": lambda: engine.generate([OTHER, PROMPT], max_tokens=1),
        "a stream": lambda: list(engine.stream(OTHER, max_tokens=1)),
        "results with a timeout": lambda: engine.stream(OTHER, max_tokens=1).results(SECONDS),
        "what was prepared": lambda: engine.start(engine.prepare(OTHER, max_tokens=1))[0].results(),
        "a pin": lambda: engine.prefix.pin(OTHER * 8),
        "an adapter": lambda: engine.adapters.load("it", "nowhere"),
    }


@pytest.mark.parametrize("how", asks(None))  # type: ignore[arg-type]
@pytest.mark.parametrize("where", ["processors", "stopping_criteria"])
def test_an_engine_that_asks_itself_says_so(engine: Engine, said: tuple[int, ...], where: str, how: str) -> None:
    """To the code that asks; if that lets it through, to the caller. Nobody waits, and others are served."""
    ask, seen = asks(engine)[how], []

    def asking(ids: Tensor, scores: Tensor) -> Any:
        try:
            ask()
        except WouldDeadlock as error:
            seen.append(error)
            raise
        return scores

    answer = in_thread(lambda: engine.generate(PROMPT, max_tokens=3, **{where: [asking]}))
    other = in_thread(lambda: engine.generate(OTHER, max_tokens=6).ids)
    with pytest.raises(WouldDeadlock, match="on the engine's own thread"):
        answer.result(SECONDS)
    assert len(seen) == 1
    assert isinstance(seen[0], RuntimeError)
    assert other.result(SECONDS) == said


def test_observers_and_drafters_cannot_wait_for_their_engine(model: PreTrainedModel, said: tuple[int, ...]) -> None:
    """The observer's failure is counted, the drafter is switched off; answers that need no wait they get."""
    found: list[object] = []

    class Asks(Drafter):
        def open(self, prompt: Sequence[int], hints: Any) -> DraftSession:
            engine.generate(PROMPT, max_tokens=1)
            raise AssertionError("it got an answer")

    class Plugin:
        @specgen.hookimpl
        def drafters(self) -> Any:
            return {"asks": lambda setup: Asks()}

        @specgen.hookimpl
        def on_finish(self, result: Result) -> None:
            found.append(engine.prefix.stats.queries)
            list(engine.stream(PROMPT, max_tokens=1))

    plugins = load_plugins(only=[])
    plugins.register(Plugin(), "asks")
    engine = Engine(model, plugins=plugins, drafters=["asks"], kv_tokens=512)
    with engine, capture_logs():
        result = in_thread(lambda: engine.generate(OTHER, max_tokens=6)).result(SECONDS)
        assert result.ids == said
        assert "WouldDeadlock" in result.stats.by_drafter["asks"].disabled
        until(lambda: plugins.failures)
        engine.check()
    assert (found, engine.counters.finished, plugins.failures) == ([1], {"length": 1}, {"asks": 1})


async def _aresults(engine: Engine) -> object:
    return await engine.stream(OTHER, max_tokens=1).aresults()


def test_an_event_loop_on_the_engines_thread_cannot_wait_for_it(engine: Engine) -> None:
    import asyncio

    def asking(ids: Tensor, scores: Tensor) -> Any:
        asyncio.run(_aresults(engine))

    with pytest.raises(WouldDeadlock):
        in_thread(lambda: engine.generate(PROMPT, max_tokens=3, processors=[asking])).result(SECONDS)


def test_another_engine_may_be_asked_but_not_in_a_circle(
    model: PreTrainedModel, engine: Engine, said: tuple[int, ...]
) -> None:
    with Engine(model, kv_tokens=512) as second:
        answers: list[tuple[int, ...]] = []

        def asks_second(ids: Tensor, scores: Tensor) -> Tensor:
            answers.append(second.generate(OTHER, max_tokens=6).ids)
            return scores

        def asks_first(ids: Tensor, scores: Tensor) -> Tensor:
            engine.prefix.clear()
            return scores

        def asks_both(ids: Tensor, scores: Tensor) -> Tensor:
            second.generate(OTHER, max_tokens=2, processors=[asks_first])
            return scores

        in_thread(lambda: engine.generate(PROMPT, max_tokens=2, processors=[asks_second])).result(SECONDS)
        assert answers == [said, said]
        with pytest.raises(WouldDeadlock):
            in_thread(lambda: engine.generate(PROMPT, max_tokens=2, processors=[asks_both])).result(SECONDS)


def test_an_engine_may_be_closed_from_its_own_thread(model: PreTrainedModel) -> None:
    """Also dropped there: whoever waits is told, and the thread ends."""
    closed: list[object] = []
    engine = Engine(model, kv_tokens=512)
    engine._core.close = lambda: closed.append(engine_threads())  # type: ignore[method-assign]

    def closes(ids: Tensor, scores: Tensor) -> Tensor:
        engine.close()
        return scores

    stream = engine.stream(PROMPT, max_tokens=60, processors=[closes])
    [result] = stream.results(SECONDS)
    assert isinstance(result.error, EngineClosed)
    until(lambda: engine_threads() == 0)
    engine.close()
    assert closed == [1]


def test_an_engine_may_be_dropped_on_its_own_thread(model: PreTrainedModel) -> None:
    held = [Engine(model, kv_tokens=512)]
    stream = held[0].stream(PROMPT, max_tokens=60, processors=[Slow()])
    stream.owner = None
    held[0]._runner.call(held.clear)
    gc.collect()
    [result] = stream.results(SECONDS)
    assert isinstance(result.error, EngineClosed)
    until(lambda: engine_threads() == 0)


def test_the_collector_waits_for_no_thread(model: PreTrainedModel) -> None:
    """It comes by anywhere, also where what the engine's thread does next cannot go on."""
    engine = Engine(model, kv_tokens=512)
    goes_on = threading.Event()
    stream = engine.stream(PROMPT, max_tokens=4, processors=[lambda ids, scores: goes_on.wait(SECONDS) and scores])
    stream.owner = None
    started = time.monotonic()
    del engine
    gc.collect()
    assert time.monotonic() - started < SECONDS / 2
    goes_on.set()
    assert isinstance(stream.results(SECONDS)[0].error, EngineClosed)


# What a caller's own code raises.

RAISED = [ValueError("mine"), KeyError("mine"), SystemExit("mine"), KeyboardInterrupt("mine"), MemoryError("mine")]


@pytest.mark.parametrize("where", ["processors", "stopping_criteria"])
@pytest.mark.parametrize("error", RAISED, ids=[type(error).__name__ for error in RAISED])
def test_what_the_callers_code_raises_arrives_as_itself(
    engine: Engine, said: tuple[int, ...], where: str, error: BaseException
) -> None:
    with pytest.raises(type(error), match="mine") as caught:
        in_thread(lambda: engine.generate(PROMPT, max_tokens=9, **{where: [code(where, Slow(error))]})).result(SECONDS)
    assert caught.value is error
    assert "raised in request req-" in error.__notes__[0]
    assert engine.failure is None
    assert engine.generate(OTHER, max_tokens=6).ids == said


@pytest.mark.parametrize("where", ["processors", "stopping_criteria"])
@pytest.mark.parametrize("error", [StopIteration, StopAsyncIteration, GeneratorExit])
def test_no_error_is_taken_for_the_end_of_a_text(engine: Engine, where: str, error: type[BaseException]) -> None:
    """Raised in a loop as it is, it would end the loop as if all were well."""
    stream = engine.stream(PROMPT, max_tokens=9, **{where: [code(where, Slow(error("mine")))]})
    with pytest.raises(RequestFailed, match="mine") as caught:
        list(stream)
    assert isinstance(caught.value.__cause__, error)
    with pytest.raises(RequestFailed, match="mine"):
        stream.results(SECONDS)


def test_what_a_plugin_raises_is_no_error_of_the_callers(model: PreTrainedModel) -> None:
    class Plugin:
        @specgen.hookimpl
        def logits_processors(self) -> Any:
            return {"breaks": lambda tokenizer: Slow(SystemExit("its own"))}

        @specgen.hookimpl
        def on_step(self) -> None:
            raise SystemExit("an observer leaves")

    plugins = load_plugins(only=[])
    plugins.register(Plugin(), "breaks")
    with Engine(model, plugins=plugins, kv_tokens=512) as engine, capture_logs():
        with pytest.raises(RequestFailed, match="its own") as caught:
            engine.generate(PROMPT, max_tokens=9, plugin_processors={"breaks": {}})
        assert isinstance(caught.value.__cause__, SystemExit)
        assert len(engine.generate(PROMPT, max_tokens=9).ids) == 9
        assert engine.failure is None


# Rows that nobody waits for any more.


def test_the_row_that_fails_first_ends_the_batch_at_once(engine: Engine) -> None:
    class Fails(Slow):
        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            if ids[0, 0] == OTHER[0] and ids.shape[1] == len(OTHER) + 2:
                raise LookupError("the last row")
            return super().__call__(ids, scores)

    with pytest.raises(LookupError, match="the last row"):
        engine.generate([PROMPT, PROMPT[1:], OTHER], max_tokens=110, processors=[Fails()])
    until(lambda: engine.counters.finished == {"error": 1, "cancelled": 2})
    assert engine.counters.committed < 60


def test_the_sample_that_fails_first_is_told_at_once(engine: Engine) -> None:
    class Fails(Slow):
        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            if ids.shape[1] > len(PROMPT) and ids[0, len(PROMPT)] % 2:
                raise LookupError("an odd beginning")
            return super().__call__(ids, scores)

    stream = engine.stream(PROMPT, max_tokens=100, n=6, temperature=2.0, seed=1, processors=[Fails()])
    with pytest.raises(LookupError, match="an odd beginning"):
        stream.results(SECONDS)
    assert engine._core.busy, "it waited for the others"
    stream.cancel()
    until(lambda: not engine._core.busy)


@pytest.mark.parametrize("batch", [False, True])
def test_an_interrupt_while_waiting_cancels_all_rows(model: PreTrainedModel, batch: bool) -> None:
    """As Ctrl-C does: it comes on the main thread."""
    import signal

    with Engine(model, kv_tokens=1024) as engine:
        slow = Slow()

        def interrupt() -> None:
            until(lambda: slow.calls if not batch else engine.load.running)
            os.kill(os.getpid(), signal.SIGINT)

        waiting = in_thread(interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.generate([PROMPT, OTHER] if batch else PROMPT, max_tokens=110, processors=[slow])
        waiting.result(SECONDS)
        until(lambda: engine.counters.finished == {"cancelled": 1 + batch})
        assert len(engine.generate(PROMPT, max_tokens=3).ids) == 3


@pytest.mark.parametrize("way", ["break", "exception"])
def test_a_loop_over_a_stream_that_is_left_cancels(engine: Engine, way: str) -> None:
    def loop() -> None:
        for _ in engine.stream(PROMPT, max_tokens=110, processors=[Slow()]):
            if way == "break":
                break
            raise ValueError("left")

    if way == "break":
        loop()
    else:
        with pytest.raises(ValueError, match="left"):
            loop()
    until(lambda: engine.counters.finished == {"cancelled": 1})


def test_a_thread_that_cannot_start_is_an_error(
    engine: Engine, said: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt at that point too: there is never a second thread, nor none that is waited for."""
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    for broken, error in ((refused, RuntimeError), (interrupted, KeyboardInterrupt)):
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", broken)
            with pytest.raises(error):
                engine.generate(OTHER, max_tokens=6)
    assert engine.generate(OTHER, max_tokens=6).ids == said
    until(lambda: engine_threads() == 1)


# Processes.


def in_child(work: Callable[[], str], *, leave: Callable[[int], object] = os._exit) -> str:
    """What `work` says in a forked child, or what it raises."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        try:
            try:
                text = work()
            except BaseException as error:
                text = f"{type(error).__name__}: {error}"
            os.write(write, text.encode())
        finally:
            leave(0)
    os.close(write)
    deadline = time.monotonic() + SECONDS
    while not os.waitpid(child, os.WNOHANG)[0]:
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            os.close(read)
            return "it hangs"
        time.sleep(0.01)
    with os.fdopen(read) as file:
        return file.read()


def test_an_engine_is_its_processs_own(engine: Engine) -> None:
    """A forked child is told so by all that would wait, whatever lock was held when it was forked; what only lets go
    does nothing there."""
    running = engine.stream(PROMPT, max_tokens=110, processors=[Slow()])
    next(running)
    calls: dict[str, Callable[[], object]] = asks(engine) | {
        "stats": lambda: engine.prefix.stats,
        "check": engine.check,
        "a list": engine.adapters.list,
        "a running stream": lambda: list(running),
    }
    told = f"EngineClosed: this engine belongs to process {os.getpid()}, from which"
    with engine._runner._wake, engine.adapters._lock, api._making:
        for name, call in calls.items():
            # With the locks held by a thread that the child has not.
            answer = in_thread(lambda call=call: in_child(lambda: str(call()))).result(SECONDS)  # type: ignore[misc]
            assert answer.startswith(told), name

        def lets_go() -> str:
            running.cancel()
            engine.close()
            return "done"

        assert in_thread(lambda: in_child(lets_go)).result(SECONDS) == "done"
    running.cancel()
    assert running.results(SECONDS)[0].finish_reason == "cancelled"


def test_a_forked_child_may_make_an_engine(model: PreTrainedModel, said: tuple[int, ...]) -> None:
    """And the one-line helpers make one there, though there is one in the parent, and its workers computed before."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.arange(2_000_000, dtype=torch.float32).mul(2)
        assert specgen.generate(model, OTHER, max_tokens=2).ids == said[:2]

        def generates() -> str:
            return str(specgen.generate(model, OTHER, max_tokens=2).ids)

        assert in_child(generates) == str(said[:2])
        assert specgen.generate(model, OTHER, max_tokens=2).ids == said[:2]
    finally:
        torch.set_num_threads(before)
        close_kept()


def test_a_forked_child_leaves_files_to_the_parent() -> None:
    """At its end too, when it runs what was to be done at the end of the program."""
    script = """
import os, sys
from tempfile import TemporaryDirectory
from specgen._base.process import finalize_here, leave_to_parent
class Owner: pass
owner, folder = Owner(), leave_to_parent(TemporaryDirectory())
finalize_here(owner, print, "ended", flush=True)
child = os.fork()
if child:
    os.waitpid(child, 0)
    print(folder.name, os.path.isdir(folder.name), flush=True)
"""
    lines = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=60
    ).stdout.split("\n")
    folder, stood = lines[0].split()
    assert (stood, lines[1], Path(folder).exists()) == ("True", "ended", False)


# Ends.


def test_nothing_stays_of_twenty_engines(model: PreTrainedModel) -> None:
    """Closed or dropped, while they run or idle: no thread, name, hook, or object."""

    def use(number: int) -> None:
        engine = Engine(model, kv_tokens=256)
        gone.append(weakref.ref(engine._core))
        with pytest.raises(ValueError, match="mine"):
            engine.generate(PROMPT, max_tokens=9, processors=[Slow(ValueError("mine"))])
        stream = engine.stream(PROMPT, max_tokens=60, processors=[Slow()])
        next(stream)
        if number % 2:
            engine.close()
            engine.check()

    def count() -> tuple[int, int, int]:
        gc.collect()
        until(lambda: engine_threads() == 0)
        gc.collect()
        hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
        return len(AttentionInterface._global_mapping), threading.active_count(), hooks

    gone: list[weakref.ref[EngineCore]] = []
    use(0)
    use(1)
    before, objects = count(), len(gc.get_objects())
    for number in range(20):
        use(number)
    assert count() == before
    assert [core() for core in gone] == [None] * 22
    assert len(gc.get_objects()) - objects < 500
    assert not [each for each in runner._open if each._thread]


def test_a_closed_engine_holds_no_name(model: PreTrainedModel) -> None:
    """Though somebody still holds the engine."""
    names = set(AttentionInterface._global_mapping)
    engine = Engine(model, kv_tokens=256, draft_model=model)
    assert set(AttentionInterface._global_mapping) > names
    engine.generate(PROMPT, max_tokens=3)
    engine.close()
    assert set(AttentionInterface._global_mapping) == names
    engine.check()
    with pytest.raises(EngineClosed):
        engine.adapters.load("it", "nowhere")


def test_a_program_ends_with_requests_running() -> None:
    script = """
import sys
sys.path.insert(0, {root!r})
from specgen import Engine
from tests.support.letters import SECONDS, engine_threads, in_thread, until
from tests.support.tiny import build
engine = Engine(build("llama"), kv_tokens=512)
stream = engine.stream([5, 6, 7], max_tokens=100, processors=[lambda ids, scores: scores])
next(stream)
print("ends", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", script.format(root=str(Path(__file__).parents[2]))],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "ends\n"), done.stderr
