"""From a request that was let in to the engine's outputs, and the place where it is left again, whatever happens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

from specgen.api.engine import Engine
from specgen.engine.request import PreparedRequest
from specgen.engine.stream import Stream
from specgen.errors import ContextLengthExceeded, RequestFailed
from specgen.sampling.params import SamplingParams
from specgen.server.admission import AdmissionControl
from specgen.server.auth import Caller
from specgen.server.config import ServerConfig
from specgen.server.deadlines import in_time
from specgen.server.merged_streams import merged
from specgen.server.metrics import Timing
from specgen.server.preparing import Preparing, lane_of
from specgen.server.protocol.errors import ApiError, invalid
from specgen.types import Prompt, Result, StepOutput

T = TypeVar("T")


class Generation:
    """One HTTP request at work: a stream for each of its prompts, n choices from each."""

    def __init__(self, prepared: Sequence[PreparedRequest], streams: Sequence[Stream], timing: Timing) -> None:
        self.prepared = prepared
        self.failure: ApiError | None = None
        self.has_begun = False
        self._streams = streams
        self._timing = timing

    @property
    def request_ids(self) -> list[str]:
        """The engine's names of what it has of this generation."""
        return [stream.request_id for stream in self._streams]

    async def outputs(self) -> AsyncIterator[tuple[int, StepOutput]]:
        """(choice, output) as they come; a choice's last output has its result.

        Raises RequestFailed, or why the server ended the request.
        """
        async for place, output in merged(self._streams):
            self.has_begun |= bool(output.tokens)
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
        return place * self.prepared[place].request.params.n + index

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


class Generations:
    """Brings requests to an engine and keeps account of those that are there."""

    def __init__(self, engine: Engine, config: ServerConfig) -> None:
        self.engine = engine
        self.gate = AdmissionControl(config, engine.config.max_num_seqs)
        self._config = config
        self._running: set[Generation] = set()
        self._accounting: set[asyncio.Task[None]] = set()
        self._ended: ApiError | None = None
        self._preparing = Preparing()

    @asynccontextmanager
    async def run(
        self, caller: Caller, timing: Timing, prompts: Sequence[Prompt], params: SamplingParams, field: str, size: int
    ) -> AsyncIterator[Generation]:
        """A generation for prompts, ended on the way out.

        field: where the prompts stand in the request, for errors. size: bytes of its body.

        Raises ApiError when there is no room, when a prompt does not fit and when the time is over; InvalidRequest.
        """
        with self.gate.place(caller, len(prompts) * params.n, size) as place:
            async with in_time(timing.arrival, self._config.request_seconds):
                async with self._patience(timing.arrival):
                    prepared = await self._prepared(prompts, params, field, size)
                async with self._started(prepared, timing) as generation:
                    place.started()
                    with self._ending_if_waiting(generation, timing.arrival):
                        try:
                            yield generation
                        finally:
                            place.was_served = generation.has_begun

    async def text(self, caller: Caller, timing: Timing, function: Callable[[], T], size: int) -> T:
        """What `function` makes of the text of a request with a body of `size` bytes, which is let in as a sequence is.

        Raises ApiError when there is no room and when the time is over.
        """
        with self.gate.place(caller, 1, size, "texts"):
            async with in_time(timing.arrival, self._config.request_seconds):
                return await self._preparing.run(function, lane_of(size, compiles=False))

    async def in_thread(self, function: Callable[[], T]) -> T:
        """What `function` returns or raises, without holding up the event loop."""
        return await self._preparing.run(function)

    def end_all(self, failure: ApiError) -> None:
        """Tell all who wait that the server ends their requests, those too whose prompts are still prepared."""
        self._ended = failure
        for generation in list(self._running):
            generation.end(failure)

    def close(self) -> None:
        """Let the threads go, and what nobody will count any more."""
        for task in self._accounting:
            task.cancel()
        self._preparing.close()

    async def _prepared(
        self, prompts: Sequence[Prompt], params: SamplingParams, field: str, size: int
    ) -> list[PreparedRequest]:
        lane = lane_of(size, compiles=params.constraint is not None)
        try:
            found = await self._preparing.run(lambda: [self.engine.prepare(each, params) for each in prompts], lane)
        except ContextLengthExceeded as error:
            param = field if error.param == "messages" else error.param
            raise invalid(str(error), param, "context_length_exceeded") from None
        for each in found:
            self._check_length(each, field)
        return found

    @asynccontextmanager
    async def _patience(self, arrival: float) -> AsyncIterator[None]:
        """Time to be prepared, where there is a limit to waiting."""
        most = self._config.max_waiting_seconds
        if most is None:
            yield
            return
        try:
            async with asyncio.timeout(arrival + most - time.monotonic()):
                yield
        except TimeoutError:
            raise self._waited() from None

    @contextmanager
    def _ending_if_waiting(self, generation: Generation, arrival: float) -> Iterator[None]:
        """End a generation that the engine has not begun when there is an end to waiting."""
        most = self._config.max_waiting_seconds
        if most is None:
            yield
            return
        watch = asyncio.create_task(self._end_if_waiting(generation, arrival + most - time.monotonic()))
        try:
            yield
        finally:
            watch.cancel()

    async def _end_if_waiting(self, generation: Generation, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if not generation.has_begun and await self.in_thread(
            lambda: all(map(self.engine.is_waiting, generation.request_ids))
        ):
            generation.end(self._waited())

    def _waited(self) -> ApiError:
        message = f"the server is busy: it did not begin within {self._config.max_waiting_seconds:g} seconds"
        return ApiError(429, message, code="waited_too_long", retry=self.gate.retry)

    @asynccontextmanager
    async def _started(self, prepared: Sequence[PreparedRequest], timing: Timing) -> AsyncIterator[Generation]:
        if self._ended is not None:
            raise self._ended
        generation = Generation(prepared, self.engine.start(*prepared), timing)
        self._running.add(generation)
        try:
            yield generation
        finally:
            self._running.discard(generation)
            generation.end(generation.failure)
            accounting = asyncio.create_task(generation.account())
            self._accounting.add(accounting)
            accounting.add_done_callback(self._accounting.discard)

    def _check_length(self, prepared: PreparedRequest, field: str) -> None:
        """What is asked for must fit as a whole: nothing is cut in silence."""
        request, length = prepared.request, self.engine.context_length
        asked = request.params.max_tokens or 1
        if len(request.ids) + asked > length:
            raise invalid(
                f"This model's maximum context length is {length} tokens. However, you requested "
                f"{len(request.ids) + asked} tokens ({len(request.ids)} in the {field}, {asked} in the completion). "
                f"Please reduce the length of the {field} or completion.",
                field,
                "context_length_exceeded",
            )
