"""Drafting with a parallel head: one forward says every depth of a tree, and a beam search in one graph joins them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specgen import DraftHints, DraftSession, TokenTree
from specgen_eagle.drafter import Eagle, Halves, attend
from specgen_eagle.head import EagleHead
from specgen_eagle.session import Answer, EagleSession, Part

_CANDIDATES = 64
"""Tokens of each depth, the likeliest before those in between are known, among which a tree chooses."""
_NODES = 64
_LEAST_SURVIVAL = 0.02
_NEARLY_ALL = 1.0 - 1e-6


class ParallelHalves(Halves):
    """What a parallel head does before its attention, and behind it, where it grows trees of `depth` levels.

    children: nodes grown per level, and children of each.
    """

    def __init__(self, head: EagleHead, embeddings: Tensor, children: int, depth: int) -> None:
        super().__init__(head, embeddings, children)
        self.depth = min(depth, head.config.parallel)
        self._candidates = min(_CANDIDATES, head.config.vocabulary)

    def compile(self, compile_rows: Callable[..., Any]) -> None:
        """Compile both."""
        tokens, positions, states, attended = self._examples()
        self.before = compile_rows(self._before, [(tokens, 0), (positions, 0), (states, 0)])
        wanted = positions[:, None].expand(-1, self.head.config.parallel).contiguous()
        self.behind = compile_rows(self._behind, [(attended, 1), (states, 0), (tokens, 0), (wanted, 0)])

    def _behind(self, attended: Tensor, residual: Tensor, tokens: Tensor, wanted: Tensor) -> tuple[Tensor, ...]:
        """The likeliest nodes of a tree for each of several sequences, likeliest first.

        tokens: int64[rows]. wanted: int64[trees, parallel], the rows of each tree's root and of the depths behind it.
        Returns, [trees, nodes] all, the chance of each node given its parent and that of its whole path, its token, its
        number and its parent's, which is -1 for children of the root.
        """
        width = self.children
        states = self.head.finish(attended, residual)[wanted.flatten()].unflatten(0, wanted.shape)[:, : self.depth]
        logits = self.head.logits(states.flatten(0, 1)).float().unflatten(0, states.shape[:2])
        top, places = logits.topk(self._candidates)
        total = logits.logsumexp(dim=-1, keepdim=True)
        # What is no candidate keeps the share that it had before the tokens in between were known.
        rest = total + torch.log1p(-(top.logsumexp(dim=-1, keepdim=True) - total).exp().clamp(max=_NEARLY_ALL))
        first = min(width * width, self._candidates)
        chance = (top[:, 0, :first] - total[:, 0]).exp()
        said = self._tokens[places[:, 0, :first]]
        levels = [(chance, chance, said, torch.full_like(said, -1))]
        last = tokens[wanted[:, :1]]
        numbers = 0
        for depth in range(1, self.depth):
            _, survival, said, _ = levels[-1]
            sure, picked = survival.topk(width)
            before = last.expand(-1, width) if depth == 1 else last.gather(1, picked // width)
            last = said.gather(1, picked)
            scores = self._seeing(states[:, depth], last, before, places[:, depth])
            best, chosen = scores.topk(width)
            whole = torch.logaddexp(scores.logsumexp(dim=-1, keepdim=True), rest[:, depth, None])
            chance = (best - whole).exp()
            levels.append(
                (
                    chance.flatten(1),
                    (sure[..., None] * chance).flatten(1),
                    self._tokens[places[:, depth].gather(1, chosen.flatten(1))],
                    (numbers + picked).repeat_interleave(width, dim=1),
                )
            )
            numbers += said.shape[1]
        chances, survivals, every, parents = (torch.cat(part, dim=1) for part in zip(*levels, strict=True))
        ordered, order = survivals.sort(dim=1, descending=True, stable=True)
        order = order[:, :_NODES]
        return chances.gather(1, order), ordered[:, :_NODES], every.gather(1, order), order, parents.gather(1, order)

    def _seeing(self, states: Tensor, last: Tensor, before: Tensor, places: Tensor) -> Tensor:
        """Logits of the candidates `places` [trees, candidates] behind each beam, [trees, width, candidates].

        states: [trees, width of the head]. last, before: int64[trees, width], the tokens of each beam.
        """
        seeing = self.head.transition(
            states.repeat_interleave(last.shape[1], dim=0),
            F.embedding(last.flatten(), self._embeddings),
            F.embedding(before.flatten(), self._embeddings),
        )
        normed = self.head.norm(seeing).float().unflatten(0, last.shape)
        return normed @ F.embedding(places, self.head.lm_head.weight).float().transpose(1, 2)


@dataclass(frozen=True, slots=True)
class Grown(Answer):
    """A whole tree under the last row, likeliest nodes first: `chances` and `tokens` have one row. Of each node also
    the chance of its path, its number and its parent's."""

    survival: Sequence[float]
    numbers: Sequence[int]
    parents: Sequence[int]


class ParallelEagle(Eagle):
    """Drafts with a parallel head: one forward for all trees."""

    halves: ParallelHalves

    def open(self, prompt: Sequence[int], hints: DraftHints) -> DraftSession:
        """A session with keys and values of its own, empty until the target's first forward."""
        self.open_sessions += 1
        return ParallelSession(self, prompt)

    @torch.inference_mode()
    def propose(self, sessions: Sequence[DraftSession], max_nodes: Sequence[int]) -> list[TokenTree]:
        """The tree behind what each session has read."""
        asked = [session for session in sessions if isinstance(session, ParallelSession)]
        self._read([session for session, most in zip(asked, max_nodes, strict=True) if most and session.is_ready])
        return [session.tree(most) for session, most in zip(asked, max_nodes, strict=True)]

    def _forward(self, parts: Sequence[Part], *, every: bool = False) -> list[Answer]:
        """What the head says of the rows of all parts, and the tree behind each part's last."""
        following = self.head.look_ahead(torch.stack([part.states[-1] for part in parts]))
        longer = [_longer(part, further) for part, further in zip(parts, following, strict=True)]
        ends = list(accumulate(len(part.tokens) for part in longer))
        count = self.head.config.parallel
        tokens, attended, residual = attend(self.halves, longer)
        wanted = torch.tensor([range(end - count, end) for end in ends], device=tokens.device)
        grown = self.halves.behind(attended, residual, tokens, wanted)
        chances, survival, said, numbers, parents = (column.tolist() for column in grown)
        return [
            Grown(part.states, [chances[i]], [said[i]], survival[i], numbers[i], parents[i])
            for i, part in enumerate(parts)
        ]


class ParallelSession(EagleSession):
    """A session whose tree is known once its entries are read."""

    def tree(self, max_nodes: int) -> TokenTree:
        """The likeliest nodes; the empty tree if nothing was read."""
        root = self.reading.root
        if not isinstance(root, Grown) or not self.is_ready or self.reading.unread:
            return TokenTree((), (), ())
        place = {-1: -1}
        kept = 0
        for number, survival in zip(root.numbers[:max_nodes], root.survival, strict=False):
            if survival < _LEAST_SURVIVAL:
                break
            place[number] = kept
            kept += 1
        return TokenTree(
            tuple(root.tokens[0][:kept]),
            tuple(place[parent] for parent in root.parents[:kept]),
            tuple(min(1.0, chance) for chance in root.chances[0][:kept]),
        )


def _longer(part: Part, following: Tensor) -> Part:
    """A part with rows for the entries behind its last one, which see what that sees and leave nothing behind."""
    count, rows = len(following), len(part.tokens)
    visible = F.pad(part.visible, (0, count, 0, count))
    visible[rows:, :rows] = part.visible[-1]
    last = part.positions[-1]
    return replace(
        part,
        tokens=[*part.tokens, *[part.tokens[-1]] * count],
        positions=[*part.positions, *range(last + 1, last + 1 + count)],
        states=torch.cat([part.states, following]),
        visible=visible,
    )
