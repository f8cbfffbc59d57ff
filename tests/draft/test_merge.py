"""One tree from several drafters."""

from __future__ import annotations

import random

import pytest
from transformers import PreTrainedModel

from specgen import (
    Speculation,
    TokenTree,
)
from specgen.draft import manager as drafting
from specgen.draft.budget import AcceptanceModel, likeliest
from specgen.draft.merge import Draft, Merged
from specgen.tree import chain, check, depths
from specgen.types import MAX_TREE_NODES
from tests.support.bench import PROMPTS, Bench, echoes, greedy
from tests.support.core import EAGER, paths
from tests.support.tiny import build

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama")


@pytest.mark.parametrize("seed", range(30))
def test_merged_trees_hold_every_path_once_with_the_mean_confidence(seed: int) -> None:
    rng = random.Random(seed)
    trees = []
    for _ in range(rng.randint(0, 4)):
        found: dict[tuple[int, int], int] = {}
        for _ in range(rng.randint(0, 12)):
            found.setdefault((rng.randrange(-1, len(found)), rng.randrange(3)), len(found))
        parents, tokens = zip(*found, strict=True) if found else ((), ())
        trees.append(TokenTree(tuple(tokens), tuple(parents), tuple(rng.random() for _ in found)))
    merged = Merged(trees)
    union = merged.tree([tree.confidence for tree in trees])
    check(union, 3)
    expected: dict[tuple[int, ...], list[float]] = {}
    for tree in trees:
        for step, confidence in paths(tree).items():
            expected.setdefault(step, []).append(confidence)
    assert paths(union) == pytest.approx({step: sum(every) / len(every) for step, every in expected.items()})
    for number, tree in enumerate(trees):
        assert merged.shared(number) == [len(expected[step]) > 1 for step in paths(tree)]


def test_agreement_is_learned_apart() -> None:
    """Alone a drafter is wrong; where another says the same it is right."""
    everyone = AcceptanceModel()
    here = AcceptanceModel(everyone)
    for _ in range(60):
        here.observe(TokenTree((1, 2), (-1, -1), (0.5, 0.5)), (1,), [True, False])
    assert here.survival(0.5, shared=True) > 0.95
    assert here.survival(0.5) < 0.05
    elsewhere = AcceptanceModel(everyone)
    agreed, alone = elsewhere.calibrated(chain((7, 8), 0.5), [True, False])
    assert (agreed, alone) == (elsewhere.survival(0.5, shared=True), elsewhere.survival(0.5))
    assert agreed > 0.9
    assert alone < 0.1


def test_a_fixed_budget_takes_the_likeliest_nodes_of_all_drafters(model: PreTrainedModel) -> None:
    """Not those of whoever comes first."""
    said = greedy(model, PROMPTS[0], 60)
    noise = echoes(0.0, siblings=3, depth=20, confidence=0.9)
    bench = Bench(model, {"noise": noise, "echo": echoes(1.0, siblings=0, depth=6)})
    speculation = {"adaptive": False, "max_nodes": 12}
    stats = bench.alone(PROMPTS[0], max_tokens=60, prediction=said, speculation=speculation).stats
    assert set(stats.per_step_drafted[:-2]) == {12}
    assert max(stats.per_step_accepted) == 6, "before: the noise had all twelve"


@pytest.mark.parametrize("seed", range(10))
def test_the_likeliest_nodes_come_with_their_parents(seed: int) -> None:
    rng = random.Random(seed)
    parents = tuple(rng.randrange(-1, node) if node else -1 for node in range(20))
    tree = TokenTree(tuple(range(20)), parents, tuple(rng.choice((0.2, 0.5, 1.0)) for _ in range(20)))
    for most in (0, 1, 7, 20, 63):
        nodes = likeliest(tree, most)
        assert len(nodes) == min(most, 20)
        assert all(parents[node] in (-1, *nodes) for node in nodes)


def test_several_drafters_share_one_tree(model: PreTrainedModel) -> None:
    """Two that say the same cost no more than one; each gets its share of the credit."""
    said = greedy(model, PROMPTS[0], 12)
    bench = Bench(model, {"a": echoes(1.0, siblings=0, depth=3), "b": echoes(1.0, siblings=0, depth=2)})
    result = bench.alone(PROMPTS[0], max_tokens=12, prediction=said, speculation=EAGER)
    assert result.stats.per_step_drafted == (3, 3, 3)
    shares = result.stats.by_drafter
    assert (shares["a"].verified, shares["a"].accepted) == (9, 9)
    assert (shares["b"].verified, shares["b"].accepted) == (6, 6)


def test_a_deep_tree_is_cut_where_the_text_ends() -> None:
    tree = TokenTree((1, 2, 3, 4), (-1, 0, 1, -1), (1.0,) * 4)
    draft = Draft(tree, (("a",), ("a", "b"), ("b",), ("a",)))
    cut = Draft(TokenTree((1, 2, 4), (-1, 0, -1), (1.0,) * 3), (("a",), ("a", "b"), ("a",)))
    assert drafting._shallow(draft, 2) == cut
    assert drafting._shallow(draft, 3) is draft
    assert max(depths(tree)) == 3
    assert MAX_TREE_NODES == 63
    assert Speculation().max_nodes == MAX_TREE_NODES
