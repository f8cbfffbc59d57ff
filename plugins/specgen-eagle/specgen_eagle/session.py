"""One sequence's side of drafting with a head: what the head has taken in of it, its keys and values, its tree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specgen import DraftSession, Features, Growth, TokenTree
from specgen_eagle.context_vocab import Borrowed

if TYPE_CHECKING:
    from specgen_eagle.drafter import Eagle

_FIRST_ROOM = 256

EMPTY = TokenTree()


@dataclass(frozen=True, slots=True)
class Answer:
    """What the head says of a part. states: [rows, width], its own; of the rows that it was to guess behind, the
    likeliest tokens and the chance of each. tree: what a parallel head says instead of these."""

    states: Tensor
    chances: Sequence[Sequence[float]] = ()
    tokens: Sequence[Sequence[int]] = ()
    tree: TokenTree = EMPTY


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one session in one forward of the head.

    states: [rows, width], the target's or the head's own before each token. visible: bool[rows, n], what each row sees
    of the last n rows in the cache once these are written. borrowed: what can be said behind them besides what the head
    says.
    """

    cache: Cache
    borrowed: Borrowed
    tokens: Sequence[int]
    positions: Sequence[int]
    states: Tensor
    visible: Tensor


@lru_cache(maxsize=64)
def causal(rows: int, device: torch.device, following: int = 0) -> Tensor:
    """bool[rows + following, rows + following]: each row sees itself and those before it; the `following` ones see all
    `rows`, and nobody sees them. Not to be changed."""
    visible = torch.ones(rows + following, rows + following, dtype=torch.bool, device=device).tril()
    visible[:, rows:] = False
    return visible


class Cache:
    """A session's keys and values, [kv_heads, room, head_dim]: `length` entries that stay, and a tree behind them.

    They are float32: a CPU's products of bfloat16 are compiled anew for each length.
    """

    def __init__(self) -> None:
        self.length = 0
        self._keys = self._values = torch.empty(0)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
        """Write new rows at the end of what `visible` spans, and attend each row to what it sees and all that stays.

        query: [heads, rows, head_dim], scaled; key, value: [kv_heads, rows, head_dim]; all of the cache's dtype, as is
        what is returned, [heads, rows, head_dim].
        """
        end = self.length + visible.shape[1]
        self._make_room(key, end)
        span = slice(end - key.shape[1], end)
        self._keys[:, span], self._values[:, span] = key, value
        grouped = query.reshape(key.shape[0], -1, query.shape[-1])
        scores = grouped @ self._keys[:, :end].transpose(1, 2)
        # All see what stays, so the mask is as small as the tree.
        behind = scores.view(-1, len(visible), end)[..., self.length :]
        behind.masked_fill_(~visible, -math.inf)
        attended: Tensor = scores.softmax(dim=-1) @ self._values[:, :end]
        return attended.reshape(query.shape)

    def _make_room(self, like: Tensor, end: int) -> None:
        room = self._keys.shape[1] if self._keys.ndim > 1 else 0
        if room >= end:
            return
        shape = like.shape[0], max(_FIRST_ROOM, 2 * end), like.shape[2]
        grown = [like.new_zeros(shape) for _ in range(2)]
        if room:
            grown[0][:, :room], grown[1][:, :room] = self._keys, self._values
        self._keys, self._values = grown


class Reading:
    """What a session's head has taken in since `start`, and what it has not.

    states: the target's, of all layers side by side, of entries that are `unread`. cache: keys and values of the
    others. root: what the head said of the last of them; `None` if there is none.
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

    def add(self, states: Tensor, window: int) -> None:
        """Entries that follow. While nobody asks, at most two windows are kept."""
        self.states.append(states)
        self.stop += len(states)
        if self.unread > 2 * window:
            self.cut(window)

    def cut(self, window: int) -> None:
        """If more than `window` entries are unread, the text begins anew so many entries back."""
        if self.unread > window:
            self.states = [torch.cat(self.states)[-window:].clone()]
            self.start, self.cache, self.root = self.stop - window, Cache(), None

    def take(self, most: int) -> tuple[int, Tensor]:
        """The position of the first unread entry, and the states of at most `most`."""
        states = self.states[0] if len(self.states) == 1 else torch.cat(self.states)
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
        self._borrowed = Borrowed(drafter.halves.lender, prompt)
        self.reading = Reading(0)

    def propose(self, max_nodes: int) -> TokenTree:
        """The likeliest nodes of a tree under the last id; none before the first commit."""
        return self._drafter.propose([self], [max_nodes])[0]

    @torch.inference_mode()
    def observe(self, features: Features) -> None:
        """Keep the states of positions that were not seen yet."""
        if not self.reading.stop or features.position > self.reading.stop:
            # A cached prefix has no states: the head sees the text from here on, as if it began there.
            self.reading = Reading(features.position)
        seen = self.reading.stop - features.position
        new = torch.cat([features.hidden[layer][seen:] for layer in self._drafter.layers], dim=-1)
        if len(new):
            self.reading.add(new, self._drafter.window)

    def commit(self, tokens: Sequence[int]) -> None:
        """Take in ids; the tree under the last one is gone."""
        self._ids.extend(tokens)
        self._borrowed.add(tokens)
        self._growth = None

    def close(self) -> None:
        """Nothing is held but memory."""
        self._drafter.open_sessions -= 1

    @property
    def is_ready(self) -> bool:
        """Whether there is a root. Not before the first commit: the first token does not wait for the head."""
        return len(self._ids) > self._prompt and (self.reading.unread > 0 or self.reading.root is not None)

    def entries(self, most: int) -> Part:
        """The next `most` of them as rows, each of which sees those before it; their states are still the target's."""
        first, states = self.reading.take(most)
        positions = range(first, first + len(states))
        tokens = self._ids[first + 1 : first + 1 + len(states)]
        visible = causal(len(states), states.device)
        return Part(self.reading.cache, self._borrowed, tokens, positions, states, visible)

    def advance(self, answer: Answer) -> None:
        """The rows of `entries` are done."""
        self.reading.cache.length += len(answer.states)
        self.reading.root = replace(answer, states=answer.states[-1:])

    def grow(self, kept: int) -> Growth:
        """A new tree under the last id, of which `kept` nodes will be taken, with the root's children."""
        growth = self._growth = Growth(kept)
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
        tokens = [growth.tokens[node] for node in growth.picked]
        return Part(self.reading.cache, self._borrowed, tokens, positions, states, visible)

    def keep(self, answer: Tensor) -> None:
        """The states of the rows of `level`."""
        self._level.append(answer)

    def tree(self, max_nodes: int) -> TokenTree:
        """The likeliest nodes of the tree that was grown; the empty tree if none was."""
        return self._growth.best(max_nodes) if self._growth and max_nodes else EMPTY
