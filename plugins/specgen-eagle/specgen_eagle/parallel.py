"""A parallel head as it will draft, every depth of a tree from one forward over the target's states (as P-EAGLE does),
each corrected by the tokens drafted before it: what it must say, and how often it says it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from specgen_eagle.head import EagleHead
from specgen_eagle.unrolled import Batch

_BLIND = 0.3
"""Weight of what is said before the tokens in between are known: it only has to name the choices."""
_KEPT = 0.7
"""Each depth is trained on so many of the entries that the depth above it is (P-EAGLE, 3.3)."""


@dataclass(frozen=True)
class Depth:
    """Rows of one depth, 0 for the head's next token. anchors: int64[rows], the last entries they see.

    blind, seeing: states [batch, rows, width] before and after the tokens in between are known; equal at depth 0.
    """

    anchors: Tensor
    blind: Tensor
    seeing: Tensor


def forward(head: EagleHead, batch: Batch, anchors: list[Tensor]) -> list[Depth]:
    """What the head computes at each depth d for entries `anchors[d]`, all entries at depth 0."""
    size, count = batch.valid.shape
    states = head.fuse(batch.states)
    ahead = head.look_ahead(states)
    rows = [states] + [ahead[:, chosen, d] for d, chosen in enumerate(anchors[1:])]
    every = torch.cat(anchors)
    positions = torch.cat([chosen + d for d, chosen in enumerate(anchors)])
    query, key, value, residual = head.project(
        batch.embedded[:, every], torch.cat(rows, dim=1), positions.expand(size, -1)
    )
    visible = every[:, None] >= torch.arange(count)
    groups = head.heads // head.kv_heads
    attended = F.scaled_dot_product_attention(
        query,
        key[:, :, :count].repeat_interleave(groups, dim=1),
        value[:, :, :count].repeat_interleave(groups, dim=1),
        attn_mask=visible,
    )
    finished = head.finish(attended, residual).split([len(chosen) for chosen in anchors], dim=1)
    depths = [Depth(anchors[0], finished[0], finished[0])]
    for d, (chosen, blind) in enumerate(zip(anchors[1:], finished[1:], strict=True), start=1):
        seeing = head.transition(blind, batch.embedded[:, chosen + d], batch.embedded[:, chosen + d - 1])
        depths.append(Depth(chosen, blind, seeing))
    return depths


def loss(head: EagleHead, batch: Batch, decay: float) -> Tensor:
    """Cross-entropy with the target's distribution, mean over entries; depth d counts `decay` ** d, and besides what it
    says before it knows the tokens in between."""
    total = torch.zeros(())
    for d, depth in enumerate(forward(head, batch, _sampled(batch, head.config.parallel))):
        places = depth.anchors + d
        valid = batch.valid[:, places]
        if not valid.any():
            continue
        wanted = batch.wanted[:, places][valid]
        part = _cross_entropy(head.logits(depth.seeing[valid]), wanted)
        if d:
            part = part + _BLIND * _cross_entropy(head.logits(depth.blind[valid]), wanted)
        total = total + decay**d * part
    return total


def hits(head: EagleHead, batch: Batch) -> tuple[list[int], list[int]]:
    """Per depth: chains of first choices that are right up to there, and chains in all."""
    right, asked = [], []
    count = batch.valid.shape[1]
    best = batch.wanted.argmax(dim=-1)
    alive = batch.valid
    every = [torch.arange(max(0, count - d)) for d in range(head.config.parallel)]
    for d, depth in enumerate(forward(head, batch, every)):
        valid = batch.valid[:, d:]
        alive = alive[:, : valid.shape[1]] & valid & (head.logits(depth.seeing).argmax(dim=-1) == best[:, d:])
        right.append(int(alive.sum()))
        asked.append(int(valid.sum()))
    return right, asked


def _sampled(batch: Batch, depths: int) -> list[Tensor]:
    """Anchors of each depth, drawn by the batch's shape: a run that is taken up again draws the same."""
    count = batch.valid.shape[1]
    generator = torch.Generator().manual_seed(int(batch.valid.sum()) * 1009 + count)
    anchors = [torch.arange(count)]
    for d in range(1, depths):
        kept = max(1, round(count * _KEPT**d))
        anchors.append(torch.randperm(max(0, count - d), generator=generator)[:kept].sort().values)
    return anchors


def _cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    return -(wanted.exp() * torch.log_softmax(logits.float(), dim=-1)).sum(dim=-1).mean()
