"""Spans and metrics as an SDK sees them, of requests to a tiny engine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from specgen_otel import Telemetry

from specgen import Engine, RequestFailed
from specgen.plugins.manager import load_plugins
from tests.support.servers import engine as tiny_engine
from tests.support.servers import plugins

DRAFTED: dict[str, Any] = {"speculation": {"adaptive": False}, "temperature": 0.0}


@dataclass
class Seen:
    """What an application would export."""

    tracing: TracerProvider
    spans: InMemorySpanExporter
    metrics: InMemoryMetricReader
    telemetry: Telemetry

    def span(self) -> ReadableSpan:
        """The only one."""
        (found,) = self.spans.get_finished_spans()
        return found

    def points(self) -> dict[str, Any]:
        """Metric -> its only data point."""
        data: Any = self.metrics.get_metrics_data()
        found = {metric.name: metric.data for metric in data.resource_metrics[0].scope_metrics[0].metrics}
        return {name: data.data_points[0] for name, data in found.items() if len(data.data_points) == 1}


@pytest.fixture
def seen() -> Seen:
    spans, metrics, tracing = InMemorySpanExporter(), InMemoryMetricReader(), TracerProvider()
    tracing.add_span_processor(SimpleSpanProcessor(spans))
    return Seen(tracing, spans, metrics, Telemetry(tracing, MeterProvider([metrics])))


@pytest.fixture
def engine(seen: Seen) -> Iterator[Engine]:
    found = plugins()
    found.register(seen.telemetry, "specgen-otel")
    with tiny_engine(plugins=found) as opened:
        yield opened
        opened.check()
        assert not opened.plugins.failures
        assert not seen.telemetry._running


def test_a_request_is_a_span_below_its_callers(engine: Engine, seen: Seen) -> None:
    with seen.tracing.get_tracer("test").start_as_current_span("caller") as caller:
        sampled = {**DRAFTED, "temperature": 0.8, "ignore_eos": True}
        results = engine.generate("a prompt", n=2, max_tokens=20, top_p=0.9, **sampled)
    assert isinstance(results, list)
    engine.check()
    span, outer = seen.spans.get_finished_spans()
    assert outer.name == "caller"
    assert span.parent == caller.get_span_context()
    assert span.name == "text_completion"
    stats = [result.stats for result in results]
    accepted, steps = (sum(getattr(s, name) for s in stats) for name in ("num_accepted_draft_tokens", "num_spec_steps"))
    assert dict(span.attributes or {}) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "specgen",
        "gen_ai.request.max_tokens": 20,
        "gen_ai.request.temperature": 0.8,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.finish_reasons": ("length", "length"),
        "gen_ai.usage.input_tokens": 8,
        "gen_ai.usage.cache_read.input_tokens": results[0].usage.cached_tokens,
        "gen_ai.usage.output_tokens": 40,
        "specgen.request.id": results[0].request_id,
        "specgen.drafted_tokens": sum(s.num_draft_tokens for s in stats),
        "specgen.accepted_tokens": accepted,
        "specgen.mean_acceptance_length": (steps + accepted) / steps,
    }
    assert [event.name for event in span.events] == ["first_token"]
    assert span.status.status_code is StatusCode.UNSET


def test_the_histograms_hold_what_the_clock_says(seen: Seen) -> None:
    """A clock that goes one second from look to look: at the beginning, at the first tokens, at the end."""
    now = iter(range(100))
    seen.telemetry._clock = lambda: float(next(now))
    found = plugins()
    found.register(seen.telemetry, "specgen-otel")
    with tiny_engine(plugins=found) as engine:
        result = engine.generate("a prompt", max_tokens=9, temperature=0.0, speculation="off")
        engine.check()
        points = seen.points()
        assert points["gen_ai.server.time_to_first_token"].sum == 1.0
        assert points["gen_ai.server.request.duration"].sum == 2.0
        assert points["gen_ai.server.time_per_output_token"].sum == 1.0 / 8
        assert points["specgen.drafted_tokens"].value == 0
        drafted = engine.generate("a prompt", max_tokens=30, **DRAFTED)
    assert drafted.ids[:9] == result.ids
    assert drafted.stats.num_draft_tokens
    points = seen.points()
    assert points["gen_ai.server.request.duration"].count == 2
    assert points["specgen.drafted_tokens"].value == drafted.stats.num_draft_tokens
    assert points["specgen.accepted_tokens"].value == drafted.stats.num_accepted_draft_tokens


def test_a_failure_tells_its_kind_and_no_more(engine: Engine, seen: Seen) -> None:
    with pytest.raises(RequestFailed):
        engine.generate("canary-prompt", max_tokens=9, plugin_processors={"broken": {"message": "canary-message"}})
    engine.check()
    span = seen.span()
    assert span.status.status_code is StatusCode.ERROR
    assert (span.attributes or {})["error.type"] == "ZeroDivisionError"
    assert (span.attributes or {})["gen_ai.response.finish_reasons"] == ("error",)
    assert "canary" not in span.to_json()
    assert seen.points()["gen_ai.server.request.duration"].attributes["error.type"] == "ZeroDivisionError"


def test_a_request_that_is_cancelled_ends_its_span(engine: Engine, seen: Seen) -> None:
    stream = engine.stream("a prompt", max_tokens=400, plugin_processors={"slow": {"seconds": 0.005}})
    next(iter(stream))
    stream.cancel()
    for _ in stream:
        pass
    engine.check()
    span = seen.span()
    assert (span.attributes or {})["gen_ai.response.finish_reasons"] == ("cancelled",)
    assert "a prompt" not in span.to_json()


def test_what_was_known_already_has_a_span_and_is_not_computed(seen: Seen) -> None:
    found = plugins()
    found.register(seen.telemetry, "specgen-otel")
    with tiny_engine(plugins=found, response_cache_bytes=1 << 20) as engine:
        first, again = (engine.generate("a prompt", max_tokens=30, **DRAFTED) for _ in range(2))
    assert first.ids == again.ids
    computed, known = seen.spans.get_finished_spans()
    assert (known.attributes or {})["gen_ai.usage.output_tokens"] == 30
    assert [len(span.events) for span in (computed, known)] == [1, 0]
    assert seen.points()["specgen.drafted_tokens"].value == first.stats.num_draft_tokens


def test_it_comes_by_its_entry_point_and_the_readme_runs() -> None:
    """Without a provider, too."""
    found = load_plugins(only=["specgen-otel"])
    (info,) = (info for info in found.info() if info.name == "specgen-otel")
    assert info.hooks == ("on_finish", "on_request", "on_step")
    (source,) = re.findall(
        r"^```python\n(.*?)^```$", (Path(__file__).parents[1] / "README.md").read_text(), flags=re.M | re.S
    )
    with tiny_engine(plugins=found) as engine:
        exec(source, {"engine": engine})
        assert not engine.plugins.failures
