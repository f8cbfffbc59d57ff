"""All drafters of an engine at work: ask them, merge what they say, keep what pays, learn from what was committed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import index

from specgen.draft.budget import Calibration, Pace, RowCost, worthwhile
from specgen.draft.drafter import Drafter, DraftHints, DraftSession
from specgen.draft.features import Features, Wanted
from specgen.draft.merge import merge
from specgen.errors import UnknownName
from specgen.log import Log
from specgen.tree import check, depths, select
from specgen.types import EMPTY_TREE, DrafterStats, Speculation, TokenTree

log = Log("specgen.draft")

_STALL_SECONDS = 5.0


@dataclass(slots=True)
class _Active:
    """One drafter in one sequence."""

    session: DraftSession
    calibration: Calibration
    pace: Pace = field(default_factory=Pace)
    stats: DrafterStats = DrafterStats()
    offer: TokenTree = EMPTY_TREE
    seconds: float = 0.0


@dataclass(slots=True)
class Drafts:
    """The drafting side of one sequence. Owned by the sequence, changed by `Drafting` alone."""

    speculation: Speculation
    active: dict[str, _Active] = field(default_factory=dict)
    unopened: dict[str, DrafterStats] = field(default_factory=dict)

    def stats(self) -> dict[str, DrafterStats]:
        """What each drafter offered and what became of it."""
        return self.unopened | {name: active.stats for name, active in self.active.items()}


class Drafting:
    """The drafters of one engine, in their order, and what was learned about them."""

    def __init__(self, drafters: Mapping[str, Drafter], vocab_size: int) -> None:
        self.drafters = dict(drafters)
        self.cost = RowCost()
        self._vocab_size = vocab_size
        self._calibrations = {name: Calibration() for name in drafters}
        self._curious = [name for name, drafter in drafters.items() if drafter.wanted != Wanted()]
        self.wanted = Wanted.union(drafter.wanted for drafter in drafters.values())

    def check_names(self, speculation: Speculation) -> None:
        """Raise UnknownName if the request asks for a drafter that the engine does not have."""
        for name in speculation.drafters or ():
            if name not in self.drafters:
                raise UnknownName("drafter", name, self.drafters, param="speculation")

    def open(self, prompt: Sequence[int], hints: DraftHints, speculation: Speculation) -> Drafts:
        """Sessions of all drafters that the request allows."""
        drafts = Drafts(speculation)
        if not speculation.max_nodes:
            return drafts
        for name in dict.fromkeys(self.drafters if speculation.drafters is None else speculation.drafters):
            try:
                session = self.drafters[name].open(prompt, hints)
            except Exception as error:  # a drafter is someone else's code: the request goes on without it
                log.warning("drafter cannot open a session", drafter=name, error=repr(error))
                drafts.unopened[name] = DrafterStats(disabled=repr(error))
                continue
            drafts.active[name] = _Active(session, Calibration(self._calibrations[name]))
        return drafts

    def propose(self, sequences: Sequence[Drafts], deepest: Sequence[int], base_rows: int) -> list[TokenTree]:
        """The tree to verify for each sequence, at most `deepest[i]` deep, when `base_rows` rows run anyway."""
        for name, drafter in self.drafters.items():
            self._ask(name, drafter, [d for d, depth in zip(sequences, deepest, strict=True) if depth > 0])
        trees = [_shallow(self._merged(d), depth) for d, depth in zip(sequences, deepest, strict=True)]
        adaptive = [tree if d.speculation.adaptive else EMPTY_TREE for d, tree in zip(sequences, trees, strict=True)]
        fixed = [EMPTY_TREE if d.speculation.adaptive else tree for d, tree in zip(sequences, trees, strict=True)]
        chosen = worthwhile(adaptive, base_rows + sum(map(len, fixed)), self.cost)
        return [
            select(tree, nodes[: d.speculation.max_nodes])
            if d.speculation.adaptive
            else select(tree, range(min(len(tree), d.speculation.max_nodes)))
            for d, tree, nodes in zip(sequences, trees, chosen, strict=True)
        ]

    def commit(self, drafts: Drafts, verified: TokenTree, committed: Sequence[int]) -> None:
        """Tell the sessions what was committed, and learn what their offers were worth."""
        token_seconds = self.cost.seconds(1)
        for name, active in list(drafts.active.items()):
            offer, active.offer = active.offer, EMPTY_TREE
            held = active.calibration.observe(offer, committed)
            places = _common(offer, verified)
            accepted = min(held, len(committed) - 1) if places else 0
            if offer or active.seconds:
                active.pace.observe(accepted, active.seconds, token_seconds)
            active.seconds = 0.0
            stats = active.stats
            active.stats = DrafterStats(
                stats.offered + len(offer), stats.verified + places, stats.accepted + accepted, stats.disabled
            )
            if stats.disabled:
                continue
            try:
                active.session.commit(committed)
            except Exception as error:  # a drafter is someone else's code: the request goes on without it
                self._disable(name, [drafts], repr(error))

    def wants(self, drafts: Drafts) -> bool:
        """Whether anyone in this sequence would look at features."""
        return any(name in drafts.active and not drafts.active[name].stats.disabled for name in self._curious)

    def observe(self, drafts: Drafts, features: Features) -> None:
        """Show the sessions what the target's forward said; what it shows is not to be changed."""
        for name in self._curious:
            if (active := drafts.active.get(name)) is None or active.stats.disabled:
                continue
            try:
                active.session.observe(features)
            except Exception as error:  # a drafter is someone else's code: the request goes on without it
                self._disable(name, [drafts], repr(error))

    def close(self, drafts: Drafts) -> None:
        """Close all sessions; what was learned stays."""
        for name, active in drafts.active.items():
            try:
                active.session.close()
            except Exception as error:  # the sequence is done; nothing of it may be held up
                log.warning("drafter cannot close a session", drafter=name, error=repr(error))

    def _ask(self, name: str, drafter: Drafter, sequences: Sequence[Drafts]) -> None:
        asked = [
            drafts
            for drafts in sequences
            if (active := drafts.active.get(name))
            and not active.stats.disabled
            and (active.pace.ready() or not drafts.speculation.adaptive)
        ]
        if not asked:
            return
        sessions = [drafts.active[name].session for drafts in asked]
        limits = [drafts.speculation.max_nodes for drafts in asked]
        started = time.perf_counter()
        try:
            trees = [_plain(tree) for tree in drafter.propose(sessions, limits)]
            for tree, limit in zip(trees, limits, strict=True):
                check(tree, self._vocab_size, limit)
        except Exception as error:  # a drafter is someone else's code: the requests go on without it
            self._disable(name, asked, repr(error))
            return
        seconds = time.perf_counter() - started
        if seconds > _STALL_SECONDS * len(asked):
            self._disable(name, asked, f"took {seconds:.1f} s for {len(asked)} trees")
            return
        for drafts, tree in zip(asked, trees, strict=True):
            drafts.active[name].offer = tree
            drafts.active[name].seconds = seconds / len(asked)

    def _merged(self, drafts: Drafts) -> TokenTree:
        offers = [active for active in drafts.active.values() if active.offer]
        return merge([active.calibration.calibrated(active.offer) for active in offers])

    def _disable(self, name: str, sequences: Sequence[Drafts], reason: str) -> None:
        log.warning("drafter switched off", drafter=name, requests=len(sequences), reason=reason)
        for drafts in sequences:
            stats = drafts.active[name].stats
            drafts.active[name].stats = DrafterStats(stats.offered, stats.verified, stats.accepted, reason)


def _plain(tree: TokenTree) -> TokenTree:
    """The same tree in Python's own numbers. Raises TypeError for tokens or parents that are not whole."""
    return TokenTree(
        tuple(map(index, tree.tokens)), tuple(map(index, tree.parents)), tuple(map(float, tree.confidence))
    )


def _shallow(tree: TokenTree, deepest: int) -> TokenTree:
    levels = depths(tree)
    if max(levels, default=0) <= deepest:
        return tree
    return select(tree, [node for node, level in enumerate(levels) if level <= deepest])


def _common(offer: TokenTree, verified: TokenTree) -> int:
    """How many paths of `offer` stand in `verified`."""
    below = {place: node for node, place in enumerate(zip(verified.parents, verified.tokens, strict=True))}
    places: dict[int, int] = {-1: -1}
    for node, (token, parent) in enumerate(zip(offer.tokens, offer.parents, strict=True)):
        if parent in places and (place := below.get((places[parent], token))) is not None:
            places[node] = place
    return len(places) - 1
