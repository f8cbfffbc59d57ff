"""Drafting with a parallel head: one forward says every depth of a tree, and a beam search in one graph joins them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specgen import DraftSession, Speculation, TokenTree
from specgen_eagle.borrowed import Lender
from specgen_eagle.drafter import LEAST_SURVIVAL, WINDOW, Eagle, Halves, attend, borrowed_by, exact
from specgen_eagle.head import EagleHead
from specgen_eagle.session import EMPTY, Answer, EagleSession, Part, causal

_CANDIDATES = 64
"""Tokens of each depth, the likeliest before those in between are known, among which a tree chooses."""
_MOST = Speculation().max_nodes


class ParallelHalves(Halves):
    """What a parallel head does before its attention, and behind it, where it grows trees of `depth` levels.

    children: nodes grown per level, and children of each.
    """

    def __init__(
        self, head: EagleHead, embeddings: Tensor, children: int, depth: int, lender: Lender | None = None
    ) -> None:
        super().__init__(head, embeddings, children, lender)
        self.depth = min(depth, head.config.parallel)
        self._candidates = min(_CANDIDATES, head.config.vocabulary)
        self.behind = self._trees

    def compile(self, compile_rows: Callable[..., Any]) -> None:
        """Compile both."""
        tokens, positions, states, attended = self._examples()
        self.before = compile_rows(self._before, [(tokens, 0), (positions, 0), (states, 0)])
        wanted = positions[:, None].expand(-1, self.depth).contiguous()
        borrowed = self._borrowed_examples(states, positions)
        self.behind = compile_rows(self._trees, [(attended, 1), (states, 0), (tokens, 0), (wanted, 0), *borrowed])

    def _trees(
        self, attended: Tensor, residual: Tensor, tokens: Tensor, wanted: Tensor, texts: Tensor, *borrowed: Tensor
    ) -> tuple[Tensor, ...]:
        """The likeliest nodes of a tree for each of several sequences, likeliest first, parents before their children.

        tokens: int64[rows]. wanted: int64[trees, depth], the rows of each tree's root and of the depths behind it.
        texts: int64[trees]. borrowed: what follows the texts in `_scores`.
        Returns, [trees, nodes] all, the chance of each node's path, its token, its number and its parent's, which is -1
        for children of the root.
        """
        width, rows = self.children, wanted.flatten()
        states = self.head.finish(attended[:, rows], residual[rows])
        scores, sayable = self._scores(states, texts.repeat_interleave(self.depth), *borrowed)
        logits = scores.unflatten(0, wanted.shape)
        states = states.unflatten(0, wanted.shape)
        top, places = logits.topk(self._candidates)
        shares = (top - logits.logsumexp(dim=-1, keepdim=True)).exp()
        # The candidates together keep the share that they had before the tokens in between were known.
        kept = shares.sum(dim=-1, keepdim=True)
        first = min(width * width, self._candidates)
        chance = shares[:, 0, :first]
        said = sayable[places[:, 0, :first]]
        levels = [(chance, said, torch.full_like(said, -1))]
        last = tokens[wanted[:, :1]]
        numbers = 0
        for depth in range(1, self.depth):
            survival, said, _ = levels[-1]
            sure, picked = survival.topk(width)
            before = last.expand(-1, width) if depth == 1 else last.gather(1, picked // width)
            last = said.gather(1, picked)
            scores = self._seeing(states[:, depth], last, before, places[:, depth], borrowed[0])
            chance, chosen = (scores.softmax(dim=-1) * kept[:, depth, None]).topk(width)
            levels.append(
                (
                    (sure[..., None] * chance).flatten(1),
                    sayable[places[:, depth].gather(1, chosen.flatten(1))],
                    (numbers + picked).repeat_interleave(width, dim=1),
                )
            )
            numbers += said.shape[1]
        survival, said, parents = (torch.cat(part, dim=1) for part in zip(*levels, strict=True))
        ordered, order = survival.nan_to_num(0.0).sort(dim=1, descending=True, stable=True)
        ordered, order = ordered[:, :_MOST], order[:, :_MOST]
        return ordered, said.gather(1, order), order, parents.gather(1, order)

    def _seeing(self, states: Tensor, last: Tensor, before: Tensor, places: Tensor, columns: Tensor) -> Tensor:
        """Logits of the candidates `places` [trees, candidates] behind each beam, [trees, width, candidates].

        states: [trees, width of the head]. last, before: int64[trees, width], the tokens of each beam.
        columns: of what is borrowed, see `_scores`; its places are behind the vocabulary's.
        """
        seeing = self.head.transition(
            states.repeat_interleave(last.shape[1], dim=0),
            F.embedding(last.flatten(), self._embeddings),
            F.embedding(before.flatten(), self._embeddings),
        )
        normed = exact(self.head.norm(seeing)).unflatten(0, last.shape)
        own, vocabulary = self.head.lm_head.weight, self.head.config.vocabulary
        rows = exact(F.embedding(places.clamp(max=vocabulary - 1), own))
        lent = F.embedding((places - vocabulary).clamp(min=0), columns.T).to(rows)
        scores: Tensor = normed @ torch.where(places[..., None] < vocabulary, rows, lent).transpose(1, 2)
        return scores


class ParallelSession(EagleSession):
    """A session whose tree is known once its entries are read."""

    def tree(self, max_nodes: int) -> TokenTree:
        """The likeliest nodes; the empty tree if nothing was read."""
        # Nobody asks for nodes before all is read.
        return _cut(self.reading.root.tree, max_nodes) if self.reading.root else EMPTY


class ParallelEagle(Eagle):
    """Drafts with a parallel head: one forward for all trees."""

    session = ParallelSession
    halves: ParallelHalves

    def __init__(self, halves: ParallelHalves, window: int = WINDOW) -> None:
        super().__init__(halves, halves.depth, window)

    @torch.inference_mode()
    def propose(self, sessions: Sequence[DraftSession], max_nodes: Sequence[int]) -> list[TokenTree]:
        """The tree behind what each session has read."""
        asked = [session for session in sessions if isinstance(session, ParallelSession)]
        self._read([session for session, most in zip(asked, max_nodes, strict=True) if most and session.is_ready])
        return [session.tree(most) for session, most in zip(asked, max_nodes, strict=True)]

    def _forward(self, parts: Sequence[Part], *, every: bool = False) -> list[Answer]:
        """The tree behind the last row of each part."""
        following = self.head.look_ahead(torch.stack([part.states[-1] for part in parts]))[:, : self.depth - 1]
        longer = [_longer(part, further) for part, further in zip(parts, following, strict=True)]
        tokens, attended, residual = attend(self.halves, longer)
        ends = accumulate(len(part.tokens) for part in longer)
        wanted = torch.tensor([range(end - self.depth, end) for end in ends], device=tokens.device)
        borrowed = borrowed_by(parts, [1] * len(parts))
        trees = [column.tolist() for column in self.halves.behind(attended, residual, tokens, wanted, *borrowed)]
        return [Answer(part.states, tree=_tree(*nodes)) for part, *nodes in zip(parts, *trees, strict=True)]


def _longer(part: Part, following: Tensor) -> Part:
    """A part with rows for the entries behind its last one, which see what that sees and leave nothing behind."""
    count, rows = len(following), len(part.tokens)
    last = part.positions[-1]
    return replace(
        part,
        tokens=[*part.tokens, *[part.tokens[-1]] * count],
        positions=[*part.positions, *range(last + 1, last + 1 + count)],
        states=torch.cat([part.states, following]),
        visible=causal(rows, following.device, count),
    )


def _tree(survival: list[float], tokens: list[int], numbers: list[int], parents: list[int]) -> TokenTree:
    """Of nodes in order of survival, those that may survive."""
    kept = sum(chance >= LEAST_SURVIVAL for chance in survival)
    place = {number: node for node, number in enumerate(numbers[:kept])}
    place[-1] = -1
    above = [place[parent] for parent in parents[:kept]]
    survival = [*survival[:kept], 1.0]  # the last one is the root's
    confidence = tuple(min(1.0, survival[node] / survival[parent]) for node, parent in enumerate(above))
    return TokenTree(tuple(tokens[:kept]), tuple(above), confidence)


def _cut(tree: TokenTree, count: int) -> TokenTree:
    """The first nodes, whose parents are among them."""
    return TokenTree(tree.tokens[:count], tree.parents[:count], tree.confidence[:count])
