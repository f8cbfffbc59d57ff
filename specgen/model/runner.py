"""A Hugging Face causal LM behind one packed forward: no padding, KV in a pool, logits only where they are wanted."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specgen._base.log import Log
from specgen._base.memory import available_bytes
from specgen.errors import InvalidRequest, UnsupportedModel
from specgen.kernels import backends
from specgen.kernels import triton_backend as gpu
from specgen.kernels.backends import Backend
from specgen.kernels.cpu_backend import why_not
from specgen.kv.formats import NATIVE, KVFormat
from specgen.kv.pool import PAGE_SIZE, KVPool
from specgen.lora.peft_files import AdapterFiles, read_adapter
from specgen.model.attention.cpu_plan import wanted_rows
from specgen.model.attention.interface import PackedAttention, PackedCache, Seam
from specgen.model.batch import Batch, dense_mask
from specgen.model.cache_keyword import cache_keyword
from specgen.model.checks.architecture import context_limit, inspect_layers
from specgen.model.checks.equivalence import choose_seam
from specgen.model.checks.invariance import CHECK_PAGES, check_invariance
from specgen.model.checks.quantisation import check_quantised, quantised_layers
from specgen.model.forward.compiled import CompiledForward, compile_forward, in_background
from specgen.model.hidden_states import HiddenStateTap
from specgen.model.invariant_layers import InvariantLayers, mixes_experts
from specgen.model.kv_calibration import centre_keys
from specgen.model.kv_size import context_of, kv_size
from specgen.model.lora_layers import AdaptedLayers
from specgen.model.model_state import ModelState
from specgen.model.output import ForwardOutput
from specgen.model.packed_linear import pack_linears
from specgen.model.profiling import rows_seen
from specgen.model.segment import Segment
from specgen.model.twin import runs_alone, twin, unwrapped

if TYPE_CHECKING:
    from specgen.model.attention.triton import GpuForward
    from specgen.model.forward.graphs import GraphForward

log = Log("specgen.model")

Kernel: TypeAlias = Literal["cpu", "gpu"]
Compile: TypeAlias = bool | Literal["background"]

_SEAM_CHECK_PAGES = 2


class ModelRunner:
    """A model that scores rows of many sequences in one forward.

    Loading proves that the packed forward says what the model says alone, on a small tree; a model for which it does
    not is refused. The caller's model is never touched: `model` is a twin of it that shares its weights.

    kv_tokens: tokens the KV pool holds; `None` takes a quarter of the available memory, at most 16 full contexts.
    max_context: most tokens of one sequence; `None` takes what the model's positions and the pool allow, and warns
        where the pool is the shorter. LongRoPE models stay below their original length: behind it one text would change
        how another is read.
    kv_format: how the pool keeps keys and values. calibration: ids of a text, for formats that centre keys.
    invariant: compute each row so that its bits do not depend on the rows beside it, which loading proves. `None` does
        so where it is cheap, with the CPU kernels, and for formats that round, where the last bit of a sum may be a
        step of the code, below float64.
    cpu_kernels: use them where they can be built; `False` is plain torch.
    gpu_kernels: `None` uses them on a GPU where triton is installed; `True` demands them, also of Triton's interpreter.
    gpu_graphs: capture forwards through them as graphs, where that can be; see `why_no_graphs`.
    pool: that of an earlier target of the same model and settings, to go on with; nothing may be in use of it.
    Raises UnsupportedModel, naming the layer and what to do instead, and InvalidRequest for sizes below 1 and
    those that memory has no room for.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        kv_tokens: int | None = None,
        max_context: int | None = None,
        kv_format: KVFormat = NATIVE,
        calibration: Sequence[int] = (),
        batch_invariant: bool | None = None,
        cpu_kernels: bool = True,
        gpu_kernels: bool | None = None,
        gpu_graphs: bool = True,
        pool: KVPool | None = None,
    ) -> None:
        for name, size in (("kv_tokens", kv_tokens), ("max_context", max_context)):
            if size is not None and size < 1:
                raise InvalidRequest(f"{name} is {size}; it must be at least 1", param=name)
        self._given = given = unwrapped(model)
        self._state = ModelState.of(given)
        self.model = model = twin(given).eval()
        self.device = model.device
        before = ModelState.of(model)
        with runs_alone(given):
            self.architecture = inspect_layers(model)
        # Caches of the model's own, what a hook collects: its forward writes there, so that no caller has changed it.
        self._written = before.changes(ModelState.of(model))
        check_quantised(model, self.architecture.dtype)
        self.vocab_size = self.architecture.vocab_size
        self.forwards = 0
        self.rows = 0
        self._packs = cpu_kernels
        self._gpu = self._gpu_executor(gpu_kernels)
        self._gpu_graphs = gpu_graphs
        self._kernel: Kernel | None = "gpu" if self._gpu else self._take_cpu_kernels()
        self._cache_keyword = cache_keyword(model)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        # The check compares with the model itself, so it keeps KV as it is; the real pool comes after.
        self.batch_invariant = False
        self._layers: InvariantLayers | None = None
        self._watched = HiddenStateTap(model, ())
        self._compiled: CompiledForward | None = None
        self._compiling: Future[CompiledForward] | None = None
        self._attention = PackedAttention(model, self.architecture.reaches, self.architecture.stores)
        self.seam = Seam.DIRECT
        self.pool = self._make_pool(_SEAM_CHECK_PAGES, NATIVE)
        self.seam = self._choose_seam()
        if gpu_kernels and (reason := self.why_no_gpu(kv_format)):
            raise UnsupportedModel(f"gpu_kernels=True cannot be kept: {reason}; take gpu_kernels=None")
        self._make_invariant(kv_format, batch_invariant)
        if pool is None:
            sizes = kv_size(
                limit=context_limit(model),
                max_context=max_context,
                kv_tokens=kv_tokens,
                token_bytes=kv_format.bytes_per_token(self.architecture.shapes, self.architecture.dtype),
                available=_free_memory(self.device),
            )
            pool = self._make_pool(sizes.tokens // PAGE_SIZE, kv_format)
        elif reason := self._misfit(pool):
            raise UnsupportedModel(f"the model changed in more than it says: {reason}; make a new engine")
        self.pool = pool
        self.context_length = context_of(pool.capacity, limit=context_limit(model), max_context=max_context)
        if kv_format.centred:
            centre_keys(self.pool, model, calibration, self.architecture)
        if self._gpu and self.why_no_graphs() is None:
            self._gpu.capture_over(self.pool)
        self.forwards = self.rows = 0

    def change(self) -> str | None:
        """What of the caller's model is not as it was when this was made, a weight or anything else its answers depend
        on; None if all is."""
        return self._state.change(ModelState.of(self._given), but=self._written)

    @property
    def settings(self) -> list[list[str]]:
        """All that the model's answers depend on besides its config and tensors; alike in every process."""
        return self._state.portable(but=self._written)

    def watch(self, layers: Sequence[int]) -> None:
        """From now on `score` answers the hidden states of these layers too; see `HiddenStateTap`. Once, and before
        `compile`."""
        self._watched = HiddenStateTap(self.model, layers)

    def close(self) -> None:
        """Take back what transformers was told of; there are no more forwards. Doing so twice is harmless."""
        self._attention.close()

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """The logits of `score`."""
        return self.score(segments).logits

    @torch.inference_mode()
    def score(self, segments: Sequence[Segment]) -> ForwardOutput:
        """Score all rows in one forward and write their KV behind each segment's prefix.

        The tables must own the slots (`BlockTable.reserve`). Logits are float32 or the 16-bit floats of the model: an
        argmax needs no copy, who reads a row in full makes it float32.
        """
        tokens = [token for segment in segments for token in segment.tokens]
        positions = [p for segment in segments for p in segment.new_positions]
        self.forwards += 1
        self.rows += len(tokens)
        if self._compiled is not None:
            return self._compiled(segments, tokens, positions)
        return self._forward(segments, tokens, positions)

    def _forward(self, segments: Sequence[Segment], tokens: Sequence[int], positions: Sequence[int]) -> ForwardOutput:
        """The model's own code, layer by layer."""
        if self._gpu and self.why_no_gpu(self.pool.kind) is None:

            def run(forward: GpuForward) -> ForwardOutput:
                batch = Batch(segments, self.pool, gpu=forward)
                return self._run(batch, forward.ids, forward.positions, forward.wanted)

            return self._gpu(segments, self.pool, run)
        direct = self.seam is Seam.DIRECT
        kernel = self._kernel == "cpu" and direct and self.pool.kind.lossless
        wanted = torch.tensor(wanted_rows(segments), dtype=torch.int64)
        ids, position_ids = torch.tensor([[tokens], [positions]], device=self.device)
        return self._run(Batch(segments, self.pool, gathered=not direct, kernel=kernel), ids, position_ids, wanted)

    def _run(self, batch: Batch, ids: Tensor, position_ids: Tensor, wanted: Tensor) -> ForwardOutput:
        """ids, position_ids: [1, rows]. wanted: int64, the rows whose logits are."""
        adapted = any(segment.adapter for segment in batch.segments)
        dense = self.seam is Seam.DENSE
        with (
            nullcontext() if dense else self._attention.over(batch),
            self._layers.active() if self._layers else nullcontext(),
            self.adapted.over(batch.segments) if adapted else nullcontext(),
        ):
            logits: Tensor = self.model(
                input_ids=ids,
                position_ids=position_ids,
                attention_mask=dense_mask(batch, self.architecture.dtype) if dense else None,
                use_cache=True,
                **{self._cache_keyword: PackedCache(batch, self.architecture.stores)},
                **({"logits_to_keep": wanted} if self._keeps_logits else {}),
            ).logits[0]
        logits = logits if self._keeps_logits else logits[wanted]
        return ForwardOutput(logits.float() if logits.dtype == torch.float64 else logits, self._watched.take())

    @cached_property
    def adapted(self) -> AdaptedLayers:
        """The layers that adapters can adapt; a small forward finds them. On the thread that runs forwards.

        Raises UnsupportedModel where a row under an adapter would not be exact.
        """
        backend: Backend = "torch"
        if self._gpu:
            backend = "triton"
        elif self._packs and backends.available("cpu", self.device, self.architecture.dtype):
            backend = "cpu"
        if self._compiled or self._compiling:
            raise UnsupportedModel("a compiled forward takes no adapters; build the engine with compile=False")
        if self.batch_invariant and backend == "torch":
            reason = "without kernels an adapter's sums depend on the rows beside them"
            raise UnsupportedModel(
                f"batch_invariant=True cannot be kept under adapters: {reason}; take batch_invariant=False"
            )
        return AdaptedLayers(self.model, rows_seen(self), backend=backend)

    def read_adapter(self, folder: Path, *, max_rank: int, max_bytes: int) -> AdapterFiles:
        """Read an adapter for this model, on any thread, once `adapted` is known. See `peft_files.read_adapter`."""
        fits, dtype = self.adapted.sees_wanted, self.architecture.dtype
        return read_adapter(folder, self._given, fits=fits, dtype=dtype, max_rank=max_rank, max_bytes=max_bytes)

    @property
    def kernel(self) -> Kernel | None:
        """Whose attention kernel says what the model says; whether it is used hangs on the KV format too."""
        return self._kernel

    @property
    def compiled(self) -> bool:
        """Whether forwards are compiled now."""
        return self._compiled is not None

    @property
    def arithmetic(self) -> str:
        """Names the ways in which rows are computed that may differ in a bit."""
        cpu, gpu = self._kernel == "cpu", self._kernel == "gpu"
        chosen = {
            "batch_invariant": self.batch_invariant,
            "kernels": cpu,
            "gpu-kernels": gpu,
            "compiled": self.compiled,
        }
        return " ".join(name for name, on in chosen.items() if on)

    def take_compiled(self, *, wait: bool = False) -> bool:
        """Go over to the compiled forward if it has become ready since the last call; with `wait` be there for it."""
        if self._compiling is None or not (wait or self._compiling.done()):
            return False
        compiling, self._compiling = self._compiling, None
        try:
            self._compiled = compiling.result()
        except Exception as error:  # a model's code, a compiler, a full disk: the forward that there is goes on
            log.warning("forwards are not compiled", model=self.model.config.model_type, reason=str(error))
            return False
        self._compiled.pool = self.pool
        return True

    def compile(self, how: Compile) -> None:
        """Compile the forward: `True` before this returns, "background" while forwards run as they are; `False` does
        nothing. Where it cannot be done they go on as they are, and the log says why."""
        if not how:
            return
        given, batch_invariant, architecture, layers = (
            self._given,
            self.batch_invariant,
            self.architecture,
            self._watched.layers,
        )
        if reason := self.why_not_compiled():
            log.warning("forwards are not compiled", model=given.config.model_type, reason=reason)
            return
        alone = twin(given).eval()

        def work() -> CompiledForward:
            packed = twin(given).eval()
            pack_linears(packed)
            return compile_forward(packed, alone, architecture, layers=layers, batch_invariant=batch_invariant)

        self._compiling = in_background(work)
        if how is True:
            self.take_compiled(wait=True)

    def why_not_compiled(self) -> str | None:
        """Why forwards cannot be compiled; `None` if they can."""
        kv_format = self.pool.kind
        if reason := why_not():
            return reason
        if self.seam is not Seam.DIRECT:
            return f"the seam is {self.seam.value!r}; it must be 'direct'"
        if not kv_format.lossless:
            return f"kv_format is {kv_format.name!r}; it must be 'native'"
        if not self._packs:
            return "cpu_kernels is False"
        if self._kernel != "cpu":
            return "the attention kernel does not say what the model says, or cannot take its data type"
        if self.batch_invariant and (layer := next(quantised_layers(self.model), None)):
            reason = "is quantised, and compiled it would round a row by its neighbours"
            return f"{layer[0]} {reason}: take batch_invariant=False"
        return None if self._keeps_logits else "the model cannot be asked for the logits of single rows"

    def _choose_seam(self) -> Seam:
        """With the attention kernel if the packed forward is the model's own with it."""
        if self._kernel:
            try:
                if (seam := choose_seam(self)) is Seam.DIRECT:
                    return seam
            except UnsupportedModel:
                pass  # then without it
        self._kernel = None
        return choose_seam(self)

    def _take_cpu_kernels(self) -> Kernel | None:
        """Let linear layers run by the CPU kernels where they can; and say whether attention can too."""
        if not (self._packs and backends.available("cpu", self.device, self.architecture.dtype)):
            return None
        pack_linears(self.model)
        stores = self.architecture.stores
        return "cpu" if len(set(stores)) == len(stores) else None

    def _gpu_executor(self, asked: bool | None) -> GraphForward | None:
        """The GPU kernels if they can run here. Raises UnsupportedModel where they are asked for and cannot."""
        if asked is False or not (asked or backends.available("triton", self.device, self.architecture.dtype)):
            return None
        if reason := gpu.why_not(self.device, self.architecture.dtype):
            raise UnsupportedModel(f"gpu_kernels=True cannot be kept: {reason}")
        from specgen.model.attention.triton import GpuKernels
        from specgen.model.forward.graphs import GraphForward

        return GraphForward(GpuKernels.on(self.device))

    def why_no_gpu(self, kv_format: KVFormat) -> str | None:
        """Why the GPU kernels are not used, where they could run; `None` if they are."""
        if self.seam is not Seam.DIRECT:
            return f"the seam is {self.seam.value!r}; it must be 'direct'"
        if self._kernel != "gpu":
            return "with the attention kernel the forward does not say what the model says"
        if kv_format.key.coding is None or kv_format.value.coding is None:
            return f"kv_format is {kv_format.name!r}, which the kernels do not know"
        return None

    def why_no_graphs(self) -> str | None:
        """Why forwards are not captured as graphs; `None` if they are, but those of `GraphForward` that are not."""
        if not self._gpu_graphs:
            return "gpu_graphs is False"
        if self._gpu is None:
            return "no GPU kernels carry the forward"
        if reason := self.why_no_gpu(self.pool.kind):
            return reason
        blocks = (name for name, module in self.model.named_modules() if mixes_experts(module))
        if block := next(blocks, None):
            return f"{block} asks the device which experts have rows"
        return self._gpu.why_not

    def _make_invariant(self, kv_format: KVFormat, asked: bool | None) -> None:
        """Compute rows that do not depend on their neighbours, if that is asked for, needed, or costs little."""
        rounds = not kv_format.lossless and self.architecture.dtype != torch.float64
        if asked is False or not (asked or rounds or self._kernel == "cpu"):
            return
        try:
            self._layers = InvariantLayers(self.model)
            self._attention.batch_invariant = True
            if self._gpu:
                self._gpu.kernels.by_path = True
            self._check_invariance(kv_format, asked=asked is True)
            self.batch_invariant = True
        except UnsupportedModel:
            if asked or rounds:
                raise
            self._layers, self._attention.batch_invariant = None, False
            if self._gpu:
                self._gpu.kernels.by_path = False

    def _check_invariance(self, kv_format: KVFormat, *, asked: bool) -> None:
        """With KV as it is, where a difference cannot hide behind rounding, and as it will be kept."""
        instead = "load it without" if asked else f"without it kv_format={kv_format.name!r} is not exact: take 'native'"
        instead += ", or batch_invariant=False, and drafting may change the last bits, and so at times the text"
        for kind in dict.fromkeys((NATIVE, kv_format)):
            self.pool = self._make_pool(CHECK_PAGES, kind)
            check_invariance(self, instead)

    def _make_pool(self, pages: int, kind: KVFormat) -> KVPool:
        return KVPool(self.architecture.shapes, pages, dtype=self.architecture.dtype, device=self.device, kind=kind)

    def _misfit(self, pool: KVPool) -> str | None:
        """Why the model's KV cannot be kept in `pool`."""
        ours = (self.architecture.shapes, self.architecture.dtype, self.device)
        theirs = (pool.shapes, pool.dtype, pool.device)
        return None if ours == theirs else f"its KV is {ours}, and was {theirs}"


def _free_memory(device: torch.device) -> int:
    return available_bytes(device)
