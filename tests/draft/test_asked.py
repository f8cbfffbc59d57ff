"""How many nodes a drafter is asked for, and what it is charged for those that are verified."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from specgen import Drafter, DraftHints, DraftSession, Speculation, TokenTree
from specgen.draft.budget import RowCost
from specgen.draft.manager import DraftManager, DraftState
from specgen.draft.merge import NO_DRAFT, Draft
from specgen.tree import chain


class Listening(Drafter, DraftSession):
    """Offers a chain of `offers` nodes or as many as it is asked for, and remembers how many that were."""

    def __init__(self, offers: int = 63) -> None:
        self.asked: list[int] = []
        self.offers = offers

    def open(self, prompt: Sequence[int], hints: DraftHints) -> DraftSession:
        return self

    def propose(self, sessions: Sequence[DraftSession], max_nodes: Sequence[int]) -> list[TokenTree]:  # type: ignore[override]
        self.asked += max_nodes
        return [chain(range(min(self.offers, most)), 0.9) for most in max_nodes]

    def commit(self, tokens: Sequence[int]) -> None:
        pass


def opened(listening: Listening, **fields: object) -> tuple[DraftManager, DraftState]:
    drafting = DraftManager({"listening": listening}, 64)
    return drafting, drafting.open((1,), DraftHints(), Speculation(**fields))  # type: ignore[arg-type]


def step(drafting: DraftManager, drafts: DraftState, verified: int) -> None:
    """As if the budget had taken so many nodes, all of them right."""
    drafting.propose([drafts], [99], base_rows=1)
    draft = Draft(chain(range(verified), 0.9), (("listening",),) * verified) if verified else NO_DRAFT
    drafting.commit(drafts, draft, [*range(verified), 63])


def test_it_is_asked_for_what_may_be_taken() -> None:
    listening = Listening()
    drafting, drafts = opened(listening)
    for verified in (2, 2, 30, 40, 40):
        step(drafting, drafts, verified)
    assert listening.asked[:3] == [32, 28, 25]
    assert listening.asked[3:] == [60, 63], "twice what was taken, and no more than a tree may have"


def test_few_nodes_are_always_asked_for() -> None:
    listening = Listening()
    drafting, drafts = opened(listening)
    for _ in range(20):
        step(drafting, drafts, 1)
    assert listening.asked[-1] == 12


def test_where_nobody_offers_nothing_is_concluded() -> None:
    listening = Listening(offers=0)
    drafting, drafts = opened(listening)
    for _ in range(20):
        step(drafting, drafts, 0)
    assert set(listening.asked) == {32}


@pytest.mark.parametrize("adaptive", [True, False])
def test_never_more_than_the_request_allows(adaptive: bool) -> None:
    listening = Listening()
    drafting, drafts = opened(listening, adaptive=adaptive, max_nodes=5)
    for _ in range(3):
        step(drafting, drafts, 5)
    assert set(listening.asked) == {5}


def test_without_a_budget_all_nodes_are_asked_for() -> None:
    listening = Listening()
    drafting, drafts = opened(listening, adaptive=False)
    for _ in range(20):
        step(drafting, drafts, 1)
    assert set(listening.asked) == {63}


def test_a_prompt_that_is_read_beside_makes_tokens_worth_no_more() -> None:
    """It takes its time whatever is drafted: a token saves a later step, which is short again."""

    class Linear(RowCost):
        def seconds(self, rows: int) -> float:
            return 1.0 + 0.2 * rows

    def taken(base_rows: int) -> int:
        drafting, drafts = opened(Listening(offers=20))
        drafting.cost = Linear()
        return len(drafting.propose([drafts], [99], base_rows)[0].tree)

    assert 0 < taken(base_rows=1) < 20
    assert taken(base_rows=500) == taken(base_rows=1)
