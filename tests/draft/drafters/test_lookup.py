"""Prompt lookup and prediction."""

from __future__ import annotations

import random

import pytest
from transformers import PreTrainedModel

from specgen import (
    Drafter,
    DrafterSetup,
    DraftHints,
)
from specgen.draft.drafters.ngram import NgramIndex, continuations
from specgen.draft.drafters.prediction import Prediction
from specgen.draft.drafters.prompt_lookup import PromptLookup
from specgen.testing import DrafterContract
from specgen.tree import check
from specgen.types import EMPTY_TREE
from tests.support.core import paths
from tests.support.tiny import VOCABULARY, build

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama")


def test_the_index_finds_the_longest_and_latest_match_first() -> None:
    index = NgramIndex([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 2)
    assert index.matches([1, 2, 3]) == [(3, 3), (2, 6)]
    assert index.matches(index.ids) == [(3, 3), (2, 6)], "the end itself has nothing behind it"
    assert index.matches([7, 3]) == []
    assert index.matches([3]) == []


@pytest.mark.parametrize("seed", range(20))
def test_the_index_finds_what_a_search_by_hand_finds(seed: int) -> None:
    rng = random.Random(seed)
    ids = [rng.randrange(3) for _ in range(60)]
    index = NgramIndex(ids[:20], 2)
    index.extend(ids[20:])
    by_hand = []
    for end in range(2, len(ids)):
        length = 0
        while length < min(end, 16) and ids[end - 1 - length] == ids[-1 - length]:
            length += 1
        if length >= 2:
            by_hand.append((length, end))
    latest = sorted(by_hand, key=lambda match: match[1])[-8:]
    found = index.matches(index.ids)
    assert found == sorted(found, reverse=True)
    assert set(found) <= set(by_hand)
    assert set(latest[1:]) <= set(found), "the latest few of them all"


def test_continuations_branch_where_the_text_went_on_differently() -> None:
    index = NgramIndex([1, 2, 3, 4, 0, 1, 2, 3, 5, 0, 1, 2], 2)
    tree = continuations(index, index.matches(index.ids), 10, 2)
    check(tree, 10, 10)
    assert {(3, 4), (3, 5)} <= set(paths(tree))
    assert len(continuations(index, index.matches(index.ids), 1, 2)) == 1
    assert continuations(index, [], 10, 2) == EMPTY_TREE


def test_prompt_lookup_drafts_what_followed_before(model: PreTrainedModel) -> None:
    """In the prompt, and in the output once it repeats itself."""
    lookup = PromptLookup(DrafterSetup(VOCABULARY))
    session = lookup.open([1, 2, 3, 4, 5, 1, 2], DraftHints())
    assert session.propose(3).tokens == (3, 4, 5)
    session.commit([9, 9, 3, 4])
    assert session.propose(2).tokens == (5, 1)
    assert lookup.open([1, 2, 3], DraftHints()).propose(8) == EMPTY_TREE


def test_a_prediction_is_followed_and_found_again_behind_an_edit() -> None:
    drafter = Prediction(DrafterSetup(VOCABULARY))
    session = drafter.open([0], DraftHints((1, 2, 3, 4, 5, 6, 7, 8)))
    assert session.propose(3).tokens == (1, 2, 3)
    session.commit([1, 2])
    assert session.propose(3).tokens == (3, 4, 5)
    session.commit([60, 61])
    session.commit([5, 6])
    assert session.propose(3).tokens == (7, 8)
    assert drafter.open([0], DraftHints()).propose(8) == EMPTY_TREE


class TestPromptLookup(DrafterContract):
    vocab_size = VOCABULARY

    def drafter(self) -> Drafter:
        return PromptLookup(DrafterSetup(VOCABULARY))


class TestPrediction(DrafterContract):
    vocab_size = VOCABULARY

    def drafter(self) -> Drafter:
        return Prediction(DrafterSetup(VOCABULARY))
