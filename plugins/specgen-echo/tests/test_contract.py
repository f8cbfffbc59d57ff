"""The contract itself: each way to break it is caught, by the test that is there for it."""

import itertools
from collections.abc import Callable, Sequence

import pytest
from specgen_echo import EchoDrafter, EchoOptions, EchoSession

from specgen.draft.drafter import Drafter, DraftHints, DraftSession
from specgen.testing import DrafterContract
from specgen.tree import chain, select
from specgen.types import TokenTree

Propose = Callable[[EchoSession, int], TokenTree]
COUNTER = itertools.count()


class BrokenSession(EchoSession):
    broken: Propose

    def propose(self, max_nodes: int) -> TokenTree:
        return type(self).broken(self, max_nodes)


class Broken(EchoDrafter):
    """Echo, but its sessions propose as `broken` does."""

    def __init__(self, broken: Propose) -> None:
        super().__init__(64, EchoOptions())
        self.session = type("Session", (BrokenSession,), {"broken": staticmethod(broken)})

    def open(self, prompt: Sequence[int], hints: DraftHints) -> DraftSession:
        session: DraftSession = self.session(self, len(prompt), hints.prediction)
        return session


def one_too_many(session: EchoSession, max_nodes: int) -> TokenTree:
    return chain([1] * (max_nodes + 1)) if max_nodes else TokenTree()


def never_empty(session: EchoSession, max_nodes: int) -> TokenTree:
    return chain([1] * max(max_nodes, 1))


def outside_the_vocabulary(session: EchoSession, max_nodes: int) -> TokenTree:
    return chain([64][:max_nodes])


def twins(session: EchoSession, max_nodes: int) -> TokenTree:
    return TokenTree((1, 1), (-1, -1), (1.0, 1.0)) if max_nodes > 1 else TokenTree()


def restless(session: EchoSession, max_nodes: int) -> TokenTree:
    return chain([next(COUNTER) % 64][:max_nodes])


def lost_after_a_surprise(session: EchoSession, max_nodes: int) -> TokenTree:
    if session._position > len(session._prediction) and not session._prediction:
        raise IndexError("the drafter did not expect this")
    return EchoSession.propose(session, max_nodes)


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (one_too_many, "test_trees_keep_the_contract_within_any_budget"),
        (never_empty, "test_no_nodes_asked_for_gives_the_empty_tree"),
        (outside_the_vocabulary, "test_trees_keep_the_contract_within_any_budget"),
        (twins, "test_trees_keep_the_contract_within_any_budget"),
        (restless, "test_asked_twice_it_answers_the_same"),
        (restless, "test_the_same_history_gives_the_same_trees"),
        (restless, "test_sessions_do_not_see_one_another"),
        (restless, "test_a_batch_is_answered_as_one_by_one"),
        (lost_after_a_surprise, "test_trees_keep_the_contract_whatever_is_committed"),
    ],
)
def test_a_broken_session_is_caught(broken: Propose, test: str) -> None:
    assert fails(lambda: Broken(broken), test)


class Shares(EchoDrafter):
    """All sessions are one."""

    def open(self, prompt: Sequence[int], hints: DraftHints) -> DraftSession:
        self.only = getattr(self, "only", None) or super().open(prompt, hints)
        return self.only


class Shuffles(EchoDrafter):
    """Answers a batch by other trees than its sessions do."""

    def propose(self, sessions: Sequence[DraftSession], max_nodes: Sequence[int]) -> list[TokenTree]:
        return [select(tree, range(len(tree) // 2)) for tree in super().propose(sessions, max_nodes)]


class Leaks(EchoDrafter):
    """Holds something for every session and never gives it back."""

    def open(self, prompt: Sequence[int], hints: DraftHints) -> DraftSession:
        self.held = True
        return super().open(prompt, hints)

    def check(self) -> None:
        if getattr(self, "held", False):
            raise RuntimeError("something is held that no session owns")


@pytest.mark.parametrize(
    ("drafter", "test"),
    [
        (Shares, "test_sessions_do_not_see_one_another"),
        (Shuffles, "test_a_batch_is_answered_as_one_by_one"),
        (Leaks, "test_nothing_is_held_after_close"),
    ],
)
def test_a_broken_drafter_is_caught(drafter: type[EchoDrafter], test: str) -> None:
    assert fails(lambda: drafter(64, EchoOptions()), test)


def fails(make: Callable[[], Drafter], test: str) -> bool:
    class Contract(DrafterContract):
        def drafter(self) -> Drafter:
            return make()

    try:
        getattr(Contract(), test)()
    except (AssertionError, ValueError, IndexError, RuntimeError):
        return True
    return False
