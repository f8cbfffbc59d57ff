"""The one thread that owns an engine: it takes requests in between steps and hands outputs out."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar

import torch

from specgen.engine import EngineCore, Sample, cancelled
from specgen.errors import EngineClosed, RequestFailed
from specgen.log import Log
from specgen.params import Request
from specgen.plugins import Plugins
from specgen.response_cache import ResponseCache, ResponseKey, response_key
from specgen.runs import Runs
from specgen.stream import Stream
from specgen.types import Finish, StepOutput
from specgen.workers import release_workers

log = Log("specgen.engine")

_IDLE_SECONDS = 5.0
T = TypeVar("T")


class Runner:
    """Runs an `EngineCore` on a daemon thread that starts when something is asked of it and ends when nothing was for a
    while, so that an engine nobody holds can be collected.

    responses: what finished requests were answered; where it is enabled, identical requests share a run.
    """

    def __init__(self, core: EngineCore, plugins: Plugins, responses: ResponseCache) -> None:
        self._core = core
        self._plugins = plugins
        self._shares = responses.enabled
        self._runs = Runs(responses)
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._streams: weakref.WeakValueDictionary[str, Stream] = weakref.WeakValueDictionary()
        self._answers: weakref.WeakSet[Future[Any]] = weakref.WeakSet()
        self._thread: threading.Thread | None = None
        self._closed = False
        self.failure: BaseException | None = None
        """What ended the engine's thread, if anything did: nothing can be asked of it any more."""

        self.failed_steps = 0
        """How many steps have failed in a row, the last one included."""

    def submit(self, *built: tuple[Request, Sequence[Sample]], computed: bool = False) -> list[Stream]:
        """Queue requests, all in time for the same step; a stream ends when all samples of its request are finished.

        computed: whether they have to run, though the answer may be known.
        Raises EngineClosed after `close`.
        """
        release_workers()
        keys = [None if computed else self._key(*each) for each in built]
        streams = [Stream(request.id, len(samples), self.cancel) for request, samples in built]
        with self._wake:
            if self._closed:
                raise EngineClosed("this engine was closed; open a new one")
            self._streams.update({stream.request_id: stream for stream in streams})
            self._order(partial(copy_context().run, self._accept, built, keys))
        return streams

    def cancel(self, request_id: str) -> None:
        """End a request between two steps; unknown or finished ones are left alone."""
        with self._wake:
            self._commands.append(lambda: self._cancel(request_id))
            self._wake.notify()

    def call(self, function: Callable[[], T]) -> T:
        """What `function` returns or raises, on the engine's thread between two steps; after `close` too.

        On that thread itself it runs at once. Raises EngineClosed if an error ended the thread.
        """
        if threading.current_thread() is self._thread:
            return function()
        release_workers()
        answer: Future[T] = Future()
        with self._wake:
            if self.failure is not None:
                raise _ended(self.failure)
            self._answers.add(answer)
            self._order(partial(_answer, answer, function))
        return answer.result()

    def end_all(self, error: Exception) -> None:
        """End all that runs and waits with an error. On the engine's thread, between two steps: inside of `call`."""
        self._fail(Finish("error", error=error))

    def close(self) -> None:
        """Cancel what runs, end the thread and wait for it; let the engine keep what it wants to. Doing so twice is
        harmless."""
        with self._wake:
            first, self._closed = not self._closed, True
            self._wake.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        with self._wake:  # so that no other thread takes over the engine meanwhile
            if first and self._thread is None:
                self._core.close()

    def _order(self, command: Callable[[], None]) -> None:
        """Have a command run between two steps, by a new thread where there is none. Called with the lock held."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="specgen-engine", daemon=True)
            thread.start()
            self._thread = thread
        self._commands.append(command)
        self._wake.notify()

    def _wanted(self) -> bool:
        return bool(self._commands) or self._closed or self._core.busy

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:  # not one of the failures that are expected: nobody may wait for ever
            log.exception("the engine's thread ended")
            with self._wake:
                self._thread, self._closed, self.failure = None, True, error
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
                awake = self._wake.wait_for(self._wanted, timeout=_IDLE_SECONDS)
                if not awake:
                    self._thread = None
                    return
                closing = self._closed
            self._drain()
            if closing:
                self._fail(Finish("cancelled", error=EngineClosed("the engine was closed")))
                with self._wake:
                    if not self._commands:
                        self._thread = None
                        return
            elif self._core.busy:
                self._step()

    def _drain(self) -> None:
        while self._commands:
            command = self._commands.popleft()
            try:
                command()
            except Exception:
                log.exception("a command to the engine raised")

    def _step(self) -> None:
        try:
            outputs = self._stepped()
        except Exception as error:  # out of memory, a broken model: those that ran fail, those that wait go on
            self.failed_steps += 1
            log.exception("a step failed", running=len(self._core.scheduler.running))
            self._fail(Finish("error", error=error), waiting=False)
            return
        self.failed_steps = 0
        self._hand_out(outputs)

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

    def _key(self, request: Request, samples: Sequence[Sample]) -> ResponseKey | None:
        return response_key(request, self._core.key(request), samples[0].stops) if self._shares else None

    def _accept(self, built: Sequence[tuple[Request, Sequence[Sample]]], keys: Sequence[ResponseKey | None]) -> None:
        for (request, samples), key in zip(built, keys, strict=True):
            try:
                known = self._begin(request, samples, key)
            except Exception as error:
                log.exception("a request could not be queued", request=request.id)
                if stream := self._streams.get(request.id):
                    stream.fail(RequestFailed(f"request {request.id} could not be queued: {error!r}"))
                continue
            self._plugins.notify("on_request", request=request)
            self._deliver(known)

    def _begin(self, request: Request, samples: Sequence[Sample], key: ResponseKey | None) -> Sequence[StepOutput]:
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

    def _fail(self, finish: Finish, *, waiting: bool = True) -> None:
        scheduler = self._core.scheduler
        sequences = [*scheduler.running, *scheduler.waiting] if waiting else list(scheduler.running)
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
            self._plugins.notify("on_step", outputs=computed)
        for output in outputs:
            if output.result is not None:
                self._plugins.notify("on_finish", result=output.result)


def _answer(answer: Future[T], function: Callable[[], T]) -> None:
    try:
        answer.set_result(function())
    except BaseException as error:  # whatever it is, it is the caller's
        answer.set_exception(error)


def _ended(error: BaseException) -> EngineClosed:
    closed = EngineClosed(f"the engine's thread ended: {error!r}")
    closed.__cause__ = error
    return closed
