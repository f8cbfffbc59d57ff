"""Plain torch for every kernel: what the fast paths compute, and what they are tested against."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from specgen.kernels.kv_codes import affine4, hadamard, rotated, scaled
from specgen.kernels.kv_layout import Coding, LayerPlanes

if TYPE_CHECKING:
    from specgen.kernels.draws import Draw

_GOLDEN, _MIX1, _MIX2 = (n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


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


def kv_write(key: Tensor, value: Tensor, planes: LayerPlanes, slots: Tensor) -> None:
    """Keep key and value, [rows, kv_heads, dim] each, at `slots` int64[rows], -1 for rows that are not kept.

    They are rotated and centred where the layout says so, then coded, each vector of a head alone.
    """
    kept = slots >= 0
    slots, key, value = slots[kept], key[kept], value[kept]
    layout = planes.layout
    if layout.rotated:
        key, value = (rotated(side.float(), hadamard(side.shape[-1], side.device)) for side in (key, value))
    if planes.centre is not None:
        key = key - planes.centre
    _write_side(slots, key, layout.key, planes.key, planes.key_sizes)
    _write_side(slots, value, layout.value, planes.value, planes.value_sizes)


def _write_side(slots: Tensor, x: Tensor, coding: Coding, codes: Tensor, sizes: Tensor | None) -> None:
    if sizes is None:
        codes[slots] = x
    elif coding is Coding.AFFINE4:
        codes[slots], sizes[slots] = affine4(x)
    else:
        codes[slots], sizes[slots] = scaled(x, codes.dtype)


def kv_commit(stacks: Sequence[Tensor], source: Tensor, destination: Tensor) -> None:
    """Copy the slots `source` int64[n] onto the slots `destination` int64[n] in every stack [layers, slots, ...].

    In order: none may be copied onto one that is still to be copied.
    """
    for stack in stacks:
        stack[:, destination] = stack[:, source]


def sample_rows(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """For each draw a token of its row, by Gumbel-max after temperature, top-k, top-p and min-p, in this order.

    logits: [rows, vocab]. Tokens that tie at a cut share its fate: all of them stay. Returns int64[len(draws)]; -1
    where the row leaves no token.
    """
    tokens = [_sampled(logits[draw.row].float(), draw) for draw in draws]
    return torch.tensor(tokens, dtype=torch.int64, device=logits.device)


def _sampled(row: Tensor, draw: Draw) -> int:
    scores = row / draw.warp.temperature
    best = scores.max()
    kept = scores > -math.inf
    if 0 < draw.warp.top_k < len(scores):
        kept &= scores >= scores.topk(draw.warp.top_k).values[-1]
    if draw.warp.top_p < 1.0:
        kept &= scores >= _nucleus(torch.where(kept, scores, -math.inf), draw.warp.top_p)
    kept &= (scores - best).exp() >= draw.warp.min_p
    return gumbel_argmax(torch.where(kept, scores, -math.inf), draw.key)


def _nucleus(scores: Tensor, share: float) -> Tensor:
    """The score of the last token that is needed for `share` of the probability, the likeliest first."""
    ordered = scores.sort(descending=True).values
    sums = ordered.softmax(dim=0).cumsum(dim=0)
    return ordered[int((sums < share).sum().clamp(max=len(ordered) - 1))]


def gumbel_argmax(scores: Tensor, key: int) -> int:
    """A token drawn from softmax(scores), float[vocab], -1 where all are `-inf`: Gumbel-max (Maddison et al. 2014) with
    the noise of `uniforms`."""
    possible = (scores > -math.inf).nonzero().flatten()
    if possible.numel() == 0:
        return -1
    noise = -torch.log(-torch.log(uniforms(key, possible)))
    return int(possible[(scores[possible].double() + noise).argmax()])


def uniforms(key: int, tokens: Tensor) -> Tensor:
    """float64 in (0, 1), one per token id int64[n], under a position's 64-bit `key`: SplitMix64 (Steele et al. 2014) in
    its stream form."""
    z = (tokens + 1) * _GOLDEN + key
    z = (z ^ _shifted(z, 30)) * _MIX1
    z = (z ^ _shifted(z, 27)) * _MIX2
    z = z ^ _shifted(z, 31)
    # 52 bits: with 53 the largest would round up to 1.
    return (_shifted(z, 12).double() + 0.5) * 2.0**-52


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Logical shift right of int64 taken as unsigned."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """x [..., inputs] through several linear layers, weights [outputs, inputs], side by side: [..., sum(outputs)]."""
    return torch.cat([F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)], dim=-1)


def bmm(x: Tensor, weight: Tensor) -> Tensor:
    """[batch, rows, inputs] by [batch, inputs, columns]: a product of matrices for each of a batch."""
    return torch.bmm(x, weight)
