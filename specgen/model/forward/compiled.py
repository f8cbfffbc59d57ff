"""A packed forward, compiled: one graph for any number of rows, without Python between its layers.

`torch.compile` takes the model's own code over the CPU backend. Linear layers and attention are the CPU kernels'
operators, what lies between them is fused by Inductor; one graph with a symbolic number of rows serves all steps, so
that nothing is compiled again and a row meets the same loops whatever stands beside it. Guards are skipped: all that
may change between two calls is an input of the graph.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specgen._base.log import Log
from specgen._base.paths import cache_folder
from specgen.errors import UnsupportedModel
from specgen.kv.pool import KVPool
from specgen.model.attention.cpu_backend import CpuBatch
from specgen.model.attention.cpu_plan import plan
from specgen.model.attention.inputs import flat_rows, wanted_rows
from specgen.model.attention.interface import AttentionRoute, packed_logits
from specgen.model.cache_keyword import cache_keyword
from specgen.model.checks.architecture import Architecture
from specgen.model.checks.equivalence import difference
from specgen.model.checks.invariance import CHECK_PAGES, check_invariance
from specgen.model.forward.inductor_pass import OwnProducts
from specgen.model.hidden_states import HiddenStateTap
from specgen.model.output import ForwardOutput
from specgen.model.packed_linear import pack_linears
from specgen.model.segment import Segment
from specgen.model.twin import twin

log = Log("specgen.model")

_EXAMPLE_ROWS = 16
# A size of 0 or 1 would be compiled for itself.
_LEAST = 2
_FOLDER = "TORCHINDUCTOR_CACHE_DIR"
# Chances of logits that are rounded to bfloat16 differ by an eighth.
_CLOSE = 0.25

Rows: TypeAlias = Callable[..., tuple[Tensor, ...]]
"""A function of tensors whose rows belong to any number of sequences."""

Example: TypeAlias = tuple[Tensor, int | tuple[int, ...]]
"""An argument of such a function, and the dimensions whose size may be any."""


class CompiledModel:
    """A compiled forward of `model`, which nobody else may run, over pools like `pool`. Not thread-safe.

    layers: those whose hidden states are wanted too; see `HiddenStateTap`.
    """

    def __init__(
        self, model: PreTrainedModel, architecture: Architecture, pool: KVPool, layers: Sequence[int] = ()
    ) -> None:
        self.model = model
        self._tap = HiddenStateTap(model, layers)
        self._stores = architecture.stores
        self._cache_keyword = cache_keyword(model)
        self._route = AttentionRoute(model, architecture.reaches, architecture.stores)
        self._route.install()
        self._graph = _compiled(self._run)
        self._warm_up(pool)

    def forward(self, segments: Sequence[Segment], pool: KVPool) -> ForwardOutput:
        """Score all rows and write their KV to `pool`; see `forward.base.Forward`."""
        tokens, positions = flat_rows(segments)
        wanted = wanted_rows(segments)
        ids, position_ids = torch.tensor([_padded(tokens), _padded(positions)])[:, None]
        logits, *hidden = self._graph(ids, position_ids, plan(segments), torch.tensor(_padded(wanted)), pool)
        return ForwardOutput(logits[: len(wanted)], tuple(states[: len(tokens)] for states in hidden))

    def _run(self, ids: Tensor, position_ids: Tensor, plan: Tensor, wanted: Tensor, pool: KVPool) -> tuple[Tensor, ...]:
        batch = CpuBatch(pool, plan, ids, position_ids, wanted)
        self._route.batch = batch
        logits = packed_logits(self.model, batch, self._stores, self._cache_keyword)
        return logits, *self._tap.take()

    def _warm_up(self, pool: KVPool) -> None:
        """Compile, on rows that belong to no sequence."""
        rows = torch.zeros(1, _EXAMPLE_ROWS, dtype=torch.int64)
        inputs = rows, rows.clone(), torch.zeros(_EXAMPLE_ROWS, dtype=torch.int32), torch.arange(_EXAMPLE_ROWS)
        _first_call(self._graph, [(tensor, (tensor.ndim - 1,)) for tensor in inputs], pool)


@dataclass(frozen=True, slots=True)
class CompiledForward:
    """A compiled model over one KV pool. See `forward.base.Forward`."""

    model: CompiledModel
    pool: KVPool

    def __call__(self, segments: Sequence[Segment]) -> ForwardOutput:
        """See `forward.base.Forward`."""
        return self.model.forward(segments, self.pool)


def compile_rows(function: Rows, examples: Sequence[Example]) -> Rows:
    """Compile a function of packed rows, for any number of them.

    examples: an argument each, of several rows, and the dimensions in which they lie. Arguments must be contiguous, as
    these are. The compiled function is tried on them, on two rows and on one; where it cannot be compiled or does not
    say what `function` says, that is what is returned, and the log says why.
    """
    graph = _compiled(function)
    # One tensor in two places would be compiled as one argument.
    owned = [(tensor.clone(), (dims,) if isinstance(dims, int) else dims) for tensor, dims in examples]
    try:
        _first_call(graph, owned)
        with torch.inference_mode():
            for rows in (_EXAMPLE_ROWS, _LEAST, 1):
                some = [_first(rows, *example) for example in owned]
                _check_same(graph(*some), function(*some), rows)
    except Exception as error:  # a compiler, a plugin's code, a full disk
        log.warning("not compiled", function=function.__qualname__, reason=str(error)[:500])
        return function
    return graph


def _first(rows: int, tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """So many rows of an example, where it has them."""
    for dim in dims:
        tensor = tensor.narrow(dim, 0, min(rows, tensor.shape[dim]))
    return tensor.contiguous()


def _check_same(found: Sequence[Tensor], wanted: Sequence[Tensor], rows: int) -> None:
    """Whole numbers may differ: the places of two that are nearly equal."""
    for one, other in zip(found, wanted, strict=True):
        if other.is_floating_point():
            share = (one.float() - other.float()).norm() / other.float().norm()
            if not share < _CLOSE:
                raise UnsupportedModel(f"compiled, {rows} rows differ by {100 * share:.3g}%")


def _compiled(function: Rows) -> Rows:
    return torch.compile(
        function,
        fullgraph=True,
        options={
            "cpp_wrapper": True,
            "size_asserts": False,
            # What several read is computed once: rotary angles would be computed in every layer and head.
            "realize_opcount_threshold": 2,
            "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
            "post_grad_custom_pre_pass": OwnProducts(),
        },
    )


def _first_call(graph: Rows, examples: Sequence[tuple[Tensor, tuple[int, ...]]], *others: object) -> None:
    """Compile for these arguments, whose size in the dimensions given may be any in later calls, and `others`."""
    for tensor, dims in examples:
        for dim in dims:
            torch._dynamo.mark_dynamic(tensor, dim)
    with _kept(), _uncollected(), torch.inference_mode():
        graph(*(tensor for tensor, _ in examples), *others)


@contextmanager
def _kept() -> Iterator[None]:
    """Let Inductor keep what it compiles in our cache folder, which outlives a restart, unless the user names one."""
    before = os.environ.get(_FOLDER)
    # Inductor itself writes its default there, a folder for temporary files.
    if before is None or Path(before).name.startswith("torchinductor_"):
        os.environ[_FOLDER] = str(cache_folder() / "compiled")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_FOLDER, None)
        else:
            os.environ[_FOLDER] = before


@contextmanager
def _uncollected() -> Iterator[None]:
    """Tracing makes millions of objects that stay until its end: looking through them for garbage is in vain."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _padded(numbers: list[int]) -> list[int]:
    return numbers + [0] * (_LEAST - len(numbers))


def compile_model(
    given: PreTrainedModel, architecture: Architecture, *, layers: Sequence[int], batch_invariant: bool
) -> CompiledModel:
    """Compile a twin of `given` and prove that it says what `given` says, run by transformers.

    Raises UnsupportedModel with the reason when the model cannot be compiled, when it answers otherwise, or when
    invariance is asked for and not kept.
    """
    started = time.perf_counter()
    alone, packed = twin(given).eval(), twin(given).eval()
    pack_linears(packed)
    pool = architecture.new_pool(CHECK_PAGES)
    try:
        compiled = CompiledModel(packed, architecture, pool, layers)
    except Exception as error:  # a compiler, a model's code, a full disk
        message = " ".join(str(error).split()[:60])  # the compiler's own errors name the cause in their second line
        raise UnsupportedModel(f"the forward cannot be compiled ({type(error).__name__}: {message})") from error
    forward = CompiledForward(compiled, pool)
    if reason := difference(forward, alone, architecture):
        raise UnsupportedModel(f"compiled, {reason}")
    if batch_invariant:
        check_invariance(forward, packed, architecture.vocab_size, "take compile=False")
    log.info("forward compiled", seconds=round(time.perf_counter() - started, 1))
    return compiled


def in_background(work: Callable[[], CompiledModel]) -> Future[CompiledModel]:
    """Run `work` on a daemon thread: a program may end before it is done, and waits for no more than what it is at."""
    future: Future[CompiledModel] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, name="specgen-compile", daemon=True)
    thread.start()
    atexit.register(_abandon, thread)
    return future


def _abandon(thread: threading.Thread) -> None:
    """An interpreter that ends while the thread is inside of the compiler's C++ would abort: see it out."""
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
        thread.join()
