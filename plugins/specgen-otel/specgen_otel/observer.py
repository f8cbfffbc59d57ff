"""From the engine's hooks to spans and histograms under the names of OpenTelemetry's conventions for generative AI.

https://github.com/open-telemetry/semantic-conventions-genai, whose state is still "development"; what they have no name
for begins with `specgen`. No prompt, no text and no message of an exception, which might quote one, goes out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from opentelemetry import metrics, trace
from opentelemetry.metrics import MeterProvider
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, TracerProvider
from opentelemetry.util.types import AttributeValue

from specgen import Request, Result, StepOutput, hookimpl

_SCOPE = "specgen_otel"
_OPERATION = "text_completion"
_COMMON = {"gen_ai.operation.name": _OPERATION, "gen_ai.provider.name": "specgen"}
_REQUEST = {
    "gen_ai.request.max_tokens": "max_tokens",
    "gen_ai.request.temperature": "temperature",
    "gen_ai.request.top_p": "top_p",
    "gen_ai.request.top_k": "top_k",
    "gen_ai.request.frequency_penalty": "frequency_penalty",
    "gen_ai.request.presence_penalty": "presence_penalty",
    "gen_ai.request.choice.count": "n",
    "specgen.request.adapter": "adapter",
}
"""Attribute -> the sampling parameter it holds."""

# The conventions' own advice on where buckets end, in seconds.
_DURATIONS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)


@dataclass(slots=True)
class _Running:
    """A request whose sequences have not all ended. first: sequence -> when its first tokens came and how many."""

    span: Span
    sequences: int
    began: float
    first: dict[int, tuple[float, int]] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)


class Telemetry:
    """An observer of engines. Providers: OpenTelemetry's global ones where none are given, set before or after this."""

    def __init__(
        self,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tracer = trace.get_tracer(_SCOPE, tracer_provider=tracer_provider)
        self._clock = clock
        self._running: dict[str, _Running] = {}
        meter = metrics.get_meter(_SCOPE, meter_provider=meter_provider)

        def seconds(name: str, text: str, buckets: Sequence[float]) -> metrics.Histogram:
            advised = list(buckets)
            return meter.create_histogram(name, "s", text, explicit_bucket_boundaries_advisory=advised)

        self._duration = seconds("gen_ai.server.request.duration", "From the queue to the last token.", _DURATIONS)
        self._first = seconds("gen_ai.server.time_to_first_token", "From the queue to the first token.", _FIRST)
        self._per_token = seconds(
            "gen_ai.server.time_per_output_token", "Per token of a sequence after its first ones.", _PER_TOKEN
        )
        self._drafted = meter.create_counter("specgen.drafted_tokens", "{token}", "Draft tokens that were verified.")
        self._accepted = meter.create_counter("specgen.accepted_tokens", "{token}", "Draft tokens that were accepted.")

    @hookimpl
    def on_request(self, request: Request) -> None:
        """Begin a span, below the one that the caller was in."""
        span = self._tracer.start_span(
            _OPERATION, kind=SpanKind.INTERNAL, attributes={**_COMMON, **dict(_asked(request))}
        )
        self._running[request.id] = _Running(span, request.params.n, self._clock())

    @hookimpl
    def on_step(self, outputs: Sequence[StepOutput]) -> None:
        """Note when the first tokens of a sequence came."""
        for output in outputs:
            running = self._running.get(output.request_id)
            if running is None or not output.tokens or output.index in running.first:
                continue
            now = self._clock()
            if not running.first:
                running.span.add_event("first_token")
                self._first.record(now - running.began, _COMMON)
            running.first[output.index] = (now, len(output.tokens))

    @hookimpl
    def on_finish(self, result: Result) -> None:
        """Count a sequence, and end the span with the last one of its request."""
        self._drafted.add(result.stats.num_draft_tokens, _COMMON)
        self._accepted.add(result.stats.num_accepted_draft_tokens, _COMMON)
        running = self._running.get(result.request_id)
        if running is None:
            return
        now = self._clock()
        came, tokens = running.first.get(result.index, (now, 0))
        if tokens and (later := result.usage.completion_tokens - tokens) > 0:
            self._per_token.record((now - came) / later, _COMMON)
        running.results.append(result)
        if len(running.results) == running.sequences:
            del self._running[result.request_id]
            self._end(running, now)

    def _end(self, running: _Running, now: float) -> None:
        kind = next((type(r.error).__name__ for r in running.results if r.error is not None), None)
        failed = {"error.type": kind} if kind else {}
        running.span.set_attributes({**dict(_answered(running.results)), **failed})
        if kind:
            running.span.set_status(Status(StatusCode.ERROR, kind))
        running.span.end()
        self._duration.record(now - running.began, {**_COMMON, **failed})


def _asked(request: Request) -> Iterator[tuple[str, AttributeValue]]:
    """What a request says of itself; what it leaves to the model has no attribute."""
    yield "specgen.request.id", request.id
    for name, param in _REQUEST.items():
        if (value := getattr(request.params, param)) is not None:
            yield name, value


def _answered(results: Sequence[Result]) -> Iterator[tuple[str, AttributeValue]]:
    """Of all sequences of a request together; the prompt counts once."""
    ordered = sorted(results, key=lambda result: result.index)
    steps = sum(result.stats.num_spec_steps for result in ordered)
    accepted = sum(result.stats.num_accepted_draft_tokens for result in ordered)
    yield "gen_ai.response.finish_reasons", [result.finish_reason for result in ordered]
    yield "gen_ai.usage.input_tokens", ordered[0].usage.prompt_tokens
    yield "gen_ai.usage.cache_read.input_tokens", ordered[0].usage.cached_tokens
    yield "gen_ai.usage.output_tokens", sum(result.usage.completion_tokens for result in ordered)
    yield "specgen.drafted_tokens", sum(result.stats.num_draft_tokens for result in ordered)
    yield "specgen.accepted_tokens", accepted
    if steps:
        yield "specgen.mean_acceptance_length", (steps + accepted) / steps
