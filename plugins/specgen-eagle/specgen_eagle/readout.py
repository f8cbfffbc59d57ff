"""How a target's logits follow from its last states, from which students compute them again."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from specgen import InvalidRequest

_ROWS = 8
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}
_ROUNDING_OF_HALVES = 3e-2
_NO_FACTOR = 2**-8
"""So near to 1 a factor that was measured is 1."""


@torch.inference_mode()
def logit_factor(model: Any) -> float:
    """By what the target multiplies the products of its last states and its head's rows: 1, but for some models.

    Raises InvalidRequest where its logits are anything else: with a bias, a soft cap, states that are normed later.
    """
    weight = model.get_output_embeddings().weight
    ids = torch.arange(_ROWS, device=model.device)[None] % len(weight)
    answer = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    said = answer.logits.double()
    products = F.linear(answer.hidden_states[-1].to(weight.dtype), weight).double()
    factor = float((said * products).sum() / products.square().sum())
    factor = 1.0 if abs(factor - 1) < _NO_FACTOR else factor
    apart = float((said - factor * products).abs().max() / said.abs().max())
    # Not "above": what is no number is refused too.
    if not apart <= _ROUNDING.get(model.dtype, _ROUNDING_OF_HALVES):
        raise InvalidRequest(
            f"{model.config.model_type}: its logits are {apart:.1%} apart from its last states times its head's rows; "
            "models whose head has a bias or a soft cap cannot be distilled",
            param="model",
        )
    return factor
