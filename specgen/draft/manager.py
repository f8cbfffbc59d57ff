"""All drafters of an engine at work: ask them, merge what they say, keep what pays, learn from what was committed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import index

from specgen._base.log import Log
from specgen.draft.backoff import DrafterBackoff, DrafterHistory
from specgen.draft.budget import AcceptanceModel, RowCost, likeliest, worthwhile
from specgen.draft.drafter import Drafter, DraftHints, DraftSession
from specgen.draft.features import Features, Wanted
from specgen.draft.merge import NO_DRAFT, Draft, Merged
from specgen.sampling.constraint import Constrained
from specgen.tree import check, depths
from specgen.types import EMPTY_TREE, MAX_TREE_NODES, DrafterStats, Speculation, TokenTree

log = Log("specgen.draft")

_STALL_SECONDS, _READING_SECONDS = 5.0, 0.01
"""Longest time for a tree; and for each token of a prompt that a first one may have to read."""
_FEWEST_ASKED, _FIRST_ASKED = 12, 32
_SHRINK = 0.9
_SMOOTHING = 0.1


@dataclass(slots=True)
class _DrafterState:
    """One drafter in one sequence. Of the last step: its tree, which of its nodes others offered too, and the seconds
    that it took.

    unread: tokens of the prompt, until it has answered for the first time.
    """

    session: DraftSession
    calibration: AcceptanceModel
    pace: DrafterBackoff
    unread: int
    stats: DrafterStats = DrafterStats()
    offer: TokenTree = EMPTY_TREE
    shared: Sequence[bool] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Learned:
    """What is known of a drafter over all sequences under one adapter, or under none."""

    calibration: AcceptanceModel = field(default_factory=AcceptanceModel)
    experience: DrafterHistory = field(default_factory=DrafterHistory)


@dataclass(slots=True)
class DraftState:
    """The drafting side of one sequence. Owned by the sequence, changed by `DraftManager` alone.

    most: nodes that each drafter is asked for. Nodes that are never verified cost time to draft, merge and weigh, so
    where the budget decides, this follows what it took of late, with room to grow.
    """

    speculation: Speculation
    constraint: Constrained | None = None
    most: int = MAX_TREE_NODES
    active: dict[str, _DrafterState] = field(default_factory=dict)
    unopened: dict[str, DrafterStats] = field(default_factory=dict)

    def stats(self) -> dict[str, DrafterStats]:
        """What each drafter offered and what became of it."""
        return self.unopened | {name: active.stats for name, active in self.active.items()}


class DraftManager:
    """The drafters of one engine, in their order, and what was learned about them."""

    def __init__(self, drafters: Mapping[str, Drafter], vocab_size: int) -> None:
        self.drafters = dict(drafters)
        self.cost = RowCost()
        self._vocab_size = vocab_size
        self._learned: dict[str, dict[str, _Learned]] = {}
        self._token_seconds = self._row_seconds = 0.0
        # What drafts are expected to bring, lately: one step without them does not make tokens dear.
        self._speedup = 1.0
        self._curious = [name for name, drafter in drafters.items() if drafter.wanted != Wanted()]
        self.wanted = Wanted.union(drafter.wanted for drafter in drafters.values())

    def open(
        self,
        prompt: Sequence[int],
        hints: DraftHints,
        speculation: Speculation,
        constraint: Constrained | None = None,
    ) -> DraftState:
        """Sessions of all drafters that the request allows. What `constraint` forbids counts as never offered."""
        if constraint is not None:
            hints = replace(hints, forced=constraint.forced)
        drafts = DraftState(speculation, constraint, speculation.max_nodes)
        if speculation.adaptive:
            drafts.most = min(drafts.most, _FIRST_ASKED)
        if not speculation.max_nodes:
            return drafts
        learned = self._learned_under(hints.adapter.name if hints.adapter else "")
        for name in dict.fromkeys(self.drafters if speculation.drafters is None else speculation.drafters):
            try:
                session = self.drafters[name].open(prompt, hints)
            except BaseException as error:  # a drafter is someone else's code: the request goes on without it
                log.warning("drafter cannot open a session", drafter=name, error=repr(error))
                drafts.unopened[name] = DrafterStats(disabled=repr(error))
                continue
            known = learned[name]
            drafts.active[name] = _DrafterState(
                session, AcceptanceModel(known.calibration), DrafterBackoff(known.experience), len(prompt)
            )
        return drafts

    def forget(self, adapter: str) -> None:
        """Drop what was learned under an adapter that is gone."""
        self._learned.pop(adapter, None)

    def _learned_under(self, adapter: str) -> dict[str, _Learned]:
        return self._learned.setdefault(adapter, {name: _Learned() for name in self.drafters})

    def propose(
        self, sequences: Sequence[DraftState], deepest: Sequence[int], base_rows: int, context: int = 0
    ) -> list[Draft]:
        """What to verify for each sequence, a tree at most `deepest[i]` deep, when `base_rows` rows run anyway, hung
        under `context` tokens in all."""
        if not sequences:
            return []
        started = time.perf_counter()
        self._token_seconds = self._undrafted(len(sequences), base_rows, context) / self._speedup
        asking = sum(
            self._ask(name, drafter, [d for d, depth in zip(sequences, deepest, strict=True) if depth > 0])
            for name, drafter in self.drafters.items()
        )
        merged = [_shallow(self._merged(d), depth) for d, depth in zip(sequences, deepest, strict=True)]
        spent = time.perf_counter() - started
        chosen = self._choose(sequences, [draft.tree for draft in merged], base_rows, context, spent)
        _share(spent - asking, sequences)
        return [draft.select(nodes) for draft, nodes in zip(merged, chosen, strict=True)]

    def forget_offers(self, sequences: Sequence[DraftState]) -> None:
        """Go on as if nothing had been proposed in this step."""
        for drafts in sequences:
            for active in drafts.active.values():
                active.offer, active.shared = EMPTY_TREE, ()

    def _undrafted(self, sequences: int, base_rows: int, context: int) -> float:
        """Seconds that a token of each sequence takes without drafts. Prompts read beside make none dearer."""
        return (self.cost.seconds(sequences) + self.cost.reading(context, base_rows)) / sequences

    def _choose(
        self, sequences: Sequence[DraftState], trees: Sequence[TokenTree], base_rows: int, context: int, spent: float
    ) -> list[list[int]]:
        """Of each tree the nodes to verify, when drafting took `spent` seconds; learns what they are expected to bring
        and what their rows take."""
        adaptive = [tree if d.speculation.adaptive else EMPTY_TREE for d, tree in zip(sequences, trees, strict=True)]
        fixed = [
            [] if d.speculation.adaptive else likeliest(tree, d.speculation.max_nodes)
            for d, tree in zip(sequences, trees, strict=True)
        ]
        most = [d.speculation.max_nodes for d in sequences]
        rows = base_rows + sum(map(len, fixed))
        # Prompts take their time whatever is drafted: a token saves of later steps, which have none to read.
        prompts = self.cost.seconds(rows) - self.cost.seconds(rows - base_rows + len(sequences))
        gone = spent + self.cost.reading(context, rows) - prompts
        chosen, rate = worthwhile(adaptive, rows, self.cost, most=most, spent=gone)
        self._speedup *= 1.0 + _SMOOTHING * (rate * self._token_seconds - 1.0)
        taken = sum(map(len, chosen))
        self._row_seconds = (self.cost.seconds(rows + taken) - self.cost.seconds(rows)) / max(1, taken)
        return [[*all_of, *nodes] for all_of, nodes in zip(fixed, chosen, strict=True)]

    def commit(self, drafts: DraftState, verified: Draft, committed: Sequence[int]) -> None:
        """Tell the sessions what was committed, and learn what their offers were worth."""
        nodes: dict[str, list[int]] = {name: [] for name in drafts.active}
        accepted = dict.fromkeys(drafts.active, 0)
        for name, active in drafts.active.items():
            if not active.offer:
                continue
            held = active.calibration.observe(active.offer, committed, active.shared)
            nodes[name] = verified.nodes_of(name)
            accepted[name] = min(held, len(committed) - 1) if nodes[name] else 0
            active.stats = replace(
                active.stats,
                offered=active.stats.offered + len(active.offer),
                verified=active.stats.verified + len(nodes[name]),
                accepted=active.stats.accepted + accepted[name],
            )
        if drafts.speculation.adaptive:
            self._learn_pace(drafts, nodes, accepted)
            if any(active.offer for active in drafts.active.values()):
                asked = max(_FEWEST_ASKED, 2 * len(verified.tree), int(_SHRINK * drafts.most))
                drafts.most = min(drafts.speculation.max_nodes, asked)
        for name, active in drafts.active.items():
            active.offer, active.shared = EMPTY_TREE, ()
            if active.stats.disabled:
                continue
            try:
                active.session.commit(committed)
            except BaseException as error:  # a drafter is someone else's code: the request goes on without it
                self._disable(name, [drafts], repr(error))

    def _learn_pace(self, drafts: DraftState, nodes: Mapping[str, Sequence[int]], accepted: Mapping[str, int]) -> None:
        """Whoever was asked earns the tokens and pays for the rows that no cheaper drafter had: the others would have
        come without it. Requests that draft whatever it costs tell nothing of that.

        A path stands in one drafter's tree as a whole, so the union accepts as many tokens as its best tree.
        """
        had, verified = 0, set[int]()
        asked = [(active.seconds, name) for name, active in drafts.active.items() if active.seconds]
        for seconds, name in sorted(asked):
            rows = len(verified.union(nodes[name])) - len(verified)
            gained = max(0, accepted[name] - had)
            drafts.active[name].pace.observe(gained, seconds, self._token_seconds, rows * self._row_seconds)
            drafts.active[name].seconds = 0.0
            had = max(had, accepted[name])
            verified.update(nodes[name])

    def wants(self, drafts: DraftState) -> bool:
        """Whether anyone in this sequence would look at features."""
        return any(self._watching(drafts))

    def observe(self, drafts: DraftState, features: Features) -> None:
        """Show the sessions what the target's forward said; what it shows is not to be changed."""
        for name in self._watching(drafts):
            try:
                drafts.active[name].session.observe(features)
            except BaseException as error:  # a drafter is someone else's code: the request goes on without it
                self._disable(name, [drafts], repr(error))

    def _watching(self, drafts: DraftState) -> Iterator[str]:
        """The sequence's drafters that look at features."""
        for name in self._curious:
            if name in drafts.active and not drafts.active[name].stats.disabled:
                yield name

    def close(self, drafts: DraftState) -> None:
        """Close all sessions; what was learned stays."""
        for name, active in drafts.active.items():
            try:
                active.session.close()
            except BaseException as error:  # the sequence is done; nothing of it may be held up
                log.warning("drafter cannot close a session", drafter=name, error=repr(error))

    def _ask(self, name: str, drafter: Drafter, sequences: Sequence[DraftState]) -> float:
        """Let a drafter draft for all that are to ask it; the seconds that it took."""
        asked = [
            drafts
            for drafts in sequences
            if (active := drafts.active.get(name))
            and not active.stats.disabled
            and (not drafts.speculation.adaptive or active.pace.ready(self._token_seconds))
        ]
        if not asked:
            return 0.0
        drafter.token_seconds = self._token_seconds if all(d.speculation.adaptive for d in asked) else 0.0
        patience = sum(_STALL_SECONDS + _READING_SECONDS * drafts.active[name].unread for drafts in asked)
        started = time.perf_counter()
        # The default asks one session after the other: then what one of them raises is no fault of the others.
        alone = type(drafter).propose is Drafter.propose
        groups = [[drafts] for drafts in asked] if alone else [asked]
        answered = [answer for group in groups for answer in self._answers(name, drafter, group)]
        seconds = time.perf_counter() - started
        if seconds > patience:
            self._disable(name, asked, f"took {seconds:.1f} s for {len(asked)} trees")
            return seconds
        for drafts, tree in answered:
            active = drafts.active[name]
            active.offer, active.seconds, active.unread = tree, seconds / len(asked), 0
            active.stats = replace(active.stats, asked=active.stats.asked + 1)
        return seconds

    def _answers(
        self, name: str, drafter: Drafter, asked: Sequence[DraftState]
    ) -> Iterator[tuple[DraftState, TokenTree]]:
        """The trees that can be used, as far as constraints allow. Who raises or offers another is switched off."""
        limits = [drafts.most for drafts in asked]
        try:
            trees = drafter.propose([drafts.active[name].session for drafts in asked], limits)
            together = list(zip(asked, trees, limits, strict=True))
        except BaseException as error:  # a drafter is someone else's code: the requests go on without it
            self._disable(name, asked, repr(error))
            return
        for drafts, offered, limit in together:
            try:
                tree = _plain(offered)
                check(tree, self._vocab_size, limit)
            except BaseException as error:  # the same
                self._disable(name, [drafts], repr(error))
            else:
                yield drafts, drafts.constraint.prune(tree) if drafts.constraint and tree else tree

    def _merged(self, drafts: DraftState) -> Draft:
        offers = {name: active for name, active in drafts.active.items() if active.offer}
        if not offers:
            return NO_DRAFT
        merged = Merged([active.offer for active in offers.values()])
        for number, active in enumerate(offers.values()):
            active.shared = merged.shared(number)
        confidences = [active.calibration.calibrated(active.offer, active.shared) for active in offers.values()]
        return Draft(merged.tree(confidences), merged.offered_by(list(offers)))

    def _disable(self, name: str, sequences: Sequence[DraftState], reason: str) -> None:
        log.warning("drafter switched off", drafter=name, requests=len(sequences), reason=reason)
        for drafts in sequences:
            drafts.active[name].stats = replace(drafts.active[name].stats, disabled=reason)


def _share(seconds: float, sequences: Sequence[DraftState]) -> None:
    """Charge what merging and choosing took to the drafters that were asked, by the nodes that they offered."""
    asked = [active for drafts in sequences for active in drafts.active.values() if active.offer]
    nodes = sum(len(active.offer) for active in asked)
    for active in asked:
        active.seconds += seconds * len(active.offer) / nodes


def _plain(tree: TokenTree) -> TokenTree:
    """The same tree in Python's own numbers. Raises TypeError for tokens or parents that are not whole."""
    return TokenTree(
        tuple(map(index, tree.tokens)), tuple(map(index, tree.parents)), tuple(map(float, tree.confidence))
    )


def _shallow(draft: Draft, deepest: int) -> Draft:
    levels = depths(draft.tree)
    if max(levels, default=0) <= deepest:
        return draft
    return draft.select(node for node, level in enumerate(levels) if level <= deepest)
