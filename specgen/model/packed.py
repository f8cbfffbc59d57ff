"""A model that loading has proven to run packed: exact, and batch-invariant where it is to be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from specgen.errors import UnsupportedModel
from specgen.kv.formats import NATIVE, KVFormat
from specgen.kv.pool import KVPool
from specgen.model.attention.base import AttentionBackend
from specgen.model.attention.choice import choose_backend
from specgen.model.checks.architecture import Architecture
from specgen.model.checks.invariance import CHECK_PAGES, check_invariance, refusal
from specgen.model.checks.kv_format import check_kv_format
from specgen.model.checks.quantisation import quantised_layers
from specgen.model.forward.eager import EagerForward
from specgen.model.hidden_states import HiddenStateTap
from specgen.model.invariant_layers import InvariantLayers
from specgen.model.wrapped import WrappedModel


@dataclass(frozen=True, slots=True)
class PackedModel:
    """What `pack_model` found; complete but for the KV pool.

    backend: what computes attention. passed_over: why the backends before it do not, by name.
    layers: what makes the model's layers batch-invariant, if they are.
    """

    wrapped: WrappedModel
    kv_format: KVFormat
    backend: AttentionBackend
    passed_over: dict[str, str]
    layers: InvariantLayers | None

    @property
    def model(self) -> PreTrainedModel:
        """The twin that runs; see `WrappedModel`."""
        return self.wrapped.model

    @property
    def architecture(self) -> Architecture:
        """What its layers keep between tokens."""
        return self.wrapped.architecture

    @property
    def vocab_size(self) -> int:
        """Length of a row of logits."""
        return self.architecture.vocab_size

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.wrapped.device

    @property
    def batch_invariant(self) -> bool:
        """Whether loading has proven that a row's bits do not depend on the rows beside it."""
        return self.layers is not None

    @property
    def no_compiled(self) -> str | None:
        """Why its forward cannot be compiled; `None` if it can."""
        if self.backend.name != "cpu":
            reason = self.passed_over.get("cpu", "an earlier one was taken")
            return f"attention is computed by {self.backend.name!r}, it must be 'cpu': {reason}"
        if self.batch_invariant and (layer := next(quantised_layers(self.model), None)):
            reason = "is quantised, and compiled it would round a row by its neighbours"
            return f"{layer[0]} {reason}: take batch_invariant=False"
        return None if self.wrapped.keeps_logits else "the model cannot be asked for the logits of single rows"

    def eager(self, pool: KVPool, tap: HiddenStateTap | None = None) -> EagerForward:
        """The eager forward over `pool`."""
        return EagerForward(self.wrapped, self.backend, pool, layers=self.layers, tap=tap)


def pack_model(
    model: PreTrainedModel,
    *,
    kv_format: KVFormat = NATIVE,
    batch_invariant: bool | None = None,
    cpu_kernels: bool = True,
    gpu_kernels: bool | None = None,
) -> PackedModel:
    """Prove that a model says packed what it says alone, on a small tree; the model is not touched.

    batch_invariant: compute each row so that its bits do not depend on the rows beside it, which is proven too. `None`
        does so where it is cheap, with the CPU kernels, and for formats that round, where the last bit of a sum may be
        a step of the code, below float64.
    cpu_kernels: use them where they can be built; `False` is plain torch.
    gpu_kernels: `None` uses them on a GPU where triton is installed; `True` demands them, also of Triton's interpreter.
    Raises UnsupportedModel, naming the layer and what to do instead.
    """
    wrapped = WrappedModel(model, pack=cpu_kernels and gpu_kernels is not True)
    check_kv_format(kv_format, wrapped.architecture.shapes, wrapped.architecture.dtype)
    chosen = choose_backend(wrapped, kv_format, cpu_kernels=cpu_kernels, gpu_kernels=gpu_kernels)
    backend, layers = chosen.backend, None
    rounds = not kv_format.lossless and wrapped.architecture.dtype != torch.float64
    if batch_invariant is not False and (batch_invariant or rounds or backend.kernels == "cpu"):
        try:
            backend, layers = _invariant(wrapped, backend, kv_format, asked=batch_invariant is True)
        except UnsupportedModel:
            if batch_invariant or rounds:
                raise
    return PackedModel(wrapped, kv_format, backend, chosen.passed_over, layers)


def _invariant(
    wrapped: WrappedModel, backend: AttentionBackend, kv_format: KVFormat, *, asked: bool
) -> tuple[AttentionBackend, InvariantLayers]:
    """The backend and the layers for rows that do not depend on their neighbours, proven with KV as it is, where a
    difference cannot hide behind rounding, and as it will be kept. Raises UnsupportedModel where they cannot be."""
    instead = "load it without" if asked else f"without it kv_format={kv_format.name!r} is not exact: take 'native'"
    instead += ", or batch_invariant=False, and drafting may change the last bits, and so at times the text"
    layers, invariant = InvariantLayers(wrapped.model), backend.invariant()
    if invariant is None:
        raise refusal(wrapped.model, "it computes attention itself, over all rows at once", instead)
    for kind in dict.fromkeys((NATIVE, kv_format)):
        forward = EagerForward(wrapped, invariant, wrapped.architecture.new_pool(CHECK_PAGES, kind), layers=layers)
        check_invariance(forward, wrapped.model, wrapped.architecture.vocab_size, instead)
    return invariant, layers
