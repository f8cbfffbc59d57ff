"""The loop: plan, propose, score, walk, commit."""

from __future__ import annotations

import time
from collections.abc import Mapping
from collections.abc import Sequence as Many
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from specgen._base.log import Log
from specgen.draft.budget import RowCost
from specgen.draft.drafter import Drafter, DraftHints
from specgen.draft.manager import DraftManager
from specgen.engine.outputs import SequenceOutput, views
from specgen.engine.prefill_budget import PrefillBudget
from specgen.engine.request import Request, SampleSpec
from specgen.engine.scheduler import NotPlanned, ScheduledSequence, Scheduler
from specgen.engine.sequence import Sequence
from specgen.errors import AdapterRefused, OutOfPages, RequestCancelled
from specgen.kernels.backends import pick
from specgen.kernels.sample_rows import Draw, sample_rows
from specgen.kernels.top_tokens import on_host, top_tokens
from specgen.kv.offload.persistence import CacheOptions, PrefixStore, open_cache
from specgen.kv.radix_tree import CacheKey
from specgen.lora.adapter import AdapterOptions
from specgen.lora.cache import AdapterCache
from specgen.model.fingerprint import kv_identity, model_name
from specgen.model.profiling import row_seconds
from specgen.model.runner import ModelRunner
from specgen.model.segment import Segment
from specgen.sampling.user_code import UserCodeRaised
from specgen.tree import depths
from specgen.types import EMPTY_TREE, Acceptance, DraftTrace, Finish, StepOutput, TokenTree

log = Log("specgen.engine")

_MEASURED_ROWS = (1, 2, 4, 8, 16, 32)
_MEASURED_CONTEXT = 1024
_DEFAULT_CACHE = CacheOptions()
_DEFAULT_ADAPTERS = AdapterOptions()
_ARRIVAL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Load:
    """How busy an engine is: sequences that run and wait, pages of the KV pool in use by them and the prefix cache, and
    how often a sequence had to give its pages back. prefix_: tokens of admitted prompts, and those found cached."""

    running: int
    waiting: int
    used_pages: int
    total_pages: int
    preemptions: int
    prefix_queried: int = 0
    prefix_cached: int = 0


@dataclass(slots=True)
class Counters:
    """What an engine has done since it was built. Counts, not seconds: they are the same on every machine."""

    steps: int = 0
    committed: int = 0
    drafted: int = 0
    accepted: int = 0
    finished: dict[str, int] = field(default_factory=dict)


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
        self.prefix = None
        if prefix_cache is not None:
            self.prefix = open_cache(
                target.pool, prefix_cache, identity=lambda: self._identity, token_seconds=self._token_seconds
            )
        self._prefill = PrefillBudget(max_prefill_tokens, inter_token_seconds, lambda: self.drafting.cost)
        self.adapters = AdapterCache(adapters, target.device)
        self.scheduler = Scheduler(
            target.pool, self.prefix, self.adapters, max_num_seqs=max_num_seqs, prefill=self._prefill
        )
        self.counters = Counters()
        self._awaits_nobody = False
        # Whether the forward whose rows were measured is the compiled one.
        self._measured_compiled = target.compiled
        if drafters or inter_token_seconds is not None:
            self._measure()
            self._measure_context()

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
        return PrefixStore(self.prefix, self._identity) if self.prefix else None

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
        if self.prefix and self.prefix.tiers and (stored := self.stored()):
            self.prefix.tiers.describe = stored.header

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
        """One forward over everything that runs; what it added to each sequence that drew.

        Where it raises nothing is committed, so it may be tried again: what fails behind the forward ends the sequence
        that it concerns. drafting: False verifies no trees, so that the forward is as small as it can be.
        Raises NotPlanned where it did not come to a forward, and what the forward raises.
        """
        if lost := self._end_lost():
            return lost
        turns = self._plan()
        if not turns:
            return self._await_adapter() if self.scheduler.awaits_adapter else self._refuse()
        self._awaits_nobody = False
        trees = self._propose(turns) if drafting else [EMPTY_TREE] * len(turns)
        segments = [turn.sequence.rows(turn.chain, tree) for turn, tree in zip(turns, trees, strict=True)]
        views = self._score(segments, self._draws(turns, trees))
        self.counters.steps += 1
        settled = (self._settle(turn, tree, view) for turn, tree, view in zip(turns, trees, views, strict=True))
        return [output for outputs in settled for output in outputs]

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

    def _measure(self) -> None:
        """Begin with what rows cost on this machine, so that not even the first tree is larger than it pays."""
        pool, self._measured_compiled = self.target.pool, self.target.compiled
        self.drafting.cost = RowCost(self.drafting.cost.context_seconds)
        for rows in _MEASURED_ROWS:
            if rows <= self.target.context_length and pool.has(pool.pages_for(rows)):
                self.drafting.cost.observe(rows, row_seconds(self.target.current, rows))

    def _measure_context(self) -> None:
        """What a forward takes longer for each token that its rows hang under. To be asked while no page is taken."""
        context = min(_MEASURED_CONTEXT, self.target.pool.capacity // 2, self.target.context_length - 1)
        more = row_seconds(self.target.current, 1, context) - self.drafting.cost.seconds(1)
        self.drafting.cost.context_seconds = max(0.0, more) / max(1, context)

    def _plan(self) -> list[ScheduledSequence]:
        """The turns of the step, side by side where they run under one adapter, whose rows are one product then."""
        try:
            if self.target.compiled is not self._measured_compiled:
                self._measure()
            turns = self.scheduler.plan()
            turns.sort(key=lambda turn: (turn.sequence.key.adapter, turn.sequence.key.revision))
        except NotPlanned:
            raise
        except Exception as error:
            raise NotPlanned from error
        return turns

    def _propose(self, turns: Many[ScheduledSequence]) -> list[TokenTree]:
        """The tree of each turn, as far as there are pages for it; empty where the prompt is not through."""
        drawing = [turn.sequence for turn in turns if turn.complete]
        try:
            trees = iter(
                self.drafting.propose(
                    [sequence.drafts for sequence in drawing],
                    [sequence.deepest_draft for sequence in drawing],
                    base_rows=sum(turn.chain for turn in turns),
                    context=sum(turn.sequence.table.length for turn in turns),
                )
            )
            return [_housed(turn, next(trees)) if turn.complete else EMPTY_TREE for turn in turns]
        except BaseException:  # drafts are a bonus: no text ends for them
            log.exception("a step goes without drafts")
            self.drafting.forget_offers([sequence.drafts for sequence in drawing])
            return [EMPTY_TREE] * len(turns)

    def _draws(self, turns: Many[ScheduledSequence], trees: Many[TokenTree]) -> list[Draw]:
        """What a GPU can draw of the rows whose logits are wanted, whichever of them the walks will come to."""
        draws: list[Draw] = []
        row = 0
        for turn, tree in zip(turns, trees, strict=True):
            if not turn.complete:
                continue
            sampler, start = turn.sequence.sampler, len(turn.sequence.ids)
            if sampler.warp and self._draws_at_once:
                places = enumerate((0, *depths(tree)))
                draws += [Draw(row + n, sampler.key(start + depth), sampler.warp) for n, depth in places]
            row += 1 + len(tree)
        return draws

    @property
    def _draws_at_once(self) -> bool:
        """Whether warped rows are drawn by a kernel."""
        return pick("sample_rows", self.target.device, self.target.architecture.dtype) != "torch"

    def _is_drawn(self, sequence: Sequence, view: SequenceOutput) -> bool:
        """Whether the view holds the draws of all rows; of one with no token left the sampler has to complain."""
        sampler = sequence.sampler
        return sampler.is_argmax or (sampler.warp is not None and self._draws_at_once and min(view.drawn) >= 0)

    def _score(self, segments: Many[Segment], draws: Many[Draw]) -> list[SequenceOutput]:
        """One forward, and per segment its view of it."""
        started = time.perf_counter()
        scores = self.target.forward(segments)
        count = min(max(1, self.drafting.wanted.successors), self.target.vocab_size)
        drawn = sample_rows(scores.logits, draws) if draws else None
        *top, tokens = on_host(*top_tokens(scores.logits, count), drawn)
        # The draw of a greedy row; a warped one has its own.
        drawn_rows = top[1][:, 0].tolist()
        for one, token in zip(draws, tokens, strict=True):
            drawn_rows[one.row] = token
        self._learn_cost(segments, time.perf_counter() - started)
        return views(segments, scores, (top[0], top[1]), drawn_rows, self.drafting.wanted.layers)

    def _learn_cost(self, segments: Many[Segment], seconds: float) -> None:
        """A forward over these rows took `seconds`."""
        rows, context = sum(len(s.tokens) for s in segments), sum(s.table.length for s in segments)
        if any(not s.logits for s in segments):
            self._prefill.observe(rows, context, seconds)
        self.drafting.cost.observe(rows, seconds, context)

    def _settle(self, turn: ScheduledSequence, tree: TokenTree, view: SequenceOutput) -> list[StepOutput]:
        """Walk and commit one turn. A sequence for which anything raises ends with the error; the others go on."""
        sequence = turn.sequence
        outputs: list[StepOutput] = []
        try:
            if turn.complete:
                outputs.append(self._commit(turn, tree, view))
            else:
                self._read(turn, view)
            # One that has ended is published as a whole when its pages are given back.
            if sequence.finish is None and (turn.chain > 1 or not turn.complete):
                self.scheduler.publish(sequence, tail=turn.complete)
        except UserCodeRaised as raised:
            raised.error.add_note(f"raised in request {sequence.request.id}, sample {sequence.index}")
            outputs.append(sequence.end(Finish("error", error=raised.error, is_callers_error=True)))
        except BaseException as error:  # plugins may raise anything; memory may run out
            outputs.append(sequence.end(Finish("error", error=error)))
        return [self._close(sequence, output) if output.result else output for output in outputs]

    def _read(self, turn: ScheduledSequence, view: SequenceOutput) -> None:
        """Take in a part of a prompt, behind which nothing is drawn."""
        sequence = turn.sequence
        if self.drafting.wants(sequence.drafts):
            self.drafting.observe(sequence.drafts, view.features(turn.chain))
        sequence.table.commit(turn.chain)

    def _commit(self, turn: ScheduledSequence, tree: TokenTree, view: SequenceOutput) -> StepOutput:
        """Walk a tree and take in what was accepted of it."""
        sequence = turn.sequence
        walked = sequence.walk(tree, view.logits, view.drawn if self._is_drawn(sequence, view) else None)
        trace = self._trace(sequence, tree, walked[0])
        # Before the sequence, whose result may hold the drafters' share in this step.
        if self.drafting.wants(sequence.drafts):
            self.drafting.observe(sequence.drafts, view.features(turn.chain, walked[0].nodes))
        self.drafting.commit(sequence.drafts, tree, walked[0].committed)
        output = sequence.commit(turn.chain, len(tree), *walked)
        if trace:
            output = replace(output, trace=trace)
        self.counters.committed += len(output.tokens)
        self.counters.drafted += len(tree)
        self.counters.accepted += len(output.tokens) - 1
        return output

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

    def _trace(self, sequence: Sequence, tree: TokenTree, walked: Acceptance) -> DraftTrace | None:
        if not sequence.request.params.trace or not tree:
            return None
        return DraftTrace(tree, self.drafting.guessers(sequence.drafts, tree), walked.nodes)

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

    def _token_seconds(self) -> float:
        """What a token of a long prompt costs."""
        rows = self._prefill.most_rows
        return self.drafting.cost.at_most(rows) / rows

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


def _housed(turn: ScheduledSequence, tree: TokenTree) -> TokenTree:
    """The tree if the pool has room for its rows, else none: drafting never takes a page that a sequence needs."""
    table = turn.sequence.table
    try:
        table.reserve(table.length + turn.chain + len(tree))
    except OutOfPages:
        return EMPTY_TREE
    return tree
