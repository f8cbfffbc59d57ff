"""Who listens to which run: identical requests that are there at once share one. Touched from one thread alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from specgen.engine.request import Request
from specgen.engine.response_cache import ResponseCache, ResponseKey, for_request
from specgen.types import Result, StepOutput


@dataclass(slots=True)
class SharedRun:
    """A request that runs, for itself and for those that joined it.

    listeners: ids of the requests that get its outputs; the run goes on while there is one, be it its own or not.
    said: its outputs so far, for those that come later.
    """

    request: Request
    key: ResponseKey
    listeners: list[str]
    said: list[StepOutput] = field(default_factory=list)

    @property
    def results(self) -> list[Result]:
        """Of the samples that are finished, by index."""
        found = [output.result for output in self.said if output.result]
        return sorted(found, key=lambda result: result.index)

    @property
    def is_answer(self) -> bool:
        """Whether all samples came to their own end."""
        return all(result.finish_reason in ("stop", "length") for result in self.results)

    def output_for(self, output: StepOutput, request_id: str) -> StepOutput:
        """One of its outputs as a listener gets it."""
        if request_id == self.request.id:
            return output
        result = for_request(output.result, request_id) if output.result else None
        return replace(output, request_id=request_id, result=result)


class InFlight:
    """The runs that others may join, in front of the cache of finished answers."""

    def __init__(self, responses: ResponseCache) -> None:
        self._responses = responses
        self._by_key: dict[ResponseKey, SharedRun] = {}
        self._by_request: dict[str, SharedRun] = {}
        self._by_listener: dict[str, SharedRun] = {}

    def answer(self, request: Request, key: ResponseKey) -> list[StepOutput] | None:
        """What is known of a request's answer already, the rest of which it will hear; None if it has to run."""
        if run := self._by_key.get(key):
            self._responses.count_run(shared=True)
            run.listeners.append(request.id)
            self._by_listener[request.id] = run
            return [run.output_for(output, request.id) for output in run.said]
        if results := self._responses.get(key):
            return [_whole(for_request(result, request.id)) for result in results]
        return None

    def begin(self, request: Request, key: ResponseKey) -> None:
        """A request runs from now on; those with the same key may join it."""
        self._responses.count_run(shared=False)
        run = SharedRun(request, key, [request.id])
        self._by_key[key] = self._by_request[request.id] = self._by_listener[request.id] = run

    def heard_by(self, request_id: str) -> SharedRun | None:
        """The run that a request listens to, if it is one that others may join."""
        return self._by_listener.get(request_id)

    def leave(self, request_id: str) -> None:
        """A request hears no more of its run, which goes on for the others."""
        self._by_listener.pop(request_id).listeners.remove(request_id)

    def has_left(self, request_id: str) -> bool:
        """Whether a request hears no more of the run that it began: the run has its id still, and is the others'."""
        return request_id in self._by_request and request_id not in self._by_listener

    def spread(self, output: StepOutput) -> Iterator[StepOutput]:
        """An output as each listener of its run gets it. The last one ends the run, and its answer is kept."""
        run = self._by_request.get(output.request_id)
        if run is None:
            return iter((output,))
        run.said.append(output)
        listeners = list(run.listeners)
        if output.result and len(run.results) == run.request.params.n:
            self._end(run)
        return (run.output_for(output, listener) for listener in listeners)

    def _end(self, run: SharedRun) -> None:
        del self._by_key[run.key], self._by_request[run.request.id]
        for listener in run.listeners:
            del self._by_listener[listener]
        if run.is_answer:
            self._responses.put(run.key, run.results)


def _whole(result: Result) -> StepOutput:
    """A finished sample in one output."""
    return StepOutput(result.request_id, result.index, result.ids, result.text, result.logprobs, result)
