"""Forwards on a GPU: launch by launch, or as one replay of a graph that was captured of their like.

A graph launches what was launched when it was captured, with the same arguments. So all in which two steps differ
(ids, positions, slots, how attention is cut, pages) lies at fixed places of one buffer, which every step writes over
and every graph reads, and a step is padded to one of a few sizes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from specgen._base.log import Log
from specgen.kernels.triton.tree_attention import Tile
from specgen.kv.pool import KVPool
from specgen.model.attention.base import ForwardBatch
from specgen.model.attention.triton_backend import TritonBackend, TritonBatch
from specgen.model.output import ForwardOutput
from specgen.model.segment import Segment

log = Log("specgen.model")

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
"""Rows of forwards that are captured; larger ones, parts of prompts, keep a GPU busy without."""
_MOST_GRAPHS = 2 * len(SIZES)
# Of the buffer: what the tables of a forward come to, and how many sequences may fill the whole pool with one another.
_TABLES = 1 << 16
_SHARERS = 16

RunBatch: TypeAlias = Callable[[ForwardBatch, Sequence[Segment]], ForwardOutput]
Replay: TypeAlias = Callable[[], object]
Key: TypeAlias = tuple[int, tuple[Tile, ...]]


class Capture(Protocol):
    """A way to capture work on a device."""

    def __call__(self, work: Callable[[], ForwardOutput]) -> tuple[Replay, ForwardOutput]:
        """What does all launches of `work` again, and the tensors that then hold its answer. `work` runs before, as
        often as it takes to warm up; its answer counts from the first replay on."""


class CudaCapture:
    """CUDA's graphs, or HIP's, in one pool of memory: they never run at once. One stream for all: the libraries keep
    working memory for each."""

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.cuda.graph_pool_handle()
        self._aside = torch.cuda.Stream(device)

    def __call__(self, work: Callable[[], ForwardOutput]) -> tuple[Replay, ForwardOutput]:
        """See `Capture`. Raises what `work` raises, and RuntimeError where it waits for the device."""
        self._aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._aside):
            work()
        torch.cuda.current_stream().wait_stream(self._aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads may bring pages and adapters meanwhile.
        with torch.cuda.graph(graph, self._memory, self._aside, capture_error_mode="thread_local"):
            answer = work()
        return graph.replay, answer


def capture_on(device: torch.device) -> Capture | None:
    """How work on a device is captured, if it can be."""
    return CudaCapture(device) if device.type == "cuda" else None


class _Graph(NamedTuple):
    replay: Replay
    answer: ForwardOutput


class GraphForward:
    """Forwards over the Triton backend, captured where that can be. See `forward.base.Forward`.

    run: runs the model over a batch that the backend prepared for these segments.

    Bounds of a step, whatever the number of sequences and rows.
    To the device: one copy, of all that a forward is told; one for each sequence whose accepted rows have to move; one
    if rows are sampled; two for each layer under an adapter.
    Back: one, `top.on_host`, the only time that the host waits for drafters and for requests that are greedy or warped
    alone (`Sampler.warp`); one with other processors waits once a token that it draws.
    Launches: of a step that was captured, its replay, and one for the logits and each watched layer, whose answers are
    taken out of the graph. Of any other the model's own and, in it, `kv_write` and attention once a layer, the merging
    of spans once a layer where contexts are cut, two for each layer under an adapter. Of both, two for the likeliest
    tokens and one for all sampled rows. The first forward that meets a kind of layer copies once more for it.
    Graphs: a size of `SIZES` and a tile is captured when it is met the second time, and `_MOST_GRAPHS` are kept, those
    used last. They share their working memory; each holds logits for its size.

    A step without a graph: larger than the largest size, under an adapter, or so many sequences on shared pages that
    their lists do not fit the buffer.
    """

    def __init__(self, backend: TritonBackend, pool: KVPool, run: RunBatch) -> None:
        self.pool = pool
        self._backend = backend
        self._run = run
        self._capture = capture_on(pool.device)
        self.why_not = None if self._capture else f"the device is {pool.device.type!r}, which has none"
        """Why no more forwards are captured."""

        self._buffer: Tensor | None = None
        self._met: set[Key] = set()
        self._graphs: OrderedDict[Key, _Graph] = OrderedDict()

    def __call__(self, segments: Sequence[Segment]) -> ForwardOutput:
        """See `forward.base.Forward`."""
        adapted = any(segment.adapter for segment in segments)
        if not adapted and (output := self._replayed(segments)):
            return output
        return self._run(self._backend.begin(segments, self.pool), segments)

    def _replayed(self, segments: Sequence[Segment]) -> ForwardOutput | None:
        """By a graph, if there is one for the step or it is time for one."""
        rows = sum(len(segment.tokens) for segment in segments)
        if rows > SIZES[-1]:
            return None
        size = next(size for size in SIZES if size >= rows)
        key = size, self._backend.tiles(segments)
        graph, capture = self._graphs.get(key), self._capture
        if graph is None and (capture is None or key not in self._met):
            self._met.add(key)
            return None
        batch = TritonBatch(self._backend, segments, self.pool, size=size)
        if self._buffer is None:
            length = _TABLES + _SHARERS * self.pool.pages
            self._buffer = torch.empty(length, dtype=torch.int32, device=self.pool.device)
        if batch.length > len(self._buffer):
            return None
        batch.send(self._buffer)
        if graph is None and capture is not None:
            graph = self._captured(capture, key, partial(self._run, batch, segments))
        if graph is None:
            return None
        self._graphs.move_to_end(key)
        graph.replay()
        # The next replay writes over the graph's own.
        logits, hidden = graph.answer.logits, graph.answer.hidden
        return ForwardOutput(logits[: batch.wanted_rows].clone(), tuple(states[:rows].clone() for states in hidden))

    def _captured(self, capture: Capture, key: Key, work: Callable[[], ForwardOutput]) -> _Graph | None:
        """A new graph; `None` if `work` cannot be captured, and then nothing is any more."""
        while len(self._graphs) >= _MOST_GRAPHS:
            self._graphs.popitem(last=False)
        try:
            graph = self._graphs[key] = _Graph(*capture(work))
        except Exception as error:  # a model's own code that waits for the device, no memory
            log.warning("no more forwards are captured as graphs", rows=key[0], reason=str(error))
            self._capture, self.why_not = None, str(error)
            return None
        return graph
