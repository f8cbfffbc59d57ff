"""Drafting with an EAGLE-3 head: one small packed forward per depth for the whole batch, the likeliest nodes grow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from specgen import (
    Drafter,
    DrafterSetup,
    DraftHints,
    DraftSession,
    Features,
    Growth,
    InvalidRequest,
    Levels,
    TokenTree,
    Wanted,
    pack_linears,
    read_options,
)
from specgen_eagle.checkpoint import load_head
from specgen_eagle.head import EagleHead

_ROWS_PER_FORWARD = 512
_FIRST_ROOM = 256
_EXAMPLE_ROWS = 16
# A level costs little beside a step of the target: grow what is unlikely too, the budget may leave it out.
_LEAST_SURVIVAL = 0.02
_EMPTY = TokenTree((), (), ())

T = TypeVar("T")


class EagleOptions(msgspec.Struct, frozen=True):
    """path: folder of the head, required. depth of the tree. width: nodes grown per depth, and children of each."""

    path: Any = None
    depth: Annotated[int, msgspec.Meta(ge=1, le=16)] = 6
    width: Annotated[int, msgspec.Meta(ge=1, le=16)] = 6


def eagle(setup: DrafterSetup) -> Eagle:
    """The factory. Raises InvalidRequest or DrafterMismatch for a head that cannot draft for the target, by name."""
    options = read_options("drafter 'eagle'", setup.options, EagleOptions)
    if options.path is None:
        raise InvalidRequest("drafter 'eagle' needs the option path: the folder of a head", param="path")
    if setup.target is None:
        raise InvalidRequest("drafter 'eagle' needs the target's model, to share its embeddings", param="path")
    head = load_head(Path(options.path), setup.target)
    pack_linears(head)
    halves = Halves(head, setup.target.get_input_embeddings().weight, options.width)
    halves.compile(setup.compile_rows)
    return Eagle(halves, options.depth)


class Halves:
    """What the head does before its attention, and behind it, for rows of any sequences.

    embeddings: the target's, [vocabulary, width]. children: guesses for each row.
    """

    def __init__(self, head: EagleHead, embeddings: Tensor, children: int) -> None:
        self.head = head
        self.children = min(children, head.config.vocabulary)
        self._embeddings = embeddings.detach()
        self._tokens = head.tokens
        self.before, self.behind = self._before, self._behind

    def compile(self, compile_rows: Callable[..., Any]) -> None:
        """Compile both."""
        rows, like = _EXAMPLE_ROWS, self._embeddings
        tokens = torch.zeros(rows, dtype=torch.int64, device=like.device)
        positions = torch.arange(rows, device=like.device)
        random = torch.Generator().manual_seed(0)
        states = torch.randn(rows, self.head.fc.out_features, generator=random).to(like)
        attended = torch.randn(self.head.heads, rows, self.head.head_dim, generator=random).to(like)
        self.before = compile_rows(self._before, [(tokens, 0), (positions, 0), (states, 0)])
        self.behind = compile_rows(self._behind, [(attended, 1), (states, 0), (positions, 0)])

    def _before(self, tokens: Tensor, positions: Tensor, states: Tensor) -> tuple[Tensor, ...]:
        """Query [heads, rows, head_dim], key and value [kv_heads, rows, head_dim], and the residual path.

        states: [rows, width], the target's or the head's own before each token.
        """
        return self.head.project(F.embedding(tokens, self._embeddings), states, positions)

    def _behind(self, attended: Tensor, residual: Tensor, wanted: Tensor) -> tuple[Tensor, ...]:
        """The head's states [rows, width]; for each of the rows `wanted` the chances of its likeliest tokens, and
        these, [wanted, children] both."""
        states = self.head.finish(attended, residual)
        logits = self.head.logits(states[wanted]).float()
        top, places = logits.topk(self.children)
        return states, (top - logits.logsumexp(dim=-1, keepdim=True)).exp(), self._tokens[places]


class Eagle(Drafter):
    """Drafts with the head of `halves`, trees of up to `depth` levels."""

    def __init__(self, halves: Halves, depth: int) -> None:
        self.halves, self.head = halves, halves.head
        self.depth, self.width = depth, halves.children
        self.layers = self.head.config.layers
        self.wanted = Wanted(layers=self.layers)
        self._levels = Levels()
        self.open_sessions = 0

    def open(self, prompt: Sequence[int], hints: DraftHints) -> DraftSession:
        """A session with keys and values of its own, empty until the target's first forward."""
        self.open_sessions += 1
        return EagleSession(self, prompt)

    @torch.inference_mode()
    def propose(self, sessions: Sequence[DraftSession], max_nodes: Sequence[int]) -> list[TokenTree]:
        """Grow one tree per session, all of them together in each forward."""
        asked = [session for session in sessions if isinstance(session, EagleSession)]
        ready = [session for session, most in zip(asked, max_nodes, strict=True) if most and session.is_ready]
        self._read(ready)
        growths = [(session, session.grow()) for session in ready]
        for _ in range(1, self.depth):
            growths = [(session, growth) for session, growth in growths if growth.pick(self.width, _LEAST_SURVIVAL)]
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
        behind = [session for session in sessions if session.reading.unread]
        while behind:
            room = max(1, _ROWS_PER_FORWARD // len(behind))
            answers = self._forward([session.entries(room) for session in behind])
            for session, answer in zip(behind, answers, strict=True):
                session.advance(answer)
            behind = [session for session in behind if session.reading.unread]

    def _forward(self, parts: Sequence[Part], *, every: bool = False) -> list[Answer]:
        """What the head says of the rows of all parts, whose keys and values are written to their caches; it guesses
        behind `every` row, or behind the last one of each part."""
        rows = [len(part.tokens) for part in parts]
        ends = list(accumulate(rows))
        asked = rows if every else [1] * len(parts)
        device = parts[0].states.device
        tokens = torch.tensor([token for part in parts for token in part.tokens], device=device)
        positions = torch.tensor([place for part in parts for place in part.positions], device=device)
        wanted = torch.arange(ends[-1], device=device) if every else torch.tensor(ends, device=device) - 1
        query, key, value, residual = self.halves.before(tokens, positions, _joined([part.states for part in parts]))
        attended = [
            part.cache.attend(q, k, v, part.visible)
            for part, q, k, v in zip(
                parts, query.split(rows, dim=1), key.split(rows, dim=1), value.split(rows, dim=1), strict=True
            )
        ]
        states, chances, guesses = self.halves.behind(_joined(attended, dim=1), residual, wanted)
        return [
            Answer(mine, some, guessed)
            for mine, some, guessed in zip(
                states.split(rows), _dealt(chances.tolist(), asked), _dealt(guesses.tolist(), asked), strict=True
            )
        ]


def _joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def _dealt(rows: Sequence[T], counts: Sequence[int]) -> list[Sequence[T]]:
    """The first count, then the next, and so on."""
    return [rows[end - count : end] for count, end in zip(counts, accumulate(counts), strict=True)]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the head says of a part. states: [rows, width]; of the rows that it was to guess behind, the likeliest
    tokens and the chance of each."""

    states: Tensor
    chances: Sequence[Sequence[float]]
    tokens: Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one session in one forward of the head.

    states: [rows, width], the target's or the head's own before each token. visible: bool[rows, n], what each row sees
    of the last n rows in the cache once these are written.
    """

    cache: Cache
    tokens: Sequence[int]
    positions: Sequence[int]
    states: Tensor
    visible: Tensor


class Cache:
    """A session's keys and values, [kv_heads, room, head_dim]: `length` entries that stay, and a tree behind them.

    They are float32: a CPU's products of bfloat16 are compiled anew for each length.
    """

    def __init__(self) -> None:
        self.length = 0
        self._keys = self._values = torch.empty(0)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
        """Write new rows at the end of what `visible` spans, and attend each row to what it sees and all that stays.

        query: [heads, rows, head_dim]; key, value: [kv_heads, rows, head_dim]. Returns [heads, rows, head_dim].
        """
        end = self.length + visible.shape[1]
        self._make_room(key, end)
        span = slice(end - key.shape[1], end)
        self._keys[:, span], self._values[:, span] = key, value
        grouped = query.reshape(key.shape[0], -1, query.shape[-1]).to(self._keys.dtype) * query.shape[-1] ** -0.5
        scores = grouped @ self._keys[:, :end].transpose(1, 2)
        # All see what stays, so the mask is as small as the tree.
        behind = scores.view(-1, len(visible), end)[..., self.length :]
        behind.masked_fill_(~visible, -math.inf)
        attended: Tensor = scores.softmax(dim=-1) @ self._values[:, :end]
        return attended.reshape(query.shape).to(query.dtype)

    def _make_room(self, like: Tensor, end: int) -> None:
        room = self._keys.shape[1] if self._keys.ndim > 1 else 0
        if room >= end:
            return
        shape = like.shape[0], max(_FIRST_ROOM, 2 * end), like.shape[2]
        dtype = torch.promote_types(like.dtype, torch.float32)
        grown = [like.new_zeros(shape, dtype=dtype) for _ in range(2)]
        if room:
            grown[0][:, :room], grown[1][:, :room] = self._keys, self._values
        self._keys, self._values = grown


class Reading:
    """What a session's head has taken in since `start`, and what it has not.

    states: the target's, fused, of entries that are `unread`. cache: keys and values of the others. root: the head's
    own states of the last of them, [1, width], and its guesses; `None` if there is none.
    """

    def __init__(self, start: int) -> None:
        self.start = self.stop = start
        self.states: list[Tensor] = []
        self.cache = Cache()
        self.root: Answer | None = None

    @property
    def unread(self) -> int:
        """Entries that the head has not taken in."""
        return self.stop - self.start - self.cache.length

    def add(self, states: Tensor) -> None:
        """Entries that follow."""
        self.states.append(states)
        self.stop += len(states)

    def take(self, most: int) -> tuple[int, Tensor]:
        """The position of the first unread entry, and the states of at most `most`."""
        states = torch.cat(self.states)
        states, rest = states[:most], states[most:]
        self.states = [rest] if len(rest) else []
        return self.start + self.cache.length, states


class EagleSession(DraftSession):
    """Entry t pairs the target's states at position t with the token at t + 1."""

    def __init__(self, drafter: Eagle, prompt: Sequence[int]) -> None:
        self._drafter = drafter
        self._ids = list(prompt)
        self._prompt = len(prompt)
        self._level: list[Tensor] = []
        self._growth: Growth | None = None
        self.reading = Reading(0)

    def propose(self, max_nodes: int) -> TokenTree:
        """The likeliest nodes of a tree under the last id; none before the first commit."""
        return self._drafter.propose([self], [max_nodes])[0]

    @torch.inference_mode()
    def observe(self, features: Features) -> None:
        """Keep the states of positions that were not seen yet."""
        rows = torch.cat([features.hidden[layer] for layer in self._drafter.layers], dim=-1)
        if not self.reading.stop or features.position > self.reading.stop:
            # A cached prefix has no states: the head sees the text from here on, as if it began there.
            self.reading = Reading(features.position)
        new = rows[self.reading.stop - features.position :]
        if len(new):
            self.reading.add(self._drafter.head.fuse(new))

    def commit(self, tokens: Sequence[int]) -> None:
        """Take in ids; the tree under the last one is gone."""
        self._ids.extend(tokens)
        self._growth = None

    def close(self) -> None:
        """Nothing is held but memory."""
        self._drafter.open_sessions -= 1

    @property
    def is_ready(self) -> bool:
        """Whether there is a root. Not before the first commit: the first token does not wait for the head."""
        return len(self._ids) > self._prompt and (self.reading.unread > 0 or self.reading.root is not None)

    def entries(self, most: int) -> Part:
        """The next `most` of them as rows, each of which sees those before it."""
        first, states = self.reading.take(most)
        positions = range(first, first + len(states))
        visible = torch.ones(len(states), len(states), dtype=torch.bool, device=states.device).tril()
        return Part(self.reading.cache, self._ids[first + 1 : first + 1 + len(states)], positions, states, visible)

    def advance(self, answer: Answer) -> None:
        """The rows of `entries` are done."""
        self.reading.cache.length += len(answer.states)
        self.reading.root = replace(answer, states=answer.states[-1:])

    def grow(self) -> Growth:
        """A new tree under the last id, with the root's children."""
        growth = self._growth = Growth()
        self._level.clear()
        if self.reading.root is not None:
            growth.extend(self.reading.root.chances, self.reading.root.tokens)
            self._level.append(self.reading.root.states)
        return growth

    def level(self, growth: Growth) -> Part:
        """The picked nodes as rows, each with its parent's states."""
        computed = torch.cat(self._level)
        parents = [growth.parents[node] for node in growth.picked]
        states = computed[[0 if parent < 0 else 1 + growth.row[parent] for parent in parents]]
        last = len(self._ids) - 2
        positions = [last + growth.depth[node] for node in growth.picked]
        visible = growth.visible().to(states.device)
        return Part(self.reading.cache, [growth.tokens[node] for node in growth.picked], positions, states, visible)

    def keep(self, answer: Tensor) -> None:
        """The states of the rows of `level`."""
        self._level.append(answer)

    def tree(self, max_nodes: int) -> TokenTree:
        """The likeliest nodes of the tree that was grown; the empty tree if none was."""
        return self._growth.best(max_nodes) if self._growth and max_nodes else _EMPTY
