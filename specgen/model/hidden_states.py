"""Hidden states between a model's layers, taken while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from specgen.errors import InvalidRequest, UnsupportedModel


class HiddenStateTap:
    """Takes what the layers `layers` of `model` read, by hooks that stay.

    Counted as in transformers' `hidden_states`: 0 is the embeddings, i what layer i reads, the number of layers what
    the language-model head reads. Raises InvalidRequest for a layer that there is not, UnsupportedModel for a model
    without a list of layers.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)
        self._taken: dict[int, Tensor] = {}
        if not layers:
            return
        decoder = model.get_decoder()
        blocks = _blocks(model, decoder)
        for layer in layers:
            if not 0 <= layer <= len(blocks):
                raise InvalidRequest(f"layer {layer} cannot be watched; there are 0 to {len(blocks)}", param="layers")
            if layer == len(blocks):
                decoder.register_forward_hook(partial(self._behind, layer))
            else:
                blocks[layer].register_forward_pre_hook(partial(self._before, layer), with_kwargs=True)

    def take(self) -> tuple[Tensor, ...]:
        """The states of the last forward, [rows, width] each, in the order of `layers`."""
        taken, self._taken = self._taken, {}
        return tuple(taken[layer][0] for layer in self.layers)

    def _before(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._taken[layer] = args[0] if args else kwargs["hidden_states"]

    def _behind(self, layer: int, module: nn.Module, args: tuple[object, ...], output: Any) -> None:
        self._taken[layer] = output.last_hidden_state


def _blocks(model: PreTrainedModel, decoder: nn.Module) -> nn.ModuleList:
    """The decoder's layers: its one list with as many modules as the config says."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    for module in decoder.children():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    reason = f"{type(decoder).__name__} has no list of {count} layers, so no hidden state between them can be taken"
    raise UnsupportedModel(f"model type {model.config.model_type!r}: {reason}")
