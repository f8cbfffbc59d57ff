"""The twin of a caller's model that runs packed rows: its weights, its code, an attention that goes to a backend."""

from __future__ import annotations

import inspect
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specgen.kernels import backends
from specgen.model.attention.base import ForwardBatch
from specgen.model.attention.interface import AttentionRoute, packed_logits
from specgen.model.cache_keyword import cache_keyword
from specgen.model.checks.architecture import inspect_layers
from specgen.model.checks.quantisation import check_quantised
from specgen.model.model_state import ModelState
from specgen.model.packed_linear import pack_linears
from specgen.model.twin import runs_alone, twin, unwrapped


class WrappedModel:
    """A twin of `given` that shares its weights; the caller's model is never touched.

    pack_linears: let linear layers run by the CPU kernels where they can, from packed copies of their weights.
    Raises UnsupportedModel, naming the layer and what to do instead, for a model whose state cannot be packed.
    """

    def __init__(self, model: PreTrainedModel, *, pack: bool) -> None:
        self.given = unwrapped(model)
        self._state = ModelState.of(self.given)
        self.model: PreTrainedModel = twin(self.given).eval()
        before = ModelState.of(self.model)
        with runs_alone(self.given):
            self.architecture = inspect_layers(self.model)
        # Caches of the model's own, what a hook collects: its forward writes there, so that no caller has changed it.
        self._written = before.changes(ModelState.of(self.model))
        check_quantised(self.model, self.architecture.dtype)
        self.packs_linears = pack and backends.available("cpu", self.device, self.architecture.dtype)
        if self.packs_linears:
            pack_linears(self.model)
        self.keeps_logits = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        """Whether the model computes the logits of the wanted rows alone."""

        self.route = AttentionRoute(self.model, self.architecture.reaches, self.architecture.stores)
        self._cache_keyword = cache_keyword(self.model)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.architecture.device

    def logits(self, batch: ForwardBatch) -> Tensor:
        """Run the model over a batch; [wanted rows, vocab], float32 or the 16-bit floats of the model."""
        with nullcontext() if batch.mask is not None else self.route.over(batch):
            logits = packed_logits(
                self.model, batch, self.architecture.stores, self._cache_keyword, keeps_logits=self.keeps_logits
            )
        return logits.float() if logits.dtype == torch.float64 else logits

    def change(self) -> str | None:
        """What of the caller's model is not as it was when this was made, a weight or anything else its answers depend
        on; None if all is."""
        return self._state.change(ModelState.of(self.given), but=self._written)

    @property
    def settings(self) -> list[list[str]]:
        """All that the model's answers depend on besides its config and tensors; alike in every process."""
        return self._state.portable(but=self._written)

    def close(self) -> None:
        """Take back what transformers was told of; there are no more forwards. Doing so twice is harmless."""
        self.route.close()
