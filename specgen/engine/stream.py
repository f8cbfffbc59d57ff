"""The caller's end of a request: outputs as they come, for threads and for asyncio alike."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from queue import SimpleQueue
from typing import Literal

from specgen.errors import RequestFailed
from specgen.types import Result, StepOutput

_READ_BY_PYTHON = (StopIteration, StopAsyncIteration, GeneratorExit, asyncio.CancelledError)
"""Errors that would end a loop or a task in silence where they are raised, whoever they come from."""


def _set(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)


class Stream:
    """Iterate over it, `for` or `async for`, for the `StepOutput`s of all samples of one request, in order.

    Leaving the loop early cancels nothing: call `cancel()`, or use the stream as a context manager, which cancels
    what is unfinished on the way out. An unfinished request whose stream is dropped is cancelled too, as when a loop
    over a stream that has no name is left.

    What a processor or a stopping criterion of the request raises is raised here as it is, any other failure as
    RequestFailed. Whatever waits raises WouldDeadlock on the engine's own thread, and EngineClosed in a forked child.
    Not seen is a thread that code on the engine's thread starts and waits for: if that one waits here, both do so for
    ever.
    """

    def __init__(
        self,
        request_id: str,
        samples: int,
        cancel: Callable[[str], None],
        awaited: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.request_id = request_id
        self.owner: object = None
        self._cancel = cancel
        self._awaited = awaited
        self._on_settled: list[Callable[[Stream], object]] = []
        self._unfinished = samples
        self._results: dict[int, Result] = {}
        self._outputs: deque[StepOutput] = deque()
        self._changed = threading.Condition()
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._error: RequestFailed | None = None
        self._failed = False

    def put(self, output: StepOutput) -> None:
        """Hand over one output; nothing once the stream has failed. Called from the engine's thread."""
        with self._changing():
            if self._error is not None:
                return
            self._outputs.append(output)
            if output.result is not None:
                self._results[output.index] = output.result
                self._failed |= output.result.finish_reason == "error"
                self._unfinished -= 1

    def fail(self, error: RequestFailed) -> None:
        """End the stream with an error. Called from the engine's thread."""
        with self._changing():
            self._error, self._unfinished = error, 0

    def cancel(self) -> None:
        """End the request where it stands. Its samples finish with the reason "cancelled"; harmless when finished."""
        if self._unfinished:
            self._cancel(self.request_id)

    def results(self, timeout: float | None = None) -> list[Result]:
        """Wait for all samples, at most `timeout` seconds, and return them by index.

        Raises TimeoutError, and what the first sample that failed failed with, whether others go on or not.
        """
        if not self._wait(self._settled, timeout):
            raise TimeoutError(f"request {self.request_id} is not finished after {timeout} s")
        return self._checked()

    def when_settled(self, tell: Callable[[Stream], object]) -> None:
        """Call `tell` once, as soon as `results` would not wait: now, or on the engine's thread, which it must not
        hold up."""
        with self._changing():
            self._on_settled.append(tell)

    async def aresults(self) -> list[Result]:
        """`results()` for asyncio."""
        await self._until(self._settled)
        return self._checked()

    async def ended(self) -> list[Result]:
        """Wait for the end of all samples, whatever ended them; their results by index, none for a stream that failed
        as a whole."""
        await self._until(lambda: not self._unfinished)
        return [self._results[index] for index in sorted(self._results)]

    def __repr__(self) -> str:
        state = "failed" if self._error or self._failed else "running" if self._unfinished else "finished"
        return f"<Stream {self.request_id}, {state}, {len(self._outputs)} outputs unread>"

    def __iter__(self) -> Iterator[StepOutput]:
        return self

    def __next__(self) -> StepOutput:
        while (output := self._next()) is None:
            self._wait(self._readable)
        if isinstance(output, StepOutput):
            return output
        raise StopIteration

    def __aiter__(self) -> AsyncIterator[StepOutput]:
        return self

    async def __anext__(self) -> StepOutput:
        while (output := self._next()) is None:
            await self._until(self._readable)
        if isinstance(output, StepOutput):
            return output
        raise StopAsyncIteration

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.cancel()

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        if getattr(self, "_unfinished", 0):
            self._cancel(self.request_id)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Change the state under the lock, then wake whoever waits, thread or task."""
        with self._changed:
            yield
            self._changed.notify_all()
            waiting, self._waiting = self._waiting, []
            settled: Sequence[Callable[[Stream], object]] = ()
            if self._settled():
                settled, self._on_settled = self._on_settled, []
        for loop, woken in waiting:
            with suppress(RuntimeError):  # the loop was closed: nobody waits there any more
                loop.call_soon_threadsafe(_set, woken)
        for tell in settled:
            tell(self)

    def _settled(self) -> bool:
        """Whether it is known what `results` answers or raises."""
        return self._failed or not self._unfinished

    def _readable(self) -> bool:
        return bool(self._outputs) or not self._unfinished

    def _next(self) -> StepOutput | Literal["end"] | None:
        """The next output, "end" behind the last one, None while there is none. Takes no lock: a forked child may find
        it taken by a thread that it does not have."""
        # Looked at before the outputs, to which the last one is put first.
        ended = not self._unfinished
        try:
            return self._outputs.popleft()
        except IndexError:
            if not ended:
                return None
        self._checked()
        return "end"

    def _wait(self, ready: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait until `ready`, which is asked after every change; False if it is not after `timeout` seconds."""
        if ready():
            return True
        with self._awaited(), self._changed:
            return self._changed.wait_for(ready, timeout)

    async def _until(self, ready: Callable[[], bool]) -> None:
        """Wait without a thread until `ready`, which is asked after every change."""
        if ready():
            return
        loop = asyncio.get_running_loop()
        with self._awaited():
            while True:
                woken = loop.create_future()
                with self._changed:
                    if ready():
                        return
                    self._waiting.append((loop, woken))
                await woken

    def _checked(self) -> list[Result]:
        if self._error is not None:
            raise self._error
        results = [self._results[index] for index in sorted(self._results)]
        for result in results:
            if result.finish_reason == "error":
                raise _failure(result)
        return results


def gather(streams: Sequence[Stream]) -> list[list[Result]]:
    """The results of several streams of one engine. Raises what the first of them that fails fails with, as soon as it
    does so."""
    settled: SimpleQueue[Stream] = SimpleQueue()
    for stream in streams:
        stream.when_settled(settled.put)
    for stream in streams:
        with stream._awaited():
            settled.get().results()
    return [stream.results() for stream in streams]


async def agather(streams: Sequence[Stream]) -> list[list[Result]]:
    """`gather` for asyncio."""
    tasks = [asyncio.ensure_future(stream.aresults()) for stream in streams]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def _failure(result: Result) -> BaseException:
    """What to raise for a sample that failed: what the caller's own code raised as it is."""
    error = result.error
    if error is None or not result.is_callers_error or isinstance(error, _READ_BY_PYTHON):
        failed = RequestFailed(f"request {result.request_id} failed: {error!r}")
        failed.__cause__ = error
        return failed
    return error
