"""The eager forward: the model's own code, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property

from specgen.kernels.backends import Backend
from specgen.kv.pool import PAGE_SIZE, KVPool
from specgen.model.attention.base import AttentionBackend, ForwardBatch
from specgen.model.hidden_states import HiddenStateTap
from specgen.model.invariant_layers import InvariantLayers
from specgen.model.lora_layers import AdaptedLayers, routed_layers, rows_counted
from specgen.model.output import ForwardOutput
from specgen.model.segment import Segment
from specgen.model.wrapped import WrappedModel

# Numbers that a layer's input tells apart.
_PREFIX, _ROWS, _WANTED = 6, 5, 2


class EagerForward:
    """Runs `model` over one attention backend and one KV pool. See `forward.base.Forward`.

    layers: what makes the model's layers batch-invariant, where they are to be. tap: takes hidden states.
    """

    def __init__(
        self,
        model: WrappedModel,
        backend: AttentionBackend,
        pool: KVPool,
        *,
        layers: InvariantLayers | None = None,
        tap: HiddenStateTap | None = None,
    ) -> None:
        self.pool = pool
        self._model = model
        self._backend = backend
        self._layers = layers
        self._tap = tap

    def __call__(self, segments: Sequence[Segment]) -> ForwardOutput:
        """See `forward.base.Forward`."""
        return self.run(self._backend.begin(segments, self.pool), segments)

    def run(self, batch: ForwardBatch, segments: Sequence[Segment]) -> ForwardOutput:
        """The forward over a batch that the backend has prepared for these segments."""
        adapted = any(segment.adapter for segment in segments)
        with (
            self._layers.active() if self._layers else nullcontext(),
            self.adapted.over(segments) if adapted else nullcontext(),
        ):
            logits = self._model.logits(batch)
        return ForwardOutput(logits, self._tap.take() if self._tap else ())

    @property
    def lora_kernels(self) -> Backend:
        """Whose kernel adds what adapters say."""
        return "cpu" if self._model.packs_linears else self._backend.kernels

    @cached_property
    def adapted(self) -> AdaptedLayers:
        """The layers that adapters can adapt; a small forward finds them."""
        return AdaptedLayers(self._model.model, self._rows_seen(), backend=self.lora_kernels)

    def _rows_seen(self) -> dict[str, bool]:
        """Whether a linear layer sees only the rows whose logits are wanted, of all that see one row for each of a
        step's or for each of those, by the layer's name."""
        model = self._model.model
        pool = self._model.architecture.new_pool(-(-(_PREFIX + _ROWS) // PAGE_SIZE))
        table = pool.open()
        table.reserve(_PREFIX + _ROWS)
        table.commit(_PREFIX)
        positions = range(_PREFIX, _PREFIX + _ROWS)
        with rows_counted(model) as seen:
            EagerForward(self._model, self._backend, pool, layers=self._layers)(
                [Segment(table, [0] * _ROWS, positions, None, range(_WANTED))]
            )
        routed = routed_layers(model)
        wanted = {name: rows == {_WANTED} for name, rows in seen.items() if name not in routed}
        return {name: last for name, last in wanted.items() if last or seen[name] == {_ROWS}}
