"""Drafting with an EAGLE-3 head: one small packed forward per depth for the whole batch, the likeliest nodes grow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from specgen import Drafter, DraftHints, DraftSession, Levels, TokenTree, Wanted
from specgen_eagle.context_vocab import NOTHING, TargetRows
from specgen_eagle.head import EagleHead
from specgen_eagle.options import WINDOW
from specgen_eagle.session import Answer, EagleSession, Part

_ROWS_PER_FORWARD = 512
_EXAMPLE_ROWS = 16
# A level costs little beside a step of the target: grow what is unlikely too, the budget may leave it out.
LEAST_SURVIVAL = 0.02


class Halves:
    """What the head does before its attention, and behind it, for rows of any texts.

    embeddings: the target's, [vocabulary, width]. children: guesses for each row. lender: of words that the head cannot
    say.
    """

    def __init__(self, head: EagleHead, embeddings: Tensor, children: int, lender: TargetRows | None = None) -> None:
        self.head = head
        self.lender = lender or TargetRows(head, None)
        self.children = min(children, head.config.vocabulary)
        self._embeddings = embeddings.detach()
        self._tokens = head.tokens
        self.before: Callable[..., tuple[Tensor, ...]] = self._before
        self.behind: Callable[..., tuple[Tensor, ...]] = self._behind

    def compile(self, compile_rows: Callable[..., Any]) -> None:
        """Compile both."""
        rows, square, states, attended = self._examples()
        self.before = compile_rows(self._before, [(rows, 0), (rows, 0), (states, 0)])
        behind = [(attended, 1), (states, 0), (square, (0, 1)), (square, (0, 1))]
        self.behind = compile_rows(self._behind, behind)

    def _examples(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Whole numbers in a row and in a square, states and attended of some rows."""
        count, like = _EXAMPLE_ROWS, self._embeddings
        rows = torch.arange(count, device=like.device)
        random = torch.Generator().manual_seed(0)
        states = torch.randn(count, self.head.fc.out_features, generator=random).to(like)
        attended = exact(torch.randn(self.head.heads, count, self.head.head_dim, generator=random).to(like))
        return rows, rows.repeat(count, 1), states, attended

    def _before(self, tokens: Tensor, positions: Tensor, states: Tensor) -> tuple[Tensor, ...]:
        """Query [heads, rows, head_dim], scaled, key and value [kv_heads, rows, head_dim], in float32 at least, and the
        residual path.

        states: [rows, width], the target's, fused, or the head's own before each token.
        """
        embedded = F.embedding(tokens, self._embeddings)
        query, key, value, residual = self.head.project(embedded, states, positions)
        return exact(query) * self.head.head_dim**-0.5, exact(key), exact(value), residual

    def _behind(self, attended: Tensor, residual: Tensor, wanted: Tensor, words: Tensor) -> tuple[Tensor, ...]:
        """The head's states [rows, width]; for each of the rows `wanted` the chances of its likeliest tokens, and
        these, [texts, wanted, children] both.

        wanted: int64[texts, wanted], numbers of rows. words: as in `_scores`.
        """
        states = self._finished(attended, residual)
        logits = self._scores(states[wanted], words).float()
        top, places = logits.topk(self.children)
        return states, (top - logits.logsumexp(dim=-1, keepdim=True)).exp(), self._said(places, words)

    def _finished(self, attended: Tensor, residual: Tensor) -> Tensor:
        return self.head.finish(attended.to(residual.dtype), residual)

    def _scores(self, states: Tensor, words: Tensor) -> Tensor:
        """Logits of what the head can say and of what is borrowed, [texts, rows, vocabulary + n], in float32 at least.

        states: [texts, rows, width]. words: int64[texts, n], tokens that may be said in a text too; -1 is none.
        """
        normed = self.head.norm(states)
        own = exact(self.head.lm_head(normed))
        rows = exact(F.embedding(words.clamp(min=0), self._lent))
        more = torch.bmm(exact(normed), rows.mT)
        return torch.cat([own, more.masked_fill((words < 0)[:, None], -math.inf)], dim=-1)

    @property
    def _lent(self) -> Tensor:
        """Rows of the tokens; of a head that borrows nothing, some."""
        return self.head.lm_head.weight if self.lender.rows is None else self.lender.rows

    def _said(self, places: Tensor, words: Tensor) -> Tensor:
        """The tokens at places of `_scores`, int64[texts, rows, n] both."""
        sayable = torch.cat([self._tokens.expand(len(words), -1), words], dim=-1)
        return sayable.gather(1, places.flatten(1)).view_as(places)


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

    def _fused(self, parts: Sequence[Part]) -> Sequence[Part]:
        """The same with the head's states in place of the target's."""
        fused = self.head.fuse(joined([part.states for part in parts])).split([len(part.tokens) for part in parts])
        return [replace(part, states=states) for part, states in zip(parts, fused, strict=True)]

    def _forward(self, parts: Sequence[Part], *, every: bool = False) -> list[Answer]:
        """What the head says of the rows of all parts, whose keys and values are written to their caches; it guesses
        behind `every` row, or behind the last one of each part."""
        rows = [len(part.tokens) for part in parts]
        *projected, residual = self.halves.before(*told(parts), joined([part.states for part in parts]))
        numbers = torch.arange(sum(rows), device=residual.device).split(rows)
        wanted = pad_sequence([some if every else some[-1:] for some in numbers], batch_first=True)
        states, chances, guesses = self.halves.behind(attend(parts, *projected), residual, wanted, words_of(parts))
        return [
            Answer(mine, some[: len(mine)], guessed[: len(mine)])
            for mine, some, guessed in zip(states.split(rows), chances.tolist(), guesses.tolist(), strict=True)
        ]


def told(parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """The tokens and positions of all rows, int64[rows] both."""
    device = parts[0].states.device
    tokens = torch.tensor([token for part in parts for token in part.tokens], device=device)
    return tokens, torch.tensor([place for part in parts for place in part.positions], device=device)


def attend(parts: Sequence[Part], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Write the keys and values of all rows of all parts to their caches; what the rows attended to,
    [heads, rows, head_dim]."""
    rows = [len(part.tokens) for part in parts]
    split = (projected.split(rows, dim=1) for projected in (query, key, value))
    attended = [part.cache.attend(*own, part.visible) for part, *own in zip(parts, *split, strict=True)]
    return joined(attended, dim=1)


def words_of(parts: Sequence[Part]) -> Tensor:
    """What the text of each part may say besides, int64[parts, n]; -1 is none."""
    return pad_sequence([part.borrowed.words for part in parts], batch_first=True, padding_value=NOTHING)


def exact(rows: Tensor) -> Tensor:
    """In float32 at least."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Side by side, contiguous."""
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(list(parts), dim=dim)
