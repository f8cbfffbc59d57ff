"""A smaller causal LM of the same vocabulary drafts a tree (Leviathan et al. 2023; tree growth as in EAGLE-2, Li et
al. 2024): one packed forward per depth for the whole batch, the most confident nodes grow, the best nodes are offered.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specgen.draft.drafter import Drafter, DraftHints, DraftSession
from specgen.draft.growth import Growth, Levels
from specgen.errors import OutOfPages
from specgen.kv.pool import BlockTable
from specgen.kv.prefix_cache import PrefixCache
from specgen.kv.radix_tree import CacheKey
from specgen.lora.adapter import LoraWeights
from specgen.model.runner import ModelRunner
from specgen.model.segment import Segment
from specgen.types import TokenTree

_ROWS_PER_FORWARD = 512


class DraftModel(Drafter):
    """Drafts with `model`, tokens below `vocab_size` alone.

    depth: levels of a tree, at least 1. width: nodes grown per level, and children of each, at least 1.
    """

    def __init__(self, model: ModelRunner, vocab_size: int, *, depth: int = 5, width: int = 3) -> None:
        self.model = model
        self.vocab_size = vocab_size
        self.depth, self.width = depth, width
        self.prefix = PrefixCache(model.pool)
        self._levels = Levels()
        self._open = 0

    def open(self, prompt: Sequence[int], hints: DraftHints) -> DraftModelSession:
        """A session with a table of its own in the draft model's pool; the prompt is read after the first commit."""
        self._open += 1
        return DraftModelSession(self, prompt, hints)

    def closed(self) -> None:
        """A session was closed."""
        self._open -= 1

    def propose(self, sessions: Sequence[DraftSession], max_nodes: Sequence[int]) -> list[TokenTree]:
        """Grow one tree per session, all of them together in each forward."""
        growths = [
            session.grow(most)
            for session, most in zip(sessions, max_nodes, strict=True)
            if isinstance(session, DraftModelSession)
        ]
        alive = [growth for growth in growths if growth.session.reserve(self.depth * self.width)]
        self._read(alive)
        for _ in range(1, self.depth):
            alive = [growth for growth in alive if growth.pick(self.width)]
            if not alive or not self._levels.pay(alive, self.token_seconds):
                break
            with self._levels.timed():
                logits = self.model.forward([growth.segment() for growth in alive]).logits
                for growth, rows in zip(alive, logits.split([len(g.picked) for g in alive]), strict=True):
                    growth.read(rows[:, : self.vocab_size], self.width)
        return [growth.best(growth.kept) for growth in growths]

    def check(self) -> None:
        """Raise RuntimeError if pages are held though no session is open."""
        self.model.pool.check()
        self.prefix.check()
        if not self._open and self.model.pool.open_tables:
            raise RuntimeError("draft model: tables are open without a session")

    def _read(self, growths: Sequence[_Growth]) -> None:
        """Bring every session's KV up to its last committed token; its logits are the first level of the tree."""
        behind = list(growths)
        while behind:
            room = max(1, _ROWS_PER_FORWARD // len(behind))
            segments = [growth.session.unread(room) for growth in behind]
            rows = iter(self.model.forward(segments).logits)
            for growth, segment in zip(behind, segments, strict=True):
                growth.session.table.commit(len(segment.tokens))
                if segment.logits:
                    growth.read(next(rows)[None, : self.vocab_size], self.width)
            behind = [growth for growth in behind if growth.session.is_behind]


class DraftModelSession(DraftSession):
    """`ids` are those committed so far; the rows of `table` that are written stand for their beginning."""

    def __init__(self, drafter: DraftModel, prompt: Sequence[int], hints: DraftHints) -> None:
        self._drafter = drafter
        self._adapter = hints.adapter
        self._key = CacheKey(revision=hints.adapter.revision if hints.adapter else "", tenant=hints.cache_salt)
        self.ids = list(prompt)
        self._prompt_length = len(prompt)
        self.table: BlockTable = drafter.model.pool.open()
        self._adopted = 0
        self._growth: _Growth | None = None

    def propose(self, max_nodes: int) -> TokenTree:
        """As `DraftModel.propose`, alone."""
        return self._drafter.propose([self], [max_nodes])[0]

    def commit(self, tokens: Sequence[int]) -> None:
        """Keep the rows of the committed path that the last growth has computed; the rest is read again later."""
        if self._growth and not self.is_behind:
            self.table.commit(0, self._growth.rows_along(tokens))
        self._growth = None
        self.ids.extend(tokens)

    def revise(self, kept: int, tokens: Sequence[int]) -> None:
        """Take back all ids behind the first `kept`, then commit `tokens`."""
        if kept < len(self.ids):
            self._growth = None
            del self.ids[kept:]
            self.table.rewind(kept)
            if kept < self._adopted:
                # Rows that others may read are not written again: the next reading adopts anew.
                self.table.rewind(0)
                self.table.trim(0)
                self._adopted = 0
        self.commit(tokens)

    def close(self) -> None:
        """Leave what was read to the drafter's prefix cache."""
        self._drafter.prefix.retire(self._key, self.ids, self.table)
        self._drafter.closed()

    def grow(self, kept: int) -> _Growth:
        """Begin a tree of which `kept` nodes will be taken."""
        self._growth = _Growth(self, kept)
        return self._growth

    @property
    def adapter(self) -> LoraWeights | None:
        """What the draft model runs under."""
        return self._adapter.draft_weights if self._adapter else None

    @property
    def is_behind(self) -> bool:
        """Whether there are ids that the model has not read."""
        return self.table.length < len(self.ids)

    def reserve(self, tree_rows: int) -> bool:
        """Own slots for all ids and a tree's rows; False when the pool or the context has no room.

        And before the first commit: the first token does not wait until another model has read the prompt.
        """
        if len(self.ids) == self._prompt_length:
            return False
        if not self.is_behind:
            # The last id is read again: its logits are needed and were not kept.
            self.table.rewind(len(self.ids) - 1)
        if len(self.ids) + self._drafter.depth > self._drafter.model.context_length:
            return False
        if not self.table.pages:
            lease = self._drafter.prefix.match(self._key, self.ids)
            self.table.adopt(lease.pages, lease.tokens)
            self._adopted = lease.tokens
        try:
            self.table.reserve(len(self.ids) + tree_rows)
        except OutOfPages:
            return False
        return True

    def unread(self, most: int) -> Segment:
        """The next ids to read, at most `most`, with logits wanted behind the last of all."""
        size = self._drafter.model.vocab_size
        start = self.table.length
        stop = min(len(self.ids), start + most)
        wanted = (stop - start - 1,) if stop == len(self.ids) else ()
        # Models of one tokenizer may be padded to vocabularies of different sizes; what is there means nothing.
        tokens = [token if token < size else 0 for token in self.ids[start:stop]]
        return Segment(self.table, tokens, range(start, stop), None, wanted, self.adapter)


class _Growth(Growth):
    """A tree under one session's last id."""

    def __init__(self, session: DraftModelSession, kept: int) -> None:
        super().__init__(kept)
        self.session = session

    def read(self, logits: Tensor, width: int) -> None:
        """Hang the `width` likeliest tokens under each picked node, given its row of logits."""
        chances, tokens = torch.softmax(logits, dim=-1, dtype=torch.float32).topk(width)
        self.extend(chances.tolist(), tokens.tolist())

    def segment(self) -> Segment:
        """The picked nodes as rows that see the rows of their ancestors."""
        table = self.session.table
        positions = [table.length - 1 + self.depth[node] for node in self.row]
        tokens = [self.tokens[node] for node in self.picked]
        return Segment(table, tokens, positions, self.row_parents(), range(len(tokens)), self.session.adapter)
