"""What the server tells Prometheus, under vLLM's names behind our prefix, so that its dashboards need a prefix only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from specgen.api.engine import Engine
from specgen.types import Result, StepOutput

_PREFIX = "specgen:"
_SECONDS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
_LONG_SECONDS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 240.0, 480.0, 960.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_LABELS = ("model_name",)
_REASONS = {"cancelled": "abort"}
"""vLLM's words for why a sequence finished, where they are not ours."""


class Metrics:
    """The metrics of one server, in a registry of their own. `text` is what a scrape gets.

    preparing: how many sequences the server has let in and the engine does not have yet.
    """

    def __init__(self, engine: Engine, model_name: str, preparing: Callable[[], int], *, compat: bool) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineState(engine, model_name, preparing))
        self._compat = compat
        self._name = model_name

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(_PREFIX + name, text, (*_LABELS, *labels), registry=self._registry)

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            found = Histogram(_PREFIX + name, text, _LABELS, registry=self._registry, buckets=tuple(buckets))
            return found.labels(model_name)

        self._prompt = counter("prompt_tokens", "Prompt tokens of finished sequences.").labels(model_name)
        self._generated = counter("generation_tokens", "Generated tokens.").labels(model_name)
        self._cached = counter("cached_tokens", "Prompt tokens that were not computed again.").labels(model_name)
        self._success = counter("request_success", "Finished sequences.", "finished_reason")
        self._answers = counter(
            "http_requests", "Answers by route and status; 499: the client left.", "route", "status"
        )
        self._unreadable = counter("http_unreadable_requests", "Requests whose head is no HTTP, by error.", "error")
        self._refused = counter("http_refused_connections", "Connections beyond the most.").labels(model_name)
        self._drafts = counter("spec_decode_num_drafts", "Steps that verified a draft.").labels(model_name)
        self._drafted = counter("spec_decode_num_draft_tokens", "Draft tokens that were verified.").labels(model_name)
        self._accepted = counter("spec_decode_num_accepted_tokens", "Draft tokens accepted.").labels(model_name)
        self._per_position = counter(
            "spec_decode_num_accepted_tokens_per_pos", "Draft tokens accepted, by depth in the tree.", "position"
        )
        self._by_drafter = counter("drafter_accepted_tokens", "Tokens accepted of each drafter.", "drafter")
        self._first = histogram("time_to_first_token_seconds", "From arrival to the first token.", _SECONDS)
        self._between = histogram("inter_token_latency_seconds", "Time per token after the first output.", _SECONDS)
        self._whole = histogram("e2e_request_latency_seconds", "From arrival to the end.", _LONG_SECONDS)
        self._decode = histogram("request_decode_time_seconds", "From the first token to the last.", _LONG_SECONDS)
        self._prompts = histogram("request_prompt_tokens", "Prompt tokens of a sequence.", _TOKENS)
        self._lengths = histogram("request_generation_tokens", "Generated tokens of a sequence.", _TOKENS)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        found = generate_latest(self._registry)
        return found + found.replace(_PREFIX.encode(), b"vllm:") if self._compat else found

    def answered(self, route: str, status: int) -> None:
        """Count an answer."""
        self._answers.labels(self._name, route, str(status)).inc()

    def unreadable(self, error: str) -> None:
        """Count a request that could not be read."""
        self._unreadable.labels(self._name, error).inc()

    def connection_refused(self) -> None:
        """Count a connection for which there was no room."""
        self._refused.inc()

    def first_token(self, seconds: float) -> None:
        """The first output of a sequence came."""
        self._first.observe(seconds)

    def tokens(self, tokens: int, seconds: float) -> None:
        """A later output came."""
        self._between.observe(seconds / tokens)

    def finished(self, result: Result, whole: float, decode: float) -> None:
        """A sequence ended."""
        stats, usage = result.stats, result.usage
        self._success.labels(self._name, _REASONS.get(result.finish_reason, result.finish_reason)).inc()
        self._prompt.inc(usage.prompt_tokens)
        self._generated.inc(usage.completion_tokens)
        self._cached.inc(usage.cached_tokens)
        # What was cut short tells little of how long answers are and take.
        if result.finish_reason != "cancelled":
            self._prompts.observe(usage.prompt_tokens)
            self._lengths.observe(usage.completion_tokens)
            self._whole.observe(whole)
            self._decode.observe(decode)
        self._drafts.inc(sum(1 for drafted in stats.per_step_drafted if drafted))
        self._drafted.inc(stats.num_draft_tokens)
        self._accepted.inc(stats.num_accepted_draft_tokens)
        for position in range(len(stats.acceptance_histogram) - 1):
            deeper = sum(stats.acceptance_histogram[position + 1 :])
            self._per_position.labels(self._name, str(position)).inc(deeper)
        for name, share in stats.by_drafter.items():
            self._by_drafter.labels(self._name, name).inc(share.accepted)


@dataclass(slots=True)
class Timing:
    """When the tokens of one request came. arrival: `time.monotonic` when its head was read."""

    metrics: Metrics
    arrival: float = field(default_factory=time.monotonic)
    _first: dict[int, float] = field(default_factory=dict)
    _last: dict[int, float] = field(default_factory=dict)
    _finished: set[int] = field(default_factory=set)

    def output(self, choice: int, output: StepOutput) -> None:
        """An output of a choice came."""
        now = time.monotonic()
        if output.tokens and choice not in self._first:
            self._first[choice] = self._last[choice] = now
            self.metrics.first_token(now - self.arrival)
        elif output.tokens:
            self.metrics.tokens(len(output.tokens), now - self._last[choice])
            self._last[choice] = now
        if output.result is not None:
            self.result(choice, output.result)

    def result(self, choice: int, result: Result) -> None:
        """A choice ended, be it that nobody read its outputs any more. It counts once."""
        if choice in self._finished:
            return
        self._finished.add(choice)
        now = time.monotonic()
        self.metrics.finished(result, now - self.arrival, now - self._first.get(choice, now))


TIMING = web.RequestKey("timing", Timing)
"""Set for every request, first of all."""


class _EngineState(Collector):
    """What the engine counts itself, read when it is asked for."""

    def __init__(self, engine: Engine, model_name: str, preparing: Callable[[], int]) -> None:
        self._engine = engine
        self._preparing = preparing
        self._name = model_name

    def collect(self) -> Iterator[Metric]:
        load, waiting = self._engine.load, self._engine.load.waiting + self._preparing()
        gauges = (
            ("num_requests_running", "Sequences in the forward.", load.running),
            ("num_requests_waiting", "Sequences that wait or are prepared.", waiting),
            ("kv_cache_usage_perc", "Share of the KV pool in use, 1 is all.", load.used_pages / load.total_pages),
        )
        counters = (
            ("prefix_cache_queries", "Tokens of admitted prompts.", load.prefix_queried),
            ("prefix_cache_hits", "Of these, tokens found in the prefix cache.", load.prefix_cached),
            ("num_preemptions", "Sequences that gave their pages back.", load.preemptions),
            ("engine_steps", "Steps of the engine.", self._engine.counters.steps),
        )
        for family, found in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, text, value in found:
                metric = family(_PREFIX + name, text, labels=_LABELS)
                metric.add_metric([self._name], value)
                yield metric
