"""A tree grows no deeper than pays, and as deep as it may where time does not count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

import pytest

from specgen import Drafter, DrafterFactory, DraftHints, DraftSession, Engine, Speculation, TokenTree, hookimpl
from specgen.draft import growth
from specgen.draft.growth import Growth, Levels
from specgen.plugins.manager import load_plugins
from specgen.types import EMPTY_TREE
from tests.support.tiny import build


def grown(*chances: float) -> Growth:
    """A growth whose picked nodes are accepted with these chances."""
    tree = Growth()
    tree.extend([chances], [range(len(chances))])
    tree.pick(len(chances), least=0.0)
    return tree


def timed(levels: Levels, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((0.0, seconds))
    monkeypatch.setattr(growth.time, "perf_counter", lambda: next(clock))
    with levels.timed():
        pass


def test_hope_is_the_chance_that_a_picked_node_is_accepted() -> None:
    tree = grown(0.5, 0.25)
    assert tree.hope == pytest.approx(0.75)
    tree.extend([[0.5], [0.5]], [[7], [8]])
    tree.pick(1)
    assert tree.hope == pytest.approx(0.25)


def test_a_level_is_grown_if_it_may_bring_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = Levels()
    assert levels.pay([grown(0.01)], token_seconds=1e-9), "nothing is known of the cost"
    timed(levels, 0.3, monkeypatch)
    assert levels.pay([grown(0.5)], token_seconds=1.0)
    assert not levels.pay([grown(0.2)], token_seconds=1.0)
    assert levels.pay([grown(0.2), grown(0.2)], token_seconds=1.0), "a batch shares the cost"
    assert levels.pay([grown(0.2)], token_seconds=0.0), "time does not count"


def test_a_cost_that_was_an_accident_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = Levels()
    timed(levels, 30.0, monkeypatch)
    refused = 0
    while not levels.pay([grown(0.9)], token_seconds=1.0):
        refused += 1
    assert 50 < refused < 500


def grown_at_random(seed: int, kept: int, told: bool) -> tuple[TokenTree, int]:
    """The `kept` likeliest nodes of a tree whose children's chances follow from its nodes, and how many were grown."""
    tree = Growth(kept) if told else Growth()
    for _ in range(5):
        chances = []
        for node in tree.picked:
            ranks = Random(f"{seed} {tree.survival[node] if node >= 0 else 1.0}")
            chances.append(sorted((ranks.random() ** 2 / 2 for _ in range(6)), reverse=True))
        tree.extend(chances, [range(6)] * len(tree.picked))
        if not tree.pick(6, least=0.001):
            break
    return tree.best(kept), len(tree.row)


@pytest.mark.parametrize("kept", [1, 5, 12])
def test_what_will_not_be_taken_is_not_grown(kept: int) -> None:
    saved = 0
    for seed in range(20):
        (all_grown, rows), (as_wanted, fewer) = (grown_at_random(seed, kept, told) for told in (False, True))
        assert as_wanted == all_grown
        saved += rows - fewer
    assert saved > 20 * kept
    nothing = Growth(0)
    nothing.extend([[0.5]], [[1]])
    assert not nothing.pick(6)


class Listener(Drafter, DraftSession):
    """Drafts nothing, and remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[float] = []

    @hookimpl
    def drafters(self) -> Mapping[str, DrafterFactory]:
        return {"listener": lambda setup: self}

    def open(self, prompt: Sequence[int], hints: DraftHints) -> DraftSession:
        return self

    def propose(self, sessions: Sequence[DraftSession], max_nodes: Sequence[int]) -> list[TokenTree]:  # type: ignore[override]
        self.told.append(self.token_seconds)
        return [EMPTY_TREE] * len(sessions)

    def commit(self, tokens: Sequence[int]) -> None:
        pass


@pytest.mark.parametrize("adaptive", [True, False])
def test_the_engine_tells_drafters_what_a_token_is_worth(adaptive: bool) -> None:
    listener = Listener()
    plugins = load_plugins(only=())
    plugins.register(listener, "listener")
    with Engine(build("llama"), plugins=plugins, drafters={"listener": {}}, kv_tokens=512) as engine:
        engine.generate([5, 6, 7], max_tokens=6, ignore_eos=True, speculation=Speculation(adaptive=adaptive))
    assert all(seconds > 0 for seconds in listener.told[1:]) == adaptive
    assert any(listener.told) == adaptive
