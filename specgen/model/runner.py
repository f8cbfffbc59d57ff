"""The model runner: a packed model over a KV pool, no padding, logits only where they are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

import torch
from transformers import PreTrainedModel

from specgen._base.log import Log
from specgen._base.memory import available_bytes
from specgen.errors import UnsupportedModel
from specgen.kv.formats import NATIVE, KVFormat
from specgen.kv.pool import PAGE_SIZE, KVPool
from specgen.lora.peft_files import AdapterFiles, read_adapter
from specgen.model.checks.architecture import Architecture, context_limit
from specgen.model.forward.base import Forward
from specgen.model.forward.compiled import CompiledForward, CompiledModel, compile_model, in_background
from specgen.model.forward.eager import EagerForward
from specgen.model.hidden_states import HiddenStateTap
from specgen.model.invariant_layers import mixes_experts
from specgen.model.kv_calibration import centre_keys
from specgen.model.kv_size import context_of, kv_size
from specgen.model.lora_layers import AdaptedLayers
from specgen.model.output import ForwardOutput
from specgen.model.packed import PackedModel, pack_model
from specgen.model.segment import Segment

if TYPE_CHECKING:
    from specgen.model.attention.triton_backend import TritonBackend
    from specgen.model.forward.graphs import GraphForward

log = Log("specgen.model")

Compile: TypeAlias = bool | Literal["background"]


class ModelRunner:
    """Scores rows of many sequences in one forward. One thread owns it.

    max_context: most tokens of one sequence; `None` is as many as the model's positions and the pool allow. LongRoPE
        models stay below their original length: behind it one text would change how another is read.
    layers: whose hidden states each forward answers too; see `HiddenStateTap`.
    compile: the forward, on a CPU: `True` before this returns, "background" while forwards run eagerly. Where it cannot
        be done they go on so, and the log says why.
    graphs: capture forwards through the Triton backend as graphs, where that can be; see `no_graphs`.
    """

    def __init__(
        self,
        packed: PackedModel,
        pool: KVPool,
        *,
        max_context: int | None = None,
        layers: Sequence[int] = (),
        compile: Compile = False,
        graphs: bool = True,
    ) -> None:
        self.packed = packed
        self.pool = pool
        self.context_length = context_of(pool.capacity, limit=context_limit(packed.model), max_context=max_context)
        self.layers = tuple(layers)
        self.forwards = 0
        self.rows = 0
        self._eager = packed.eager(pool, HiddenStateTap(packed.model, layers))
        self._no_graphs = _no_graphs(packed, asked=graphs)
        self._graphs = None if self._no_graphs else _graph_forward(packed, self._eager)
        self._forward: Forward = self._graphs or self._eager
        self._compiling = self._begin_compiling() if compile else None
        if compile is True:
            self._take_compiled(wait=True)

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment]) -> ForwardOutput:
        """Score all rows in one forward and write their KV behind each segment's prefix; see `Forward`.

        Logits are float32 or the 16-bit floats of the model: an argmax needs no copy, who reads a row in full makes it
        float32.
        """
        self._take_compiled()
        self.forwards += 1
        self.rows += sum(len(segment.tokens) for segment in segments)
        return self._forward(segments)

    @property
    def current(self) -> Forward:
        """What runs a forward now; what is run through it directly is not counted."""
        return self._forward

    @property
    def model(self) -> PreTrainedModel:
        """The twin of the caller's model that runs."""
        return self.packed.model

    @property
    def architecture(self) -> Architecture:
        """What the model's layers keep between tokens."""
        return self.packed.architecture

    @property
    def vocab_size(self) -> int:
        """Length of a row of logits."""
        return self.packed.vocab_size

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.packed.device

    @property
    def batch_invariant(self) -> bool:
        """Whether loading has proven that a row's bits do not depend on the rows beside it."""
        return self.packed.batch_invariant

    @property
    def compiled(self) -> bool:
        """Whether forwards are compiled now."""
        return isinstance(self._forward, CompiledForward)

    @property
    def no_graphs(self) -> str | None:
        """Why forwards are not captured as graphs; `None` if they are, but those of `GraphForward` that are not."""
        return self._graphs.why_not if self._graphs else self._no_graphs

    @property
    def arithmetic(self) -> str:
        """Names the ways in which rows are computed that may differ in a bit."""
        chosen = {
            self.packed.backend.name: True,
            "packed-linears": self.packed.wrapped.packs_linears,
            "batch-invariant": self.batch_invariant,
            "compiled": self.compiled,
        }
        return " ".join(name for name, on in chosen.items() if on)

    @property
    def settings(self) -> list[list[str]]:
        """All that the model's answers depend on besides its config and tensors; alike in every process."""
        return self.packed.wrapped.settings

    def change(self) -> str | None:
        """What of the caller's model is not as it was when this was made; see `WrappedModel.change`. On any thread."""
        return self.packed.wrapped.change()

    def close(self) -> None:
        """Take back what transformers was told of; there are no more forwards. Doing so twice is harmless."""
        self.packed.wrapped.close()

    @property
    def adapted(self) -> AdaptedLayers:
        """The layers that adapters can adapt; a small forward finds them, once. On the thread that runs forwards.

        Raises UnsupportedModel where a row under an adapter would not be exact.
        """
        if self.compiled or self._compiling:
            raise UnsupportedModel("a compiled forward takes no adapters; build the engine with compile=False")
        if self.batch_invariant and self._eager.lora_kernels == "torch":
            reason = "without kernels an adapter's sums depend on the rows beside them"
            raise UnsupportedModel(
                f"batch_invariant=True cannot be kept under adapters: {reason}; take batch_invariant=False"
            )
        return self._eager.adapted

    @property
    def has_adapted(self) -> bool:
        """Whether `adapted` is known, so that rows may come under adapters."""
        return "adapted" in vars(self._eager)

    def read_adapter(self, folder: Path, *, max_rank: int, max_bytes: int) -> AdapterFiles:
        """Read an adapter for this model, on any thread, once `adapted` is known. See `peft_files.read_adapter`."""
        fits, given = self.adapted.sees_wanted, self.packed.wrapped.given
        return read_adapter(
            folder, given, fits=fits, dtype=self.architecture.dtype, max_rank=max_rank, max_bytes=max_bytes
        )

    def _begin_compiling(self) -> Future[CompiledModel] | None:
        packed = self.packed
        if packed.no_compiled:
            log.warning("forwards are not compiled", model=self.model.config.model_type, reason=packed.no_compiled)
            return None
        work = partial(
            compile_model,
            packed.wrapped.given,
            packed.architecture,
            layers=self.layers,
            batch_invariant=packed.batch_invariant,
        )
        return in_background(work)

    def _take_compiled(self, *, wait: bool = False) -> None:
        """Go over to the compiled forward if it has become ready; with `wait` be there for it."""
        if self._compiling is None or not (wait or self._compiling.done()):
            return
        compiling, self._compiling = self._compiling, None
        try:
            self._forward = CompiledForward(compiling.result(), self.pool)
        except Exception as error:  # a model's code, a compiler, a full disk: the forward that there is goes on
            log.warning("forwards are not compiled", model=self.model.config.model_type, reason=str(error))


def load_runner(
    model: PreTrainedModel,
    *,
    kv_tokens: int | None = None,
    max_context: int | None = None,
    kv_format: KVFormat = NATIVE,
    calibration: Sequence[int] = (),
    batch_invariant: bool | None = None,
    cpu_kernels: bool = True,
    gpu_kernels: bool | None = None,
    layers: Sequence[int] = (),
    compile: Compile = False,
    graphs: bool = True,
) -> ModelRunner:
    """A runner of `model` over a pool of its own. The options are those of `pack_model`, `open_pool`, `ModelRunner`."""
    packed = pack_model(
        model,
        kv_format=kv_format,
        batch_invariant=batch_invariant,
        cpu_kernels=cpu_kernels,
        gpu_kernels=gpu_kernels,
    )
    pool = open_pool(packed, kv_tokens=kv_tokens, max_context=max_context, calibration=calibration)
    return ModelRunner(packed, pool, max_context=max_context, layers=layers, compile=compile, graphs=graphs)


def open_pool(
    packed: PackedModel,
    *,
    kv_tokens: int | None = None,
    max_context: int | None = None,
    calibration: Sequence[int] = (),
) -> KVPool:
    """A KV pool for a model.

    kv_tokens: tokens it holds; `None` takes a quarter of the available memory, at most 16 full contexts.
    max_context: most tokens of one sequence; a pool that is too small for what is asked for, or for the model's
        positions, is said in a warning.
    calibration: ids of a text, for formats that centre keys.
    Raises InvalidRequest for sizes below 1 and those that memory has no room for.
    """
    sizes = kv_size(
        limit=context_limit(packed.model),
        max_context=max_context,
        kv_tokens=kv_tokens,
        token_bytes=packed.kv_format.bytes_per_token(packed.architecture.shapes, packed.architecture.dtype),
        available=available_bytes(packed.device),
    )
    pool = packed.architecture.new_pool(sizes.tokens // PAGE_SIZE, packed.kv_format)
    return reuse_pool(packed, pool, calibration)


def reuse_pool(packed: PackedModel, pool: KVPool, calibration: Sequence[int] = ()) -> KVPool:
    """A pool, of which nothing is in use, for a model of the same shapes. Raises UnsupportedModel for other shapes."""
    architecture = packed.architecture
    ours, theirs = (architecture.shapes, architecture.dtype, packed.device), (pool.shapes, pool.dtype, pool.device)
    if ours != theirs:
        reason = f"its KV is {ours}, and was {theirs}"
        raise UnsupportedModel(f"the model changed in more than it says: {reason}; make a new engine")
    if packed.kv_format.centred:
        centre_keys(pool, packed.model, calibration, architecture)
    return pool


def _no_graphs(packed: PackedModel, *, asked: bool) -> str | None:
    """Why no forward is captured as a graph."""
    if not asked:
        return "gpu_graphs is False"
    if packed.backend.kernels != "triton":
        return f"attention is computed by {packed.backend.name!r}, it must be 'triton'"
    blocks = (name for name, module in packed.model.named_modules() if mixes_experts(module))
    if block := next(blocks, None):
        return f"{block} asks the device which experts have rows"
    return None


def _graph_forward(packed: PackedModel, eager: EagerForward) -> GraphForward:
    # Imports Triton, which is slow, and there where it is used alone.
    from specgen.model.forward.graphs import GraphForward

    return GraphForward(cast("TritonBackend", packed.backend), eager.pool, eager.run)
