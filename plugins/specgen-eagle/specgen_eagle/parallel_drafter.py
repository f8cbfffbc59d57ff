"""Drafting with a parallel head: one forward says every depth of a tree, and a beam search in one graph joins them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specgen import MAX_TREE_NODES, DraftSession, TokenTree
from specgen_eagle.context_vocab import TargetRows
from specgen_eagle.drafter import LEAST_SURVIVAL, Eagle, Halves, attend, exact, joined, told, words_of
from specgen_eagle.head import EagleHead
from specgen_eagle.options import WINDOW
from specgen_eagle.session import EMPTY, Answer, EagleSession, Part, causal

_CHOICES = 64
"""Tokens of each depth, the likeliest before those in between are known, among which a tree chooses."""


class ParallelHalves(Halves):
    """What a parallel head does before its attention, and behind it, where it grows trees of `depth` levels.

    children: nodes grown per level, and children of each.
    """

    def __init__(
        self, head: EagleHead, embeddings: Tensor, children: int, depth: int, lender: TargetRows | None = None
    ) -> None:
        super().__init__(head, embeddings, children, lender)
        self.depth = min(depth, head.config.parallel)
        self._choices = min(_CHOICES, head.config.vocabulary)
        self.before, self.behind = self._ahead, self._trees

    def compile(self, compile_rows: Callable[..., Any]) -> None:
        """Compile both."""
        rows, square, states, attended = self._examples()
        shown = states.repeat(1, len(self.head.config.layers))
        self.before = compile_rows(self._ahead, [(rows, 0), (rows, 0), (shown, 0), (rows, 0), (rows, 0)])
        wanted = rows[:, None].repeat(1, self.depth)
        behind = [(attended, 1), (states, 0), (rows, 0), (wanted, 0), (square, (0, 1))]
        self.behind = compile_rows(self._trees, behind)

    def _ahead(
        self, tokens: Tensor, positions: Tensor, states: Tensor, lasts: Tensor, order: Tensor
    ) -> tuple[Tensor, ...]:
        """What `_before` gives, of entries and of the depths behind the last one of each text.

        states: [entries, layers * target_width], the target's. lasts: int64[texts]. order: int64[rows], which entry a
        row is; behind all of them are numbered the depths, text by text.
        """
        fused = self.head.fuse(states)
        ahead = self.head.look_ahead(fused[lasts])[:, : self.depth - 1].flatten(0, 1)
        return self._before(tokens, positions, torch.cat([fused, ahead])[order])

    def _trees(
        self, attended: Tensor, residual: Tensor, tokens: Tensor, wanted: Tensor, words: Tensor
    ) -> tuple[Tensor, ...]:
        """The likeliest nodes of a tree for each of several texts, likeliest first, parents before their children.

        tokens: int64[rows]. wanted: int64[trees, depth], the rows of each tree's root and of the depths behind it.
        words: as in `_scores`.
        Returns, [trees, nodes] all, the chance of each node's path, its token, its number and its parent's, which is -1
        for children of the root.
        """
        width, rows = self.children, wanted.flatten()
        states = self._finished(attended[:, rows], residual[rows]).unflatten(0, wanted.shape)
        logits = self._scores(states, words)
        top, places = logits.topk(self._choices)
        choices = self._said(places, words)
        shares = (top - logits.logsumexp(dim=-1, keepdim=True)).exp()
        # The choices together keep the share that they had before the tokens in between were known. Were the sum
        # rounded above 1, a child would survive its parent.
        kept = shares.sum(dim=-1, keepdim=True).clamp(max=1.0)
        # What all depths read is read at once.
        projected = self.head.transition.of_states(states)
        columns = self._columns(places[:, 1:].transpose(0, 1), choices[:, 1:].transpose(0, 1))
        first = min(width * width, self._choices)
        said = choices[:, 0, :first]
        levels = [(shares[:, 0, :first], said, torch.full_like(said, -1))]
        last = tokens[wanted[:, :1]]
        numbers = 0
        for depth in range(1, self.depth):
            survival, said, _ = levels[-1]
            sure, picked = survival.topk(width)
            before = last.expand(-1, width) if depth == 1 else last.gather(1, picked // width)
            last = said.gather(1, picked)
            seeing = self._seeing(states[:, depth], projected[:, depth], last, before)
            scores = torch.bmm(seeing, columns[depth - 1].mT)
            chance, chosen = (scores.softmax(dim=-1) * kept[:, depth, None]).topk(width)
            levels.append(
                (
                    (sure[..., None] * chance).flatten(1),
                    choices[:, depth].gather(1, chosen.flatten(1)),
                    (numbers + picked).repeat_interleave(width, dim=1),
                )
            )
            numbers += said.shape[1]
        survival, said, parents = (torch.cat(part, dim=1) for part in zip(*levels, strict=True))
        ordered, order = survival.nan_to_num(0.0).sort(dim=1, descending=True, stable=True)
        ordered, order = ordered[:, :MAX_TREE_NODES], order[:, :MAX_TREE_NODES]
        return ordered, said.gather(1, order), order, parents.gather(1, order)

    def _columns(self, places: Tensor, tokens: Tensor) -> Tensor:
        """Rows of the language-model head for choices, [..., width]: the target's own where it lends them."""
        return exact(F.embedding(places if self.lender.rows is None else tokens, self._lent))

    def _seeing(self, states: Tensor, projected: Tensor, last: Tensor, before: Tensor) -> Tensor:
        """The states behind each beam, normed, [trees, width, width of the head].

        states: [trees, width of the head]. projected: of these; see `Transition`. last, before: int64[trees, width],
        the tokens of each beam.
        """
        seen = F.embedding(last, self._embeddings), F.embedding(before, self._embeddings)
        return exact(self.head.norm(self.head.transition.behind(states[:, None], projected[:, None], *seen)))


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

    def _fused(self, parts: Sequence[Part]) -> Sequence[Part]:
        """As they are: fused they are where the depths behind them are added."""
        return parts

    def _forward(self, parts: Sequence[Part], *, every: bool = False) -> list[Answer]:
        """The tree behind the last row of each part."""
        longer = [_longer(part, self.depth - 1) for part in parts]
        tokens, positions = told(longer)
        lasts, order, wanted = self._rows([len(part.tokens) for part in parts], tokens.device)
        states = joined([part.states for part in parts])
        *projected, residual = self.halves.before(tokens, positions, states, lasts, order)
        trees = self.halves.behind(attend(longer, *projected), residual, tokens, wanted, words_of(parts))
        nodes = zip(parts, *(column.tolist() for column in trees), strict=True)
        return [Answer(part.states, tree=_tree(*columns)) for part, *columns in nodes]

    def _rows(self, entries: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """`lasts` and `order` of `ParallelHalves._ahead`, `wanted` of its `_trees`, for texts with so many entries."""
        count, further = sum(entries), self.depth - 1
        numbers = torch.arange(count + further * len(entries), device=device)
        own, behind = numbers[:count].split(entries), numbers[count:].split([further] * len(entries))
        order = torch.cat([part for both in zip(own, behind, strict=True) for part in both])
        rows = numbers.split([some + further for some in entries])
        return torch.stack([some[-1] for some in own]), order, torch.stack([some[-self.depth :] for some in rows])


def _longer(part: Part, further: int) -> Part:
    """A part with rows for the entries behind its last one, which see what that sees and leave nothing behind."""
    last = part.positions[-1]
    return replace(
        part,
        tokens=[*part.tokens, *[part.tokens[-1]] * further],
        positions=[*part.positions, *range(last + 1, last + 1 + further)],
        visible=causal(len(part.tokens), part.states.device, further),
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
