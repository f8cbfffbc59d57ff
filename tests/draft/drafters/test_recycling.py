"""Token recycling: what is kept of the target's forwards, for whom, and the tree that is drafted from it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from specgen import Drafter, DrafterSetup, DraftHints, DraftSession, Features, InvalidRequest, UnknownName, Wanted
from specgen.draft.budget import survivals
from specgen.draft.drafters.recycling import Recycling
from specgen.testing import DrafterContract
from specgen.tree import check, children
from specgen.types import EMPTY_TREE
from tests.support.bench import Bench, first_layers, greedy
from tests.support.tiny import VOCABULARY, build

pytestmark = pytest.mark.usefixtures("one_thread")

SURE = (9.0, 3.0, 0.0)


def drafter(**options: Any) -> Recycling:
    return Recycling(DrafterSetup(VOCABULARY, options=options))


def show(session: DraftSession, rows: Sequence[tuple[int, Sequence[int]]], scores: Sequence[float] = SURE) -> None:
    """The target named `rows`' tokens behind their first ones."""
    asked, successors = zip(*rows, strict=True)
    session.observe(Features(0, {}, asked, torch.tensor(successors), torch.tensor([list(scores)] * len(rows))))


def learn(memory: Drafter, rows: Sequence[tuple[int, Sequence[int]]], salt: str = "") -> None:
    """A request of a tenant that ends."""
    session = memory.open([0], DraftHints(cache_salt=salt))
    show(session, rows)
    session.close()


def knows(memory: Drafter, token: int, salt: str = "") -> bool:
    session = memory.open([token], DraftHints(cache_salt=salt))
    tree = session.propose(1)
    session.close()
    return tree != EMPTY_TREE


# What is drafted.


def test_it_drafts_along_the_likeliest_successors() -> None:
    session = drafter().open([1], DraftHints())
    assert session.propose(8) == EMPTY_TREE
    show(session, [(1, (2, 3, 4)), (2, (5, 6, 7)), (5, (8, 9, 1))])
    assert session.propose(3).tokens == (2, 5, 8)
    session.commit([3, 2])
    assert session.propose(2).tokens == (5, 8)


def test_nodes_come_by_survival_and_confidence_by_the_scores() -> None:
    session = drafter().open([1], DraftHints())
    show(session, [(1, (2, 3, 4)), (2, (1, 3, 4))], scores=(2.0, 1.0, 0.0))
    tree = session.propose(40)
    check(tree, VOCABULARY, 40)
    assert survivals(tree) == sorted(survivals(tree), reverse=True)
    first = [tree.confidence[node] for node in children(tree)[0].values()]
    assert first == sorted(first, reverse=True)
    assert 0 < first[-1] < first[0] < 1
    assert session.propose(7).tokens == tree.tokens[:7]


def test_the_latest_forward_has_the_last_word_and_in_it_the_row_nearest_the_root() -> None:
    session = drafter().open([1], DraftHints())
    show(session, [(1, (2, 3, 4))])
    show(session, [(1, (5, 6, 7)), (9, (1, 2, 3)), (1, (8, 9, 2))])
    assert session.propose(1).tokens == (5,)


def test_more_successors_than_wanted_are_left_alone() -> None:
    """Another drafter of the engine may want more."""
    session = drafter(successors=2).open([1], DraftHints())
    assert drafter(successors=2).wanted == Wanted(successors=2)
    show(session, [(1, (2, 3, 4))])
    assert session.propose(8).tokens == (2, 3)


@pytest.mark.parametrize("scores", [(1.0, -torch.inf, -torch.inf), (torch.nan,) * 3, (-torch.inf,) * 3])
def test_scores_that_are_no_numbers_do_no_harm(scores: tuple[float, ...]) -> None:
    session = drafter().open([1], DraftHints())
    show(session, [(1, (2, 3, 4))], scores)
    check(session.propose(8), VOCABULARY, 8)


def test_features_without_successors_are_passed_over() -> None:
    session = drafter().open([1], DraftHints())
    session.observe(Features(0))
    assert session.propose(8) == EMPTY_TREE


# What is kept.


def test_a_closed_session_teaches_those_that_open_later() -> None:
    memory = drafter()
    running = memory.open([1], DraftHints())
    learn(memory, [(1, (2, 3, 4))])
    assert running.propose(8) == EMPTY_TREE, "a session sees the memory as it was when it opened"
    assert knows(memory, 1)


def test_it_matters_not_when_a_session_is_asked() -> None:
    """What it saw waits until someone asks, and not without end."""
    rows = [(token % 7 + 1, (token % 5, token % 11, token % 3 + 12)) for token in range(0, 300, 7)]
    seldom, often = (drafter().open([1], DraftHints()) for _ in range(2))
    for row in rows:
        show(seldom, [row])
        show(often, [row])
        often.propose(4)
    assert seldom.propose(16) == often.propose(16) != EMPTY_TREE


def test_a_session_mixes_what_it_sees_with_what_was_seen_before_it() -> None:
    memory = drafter()
    learn(memory, [(1, (2, 3, 4)), (5, (6, 7, 8))])
    session = memory.open([1], DraftHints())
    show(session, [(1, (5, 3, 4))])
    tree = session.propose(3)
    assert tree.tokens == (5, 2, 6)
    assert tree.parents == (-1, -1, 0)
    assert tree.confidence[0] == tree.confidence[1] == pytest.approx(tree.confidence[2] / 2)
    for _ in range(9):
        show(session, [(1, (5, 3, 4))])
    assert 2 not in session.propose(8).tokens, "what does not come again is forgotten"


def test_tenants_never_see_one_another() -> None:
    memory = drafter()
    learn(memory, [(1, (2, 3, 4))], salt="a")
    assert knows(memory, 1, "a")
    assert not knows(memory, 1, "b")
    assert not knows(memory, 1)


def test_memory_is_bounded_and_what_was_seen_longest_ago_goes_first() -> None:
    memory = drafter(memory=10)
    learn(memory, [(token, (1, 2, 3)) for token in range(8)])
    learn(memory, [(0, (4, 5, 6)), (20, (1, 2, 3)), (21, (1, 2, 3)), (22, (1, 2, 3))])
    # Of one forward the last row counts as the oldest.
    assert [token for token in range(30) if knows(memory, token)] == [0, 1, 2, 3, 4, 5, 6, 20, 21, 22]
    session = memory.open([50], DraftHints())
    for token in range(30, 60):
        show(session, [(token, (1, 2, 3))])
    assert len(session._learned) == 10  # type: ignore[attr-defined]
    assert session.propose(1).tokens == (1,)


def test_tenants_are_bounded_and_the_one_that_learned_nothing_for_longest_goes_first() -> None:
    memory = drafter()
    for tenant in range(40):
        learn(memory, [(1, (2, 3, 4))], salt="regular")
        learn(memory, [(1, (2, 3, 4))], salt=str(tenant))
    assert knows(memory, 1, "regular")
    assert [tenant for tenant in range(40) if knows(memory, 1, str(tenant))] == list(range(25, 40))


@pytest.mark.parametrize(("option", "value"), [("successors", 0), ("successors", 33), ("memory", 0)])
def test_values_out_of_range_are_refused_by_name(option: str, value: int) -> None:
    with pytest.raises(InvalidRequest, match=f"{option} is {value}; Expected "):
        drafter(**{option: value})


def test_unknown_options_are_refused_with_the_choices() -> None:
    with pytest.raises(UnknownName, match="'top'; choices: memory, successors"):
        drafter(top=8)


# At work.


def test_a_text_that_repeats_itself_is_accepted() -> None:
    """A model that does not look back says the same behind the same token: after one round all is known."""
    model = first_layers(build("llama"), 1)
    model.model.layers[0].self_attn.o_proj.weight.data.zero_()
    said = greedy(model, [5], 60)
    bench = Bench(model, {"recycling": drafter()})
    result = bench.alone([5], max_tokens=60, speculation={"adaptive": False})
    assert list(result.ids) == said
    assert result.stats.mean_acceptance_length > 2


def test_nodes_that_were_not_accepted_are_learned_from() -> None:
    model: PreTrainedModel = build("llama")
    memory = drafter()
    bench = Bench(model, {"recycling": memory})
    result = bench.alone([5], max_tokens=24, speculation={"adaptive": False})
    assert result.stats.num_draft_tokens > 0
    assert set(memory._tenants[""]) > set(result.ids[:-1]) | {5}


class TestRecycling(DrafterContract):
    """With a memory to draft from; every session starts from the same one."""

    vocab_size = VOCABULARY

    def drafter(self) -> Drafter:
        memory = drafter()
        rng = random.Random(0)
        learn(memory, [(token, rng.sample(range(VOCABULARY), 3)) for token in range(VOCABULARY)])
        return memory


class TestRecyclingWithoutMemory(DrafterContract):
    vocab_size = VOCABULARY

    def drafter(self) -> Drafter:
        return drafter()
