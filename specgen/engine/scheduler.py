"""Who runs in the next step, and with how many rows: continuous batching, prompts in chunks, preemption."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from specgen._base.log import Log
from specgen.draft.merge import NO_DRAFT, Draft
from specgen.engine.prefill_budget import PrefillBudget
from specgen.engine.sequence import Sequence
from specgen.errors import OutOfPages
from specgen.kv.pool import KVPool
from specgen.kv.prefix_cache import PrefixCache
from specgen.lora.cache import AdapterCache, Presence
from specgen.model.segment import Segment
from specgen.sampling.batch_sampler import AskedRows

log = Log("specgen.engine")

P = ParamSpec("P")
T = TypeVar("T")


class NotPlanned(Exception):
    """A step could not be planned; nothing has run, so it may be tried again. Its cause says why, `sequence` for whom,
    where that is known."""

    def __init__(self, sequence: Sequence | None = None) -> None:
        super().__init__("the step could not be planned")
        self.sequence = sequence


def _concerning(
    method: Callable[Concatenate[Scheduler, Sequence, P], T],
) -> Callable[Concatenate[Scheduler, Sequence, P], T]:
    """What the method raises is raised as NotPlanned for the sequence that it is about."""

    @wraps(method)
    def named(self: Scheduler, sequence: Sequence, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(self, sequence, *args, **kwargs)
        except Exception as error:  # no memory, a file of the prefix cache, no thread to fetch an adapter
            raise NotPlanned(sequence) from error

    return named


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """One sequence's part in a step: its next `num_tokens` pending tokens, and what is drafted behind them.

    complete: whether they are all that is pending, so that the sequence draws in this step.
    """

    sequence: Sequence
    num_tokens: int
    complete: bool
    draft: Draft = NO_DRAFT

    @classmethod
    def of(cls, sequence: Sequence, num_tokens: int) -> ScheduledSequence:
        """For a sequence as it stands now."""
        return cls(sequence, num_tokens, num_tokens == sequence.pending)

    def segment(self) -> Segment:
        """Its rows in the step's forward."""
        return self.sequence.rows(self.num_tokens, self.draft.tree)

    def asked_rows(self) -> AskedRows:
        """The rows that tokens are drawn at."""
        sequence = self.sequence
        return AskedRows(sequence.sampler, len(sequence.ids), self.draft.tree if self.complete else None)

    def drafted(self, draft: Draft) -> ScheduledSequence:
        """The same with a draft, if the pool has room for its rows: drafts never take pages that a sequence needs."""
        table = self.sequence.table
        try:
            table.reserve(table.length + self.num_tokens + len(draft.tree))
        except OutOfPages:
            return self
        return replace(self, draft=draft)


class Scheduler:
    """Sequences wait in order of arrival, those whose pages were taken before all others. They run in order of
    admission: one that comes back stands behind those that stayed. Those that run are served first, in that order.

    max_num_seqs: sequences in one forward. prefill: prompt tokens in one forward, over all sequences, so that a long
    prompt does not hold up running streams. awaits_adapter: whether the last step left out a sequence whose
    adapter is not there.
    """

    def __init__(
        self,
        pool: KVPool,
        prefix: PrefixCache | None,
        adapters: AdapterCache,
        *,
        max_num_seqs: int,
        prefill: PrefillBudget,
    ) -> None:
        self._pool = pool
        self._prefix = prefix
        self._adapters = adapters
        self._max_num_seqs = max_num_seqs
        self._prefill = prefill
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.awaits_adapter = False

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence and give its pages back."""
        if sequence in self.running:
            self._stop(sequence)
        else:
            self.waiting.remove(sequence)
        self._retire(sequence)

    def schedule(self) -> list[ScheduledSequence]:
        """Who runs in the next step; every one owns the pages for its tokens. None when nobody can run.

        Raises NotPlanned for a sequence that can be made no room.
        """
        decoding = sum(sequence.pending == 1 for sequence in self.running)
        room = self._prefill.rows(decoding, sum(sequence.table.length for sequence in self.running))
        scheduled: dict[Sequence, ScheduledSequence] = {}
        preemptions = self.preemptions
        for sequence in list(self.running):
            count = 1 if sequence.pending == 1 else min(sequence.pending, room)
            if not count or sequence not in self.running or not self._reserve(sequence, count, scheduled):
                continue
            room -= count if sequence.pending > 1 else 0
            scheduled[sequence] = ScheduledSequence.of(sequence, count)
        # Who was preempted just now would only be so again.
        if preemptions == self.preemptions:
            for sequence in self._admissible():
                if not room or not self._admit(sequence):
                    break
                count = min(sequence.pending, room)
                room -= count
                scheduled[sequence] = ScheduledSequence.of(sequence, count)
        return list(scheduled.values())

    def publish(self, sequence: Sequence, *, tail: bool) -> None:
        """Offer a sequence's committed KV to others; with `tail` its partly filled page too."""
        if self._prefix:
            self._prefix.publish(sequence.key, sequence.ids, sequence.table, tail=tail)

    def _admissible(self) -> Iterator[Sequence]:
        """Those that may be admitted next, while there are places.

        A place is kept for each that waits for another's prompt, or for its adapter: it is next when that is read, and
        looking at all that wait, in every step, would take long when there are many. Nobody overtakes one whose adapter
        has no room, or those under the adapters that are there could keep it out for ever.
        """
        held = 0
        self.awaits_adapter = False
        for sequence in list(self.waiting):
            if len(self.running) + held >= self._max_num_seqs:
                return
            there = self._presence(sequence)
            self.awaits_adapter |= there is not Presence.THERE
            if there is Presence.FULL:
                return
            if there is Presence.COMING or self._is_being_read(sequence):
                held += 1
            else:
                yield sequence

    @_concerning
    def _presence(self, sequence: Sequence) -> Presence:
        return self._adapters.presence(sequence.adapter) if sequence.adapter else Presence.THERE

    def _is_being_read(self, sequence: Sequence) -> bool:
        """Whether a running prompt goes on like this one for a page more than is cached: then waiting is cheaper."""
        others = [other for other in self.running if other.pending > 1 and other.key == sequence.key]
        if self._prefix is None or not others:
            return False
        start = self._prefix.length(sequence.key, sequence.ids)
        end = start + self._pool.page_size
        return len(sequence.ids) > end and any(
            # The new page first: prompts that differ mostly differ there.
            other.ids[start:end] == sequence.ids[start:end] and other.ids[:start] == sequence.ids[:start]
            for other in others
        )

    @_concerning
    def _admit(self, sequence: Sequence) -> bool:
        """Let a sequence run, on its longest cached prefix; False when there are no pages for the rest of its ids."""
        tokens = len(sequence.ids) + 1
        if self._prefix:
            missing = self._prefix.missing_pages(sequence.key, sequence.ids, tokens)
        else:
            missing = sequence.table.missing_pages(tokens)
        if not self._pool.has(missing) and (self.running or not self._unpin(sequence, tokens)):
            return False
        try:
            if self._prefix:
                sequence.adopt(self._prefix.match(sequence.key, sequence.ids))
            sequence.table.reserve(tokens)
        except BaseException:
            sequence.table.release()
            sequence.restart(self._pool.open())
            raise
        self.waiting.remove(sequence)
        self.running.append(sequence)
        if sequence.adapter:
            self._adapters.hold(sequence.adapter)
        return True

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        if sequence.adapter:
            self._adapters.release(sequence.adapter)

    def _unpin(self, sequence: Sequence, tokens: int) -> bool:
        """Nobody runs who might give pages back, so pinned ones go. Whether there is room then."""
        if self._prefix is None:
            return False
        while self._prefix.pins:
            self._prefix.pins[0].release()
            if self._pool.has(self._prefix.missing_pages(sequence.key, sequence.ids, tokens)):
                return True
        return False

    def _retire(self, sequence: Sequence) -> None:
        """Give a sequence's pages back, to the prefix cache if it can take them."""
        try:
            if self._prefix:
                self._prefix.retire(sequence.key, sequence.ids, sequence.table)
        except Exception:  # the cache's loss: the sequence ends, or waits, all the same
            log.exception("what a sequence leaves could not be cached", request=sequence.request.id)
        finally:
            sequence.table.release()

    @_concerning
    def _reserve(self, sequence: Sequence, count: int, scheduled: Mapping[Sequence, ScheduledSequence]) -> bool:
        """Pages for `count` tokens more: free ones, then what drafts left unused, then those of the last admitted.

        False when that was the sequence itself.
        """
        needed = sequence.table.length + count
        if not self._pool.has(sequence.table.missing_pages(needed)):
            self._reclaim(scheduled)
        while not self._pool.has(missing := sequence.table.missing_pages(needed)):
            if self.running == [sequence] and self._prefix and self._prefix.yield_pins(missing):
                break
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.table.reserve(needed)
        return True

    def _reclaim(self, scheduled: Mapping[Sequence, ScheduledSequence]) -> None:
        """Take back pages that neither committed tokens nor those of this step need."""
        for sequence in self.running:
            count = scheduled[sequence].num_tokens if sequence in scheduled else 0
            sequence.table.trim(sequence.table.length + count)

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's pages; it waits first in line and computes its KV again, which changes nothing it says."""
        self._stop(sequence)
        self._retire(sequence)
        sequence.restart(self._pool.open())
        self.waiting.appendleft(sequence)
        self.preemptions += 1
