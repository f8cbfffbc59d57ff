"""Drafters that are wrong, each in its way: the contract that plugins test themselves with catches every one."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch

from specgen import Drafter, DraftHints, DraftSession, TokenTree, chain
from specgen.testing import DrafterContract


class Session(DraftSession):
    """Knows its ids; proposes what the test says."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.ids = list(prompt)

    def propose(self, max_nodes: int) -> TokenTree:
        return chain([self.ids[-1]][:max_nodes])

    def commit(self, tokens: Sequence[int]) -> None:
        self.ids.extend(tokens)


def opening(kind: Callable[[Sequence[int]], DraftSession]) -> type[Drafter]:
    class Opens(Drafter):
        def open(self, prompt: Sequence[int], hints: DraftHints) -> DraftSession:
            return kind(prompt)

    return Opens


def proposing(propose: Callable[[Any, int], Any]) -> type[Drafter]:
    return opening(type("Proposes", (Session,), {"propose": propose}))


CLOCK = [0.0]


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time passes where a drafter says so."""
    monkeypatch.setattr("specgen.testing.time.perf_counter", lambda: CLOCK[0])


def slow(session: Session, most: int) -> TokenTree:
    CLOCK[0] += 0.11
    return TokenTree()


class Global(Session):
    committed: ClassVar[list[int]] = []

    def propose(self, max_nodes: int) -> TokenTree:
        return chain([len(self.committed) % 60][:max_nodes])

    def commit(self, tokens: Sequence[int]) -> None:
        self.committed.extend(tokens)


class Leaking(Drafter):
    def __init__(self) -> None:
        self.sessions: list[DraftSession] = []

    def open(self, prompt: Sequence[int], hints: DraftHints) -> DraftSession:
        self.sessions.append(Session(prompt))
        return self.sessions[-1]


class Careless(Drafter):
    """In a batch it answers something else."""

    def open(self, prompt: Sequence[int], hints: DraftHints) -> DraftSession:
        return Session(prompt)

    def propose(self, sessions: Sequence[DraftSession], max_nodes: Sequence[int]) -> list[TokenTree]:
        return [TokenTree() for _ in sessions]


def answering(*tree: Any) -> type[Drafter]:
    """Whatever is known, this tree, as long as all of it may be answered."""
    return proposing(lambda session, most: TokenTree(*tree) if most >= len(tree[0]) else TokenTree())


WRONG: dict[str, type[Drafter]] = {
    "parents that come later": answering((1, 2), (1, 0), (0.5, 0.5)),
    "a node too many": proposing(lambda session, most: chain([1] * (most + 1))),
    "a token beyond the vocabulary": answering((10**6,), (-1,), (0.5,)),
    "siblings of one token": answering((1, 1), (-1, -1), (0.5, 0.5)),
    "a confidence that is no number": answering((1,), (-1,), (float("nan"),)),
    "a confidence above 1": answering((1,), (-1,), (7.0,)),
    "a list for a tree": proposing(lambda session, most: [1, 2][:most]),
    "nothing": proposing(lambda session, most: None),
    "lists for tuples": answering([1], [-1], [0.5]),
    "tensors for numbers": answering(tuple(torch.tensor([1])), (-1,), (0.5,)),
    "an error": proposing(lambda session, most: 1 // 0),
    "too slow": proposing(slow),
    "chance": proposing(lambda session, most: chain([random.randrange(60)][:most])),
    "what others committed": opening(Global),
    "sessions that are kept": Leaking,
    "no commit": opening(lambda prompt: type("Deaf", (DraftSession,), {"propose": lambda s, most: TokenTree()})()),
    "another batch": Careless,
}


def failures(drafter: type[Drafter]) -> list[str]:
    """The tests of the contract that a drafter fails."""
    contract = type("Contract", (DrafterContract,), {"drafter": lambda self: drafter(), "prompts": ((7,), (1, 2, 1))})
    failed = []
    for name, test in inspect.getmembers(contract, inspect.isfunction):
        if name.startswith("test_"):
            try:
                test(contract())
            except Exception:
                failed.append(name)
    return failed


def test_a_right_one_passes() -> None:
    assert failures(opening(Session)) == []


@pytest.mark.parametrize("name", WRONG)
def test_the_contract_catches(name: str) -> None:
    assert failures(WRONG[name]) != []


@pytest.mark.parametrize(
    ("name", "caught"),
    [
        ("too slow", "test_a_tree_takes_no_longer_than_it_may"),
        ("sessions that are kept", "test_a_closed_session_is_let_go"),
        ("another batch", "test_a_batch_is_answered_as_one_by_one"),
    ],
)
def test_and_for_the_right_reason(name: str, caught: str) -> None:
    assert failures(WRONG[name]) == [caught]
