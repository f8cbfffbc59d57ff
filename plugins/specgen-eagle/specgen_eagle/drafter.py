"""Drafting with an EAGLE-3 head: one small packed forward per depth for the whole batch, the likeliest nodes grow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from specgen import Drafter, DraftHints, DraftSession, Levels, TokenTree, Wanted
from specgen_eagle.borrowed import Lender
from specgen_eagle.head import EagleHead
from specgen_eagle.session import Answer, EagleSession, Part

_ROWS_PER_FORWARD = 512
_EXAMPLE_ROWS = 16
WINDOW = 256
# A level costs little beside a step of the target: grow what is unlikely too, the budget may leave it out.
LEAST_SURVIVAL = 0.02

T = TypeVar("T")


class Halves:
    """What the head does before its attention, and behind it, for rows of any sequences.

    embeddings: the target's, [vocabulary, width]. children: guesses for each row. lender: of words that the head cannot
    say.
    """

    def __init__(self, head: EagleHead, embeddings: Tensor, children: int, lender: Lender | None = None) -> None:
        self.head = head
        self.lender = lender or Lender(head, None)
        self.children = min(children, head.config.vocabulary)
        self._embeddings = embeddings.detach()
        self._tokens = head.tokens
        self.before: Callable[..., tuple[Tensor, ...]] = self._before
        self.behind: Callable[..., tuple[Tensor, ...]] = self._behind

    def compile(self, compile_rows: Callable[..., Any]) -> None:
        """Compile both."""
        tokens, positions, states, attended = self._examples()
        self.before = compile_rows(self._before, [(tokens, 0), (positions, 0), (states, 0)])
        borrowed = self._borrowed_examples(states, positions)
        self.behind = compile_rows(self._behind, [(attended, 1), (states, 0), (positions, 0), *borrowed])

    def _examples(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens, positions, states and attended of some rows."""
        rows, like = _EXAMPLE_ROWS, self._embeddings
        tokens = torch.zeros(rows, dtype=torch.int64, device=like.device)
        positions = torch.arange(rows, device=like.device)
        random = torch.Generator().manual_seed(0)
        states = torch.randn(rows, self.head.fc.out_features, generator=random).to(like)
        attended = torch.randn(self.head.heads, rows, self.head.head_dim, generator=random).to(like)
        return tokens, positions, states, attended

    def _borrowed_examples(self, states: Tensor, positions: Tensor) -> list[tuple[Tensor, int]]:
        """Texts, columns, borrowed and owners, of one text."""
        one = torch.zeros_like(positions)
        return [(one, 0), (states.float().T.contiguous(), 1), (positions, 0), (one, 0)]

    def _before(self, tokens: Tensor, positions: Tensor, states: Tensor) -> tuple[Tensor, ...]:
        """Query [heads, rows, head_dim], key and value [kv_heads, rows, head_dim], and the residual path.

        states: [rows, width], the target's or the head's own before each token.
        """
        return self.head.project(F.embedding(tokens, self._embeddings), states, positions)

    def _behind(self, attended: Tensor, residual: Tensor, wanted: Tensor, *borrowed: Tensor) -> tuple[Tensor, ...]:
        """The head's states [rows, width]; for each of the rows `wanted` the chances of its likeliest tokens, and
        these, [wanted, children] both. borrowed: as in `_scores`."""
        states = self.head.finish(attended, residual)
        scores, sayable = self._scores(states[wanted], *borrowed)
        logits = scores.float()
        top, places = logits.topk(self.children)
        return states, (top - logits.logsumexp(dim=-1, keepdim=True)).exp(), sayable[places]

    def _scores(
        self, states: Tensor, texts: Tensor, columns: Tensor, lent: Tensor, owners: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits of what the head can say and of what is borrowed, [rows, vocabulary + n], in float32 at least, and the
        token of each, int64[vocabulary + n].

        texts: int64[rows], the text of each. columns: float32[width, n], lent: int64[n], owners: int64[n], tokens that
        may be said too, in the text that is their owner; -1 is none.
        """
        normed = self.head.norm(states)
        own = exact(self.head.lm_head(normed))
        more = torch.bmm(exact(normed)[None], columns.to(own.dtype)[None])[0]
        strange = (owners != texts[:, None]) | (lent < 0)
        return torch.cat([own, more.masked_fill(strange, -math.inf)], dim=-1), torch.cat([self._tokens, lent])


class Eagle(Drafter):
    """Drafts with the head of `halves`, trees of up to `depth` levels.

    Of a text that it comes to late, a long prompt or after not being asked for long, it reads the last `window` entries
    alone: the more would cost more than they help.
    """

    session: type[EagleSession] = EagleSession

    def __init__(self, halves: Halves, depth: int, window: int = WINDOW) -> None:
        self.halves, self.head, self.window = halves, halves.head, window
        self.depth, self.width = depth, halves.children
        self.layers = self.head.config.layers
        self.wanted = Wanted(layers=self.layers)
        self._levels = Levels()
        self.open_sessions = 0

    def open(self, prompt: Sequence[int], hints: DraftHints) -> DraftSession:
        """A session with keys and values of its own, empty until the target's first forward."""
        self.open_sessions += 1
        return self.session(self, prompt)

    @torch.inference_mode()
    def propose(self, sessions: Sequence[DraftSession], max_nodes: Sequence[int]) -> list[TokenTree]:
        """Grow one tree per session, all of them together in each forward."""
        asked = [session for session in sessions if isinstance(session, EagleSession)]
        ready = [(session, most) for session, most in zip(asked, max_nodes, strict=True) if most and session.is_ready]
        self._read([session for session, _ in ready])
        growths = [(session, session.grow(most)) for session, most in ready]
        for _ in range(1, self.depth):
            growths = [(session, growth) for session, growth in growths if growth.pick(self.width, LEAST_SURVIVAL)]
            if not growths or not self._levels.pay([growth for _, growth in growths], self.token_seconds):
                break
            with self._levels.timed():
                parts = [session.level(growth) for session, growth in growths]
                for (session, growth), answer in zip(growths, self._forward(parts, every=True), strict=True):
                    session.keep(answer.states)
                    growth.extend(answer.chances, answer.tokens)
        return [session.tree(most) for session, most in zip(asked, max_nodes, strict=True)]

    def check(self) -> None:
        """Raise RuntimeError if more sessions were closed than opened."""
        if self.open_sessions < 0:
            raise RuntimeError("eagle: a session was closed twice")

    def _read(self, sessions: Sequence[EagleSession]) -> None:
        """Take in what the target has computed since the last time; the last entry is the tree's root."""
        for session in sessions:
            session.reading.cut(self.window)
        behind = [session for session in sessions if session.reading.unread]
        while behind:
            room = max(1, _ROWS_PER_FORWARD // len(behind))
            answers = self._forward(self._fused([session.entries(room) for session in behind]))
            for session, answer in zip(behind, answers, strict=True):
                session.advance(answer)
            behind = [session for session in behind if session.reading.unread]

    def _fused(self, parts: Sequence[Part]) -> list[Part]:
        """The same with the head's states in place of the target's."""
        fused = self.head.fuse(_joined([part.states for part in parts])).split([len(part.tokens) for part in parts])
        return [replace(part, states=states) for part, states in zip(parts, fused, strict=True)]

    def _forward(self, parts: Sequence[Part], *, every: bool = False) -> list[Answer]:
        """What the head says of the rows of all parts, whose keys and values are written to their caches; it guesses
        behind `every` row, or behind the last one of each part."""
        rows = [len(part.tokens) for part in parts]
        ends = list(accumulate(rows))
        asked = rows if every else [1] * len(parts)
        device = parts[0].states.device
        wanted = torch.arange(ends[-1], device=device) if every else torch.tensor(ends, device=device) - 1
        _, attended, residual = attend(self.halves, parts)
        states, chances, guesses = self.halves.behind(attended, residual, wanted, *borrowed_by(parts, asked))
        return [
            Answer(mine, some, guessed)
            for mine, some, guessed in zip(
                states.split(rows), _dealt(chances.tolist(), asked), _dealt(guesses.tolist(), asked), strict=True
            )
        ]


def attend(halves: Halves, parts: Sequence[Part]) -> tuple[Tensor, Tensor, Tensor]:
    """Write the keys and values of all rows of all parts to their caches. Answers their tokens int64[rows], what they
    attended to [heads, rows, head_dim], and the residual path [rows, width]."""
    rows = [len(part.tokens) for part in parts]
    device = parts[0].states.device
    tokens = torch.tensor([token for part in parts for token in part.tokens], device=device)
    positions = torch.tensor([place for part in parts for place in part.positions], device=device)
    *projected, residual = halves.before(tokens, positions, _joined([part.states for part in parts]))
    # Once for all parts, not for each of many.
    query, key, value = map(exact, projected)
    query = query * query.shape[-1] ** -0.5
    attended = [
        part.cache.attend(q, k, v, part.visible)
        for part, q, k, v in zip(
            parts, query.split(rows, dim=1), key.split(rows, dim=1), value.split(rows, dim=1), strict=True
        )
    ]
    return tokens, _joined(attended, dim=1).to(residual.dtype), residual


def borrowed_by(parts: Sequence[Part], asked: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the rows that are asked, the texts; what these may say besides, and whose it is: see `Halves`."""
    numbers = torch.arange(len(parts), device=parts[0].states.device)
    tokens, columns = zip(*(part.borrowed.fetch() for part in parts), strict=True)
    return (
        numbers.repeat_interleave(torch.tensor(asked, device=numbers.device)),
        _joined(columns, dim=1),
        _joined(tokens),
        numbers.repeat_interleave(torch.tensor(list(map(len, tokens)), device=numbers.device)),
    )


def exact(rows: Tensor) -> Tensor:
    """In float32 at least."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def _dealt(rows: Sequence[T], counts: Sequence[int]) -> list[Sequence[T]]:
    """The first count, then the next, and so on."""
    return [rows[end - count : end] for count, end in zip(counts, accumulate(counts), strict=True)]
