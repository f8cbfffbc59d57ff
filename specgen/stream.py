"""The caller's end of a request: outputs as they come, for threads and for asyncio alike."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress

from specgen.errors import RequestFailed
from specgen.types import Result, StepOutput


def _set(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)


class Stream:
    """Iterate over it, `for` or `async for`, for the `StepOutput`s of all samples of one request, in order.

    Leaving the loop early cancels nothing: call `cancel()`, or use the stream as a context manager, which cancels
    what is unfinished on the way out. An unfinished request whose stream is dropped is cancelled too.
    """

    def __init__(self, request_id: str, samples: int, cancel: Callable[[str], None]) -> None:
        self.request_id = request_id
        self.owner: object = None
        self._cancel = cancel
        self._unfinished = samples
        self._results: dict[int, Result] = {}
        self._outputs: deque[StepOutput] = deque()
        self._changed = threading.Condition()
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._error: RequestFailed | None = None

    def put(self, output: StepOutput) -> None:
        """Hand over one output; nothing once the stream has failed. Called from the engine's thread."""
        with self._changing():
            if self._error is not None:
                return
            self._outputs.append(output)
            if output.result is not None:
                self._results[output.index] = output.result
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

        Raises TimeoutError, and RequestFailed if a sample ended with an error.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: not self._unfinished, timeout):
                raise TimeoutError(f"request {self.request_id} is not finished after {timeout} s")
        return self._checked()

    async def aresults(self) -> list[Result]:
        """`results()` for asyncio."""
        await self._until(lambda: not self._unfinished)
        return self._checked()

    async def ended(self) -> list[Result]:
        """Wait for the end of all samples, whatever ended them; their results by index, none for a stream that failed
        as a whole."""
        await self._until(lambda: not self._unfinished)
        return [self._results[index] for index in sorted(self._results)]

    def __iter__(self) -> Iterator[StepOutput]:
        return self

    def __next__(self) -> StepOutput:
        with self._changed:
            self._changed.wait_for(lambda: self._outputs or not self._unfinished)
            if not self._outputs:
                self._checked()
                raise StopIteration
            return self._outputs.popleft()

    def __aiter__(self) -> AsyncIterator[StepOutput]:
        return self

    async def __anext__(self) -> StepOutput:
        await self._until(lambda: bool(self._outputs) or not self._unfinished)
        if not self._outputs:
            self._checked()
            raise StopAsyncIteration
        return self._outputs.popleft()

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
        for loop, woken in waiting:
            with suppress(RuntimeError):  # the loop was closed: nobody waits there any more
                loop.call_soon_threadsafe(_set, woken)

    async def _until(self, ready: Callable[[], bool]) -> None:
        """Wait without a thread until `ready`, which is asked after every change."""
        loop = asyncio.get_running_loop()
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
                raise RequestFailed(f"request {self.request_id} failed: {result.error!r}") from result.error
        return results
