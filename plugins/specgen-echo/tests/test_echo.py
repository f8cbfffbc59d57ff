from pathlib import Path
from typing import Any

import pytest
import specgen_echo
from specgen_echo import EchoDrafter, EchoOptions, echo

from specgen.draft.drafter import Drafter, DrafterSetup, DraftHints
from specgen.errors import InvalidRequest, UnknownName
from specgen.plugins.manager import Plugins
from specgen.testing import DrafterContract
from specgen.tree import check, children, depths
from specgen.types import TokenTree

VOCAB = 100
PROMPT = [1, 2, 3]
TRUTH = tuple(position * 37 % VOCAB for position in range(400))


def drafter(vocab_size: int = VOCAB, **options: Any) -> Drafter:
    return echo(DrafterSetup(vocab_size, options=options))


def walk(tree: TokenTree, truth: tuple[int, ...]) -> int:
    """How many tokens of `truth` the tree holds as one path from the root."""
    below, node = children(tree), -1
    for depth, token in enumerate(truth):
        if token not in below[node + 1]:
            return depth
        node = below[node + 1][token]
    return len(truth)


def accepted_per_step(max_nodes: int = 63, prediction: tuple[int, ...] = TRUTH, **options: Any) -> list[int]:
    """Decode all of TRUTH: each step commits what the tree has right, and one token more."""
    session, at, steps = drafter(**options).open(PROMPT, DraftHints(prediction)), 0, []
    while at < len(TRUTH) - 8:
        tree = session.propose(max_nodes)
        check(tree, VOCAB, max_nodes)
        steps.append(walk(tree, TRUTH[at:]))
        session.commit(TRUTH[at : at + steps[-1] + 1])
        at += steps[-1] + 1
    return steps


def hits(tree: TokenTree, truth: tuple[int, ...]) -> list[bool]:
    level = list(zip(depths(tree), tree.tokens, strict=True))
    return [(depth + 1, token) in level for depth, token in enumerate(truth)]


def test_hit_rate_1_is_always_right_to_its_depth() -> None:
    assert set(accepted_per_step(hit_rate=1.0)) == {8}
    assert set(accepted_per_step(hit_rate=1.0, depth=3, siblings=4)) == {3}


def test_hit_rate_0_is_never_right() -> None:
    assert set(accepted_per_step(hit_rate=0.0)) == {0}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("siblings", [0, 2])
def test_hit_rate_one_half_is_right_at_half_of_the_positions(seed: int, siblings: int) -> None:
    session = drafter(hit_rate=0.5, seed=seed, siblings=siblings, depth=1).open(PROMPT, DraftHints(TRUTH))
    right = []
    for token in TRUTH:
        right.append(token in session.propose(63).tokens)
        session.commit([token])
    assert 0.42 < sum(right) / len(right) < 0.58


def test_where_it_hits_does_not_depend_on_the_steps() -> None:
    options = {"hit_rate": 0.5, "depth": 16}
    ahead = drafter(**options).open(PROMPT, DraftHints(TRUTH))
    later = drafter(**options).open(PROMPT, DraftHints(TRUTH))
    later.commit(TRUTH[:5])
    assert hits(ahead.propose(63), TRUTH[:16])[5:] == hits(later.propose(63), TRUTH[5:16])


def test_a_missed_position_is_missed_in_every_branch() -> None:
    tree = drafter(hit_rate=0.5, siblings=3, depth=6).open(PROMPT, DraftHints(TRUTH)).propose(63)
    shown = hits(tree, TRUTH[:6])
    assert True in shown
    assert False in shown


def test_it_claims_what_it_is_told_to() -> None:
    session = drafter(hit_rate=0.0, depth=21, confidence=0.9).open(PROMPT, DraftHints())
    assert session.propose(60).confidence == (0.9,) * 60
    assert set(drafter(siblings=3).open(PROMPT, DraftHints(TRUTH)).propose(60).confidence) == {0.25}


def test_noise_has_wrong_siblings_and_wrong_branches_of_depth_two() -> None:
    tree = drafter(siblings=2, depth=3).open(PROMPT, DraftHints(TRUTH)).propose(63)
    below = children(tree)
    wrong = [node for token, node in below[0].items() if token != TRUTH[0]]
    assert len(wrong) == 2
    assert all(below[node + 1] for node in wrong)
    assert max(depths(tree)) == 3


def test_the_truth_is_not_always_the_first_child() -> None:
    session = drafter(depth=1).open(PROMPT, DraftHints(TRUTH))
    places = set()
    for token in TRUTH[:40]:
        places.add(session.propose(63).tokens.index(token))
        session.commit([token])
    assert places == {0, 1}


@pytest.mark.parametrize("most", range(1, 12))
def test_the_truth_stays_when_nodes_are_few(most: int) -> None:
    assert min(accepted_per_step(max_nodes=most)) >= 1


def test_off_the_prediction_there_is_only_noise_for_good() -> None:
    session = drafter().open(PROMPT, DraftHints((5, 6, 7, 8, 9)))
    session.commit([5, 0])
    assert len(session.propose(63)) > 0
    session.commit([7])
    assert walk(session.propose(63), (8, 9)) == 0


@pytest.mark.parametrize("prediction", [(), (5,), (VOCAB, -1, 5)])
@pytest.mark.parametrize("vocab_size", [1, 2, VOCAB])
def test_odd_predictions_and_vocabularies_do_no_harm(prediction: tuple[int, ...], vocab_size: int) -> None:
    session = drafter(vocab_size).open(PROMPT, DraftHints(prediction))
    for tokens in ([0], [0, 0, 0], [0]):
        check(session.propose(63), vocab_size)
        session.commit(tokens)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("hit_rate", 1.1),
        ("hit_rate", float("nan")),
        ("hit_rate", "1"),
        ("siblings", -1),
        ("confidence", 1.5),
        ("siblings", 1.5),
        ("depth", 0),
        ("seed", True),
    ],
)
def test_values_out_of_range_are_refused_by_name(option: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=f"{option} is {value!r}; Expected ") as caught:
        drafter(**{option: value})
    assert caught.value.param == option


def test_unknown_options_are_refused_with_the_choices() -> None:
    with pytest.raises(UnknownName, match="'hitrate'; choices: confidence, depth, hit_rate, seed, siblings"):
        drafter(hitrate=1.0)


def test_it_comes_through_the_door() -> None:
    plugins = Plugins()
    plugins.register(specgen_echo, "specgen-echo", version="0.1.0")
    assert plugins.collect("drafters")["echo"] is echo


def test_the_readme_runs() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    exec(readme.split("```python\n")[1].split("```")[0], {})


class TestEcho(DrafterContract):
    def drafter(self) -> Drafter:
        return EchoDrafter(self.vocab_size, EchoOptions(hit_rate=0.5))


class TestEchoWithoutPrediction(DrafterContract):
    hints = DraftHints()

    def drafter(self) -> Drafter:
        return EchoDrafter(self.vocab_size, EchoOptions(siblings=5))
