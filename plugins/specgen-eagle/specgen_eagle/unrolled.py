"""A head run as it will draft, on the target's states first and then on its own output (EAGLE-3's training-time test,
Li et al. 2025, 3.2): what it must say, and how often it says it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from specgen_eagle.head import EagleHead
from specgen_eagle.states import Padded

_NEVER = float("-inf")


@dataclass(frozen=True)
class Batch:
    """Entries t of padded conversations.

    embedded: [batch, entries, width], of the tokens at t + 1. states: [batch, entries, layers * target_width] at t.
    wanted: [batch, entries, vocabulary], the target's log-probabilities of t + 2 over what the head can say.
    valid: bool[batch, entries].
    """

    embedded: Tensor
    states: Tensor
    wanted: Tensor
    valid: Tensor


def make_batch(embeddings: Tensor, target_head: Tensor, padded: Padded) -> Batch:
    """embeddings, target_head: of the target's vocabulary, of what the draft head can say; in the dtype of products."""
    ids, states, lengths = padded
    states = states.to(target_head.dtype)
    entries = ids.shape[1] - 2
    with torch.no_grad():
        logits = F.linear(states[:, 1:-1, -1], target_head).float()
        return Batch(
            F.embedding(ids[:, 1:-1], embeddings),
            states[:, :-2, :-1].flatten(-2),
            torch.log_softmax(logits, dim=-1),
            torch.arange(entries)[None] < (lengths - 2)[:, None],
        )


def unroll(head: EagleHead, batch: Batch, ahead: int) -> Iterator[tuple[Tensor, Tensor]]:
    """For each step j: logits [batch, entries, vocabulary] and which of them count, bool[batch, entries].

    At step j entry t has seen the target's states up to t - j and its own in their place behind them.
    """
    count = batch.valid.shape[1]
    places = torch.arange(count)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    states = head.fuse(batch.states)
    for step in range(ahead):
        query, key, value, residual = head.project(batch.embedded, states, places.expand(len(states), -1))
        groups = head.heads // head.kv_heads
        keys.append(key.repeat_interleave(groups, dim=1))
        values.append(value.repeat_interleave(groups, dim=1))
        visible = places[:, None] - step >= places[None]
        states = head.finish(_attend(query, keys, values, visible), residual)
        yield head.logits(states), batch.valid & (places >= step)
        states = _later(states, 1)


def loss(head: EagleHead, batch: Batch, ahead: int, decay: float) -> Tensor:
    """Cross-entropy with the target's distribution, mean over entries; step j counts `decay` ** j."""
    total = torch.zeros(())
    wanted = batch.wanted.exp()
    for step, (logits, valid) in enumerate(unroll(head, batch, ahead)):
        losses = -(wanted * torch.log_softmax(logits.float(), dim=-1)).sum(dim=-1)
        total = total + decay**step * (losses * valid).sum() / valid.sum().clamp(min=1)
    return total


def hits(head: EagleHead, batch: Batch, ahead: int) -> tuple[list[int], list[int]]:
    """Per step: chains of first choices that are right up to there, and chains in all."""
    right, asked = [], []
    alive = batch.valid
    best = batch.wanted.argmax(dim=-1)
    for step, (logits, valid) in enumerate(unroll(head, batch, ahead)):
        alive = (alive if step == 0 else _later(alive[..., None], 1)[..., 0]) & valid & (logits.argmax(dim=-1) == best)
        right.append(int(alive.sum()))
        asked.append(int(valid.sum()))
    return right, asked


def _attend(query: Tensor, keys: list[Tensor], values: list[Tensor], visible: Tensor) -> Tensor:
    """To the target's entries where `visible`, and of each later step to the one entry on the own path."""
    scale = query.shape[-1] ** -0.5
    last = len(keys) - 1
    scores = [(query @ keys[0].transpose(-1, -2)).masked_fill(~visible, _NEVER)]
    paths = [(_later(keys[step], last - step), _later(values[step], last - step)) for step in range(1, last + 1)]
    scores += [(query * key).sum(dim=-1, keepdim=True) for key, _ in paths]
    # The first entries of late steps see no target's entry; those of their own path keep the softmax finite.
    weights = torch.softmax(torch.cat(scores, dim=-1).float() * scale, dim=-1).to(query.dtype)
    count = visible.shape[-1]
    attended = weights[..., :count] @ values[0]
    for place, (_, value) in enumerate(paths):
        attended = attended + weights[..., count + place, None] * value
    return attended


def _later(rows: Tensor, steps: int) -> Tensor:
    """[..., entries, width] moved `steps` entries towards the end; zeros come in."""
    return F.pad(rows, (0, 0, steps, 0))[..., : rows.shape[-2], :] if steps else rows
