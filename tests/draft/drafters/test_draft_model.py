"""A smaller model that drafts."""

from __future__ import annotations

import random
from copy import deepcopy

import pytest
from transformers import PreTrainedModel

from specgen import (
    Drafter,
    DrafterMismatch,
    DraftHints,
    Engine,
    InvalidRequest,
)
from specgen.testing import DrafterContract
from specgen.tree import path
from specgen.types import EMPTY_TREE
from tests.support.bench import PROMPTS, Bench, first_layers, greedy
from tests.support.core import EAGER, drafted_by
from tests.support.tiny import VOCABULARY, build

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama")


@pytest.fixture(scope="module")
def smaller(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its last layer: right now and then."""
    return first_layers(model, 2)


class TestDraftModel(DrafterContract):
    vocab_size = VOCABULARY

    @pytest.fixture(autouse=True)
    def draft_with(self, smaller: PreTrainedModel) -> None:
        # In float32 a batch rounds otherwise than its parts, and the last digit of a confidence shows it.
        self.model = deepcopy(smaller).double()

    def drafter(self) -> Drafter:
        return drafted_by(self.model, kv_tokens=1024)


def test_the_model_as_its_own_draft_is_nearly_always_right(model: PreTrainedModel) -> None:
    """Its tree holds the very path that it will say; the draft is as deep as it may be and one forward per level."""
    model = deepcopy(model)
    model.lm_head.weight.data *= 8  # so that it is sure of what it says
    drafter = drafted_by(model, depth=4, width=2)
    bench = Bench(model, {"draft-model": drafter})
    said = greedy(model, PROMPTS[0], 60)
    result = bench.alone(PROMPTS[0], max_tokens=60, speculation=EAGER)
    assert list(result.ids) == said
    assert result.stats.mean_acceptance_length > 4
    assert drafter.model.forwards <= 4 * result.stats.num_spec_steps
    assert not drafter.model.pool.open_tables


def test_a_draft_model_drafts_for_the_whole_batch_at_once(model: PreTrainedModel) -> None:
    drafter = drafted_by(model, depth=4, width=2)
    bench = Bench(model, {"draft-model": drafter})
    for prompt in PROMPTS:
        bench.add(prompt, max_tokens=20, speculation=EAGER)
    bench.run()
    assert drafter.model.forwards <= 4 * bench.core.counters.steps


def test_a_draft_session_catches_up_on_what_it_was_not_asked_for(smaller: PreTrainedModel) -> None:
    """Whatever was committed in between, it answers as one that has read the whole text at once."""
    rng = random.Random(2)
    drafter = drafted_by(smaller)
    ids = [rng.randrange(VOCABULARY) for _ in range(9)]
    session = drafter.open(ids, DraftHints())
    for round in range(12):
        tree = session.propose(63) if round % 3 else EMPTY_TREE
        inside = [tree.tokens[node] for node in path(tree, rng.randrange(len(tree)))] if len(tree) else []
        step = [*inside, *(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 4)))]
        session.commit(step)
        ids += step
        fresh = drafter.open(ids[:-1], DraftHints())
        fresh.commit(ids[-1:])
        theirs, mine = fresh.propose(63), session.propose(63)
        assert (mine.tokens, mine.parents) == (theirs.tokens, theirs.parents)
        assert mine.confidence == pytest.approx(theirs.confidence, abs=1e-4)
        fresh.close()
        drafter.check()
    session.close()
    drafter.check()
    assert not drafter.model.pool.open_tables


def test_a_draft_session_reads_only_what_is_new(smaller: PreTrainedModel) -> None:
    """Behind an accepted path its rows stay: a step reads the bonus and grows the tree."""
    drafter = drafted_by(smaller, depth=3, width=1)
    session = drafter.open(PROMPTS[2][:-1], DraftHints())
    assert session.propose(3) == EMPTY_TREE, "the first token does not wait for the draft model to read the prompt"
    session.commit(PROMPTS[2][-1:])
    tree = session.propose(3)
    session.commit([*tree.tokens[:2], 5])
    rows = drafter.model.rows
    session.propose(3)
    assert drafter.model.rows - rows <= 1 + 2
    session.close()


def test_a_draft_model_without_room_says_nothing_and_harms_nobody(model: PreTrainedModel) -> None:
    """Its pool holds one text, three run; nothing is switched off, and room that comes free is used."""
    drafter = drafted_by(model, kv_tokens=64, depth=2, width=2)
    bench = Bench(model, {"draft-model": drafter})
    names = [bench.add(PROMPTS[number], max_tokens=40, speculation=EAGER) for number in (0, 2, 5)]
    bench.run()
    for name, number in zip(names, (0, 2, 5), strict=True):
        assert list(bench.result(name).ids) == greedy(model, PROMPTS[number], 40)
        assert bench.result(name).stats.by_drafter["draft-model"].disabled is None
    assert sum(bench.result(name).stats.num_accepted_draft_tokens for name in names) > 0
    assert not drafter.model.pool.open_tables


def test_a_text_longer_than_the_draft_models_context_goes_on_without_it(model: PreTrainedModel) -> None:
    short = first_layers(model, 2)
    short.config.max_position_embeddings = 24
    bench = Bench(model, {"draft-model": drafted_by(short)})
    result = bench.alone(PROMPTS[0], max_tokens=40, speculation=EAGER)
    assert list(result.ids) == greedy(model, PROMPTS[0], 40)
    assert sum(result.stats.per_step_drafted[:2]) > 0
    assert result.stats.per_step_drafted[-1] == 0
    assert result.stats.by_drafter["draft-model"].disabled is None


def test_a_draft_model_with_another_vocabulary_is_refused(model: PreTrainedModel) -> None:
    """When the engine is built, with both sizes and what to do."""
    other = first_layers(model, 1)
    other.resize_token_embeddings(VOCABULARY + 8)
    with pytest.raises(DrafterMismatch, match=f"vocabulary of {VOCABULARY + 8}, the target of {VOCABULARY}; choose"):
        Engine(model, kv_tokens=512, draft_model=other)
    with pytest.raises(InvalidRequest, match="needs the option model") as caught:
        Engine(model, kv_tokens=512, drafters=["draft-model"])
    assert caught.value.param == "model"
