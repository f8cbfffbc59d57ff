"""Drafters that raise, stall or answer garbage are switched off; texts go on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
from structlog.testing import capture_logs
from transformers import PreTrainedModel

from specgen import (
    DraftSession,
    TokenTree,
)
from specgen.draft import manager as drafting
from specgen.tree import chain
from tests.support.bench import PROMPTS, Bench, echoes, greedy
from tests.support.core import BUSH, EAGER, Scripted, _Scripted
from tests.support.tiny import VOCABULARY, build

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama")


def raises(*_: object) -> Any:
    raise KeyError("drafter bug")


GARBAGE: dict[str, Any] = {
    "nothing": None,
    "a parent behind its child": TokenTree((1, 2), (1, -1), (1.0, 1.0)),
    "a parent far below the root": TokenTree((1,), (-2,), (1.0,)),
    "a token outside the vocabulary": TokenTree((VOCABULARY,), (-1,), (1.0,)),
    "a negative token": TokenTree((-1,), (-1,), (1.0,)),
    "two children with one token": TokenTree((1, 1), (-1, -1), (1.0, 1.0)),
    "more nodes than asked for": chain(tuple(range(64))),
    "no confidence": TokenTree((1,), (-1,)),
    "confidence that is no number": TokenTree((1,), (-1,), (float("nan"),)),
    "confidence over 1": TokenTree((1,), (-1,), (1.5,)),
    "words for tokens": TokenTree(("a",), (-1,), (1.0,)),  # type: ignore[arg-type]
    "fractions for tokens": TokenTree((1.5,), (-1,), (1.0,)),  # type: ignore[arg-type]
    "fractions for parents": TokenTree((1,), (-1.0,), (1.0,)),  # type: ignore[arg-type]
    "lists of lists": TokenTree(((1,),), (-1,), (1.0,)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("kind", GARBAGE)
@pytest.mark.parametrize("adaptive", [True, False])
def test_a_drafter_that_answers_garbage_is_switched_off(model: PreTrainedModel, kind: str, adaptive: bool) -> None:
    """The request goes on with the other drafters, and says what it says; the reason stands in its result."""
    said = greedy(model, PROMPTS[0], 16)
    broken = Scripted(lambda ids: GARBAGE[kind] if len(ids) > 8 else BUSH)
    bench = Bench(model, {"broken": broken, "echo": echoes(1.0)})
    with capture_logs() as logs:
        name = bench.add(PROMPTS[0], max_tokens=16, prediction=said, speculation={"adaptive": adaptive})
        other = bench.add(PROMPTS[3], max_tokens=16, speculation={"drafters": ["echo"]})
        bench.run()
    assert list(bench.result(name).ids) == said
    assert list(bench.result(other).ids) == greedy(model, PROMPTS[3], 16)
    shares = bench.result(name).stats.by_drafter
    assert shares["broken"].disabled
    assert shares["echo"].disabled is None
    assert adaptive or shares["echo"].accepted > 0
    assert [entry["drafter"] for entry in logs if entry["event"] == "drafter switched off"] == ["broken"]
    assert broken.sessions == 0


@pytest.mark.parametrize("method", ["propose", "commit"])
def test_a_drafter_that_raises_is_switched_off(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(_Scripted, method, raises)
    drafter = Scripted(lambda ids: BUSH)
    bench = Bench(model, {"broken": drafter})
    names = [bench.add(PROMPTS[number], max_tokens=8, speculation=EAGER) for number in (0, 3)]
    bench.run()
    for name, number in zip(names, (0, 3), strict=True):
        assert list(bench.result(name).ids) == greedy(model, PROMPTS[number], 8)
        assert "drafter bug" in str(bench.result(name).stats.by_drafter["broken"].disabled)
    assert drafter.sessions == 0, "even so, every session is closed"


def test_a_drafter_that_cannot_open_is_switched_off_for_the_request(model: PreTrainedModel) -> None:
    class Closed(Scripted):
        open = raises

    bench = Bench(model, {"broken": Closed(raises), "bush": Scripted(lambda ids: BUSH)})
    result = bench.alone(PROMPTS[0], max_tokens=8, speculation=EAGER)
    assert list(result.ids) == greedy(model, PROMPTS[0], 8)
    assert "drafter bug" in str(result.stats.by_drafter["broken"].disabled)
    assert result.stats.by_drafter["bush"].verified > 0


def test_a_drafter_that_cannot_close_does_no_harm(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Scripted, "close", raises)
    bench = Bench(model, {"broken": Scripted(lambda ids: BUSH)})
    assert list(bench.alone(PROMPTS[0], max_tokens=8).ids) == greedy(model, PROMPTS[0], 8)


def test_a_drafter_that_forgets_a_session_is_switched_off(model: PreTrainedModel) -> None:
    """One tree for two sessions: nobody can tell whose it is."""

    class Forgetful(Scripted):
        def propose(self, sessions: Sequence[DraftSession], max_nodes: Sequence[int]) -> list[TokenTree]:
            return [BUSH]

    bench = Bench(model, {"broken": Forgetful(raises)})
    names = [bench.add(PROMPTS[number], max_tokens=8, speculation=EAGER) for number in (0, 3)]
    bench.run()
    assert all(bench.result(name).stats.by_drafter["broken"].disabled for name in names)
    assert list(bench.result(names[1]).ids) == greedy(model, PROMPTS[3], 8)


def test_a_drafter_that_stalls_is_switched_off(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafting, "_STALL_SECONDS", 0.2)
    calls = []

    def slow(ids: list[int]) -> TokenTree:
        calls.append(len(ids))
        time.sleep(0.4 if len(calls) == 3 else 0)
        return BUSH

    bench = Bench(model, {"slow": Scripted(slow)})
    result = bench.alone(PROMPTS[0], max_tokens=12, speculation=EAGER)
    assert list(result.ids) == greedy(model, PROMPTS[0], 12)
    assert "took 0." in str(result.stats.by_drafter["slow"].disabled)
    assert len(calls) == 3, "it was asked again"


def test_a_first_answer_may_read_a_long_prompt(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafting, "_STALL_SECONDS", 0.2)
    monkeypatch.setattr(drafting, "_READING_SECONDS", 60.0)
    calls = []

    def slow(ids: list[int]) -> TokenTree:
        calls.append(len(ids))
        time.sleep(0.4 if len(calls) in (1, 3) else 0)
        return BUSH

    result = Bench(model, {"slow": Scripted(slow)}).alone(PROMPTS[0], max_tokens=12, speculation=EAGER)
    assert list(result.ids) == greedy(model, PROMPTS[0], 12)
    assert "took 0." in str(result.stats.by_drafter["slow"].disabled)
    assert len(calls) == 3, "the second time it has nothing to read"


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("answer", [raises, TokenTree((1, 2), (1, 0), (0.5, 0.5)), None])
def test_a_sessions_fault_leaves_the_drafter_to_others(model: PreTrainedModel, answer: Any, together: bool) -> None:
    """What is raised for all of a batch alone concerns all of it."""

    def tree(ids: list[int]) -> TokenTree:
        if ids[: len(PROMPTS[0])] != list(PROMPTS[0]):
            return BUSH
        found: TokenTree = answer() if answer is raises else answer
        return found

    class Together(Scripted):
        def propose(self, sessions: Sequence[DraftSession], max_nodes: Sequence[int]) -> list[TokenTree]:
            return [session.propose(most) for session, most in zip(sessions, max_nodes, strict=True)]

    bench = Bench(model, {"faulty": (Together if together else Scripted)(tree)})
    names = [bench.add(PROMPTS[number], max_tokens=8, speculation=EAGER) for number in (0, 3)]
    bench.run()
    for name, number in zip(names, (0, 3), strict=True):
        assert list(bench.result(name).ids) == greedy(model, PROMPTS[number], 8)
    at_fault, other = (bench.result(name).stats.by_drafter["faulty"] for name in names)
    assert at_fault.disabled
    assert bool(other.disabled) == (together and answer is raises)


def test_a_drafter_that_is_named_twice_has_one_session(model: PreTrainedModel) -> None:
    drafter = Scripted(lambda ids: BUSH)
    bench = Bench(model, {"bush": drafter})
    bench.alone(PROMPTS[0], max_tokens=4, speculation={"drafters": ["bush", "bush"]})
    assert drafter.sessions == 0


def test_a_new_request_gives_a_broken_drafter_another_chance(model: PreTrainedModel) -> None:
    answers = [raises]
    bench = Bench(model, {"moody": Scripted(lambda ids: answers[0](ids))})
    assert bench.alone(PROMPTS[0], max_tokens=4, speculation=EAGER).stats.by_drafter["moody"].disabled
    answers[0] = lambda ids: BUSH
    stats = bench.alone(PROMPTS[0], max_tokens=4, speculation=EAGER).stats.by_drafter["moody"]
    assert (stats.disabled, stats.verified > 0) == (None, True)
