"""Who runs in the next step, and with how many rows: continuous batching, prompts in chunks, preemption."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from specgen.errors import OutOfPages
from specgen.kv.pool import KVPool
from specgen.kv.prefix import PrefixCache
from specgen.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Turn:
    """One sequence's part in a step: its next `chain` pending tokens; `complete` if they are all that is pending."""

    sequence: Sequence
    chain: int

    @property
    def complete(self) -> bool:
        """Whether the sequence draws in this step."""
        return self.chain == self.sequence.pending


class Scheduler:
    """Sequences in order of arrival. Those that run are served first, the oldest before the youngest.

    max_running: sequences in one forward. max_prompt_rows: prompt tokens in one forward, over all sequences, so that
    a long prompt does not hold up running streams.
    """

    def __init__(self, pool: KVPool, prefix: PrefixCache | None, *, max_running: int, max_prompt_rows: int) -> None:
        self._pool = pool
        self._prefix = prefix
        self._max_running = max_running
        self._max_prompt_rows = max_prompt_rows
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence and give its pages back."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.publish(sequence, final=True)
        sequence.table.release()

    def plan(self) -> list[Turn]:
        """The turns of the next step; every one owns the pages for its chain."""
        room = self._max_prompt_rows
        turns: list[Turn] = []
        for sequence in list(self.running):
            chain = 1 if sequence.pending == 1 else min(sequence.pending, room)
            if not chain or sequence not in self.running or not self._reserve(sequence, chain):
                continue
            room -= chain if sequence.pending > 1 else 0
            turns.append(Turn(sequence, chain))
        for sequence in list(self.waiting):
            if not room or len(self.running) >= self._max_running:
                break
            if self._prefix and self._is_being_read(sequence):
                continue
            if not self._admit(sequence):
                break
            chain = min(sequence.pending, room)
            sequence.table.reserve(sequence.table.length + chain)
            room -= chain
            turns.append(Turn(sequence, chain))
        return turns

    def publish(self, sequence: Sequence, *, final: bool = False) -> None:
        """Offer a sequence's committed KV to others; `final` when it will not be written to again."""
        if self._prefix:
            self._prefix.publish(sequence.key, sequence.ids, sequence.table, final=final)

    def _is_being_read(self, sequence: Sequence) -> bool:
        """Whether a running prompt begins like this one for a page more than is cached: then waiting is cheaper."""
        if self._prefix is None:
            return False
        cached = self._prefix.length(sequence.key, sequence.ids)
        end = cached + self._pool.page_size
        return any(
            other.pending > 1 and other.key == sequence.key and other.ids[:end] == sequence.ids[:end]
            for other in self.running
            if len(sequence.ids) > end
        )

    def _admit(self, sequence: Sequence) -> bool:
        """Let a sequence run, on its longest cached prefix; False when there are no pages for the rest of its ids."""
        needed = -(-(len(sequence.ids) + 1) // self._pool.page_size)
        cached = self._prefix.length(sequence.key, sequence.ids) if self._prefix else 0
        if not self._pool.has(needed - cached // self._pool.page_size):
            return False
        if self._prefix:
            lease = self._prefix.match(sequence.key, sequence.ids)
            sequence.adopt(lease)
        try:
            sequence.table.reserve(len(sequence.ids) + 1)
        except OutOfPages:
            # The pages that would have been evicted for it are its own prefix.
            self._rewind(sequence)
            return False
        self.waiting.remove(sequence)
        self.running.append(sequence)
        return True

    def _rewind(self, sequence: Sequence) -> None:
        self.publish(sequence, final=True)
        sequence.table.release()
        sequence.table = self._pool.open()

    def _reserve(self, sequence: Sequence, chain: int) -> bool:
        """Pages for the chain: free ones, then what drafts left unused, then those of the youngest sequences.

        False when the youngest was the sequence itself.
        """
        needed = sequence.table.length + chain
        if not self._pool.has(sequence.table.missing_pages(needed)):
            self._reclaim(sequence)
        while not self._pool.has(sequence.table.missing_pages(needed)):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.table.reserve(needed)
        return True

    def _reclaim(self, sequence: Sequence) -> None:
        """Take back unused pages of `sequence` and of those behind it, which have no turn in this step yet."""
        for later in self.running[self.running.index(sequence) :]:
            later.table.trim(later.table.length)

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's pages; it waits first in line and computes its KV again, which changes nothing it says."""
        self.running.remove(sequence)
        self._rewind(sequence)
        self.waiting.appendleft(sequence)
        self.preemptions += 1
