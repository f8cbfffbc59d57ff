"""Who runs in the next step, and with how many rows: continuous batching, prompts in chunks, preemption."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from specgen.kv.pool import KVPool
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

    def __init__(self, pool: KVPool, *, max_running: int, max_prompt_rows: int) -> None:
        self._pool = pool
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
        while self.waiting and room and len(self.running) < self._max_running:
            sequence = self.waiting[0]
            if self._pool.free_pages < sequence.table.missing_pages(sequence.pending + 1):
                break
            self.running.append(self.waiting.popleft())
            chain = min(sequence.pending, room)
            sequence.table.reserve(chain)
            room -= chain
            turns.append(Turn(sequence, chain))
        return turns

    def _reserve(self, sequence: Sequence, chain: int) -> bool:
        """Pages for the chain: free ones, then what drafts left unused, then those of the youngest sequences.

        False when the youngest was the sequence itself.
        """
        needed = sequence.table.length + chain
        if sequence.table.missing_pages(needed) > self._pool.free_pages:
            self._reclaim(sequence)
        while sequence.table.missing_pages(needed) > self._pool.free_pages:
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
        sequence.table.release()
        sequence.table = self._pool.open()
        self.waiting.appendleft(sequence)
        self.preemptions += 1
