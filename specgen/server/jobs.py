"""From a request that was let in to the engine's outputs, and the place where it is left again, whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

from specgen.api import Engine
from specgen.errors import RequestFailed
from specgen.params import SamplingParams
from specgen.requests import Prepared
from specgen.server.auth import Caller
from specgen.server.config import ServerConfig
from specgen.server.deadlines import in_time
from specgen.server.errors import ApiError, invalid
from specgen.server.limits import Gate
from specgen.server.merge import merged
from specgen.server.metrics import Timing
from specgen.stream import Stream
from specgen.types import Prompt, Result, StepOutput

T = TypeVar("T")

_PREPARING_THREADS = 4


class Job:
    """One HTTP request at work: a stream for each of its prompts, n choices from each."""

    def __init__(self, prepared: Sequence[Prepared], streams: Sequence[Stream], timing: Timing) -> None:
        self.prepared = prepared
        self.failure: ApiError | None = None
        self._streams = streams
        self._timing = timing

    async def outputs(self) -> AsyncIterator[tuple[int, StepOutput]]:
        """(choice, output) as they come; a choice's last output has its result.

        Raises RequestFailed, or why the server ended the request.
        """
        async for place, output in merged(self._streams):
            choice = self._choice(place, output.index)
            self._timing.output(choice, output)
            if output.result is not None:
                self._check(output.result)
            yield choice, output

    async def results(self) -> list[Result]:
        """All results by choice."""
        found = {choice: output.result async for choice, output in self.outputs() if output.result is not None}
        return [found[choice] for choice in sorted(found)]

    async def account(self) -> None:
        """Count what was generated for those who have left, once the engine has ended it."""
        for place, stream in enumerate(self._streams):
            for result in await stream.ended():
                self._timing.result(self._choice(place, result.index), result)

    def _choice(self, place: int, index: int) -> int:
        return place * self.prepared[place][0].params.n + index

    def _check(self, result: Result) -> None:
        """One sequence that did not come to its own end fails the request."""
        if result.finish_reason == "error":
            raise RequestFailed(f"request {result.request_id} failed") from result.error
        if result.finish_reason == "cancelled":
            cancelled = ApiError(503, "the request was cancelled", code="cancelled", retry=1)
            raise (self.failure or cancelled) from result.error

    def end(self, failure: ApiError | None = None) -> None:
        """Cancel what is unfinished; harmless when all is finished."""
        self.failure = failure
        for stream in self._streams:
            stream.cancel()


class Jobs:
    """Brings requests to an engine and keeps account of those that are there."""

    def __init__(self, engine: Engine, config: ServerConfig) -> None:
        self.engine = engine
        self.gate = Gate(config, engine.config.max_running)
        self._config = config
        self._jobs: set[Job] = set()
        self._accounting: set[asyncio.Task[None]] = set()
        self._ended: ApiError | None = None
        self._threads = ThreadPoolExecutor(_PREPARING_THREADS, thread_name_prefix="specgen-prepare")

    @asynccontextmanager
    async def run(
        self, caller: Caller, timing: Timing, prompts: Sequence[Prompt], params: SamplingParams, field: str
    ) -> AsyncIterator[Job]:
        """A job for prompts, ended on the way out.

        field: where the prompts stand in the request, for errors.

        Raises ApiError when there is no room, when a prompt does not fit and when the time is over; InvalidRequest.
        """
        with self.gate.place(caller, len(prompts) * params.n):
            async with in_time(timing.arrival, self._config.request_seconds):
                prepared = await self.in_thread(lambda: [self.engine.prepare(each, params) for each in prompts])
                for each in prepared:
                    self._check_length(each, field)
                async with self._started(prepared, timing) as job:
                    yield job

    async def in_thread(self, function: Callable[[], T]) -> T:
        """What `function` returns or raises, without holding up the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)

    def end_all(self, failure: ApiError) -> None:
        """Tell all who wait that the server ends their requests, those too whose prompts are still prepared."""
        self._ended = failure
        for job in list(self._jobs):
            job.end(failure)

    def close(self) -> None:
        """Let the threads go, and what nobody will count any more."""
        for task in self._accounting:
            task.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def _started(self, prepared: Sequence[Prepared], timing: Timing) -> AsyncIterator[Job]:
        if self._ended is not None:
            raise self._ended
        job = Job(prepared, self.engine.start(*prepared), timing)
        self._jobs.add(job)
        try:
            yield job
        finally:
            self._jobs.discard(job)
            job.end(job.failure)
            accounting = asyncio.create_task(job.account())
            self._accounting.add(accounting)
            accounting.add_done_callback(self._accounting.discard)

    def _check_length(self, prepared: Prepared, field: str) -> None:
        """What is asked for must fit as a whole: nothing is cut in silence."""
        request, length = prepared[0], self.engine.context_length
        asked = request.params.max_tokens or 1
        if len(request.ids) + asked > length:
            raise invalid(
                f"This model's maximum context length is {length} tokens. However, you requested "
                f"{len(request.ids) + asked} tokens ({len(request.ids)} in the {field}, {asked} in the completion). "
                f"Please reduce the length of the {field} or completion.",
                field,
                "context_length_exceeded",
            )
