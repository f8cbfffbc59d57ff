"""Plain torch for every kernel: the law that the fast paths are tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of `rows` queries over `keys` keys, grouped heads, in the queries' dtype with a float32 softmax.

    query: [heads, rows, key_dim]; key: [kv_heads, keys, key_dim]; value: [kv_heads, keys, value_dim].
    visible: bool[rows, keys], `None` when every row sees every key.
    softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2).
    sinks: [heads], a learned score that takes part in the softmax and is then dropped (gpt-oss).
    Returns [heads, rows, value_dim].
    """
    groups = query.shape[0] // key.shape[0]
    key = key.repeat_interleave(groups, dim=0)
    value = value.repeat_interleave(groups, dim=0)
    scores = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is None:
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value
    sink = sinks.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)
    weights = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1, dtype=torch.float32)
    return weights[..., :-1].to(query.dtype) @ value


def top_tokens(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row of logits [rows, vocab], largest first; of equals the one with the lower id.

    Returns values float32[rows, count] and ids int64[rows, count].
    """
    if count == 1:
        values, ids = logits.max(dim=-1, keepdim=True)
    else:
        values, ids = (t[:, :count] for t in logits.sort(dim=-1, descending=True, stable=True))
    return values.float(), ids


def segmented_lora(
    y: Tensor, x: Tensor, bounds: Sequence[int], downs: Sequence[Tensor], ups: Sequence[Tensor]
) -> Tensor:
    """A layer's output with each adapter's low-rank product added on its own rows.

    y: [rows, outputs], what the layer says of x: [rows, inputs]. Adapter i has rows bounds[2 * i] to bounds[2 * i + 1],
    downs[i]: [rank, inputs] and ups[i]: [rank, outputs], ranks may differ. Sums in float32 at least; rows of no adapter
    come back as they are. Returns [rows, outputs] in y's dtype.
    """
    exact = torch.promote_types(y.dtype, torch.float32)
    result = y.clone()
    for first, stop, down, up in zip(bounds[::2], bounds[1::2], downs, ups, strict=True):
        shrunk = x[first:stop].to(exact) @ down.to(exact).T
        result[first:stop] = (y[first:stop].to(exact) + shrunk @ up.to(exact)).to(y.dtype)
    return result
