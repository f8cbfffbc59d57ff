"""Which steps are captured and how many graphs are kept, over a forward that computes nothing but what it is told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import structlog
import torch

from specgen.kv.formats import LayerShape
from specgen.kv.pool import KVPool
from specgen.model.attention.base import ForwardBatch
from specgen.model.output import ForwardOutput
from specgen.model.segment import Segment
from tests.support.attention import chain
from tests.support.tape import Tapes

pytest.importorskip("triton")

from specgen.model.attention.triton_backend import TritonBackend
from specgen.model.forward import graphs as module
from specgen.model.forward.graphs import SIZES, GraphForward

CPU = torch.device("cpu")

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.skipif(torch.cuda.is_available(), reason="a tape")]


class Here:
    """An executor over a pool, whose forwards answer the ids that they are told."""

    tapes: Tapes

    def __init__(self) -> None:
        self.pool = KVPool([LayerShape(1, 4, 4)], 64, dtype=torch.float32, device=CPU)
        self.executor = GraphForward(TritonBackend(CPU), self.pool, self.run)
        self.runs = 0

    def segments(self, rows: int, count: int = 1) -> list[Segment]:
        found = []
        for number in range(count):
            table = self.pool.open()
            table.reserve(rows)
            tokens = [100 * number + self.runs + row for row in range(rows)]
            found.append(replace(chain(table, rows), tokens=tokens, logits=[rows - 1]))
        return found

    def __call__(self, segments: list[Segment]) -> bool:
        """Whether a forward over these segments was replayed; its answer is checked."""
        before = self.tapes.replays
        scores = self.executor(segments)
        told = [token for segment in segments for token in segment.tokens]
        asked = [segment.tokens[-1] for segment in segments]
        assert scores.logits.tolist() == [[token] for token in asked]
        assert [states.tolist() for states in scores.hidden] == [told]
        for segment in segments:
            segment.table.release()
        return self.tapes.replays > before

    def run(self, batch: ForwardBatch, segments: Sequence[Segment]) -> ForwardOutput:
        self.runs += 1
        ids = batch.ids[0]
        return ForwardOutput(ids[batch.wanted][:, None], (ids,))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Here]:
    tapes = Tapes()
    monkeypatch.setattr(module, "capture_on", lambda device: tapes)
    with torch.inference_mode():
        made = Here()
        made.tapes = tapes
        yield made


def test_a_size_is_captured_when_it_is_met_again(here: Here) -> None:
    assert [here(here.segments(3)) for _ in range(4)] == [False, True, True, True]
    # Of the same size: filled up to four rows.
    assert here(here.segments(2, count=2))
    assert len(here.tapes.kept) == 1
    assert not here(here.segments(5))


def test_what_is_kept_is_bounded_and_used_last(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_GRAPHS", 2)
    for rows in (1, 2, 1, 2, 1, 4, 4):
        here(here.segments(rows))
    assert [size for size, _ in here.executor._graphs] == [1, 4]
    assert here(here.segments(2))
    assert len(here.tapes.kept) == 4
    assert [size for size, _ in here.executor._graphs] == [4, 2]


def test_steps_that_are_not_captured(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(here(here.segments(SIZES[-1] + 1)) for _ in range(3))
    adapted = [replace(segment, adapter=object()) for segment in here.segments(1)]  # type: ignore[arg-type]
    assert not any(here(adapted) for _ in range(3))
    monkeypatch.setattr(module, "_TABLES", 8)
    monkeypatch.setattr(module, "_SHARERS", 0)
    assert not any(here(here.segments(1)) for _ in range(3))
    assert not here.tapes.kept


def test_a_forward_that_cannot_be_captured_runs_as_it_is(here: Here) -> None:
    for _ in range(2):
        here(here.segments(1))

    def failing(work: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    here.executor._capture = failing  # type: ignore[assignment]
    with structlog.testing.capture_logs() as logs:
        assert not any(here(here.segments(2)) for _ in range(3))
    assert [(line["rows"], line["reason"]) for line in logs] == [
        (2, "operation not permitted when stream is capturing")
    ]
    assert here.executor.why_not == "operation not permitted when stream is capturing"
    assert here(here.segments(1)), "what was captured before goes on"
