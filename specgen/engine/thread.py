"""The one thread that owns an engine: it takes requests in between steps and hands outputs out."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from contextvars import copy_context
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from specgen._base.log import Log
from specgen._base.openmp import release_workers
from specgen._base.process import at_fork
from specgen.engine.core import EngineCore, cancelled
from specgen.engine.in_flight import InFlight
from specgen.engine.request import PreparedRequest, Request, SampleSpec
from specgen.engine.response_cache import ResponseCache, ResponseKey, response_key
from specgen.engine.scheduler import NotPlanned
from specgen.engine.sequence import Sequence as Running
from specgen.engine.stream import Stream
from specgen.errors import EngineClosed, RequestFailed, WouldDeadlock
from specgen.types import Finish, StepOutput

log = Log("specgen.engine")

_IDLE_SECONDS = 5.0
_EXIT_SECONDS = 60.0
"""How long a program that ends waits for the step that is running; code of a plugin in it may never come back."""
_PLANS = 3
"""How often a step is planned before those whom it fails for are given up."""
T = TypeVar("T")

_this_thread = threading.local()
"""`runner`: whose thread it is, on an engine's."""
_waits = threading.Lock()
_open: weakref.WeakSet[EngineThread] = weakref.WeakSet()
# A child has none of the workers that the forking thread keeps, and would wait for them.
at_fork(before=release_workers)


class Observers(Protocol):
    """Who is told what the engine accepts, commits and finishes."""

    def notify(self, hook: str, **arguments: object) -> None:
        """Call every observer of `hook`. Never raises."""


class EngineThread:
    """Runs an `EngineCore` on a daemon thread that starts when something is asked of it and ends when nothing was for a
    while, so that an engine nobody holds can be collected.

    A child that is forked from the process has no such thread, and maybe locks that are held for ever: there all that
    is asked raises EngineClosed, and what only lets go does nothing.

    responses: what finished requests were answered; where it is enabled, identical requests share a run.
    """

    def __init__(self, core: EngineCore, observers: Observers, responses: ResponseCache) -> None:
        self._core = core
        self._observers = observers
        self._shares = responses.enabled
        self._runs = InFlight(responses)
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._streams: weakref.WeakValueDictionary[str, Stream] = weakref.WeakValueDictionary()
        self._answers: weakref.WeakSet[Future[Any]] = weakref.WeakSet()
        self._thread: threading.Thread | None = None
        self._process = os.getpid()
        self._waits_for: EngineThread | None = None
        self._closed = self._core_closed = False
        self._unplanned = 0
        _open.add(self)
        self.failure: BaseException | None = None
        """What ended the engine's thread, if anything did: nothing can be asked of it any more."""

        self.failed_steps = 0
        """How many steps have failed in a row, the last one included."""

    def submit(self, *built: PreparedRequest, computed: bool = False) -> list[Stream]:
        """Queue requests, all in time for the same step; a stream ends when all samples of its request are finished.

        computed: whether they have to run, though the answer may be known.
        Raises EngineClosed after `close` and in a forked child, WouldDeadlock where nobody could wait for the streams.
        """
        with self.awaited():
            pass
        release_workers()
        keys = [None if computed else self._key(*each) for each in built]
        streams = [Stream(request.id, len(samples), self.cancel, self.awaited) for request, samples in built]
        with self._wake:
            if self._closed:
                raise _closed()
            self._streams.update({stream.request_id: stream for stream in streams})
            self._order(partial(copy_context().run, self._accept, built, keys))
        return streams

    def cancel(self, request_id: str) -> None:
        """End a request between two steps; unknown or finished ones are left alone."""
        if os.getpid() != self._process:
            return
        with self._wake:
            self._commands.append(lambda: self._cancel(request_id))
            self._wake.notify()

    def call(self, function: Callable[[], T]) -> T:
        """What `function` returns or raises, on the engine's thread between two steps; after `close` too.

        On that thread itself it runs at once. Raises EngineClosed if an error ended the thread.
        """
        self.check_process()
        if self.is_here:
            return function()
        release_workers()
        answer: Future[T] = Future()
        with self._wake:
            if self.failure is not None:
                raise _ended(self.failure)
            self._answers.add(answer)
            self._order(partial(_answer, answer, function))
        with self.awaited():
            return answer.result()

    def end_all(self, error: Exception) -> None:
        """End all that runs and waits with an error. On the engine's thread, between two steps: inside of `call`."""
        self._fail(Finish("error", error=error), self._everyone())

    def close(self, *, wait: float | None = None) -> None:
        """Cancel what runs and end the thread, which lets the engine keep what it wants to. Doing so twice is harmless.

        wait: most seconds to wait for the thread; on the thread itself nobody waits.
        """
        if os.getpid() != self._process:
            return
        with self._wake:
            self._closed = True
            self._wake.notify()
            if (thread := self._thread) is None:
                # With the lock, so that no other thread takes over the engine meanwhile.
                self._close_core()
        if thread is not None and wait != 0 and not self.is_here:
            with self.awaited():
                thread.join(wait)

    @property
    def is_here(self) -> bool:
        """Whether the calling thread is the engine's."""
        return threading.current_thread() is self._thread

    def check_process(self) -> None:
        """Raise EngineClosed in another process than the engine was made in."""
        if (here := os.getpid()) != self._process:
            raise EngineClosed(
                f"this engine belongs to process {self._process}, from which this one, {here}, was forked: "
                "its thread is not here; make an engine in this process"
            )

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Around what waits for this engine. Raises WouldDeadlock where the engine waits for the calling thread: on its
        own, and on that of another engine that this one is waiting for. Raises EngineClosed in a forked child."""
        self.check_process()
        here: EngineThread | None = getattr(_this_thread, "runner", None)
        if here is None:
            yield
            return
        with _waits:
            other: EngineThread | None = self
            while other is not None:
                if other is here:
                    raise WouldDeadlock(
                        "this would wait for ever: it runs on the engine's own thread, in a processor, a criterion, an "
                        "observer or another plugin, and waits for that engine; ask it on another thread"
                    )
                other = other._waits_for
            before, here._waits_for = here._waits_for, self
        try:
            yield
        finally:
            here._waits_for = before

    def check_open(self) -> None:
        """Raise EngineClosed where nothing can be run any more."""
        self.check_process()
        if self._closed:
            raise _closed()

    def _close_core(self) -> None:
        if self._core_closed:
            return
        self._core_closed = True
        try:
            self._core.close()
        except Exception:  # a disk: the engine ends all the same
            log.exception("what an engine holds could not be kept for the next one")

    def _order(self, command: Callable[[], None]) -> None:
        """Have a command run between two steps, by a new thread where there is none. Called with the lock held."""
        if self._thread is None:
            # A thread that starts though this is interrupted finds that it is not the one.
            self._thread = threading.Thread(target=self._run, name="specgen-engine", daemon=True)
            try:
                self._thread.start()
            except BaseException:
                self._thread = None
                raise
        self._commands.append(command)
        self._wake.notify()

    def _wanted(self) -> bool:
        return bool(self._commands) or self._closed or self._core.busy

    def _run(self) -> None:
        _this_thread.runner = self
        try:
            self._loop()
        except BaseException as error:  # not one of the failures that are expected: nobody may wait for ever
            log.exception("the engine's thread ended")
            with self._wake:
                self._thread, self._closed, self.failure = None, True, error
                # Nobody knows what state it is in.
                self._core_closed = True
                self._commands.clear()
            self._fail_all(error)
            raise

    def _fail_all(self, error: BaseException) -> None:
        """Tell all who wait for something that the thread has ended."""
        failed = RequestFailed(f"the engine's thread ended: {error!r}")
        failed.__cause__ = EngineClosed("the engine's thread ended")
        for stream in list(self._streams.values()):
            stream.fail(failed)
        for answer in list(self._answers):
            if not answer.done():
                answer.set_exception(_ended(error))

    def _loop(self) -> None:
        while True:
            if not self._wanted():
                release_workers()
            with self._wake:
                if not self.is_here:
                    return
                awake = self._wake.wait_for(self._wanted, timeout=_IDLE_SECONDS)
                if not awake:
                    self._thread = None
                    return
                closing = self._closed
            self._drain()
            if closing:
                self._fail(Finish("cancelled", error=EngineClosed("the engine was closed")), self._everyone())
                with self._wake:
                    if not self._commands:
                        self._close_core()
                        self._thread = None
                        return
            elif self._core.busy:
                self._step()

    def _drain(self) -> None:
        while self._commands:
            command = self._commands.popleft()
            try:
                command()
            except BaseException:  # SystemExit of a plugin too
                log.exception("a command to the engine raised")

    def _step(self) -> None:
        try:
            outputs = self._stepped()
        except NotPlanned as unplanned:
            self.failed_steps += 1
            self._plan_again(unplanned.sequence, unplanned.__cause__ or unplanned)
            return
        except Exception as error:  # out of memory, a broken model: those that ran fail, those that wait go on
            self.failed_steps += 1
            if not (running := list(self._core.scheduler.running)):
                self._plan_again(None, error)
                return
            log.exception("a step failed", running=len(running))
            self._fail(Finish("error", error=error), running)
            return
        self.failed_steps = self._unplanned = 0
        self._hand_out(outputs)

    def _plan_again(self, sequence: Running | None, error: BaseException) -> None:
        """A step could not be planned: it is tried again, and after some tries without the sequence that it fails for.
        Where nobody knows which, without those that run, and if there are none, without the first in line."""
        self._unplanned += 1
        log.error("a step could not be planned", tries=self._unplanned, exc_info=error)
        if self._unplanned < _PLANS:
            return
        self._unplanned = 0
        scheduler = self._core.scheduler
        concerned = [sequence] if sequence else list(scheduler.running) or list(scheduler.waiting)[:1]
        self._fail(Finish("error", error=error), concerned)

    def _stepped(self) -> list[StepOutput]:
        """A step; a smaller one where there was no memory for it on the device."""
        try:
            return self._core.step()
        except torch.OutOfMemoryError:
            log.warning("no memory for a step; trying it without drafts", running=len(self._core.scheduler.running))
            # The caching allocator of the device may hold what is missing.
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()
            return self._core.step(drafting=False)

    def _key(self, request: Request, samples: Sequence[SampleSpec]) -> ResponseKey | None:
        return response_key(request, self._core.key(request), samples[0].stops) if self._shares else None

    def _accept(self, built: Sequence[PreparedRequest], keys: Sequence[ResponseKey | None]) -> None:
        for (request, samples), key in zip(built, keys, strict=True):
            try:
                known = self._begin(request, samples, key)
            except BaseException as error:  # a drafter's SystemExit too
                log.exception("a request could not be queued", request=request.id)
                if stream := self._streams.get(request.id):
                    stream.fail(RequestFailed(f"request {request.id} could not be queued: {error!r}"))
                continue
            self._observers.notify("on_request", request=request)
            self._deliver(known)

    def _begin(self, request: Request, samples: Sequence[SampleSpec], key: ResponseKey | None) -> Sequence[StepOutput]:
        """What is known of a request's answer already; nothing when it is queued to run."""
        known = self._runs.answer(request, key) if key is not None else None
        if known is not None:
            return known
        self._core.add(request, samples)
        if key is not None:
            self._runs.begin(request, key)
        return ()

    def _cancel(self, request_id: str) -> None:
        """End a request; a run that others listen to goes on without it."""
        if self._runs.has_left(request_id):
            return
        finish, run = cancelled(request_id), self._runs.heard_by(request_id)
        if run is None or len(run.listeners) == 1:
            self._hand_out(self._core.cancel(run.request.id if run else request_id, finish))
            return
        self._runs.leave(request_id)
        self._deliver([run.output_for(output, request_id) for output in self._core.cut(run.request.id, finish)])

    def _everyone(self) -> list[Running]:
        return [*self._core.scheduler.running, *self._core.scheduler.waiting]

    def _fail(self, finish: Finish, sequences: Sequence[Running]) -> None:
        """End the requests of these sequences."""
        for request_id in {sequence.request.id for sequence in sequences}:
            self._hand_out(self._core.cancel(request_id, finish))

    def _hand_out(self, outputs: Sequence[StepOutput]) -> None:
        """Give outputs of the engine to all who listen; observers see what was computed, once."""
        self._deliver([each for output in outputs for each in self._runs.spread(output)], computed=outputs)

    def _deliver(self, outputs: Sequence[StepOutput], *, computed: Sequence[StepOutput] = ()) -> None:
        for output in outputs:
            if stream := self._streams.get(output.request_id):
                stream.put(output)
        if computed:
            self._observers.notify("on_step", outputs=computed)
        for output in outputs:
            if output.result is not None:
                self._observers.notify("on_finish", result=output.result)


def _at_exit() -> None:
    """End all threads: what they compute in must not be taken away under them."""
    for runner in list(_open):
        runner.close(wait=0)
    for runner in list(_open):
        with suppress(Exception):
            runner.close(wait=_EXIT_SECONDS)


atexit.register(_at_exit)


def _answer(answer: Future[T], function: Callable[[], T]) -> None:
    try:
        answer.set_result(function())
    except BaseException as error:  # whatever it is, it is the caller's
        answer.set_exception(error)


def _closed() -> EngineClosed:
    return EngineClosed("this engine was closed; open a new one")


def _ended(error: BaseException) -> EngineClosed:
    closed = EngineClosed(f"the engine's thread ended: {error!r}")
    closed.__cause__ = error
    return closed
