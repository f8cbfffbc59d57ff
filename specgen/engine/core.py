"""The loop: schedule, draft, forward and sample, verify, commit."""

from __future__ import annotations

import time
from collections.abc import Mapping
from collections.abc import Sequence as Many
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property

import torch

from specgen._base.log import Log
from specgen.draft.drafter import Drafter, DraftHints
from specgen.draft.manager import DraftManager
from specgen.engine.load import Counters, Load
from specgen.engine.outputs import SequenceOutput, sequence_outputs
from specgen.engine.prefill_budget import PrefillBudget
from specgen.engine.request import Request, SampleSpec
from specgen.engine.scheduler import NotPlanned, ScheduledSequence, Scheduler
from specgen.engine.sequence import Sequence
from specgen.engine.step_costs import StepCosts
from specgen.errors import AdapterRefused, OutOfPages, RequestCancelled
from specgen.kv.offload.page_names import PageNames
from specgen.kv.offload.persistence import CacheOptions, PrefixStore, open_cache
from specgen.kv.radix_tree import CacheKey
from specgen.lora.adapter import AdapterOptions
from specgen.lora.cache import AdapterCache
from specgen.model.fingerprint import kv_identity, model_name
from specgen.model.runner import ModelRunner
from specgen.sampling.batch_sampler import sample_batch
from specgen.sampling.user_code import UserCodeRaised
from specgen.types import DraftTrace, Finish, StepOutput

log = Log("specgen.engine")

_DEFAULT_CACHE = CacheOptions()
_DEFAULT_ADAPTERS = AdapterOptions()
_ARRIVAL_SECONDS = 0.1


class EngineCore:
    """Runs requests step by step over one target. Not thread-safe: one thread owns it."""

    def __init__(
        self,
        target: ModelRunner,
        drafters: Mapping[str, Drafter],
        *,
        max_num_seqs: int = 16,
        max_prefill_tokens: int = 512,
        inter_token_seconds: float | None = None,
        prefix_cache: CacheOptions | None = _DEFAULT_CACHE,
        adapters: AdapterOptions = _DEFAULT_ADAPTERS,
    ) -> None:
        self.target = target
        self._key = CacheKey(model_name(target.model), target.pool.kind.name)
        self.drafting = DraftManager(drafters, target.vocab_size)
        prefill = PrefillBudget(max_prefill_tokens, inter_token_seconds, lambda: self.drafting.cost)
        self._costs = StepCosts(self.drafting, prefill, compiled=target.compiled)
        self.prefix = None
        if prefix_cache is not None:
            self.prefix = open_cache(
                target.pool, prefix_cache, identity=lambda: self._identity, token_seconds=self._costs.token_seconds
            )
        self.adapters = AdapterCache(adapters, target.device)
        self.scheduler = Scheduler(target.pool, self.prefix, self.adapters, max_num_seqs=max_num_seqs, prefill=prefill)
        self.counters = Counters()
        self._awaits_nobody = False
        if drafters or inter_token_seconds is not None:
            self._costs.measure(target)
            self._costs.measure_context(target)

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    @property
    def load(self) -> Load:
        """How busy the engine is. Counts alone, so that any thread may look."""
        pool, stats = self.target.pool, self.prefix and self.prefix.stats
        return Load(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            used_pages=pool.pages - pool.free_pages,
            total_pages=pool.pages,
            preemptions=self.scheduler.preemptions,
            prefix_queried=stats.queried_tokens if stats else 0,
            prefix_cached=stats.cached_tokens if stats else 0,
        )

    def key(self, request: Request) -> CacheKey:
        """Whose KV a request may read and leaves behind."""
        key = replace(self._key, tenant=request.params.cache_salt)
        return replace(key, adapter=a.name, revision=a.revision) if (a := request.adapter) else key

    def stored(self) -> PrefixStore | None:
        """The prefix cache's way to files; the first call reads all weights once, to tell models apart."""
        return PrefixStore(self.prefix, PageNames(self._identity)) if self.prefix else None

    def close(self) -> None:
        """Leave to the next engine what the prefix cache holds, where there is a folder for it. After the last step."""
        if self.prefix and self.prefix.tiers and self.prefix.tiers.disk is not None and (stored := self.stored()):
            stored.spill()

    def retarget(self, target: ModelRunner) -> None:
        """Go on with a new target over the same pool, whose model says something else: no KV of the old one is read
        again. While nothing runs."""
        if self.target.has_adapted:
            _ = target.adapted  # asks by a forward, and those that bring rows under an adapter come later
        if self.prefix:
            self.prefix.forget()
        self.target, self._key = target, CacheKey(model_name(target.model), target.pool.kind.name)
        self.__dict__.pop("_identity", None)
        if self.prefix and self.prefix.tiers and self.prefix.tiers.disk:
            self.prefix.rename(PageNames(self._identity))

    def add(self, request: Request, samples: Many[SampleSpec]) -> None:
        """Queue one sequence per sample; none where one cannot be made."""
        with ExitStack() as undo:
            sequences = [self._sequence(request, index, sample, undo) for index, sample in enumerate(samples)]
            undo.pop_all()
        for sequence in sequences:
            self.scheduler.add(sequence)
            if sequence.adapter:
                self.adapters.use(sequence.adapter)

    def is_waiting(self, request_id: str) -> bool:
        """Whether all sequences of a request wait for their first step; not if it is finished or unknown."""
        sequences = self._of(request_id)
        return bool(sequences) and not any(s in self.scheduler.running or s.table.length for s in sequences)

    def cancel(self, request_id: str, finish: Finish | None = None) -> list[StepOutput]:
        """End all sequences of a request where they stand; none if it is finished or unknown."""
        reason = finish or cancelled(request_id)
        return [self._close(sequence, sequence.end(reason)) for sequence in self._of(request_id)]

    def cut(self, request_id: str, finish: Finish) -> list[StepOutput]:
        """What `cancel` would answer; the sequences go on."""
        return [sequence.cut(finish) for sequence in self._of(request_id)]

    @torch.no_grad()
    def step(self, *, drafting: bool = True) -> list[StepOutput]:
        """Schedule, draft, forward and sample, verify and commit: what it added to each sequence that drew.

        Where it raises nothing is committed, so it may be tried again: what fails behind the forward ends the sequence
        that it concerns. drafting: False verifies no trees, so that the forward is as small as it can be.
        Raises NotPlanned where it did not come to a forward, and what the forward raises.
        """
        if lost := self._end_lost():
            return lost
        work = self._schedule()
        if not work:
            return self._await_adapter() if self.scheduler.awaits_adapter else self._refuse()
        self._awaits_nobody = False
        if drafting:
            work = self._draft(work)
        outputs = self._forward(work)
        self.counters.steps += 1
        return [said for item, output in zip(work, outputs, strict=True) for said in self._finish(item, output)]

    def check(self) -> None:
        """Raise RuntimeError if anything is held that no sequence owns. Cheap; tests call it after every step."""
        self.target.pool.check()
        for drafter in self.drafting.drafters.values():
            drafter.check()
        if self.prefix:
            self.prefix.check()
        self.adapters.check(busy=self.busy)
        if not self.busy and self.target.pool.open_tables:
            raise RuntimeError("KV pool: tables are open though no sequence is left")

    def _sequence(self, request: Request, index: int, sample: SampleSpec, undo: ExitStack) -> Sequence:
        """A sequence to be queued; `undo` gives back what was opened for it."""
        drafts = self.drafting.open(request.ids, _hints(request), request.speculation, sample.constraint)
        undo.callback(self.drafting.close, drafts)
        table = self.target.pool.open()
        undo.callback(table.release)
        return Sequence(
            request,
            index,
            sampler=sample.sampler,
            stops=sample.stops,
            cursor=sample.cursor,
            constraint=sample.constraint,
            drafts=drafts,
            table=table,
            key=self.key(request),
        )

    def _of(self, request_id: str) -> list[Sequence]:
        return [s for s in (*self.scheduler.running, *self.scheduler.waiting) if s.request.id == request_id]

    def _schedule(self) -> list[ScheduledSequence]:
        """Who runs, side by side where they run under one adapter, whose rows are one product then."""
        try:
            self._costs.follow(self.target)
            work = self.scheduler.schedule()
            work.sort(key=lambda item: (item.sequence.key.adapter, item.sequence.key.revision))
        except NotPlanned:
            raise
        except Exception as error:
            raise NotPlanned from error
        return work

    def _draft(self, work: list[ScheduledSequence]) -> list[ScheduledSequence]:
        """The same with a draft for each that draws, as far as there are pages for it."""
        drawing = [item.sequence for item in work if item.complete]
        try:
            drafts = iter(
                self.drafting.propose(
                    [sequence.drafts for sequence in drawing],
                    [sequence.deepest_draft for sequence in drawing],
                    base_rows=sum(item.num_tokens for item in work),
                    context=sum(item.sequence.table.length for item in work),
                )
            )
            return [item.drafted(next(drafts)) if item.complete else item for item in work]
        except BaseException:  # drafts are a bonus: no text ends for them
            log.exception("a step goes without drafts")
            self.drafting.forget_offers([sequence.drafts for sequence in drawing])
            return work

    def _forward(self, work: Many[ScheduledSequence]) -> list[SequenceOutput]:
        """One forward and the sampling of its rows, as each sequence sees it."""
        segments = [item.segment() for item in work]
        started = time.perf_counter()
        output = self.target.forward(segments)
        count = min(max(1, self.drafting.wanted.successors), self.target.vocab_size)
        sampled = sample_batch(output.logits, [item.asked_rows() for item in work], count)
        self._costs.observe(segments, time.perf_counter() - started)
        return sequence_outputs(segments, output, sampled, self.target.layers)

    def _finish(self, item: ScheduledSequence, output: SequenceOutput) -> list[StepOutput]:
        """Verify and commit for one sequence. One for which anything raises ends with the error; the others go on."""
        sequence = item.sequence
        outputs: list[StepOutput] = []
        try:
            if item.complete:
                outputs.append(self._commit(item, output))
            else:
                self._prefilled(item, output)
            # One that has ended is published as a whole when its pages are given back.
            if sequence.finish is None and (item.num_tokens > 1 or not item.complete):
                self.scheduler.publish(sequence, tail=item.complete)
        except UserCodeRaised as raised:
            raised.error.add_note(f"raised in request {sequence.request.id}, sample {sequence.index}")
            outputs.append(sequence.end(Finish("error", error=raised.error, is_callers_error=True)))
        except BaseException as error:  # plugins may raise anything; memory may run out
            outputs.append(sequence.end(Finish("error", error=error)))
        return [self._close(sequence, output) if output.result else output for output in outputs]

    def _prefilled(self, item: ScheduledSequence, output: SequenceOutput) -> None:
        """Take in a chunk of a prompt, behind which nothing is drawn."""
        sequence = item.sequence
        if self.drafting.wants(sequence.drafts):
            self.drafting.observe(sequence.drafts, output.features(item.num_tokens))
        sequence.prefilled(item.num_tokens)

    def _commit(self, item: ScheduledSequence, output: SequenceOutput) -> StepOutput:
        """Walk down a tree and take in what was accepted of it."""
        sequence, draft = item.sequence, item.draft
        verified = sequence.verify(draft.tree, output.logits, output.tokens)
        accepted = verified.accepted
        # Before the sequence, whose result may hold the drafters' share in this step.
        if self.drafting.wants(sequence.drafts):
            self.drafting.observe(sequence.drafts, output.features(item.num_tokens, accepted.nodes))
        self.drafting.commit(sequence.drafts, draft, accepted.committed)
        said = sequence.commit(item.num_tokens, len(draft.tree), verified)
        if sequence.request.params.trace and draft.tree:
            said = replace(said, trace=DraftTrace(draft.tree, draft.offered_by, accepted.nodes))
        self.counters.committed += len(said.tokens)
        self.counters.drafted += len(draft.tree)
        self.counters.accepted += len(said.tokens) - 1
        return said

    def _end_lost(self) -> list[StepOutput]:
        """End those whose adapter cannot be brought back."""
        lost = [(s, s.adapter, s.adapter.failure) for s in self.scheduler.waiting if s.adapter and s.adapter.failure]
        for _, adapter, _ in lost:
            self.adapters.forgive(adapter)
        return [self._close(sequence, sequence.end(Finish("error", error=error))) for sequence, _, error in lost]

    def _await_adapter(self) -> list[StepOutput]:
        """Nobody can run before an adapter has arrived: look again when one has.

        Where none is on its way, and the next plan does not find that one has just come, the adapters that hold the
        room are pinned: the first that waits for room fails.
        """
        there_are = self.adapters.wait(_ARRIVAL_SECONDS)
        looked_again, self._awaits_nobody = self._awaits_nobody, not there_are
        if there_are or not looked_again:
            return []
        for sequence in self.scheduler.waiting:
            if (adapter := sequence.adapter) and adapter.weights is None:
                error = AdapterRefused(
                    f"adapter {adapter.name!r} has no room on the device beside those that are pinned"
                )
                return [self._close(sequence, sequence.end(Finish("error", error=error)))]
        return []

    def _refuse(self) -> list[StepOutput]:
        """The first in line fails when nobody can run: all pages are free for it by then, so it can never fit."""
        for sequence in (*self.scheduler.waiting, *self.scheduler.running):
            error = OutOfPages(f"{len(sequence.ids) + 1} tokens do not fit a KV pool of {self.target.pool.capacity}")
            return [self._close(sequence, sequence.end(Finish("error", error=error)))]
        return []

    @cached_property
    def _identity(self) -> str:
        target = self.target
        return kv_identity(target.model, target.pool, arithmetic=target.arithmetic, settings=target.settings)

    def _close(self, sequence: Sequence, output: StepOutput) -> StepOutput:
        self.scheduler.remove(sequence)
        self.drafting.close(sequence.drafts)
        if sequence.adapter:
            self.adapters.leave(sequence.adapter)
        if output.result:
            reason = output.result.finish_reason
            self.counters.finished[reason] = self.counters.finished.get(reason, 0) + 1
        return output


def cancelled(request_id: str) -> Finish:
    """Why a request ends that its caller cancelled."""
    return Finish("cancelled", error=RequestCancelled(f"request {request_id} was cancelled"))


def _hints(request: Request) -> DraftHints:
    """What drafters may know. Under another adapter other words come, so what they keep is kept apart."""
    salt = request.params.cache_salt
    if request.adapter:
        salt = f"{salt}\0{request.adapter.name}"
    return DraftHints(request.prediction, salt, request.adapter)
