"""Adapters inside of a packed forward: each adapted linear layer adds to the rows of each adapter what that one says.

Nothing stays on the model: a step in which no row is adapted runs the forward that there was before, and base rows
beside adapted ones cost nothing but the layer's own product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from specgen.kernels.backends import Backend
from specgen.kernels.segmented_lora import add_segmented_lora
from specgen.lora.adapter import LoraLayer, LoraWeights, is_linear
from specgen.model.invariant_layers import mixes_experts
from specgen.model.segment import Segment

Span = tuple[int, int, LoraWeights]
"""Rows from, to, and what they run under."""


class AdaptedLayers:
    """The layers of `model` that adapters can adapt.

    sees_wanted: name -> whether a layer sees only the rows whose logits are wanted; of all layers that can be adapted.
    backend: which one adds.
    """

    def __init__(self, model: nn.Module, sees_wanted: Mapping[str, bool], *, backend: Backend) -> None:
        self._modules = {name: model.get_submodule(name) for name in sees_wanted}
        self.sees_wanted = sees_wanted
        self._backend = backend

    @contextmanager
    def over(self, segments: Sequence[Segment]) -> Iterator[None]:
        """Adapt the rows of `segments` for one forward; put back on the way out what was there."""
        spans = {
            False: _spans(segments, [len(segment.tokens) for segment in segments]),
            True: _spans(segments, [len(segment.logits) for segment in segments]),
        }
        names = dict.fromkeys(name for _, _, weights in spans[False] for name in weights.layers)
        before = [(self._modules[name], self._modules[name].__dict__.get("forward")) for name in names]
        try:
            for name in names:
                module: Any = self._modules[name]
                parts = [
                    (first, stop, layer)
                    for first, stop, weights in spans[self.sees_wanted[name]]
                    if (layer := weights.layers.get(name)) is not None
                ]
                module.__dict__["forward"] = _Adapted(module.forward, parts, backend=self._backend)
            yield
        finally:
            for module, earlier in before:
                if earlier is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.__dict__["forward"] = earlier


class _Adapted:
    """A layer's forward over all rows, then each adapter's part on its own rows."""

    def __init__(
        self, forward: Callable[[Tensor], Tensor], parts: Sequence[tuple[int, int, LoraLayer]], *, backend: Backend
    ) -> None:
        self._forward = forward
        self._parts = parts
        self._backend = backend
        self._bounds = [bound for first, stop, _ in parts for bound in (first, stop)]
        self._downs = [layer.down for _, _, layer in parts]
        self._ups = [layer.up for _, _, layer in parts]

    def __call__(self, x: Tensor) -> Tensor:
        output = self._forward(x).contiguous()
        rows = output.view(-1, output.shape[-1])
        for first, stop, layer in self._parts:
            if layer.gain is not None:
                rows[first:stop] *= layer.gain
            if layer.offset is not None:
                rows[first:stop] += layer.offset
        inputs = x.reshape(-1, x.shape[-1]).contiguous()
        add_segmented_lora(rows, inputs, self._bounds, self._downs, self._ups, backend=self._backend)
        return output


def _spans(segments: Sequence[Segment], counts: Sequence[int]) -> list[Span]:
    """The rows of each adapter, where segment i has `counts[i]` of them; neighbours under one adapter are one span."""
    spans: list[Span] = []
    first = 0
    for segment, count in zip(segments, counts, strict=True):
        stop = first + count
        if segment.adapter is not None and count:
            if spans and spans[-1][1:] == (first, segment.adapter):
                spans[-1] = (spans[-1][0], stop, segment.adapter)
            else:
                spans.append((first, stop, segment.adapter))
        first = stop
    return spans


@contextmanager
def rows_counted(model: nn.Module) -> Iterator[dict[str, set[int]]]:
    """Count the rows that each linear layer sees, call by call, by the layer's name."""
    seen: dict[str, set[int]] = {}
    hooks = [
        module.register_forward_pre_hook(_counting(seen.setdefault(name, set())))
        for name, module in model.named_modules()
        if is_linear(module)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _counting(seen: set[int]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.add(args[0].shape[:-1].numel() if args else 0)

    return count


def routed_layers(model: nn.Module) -> set[str]:
    """The names of the layers inside blocks that send rows to experts: what they see is no row of the step's."""
    blocks = [(name, module) for name, module in model.named_modules() if mixes_experts(module)]
    return {f"{name}.{inner}" for name, block in blocks for inner, module in block.named_modules() if is_linear(module)}
