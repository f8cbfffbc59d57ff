import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import specgen_suffix
from specgen_suffix import Suffix, SuffixOptions, suffix
from specgen_suffix.history import Outputs, joined
from specgen_suffix.session import SuffixSession, Text

from specgen.draft.drafter import Drafter, DrafterSetup, DraftHints
from specgen.errors import InvalidRequest, UnknownName
from specgen.plugins.manager import Plugins
from specgen.testing import DrafterContract
from specgen.tree import check, children
from specgen.types import EMPTY_TREE, TokenTree

VOCAB = 100
STORY = [10, 11, 12, 13, 14, 15, 16, 17]


def drafter(**options: Any) -> Suffix:
    return suffix(DrafterSetup(VOCAB, options=options))


def tree_of(drafter: Drafter, prompt: Sequence[int], max_nodes: int = 63, salt: str = "") -> TokenTree:
    session = drafter.open(prompt, DraftHints(cache_salt=salt))
    tree = session.propose(max_nodes)
    check(tree, VOCAB, max_nodes)
    session.close()
    return tree


def write(drafter: Drafter, output: Sequence[int], salt: str = "", prompt: Sequence[int] = (0,)) -> None:
    """A request that is answered by `output`."""
    session = drafter.open(prompt, DraftHints(cache_salt=salt))
    session.commit(output)
    session.close()


def held(drafter: Suffix) -> dict[str, int]:
    """Tokens of past outputs, per tenant."""
    return {tenant: sum(len(part.tokens) for part in past) for tenant, past in drafter._past.items()}


# What is drafted.


def test_what_followed_before_is_drafted() -> None:
    session = drafter().open([1, 2, 3, 4, 5, 1, 2], DraftHints())
    assert session.propose(3) == TokenTree((3, 4, 5), (-1, 0, 1), (2 / 3, 3 / 4, 4 / 5))
    session.commit([9, 9, 3, 4])
    assert session.propose(2).tokens == (5, 1)


def test_what_never_came_before_is_not_drafted() -> None:
    assert tree_of(drafter(), [1, 2, 3]) == EMPTY_TREE
    assert tree_of(drafter(), [1, 2, 3, 4, 1]) == EMPTY_TREE, "one token is too short a match"
    assert tree_of(drafter(min_match=1), [1, 2, 3, 4, 1]).tokens[0] == 2


def test_it_branches_where_texts_went_on_differently_and_the_frequent_is_surer() -> None:
    tree = tree_of(drafter(), [1, 2, 3, 0, 1, 2, 4, 0, 1, 2, 4, 9, 1, 2])
    below = children(tree)[0]
    assert set(below) == {3, 4}
    assert tree.confidence[below[4]] == pytest.approx(2 / 3 * 2 / 3)
    assert tree.confidence[below[3]] == pytest.approx(2 / 3 * 1 / 3)


def test_a_longer_match_comes_first_and_a_shorter_one_gets_what_it_leaves() -> None:
    tree = tree_of(drafter(), [7, 1, 2, 3, 0, 8, 1, 2, 4, 0, 8, 1, 2, 5, 0, 7, 1, 2])
    below = children(tree)[0]
    assert next(iter(below)) == 3
    assert set(below) == {3, 4, 5}
    assert tree.confidence[below[3]] > 3 / 4
    assert tree.confidence[below[4]] == pytest.approx(1 / 4 * 2 / 3 * 1 / 3)


def test_where_the_text_ends_it_goes_round() -> None:
    """The longest match of a text that repeats itself ends at the text's end, just when its continuation is sure."""
    assert tree_of(drafter(), [1, 2, 3] * 4, 9).tokens == (1, 2, 3) * 3


def test_what_went_on_in_very_many_ways_is_passed_over() -> None:
    prompt = [token for way in range(40) for token in (1, 2, 10 + way)]
    assert tree_of(drafter(), [*prompt[:60], 1, 2]) != EMPTY_TREE
    assert tree_of(drafter(), [*prompt, 1, 2]) == EMPTY_TREE


def test_few_nodes_are_the_best_ones() -> None:
    prompt = [random.Random(3).randrange(4) for _ in range(300)]
    all_nodes = tree_of(drafter(), prompt, 63)
    few = tree_of(drafter(), prompt, 8)
    assert few.tokens == all_nodes.tokens[:8]
    assert few.parents == all_nodes.parents[:8]


def acceptance_length(drafter: Drafter, prompt: Sequence[int], output: Sequence[int], max_nodes: int = 32) -> float:
    """Committed tokens per step when the target says `output`."""
    session, at, steps = drafter.open(prompt, DraftHints()), 0, 0
    while at < len(output):
        below, node, taken = children(session.propose(max_nodes)), -1, 0
        for token in output[at:]:
            taken += 1
            if token not in below[node + 1]:
                break
            node = below[node + 1][token]
        session.commit(output[at : at + taken])
        at, steps = at + taken, steps + 1
    session.close()
    return len(output) / steps


def test_a_text_that_repeats_itself_is_accepted() -> None:
    rng = random.Random(0)
    words = [[rng.randrange(VOCAB) for _ in range(rng.randint(3, 8))] for _ in range(12)]
    output = [token for _ in range(60) for token in rng.choice(words)]
    assert acceptance_length(drafter(), [1], output) > 2


def test_noise_is_not_drafted_at_length() -> None:
    rng = random.Random(0)
    assert acceptance_length(drafter(), [1], [rng.randrange(VOCAB) for _ in range(300)]) < 1.1


# What is kept beyond a session.


def test_past_outputs_are_drafted_from_the_next_session_on() -> None:
    memory = drafter()
    running = memory.open([90, 10, 11], DraftHints())
    write(memory, STORY)
    assert running.propose(8) == EMPTY_TREE, "a session sees the past as it was when it opened"
    assert tree_of(memory, [90, 10, 11], 4).tokens == (12, 13, 14, 15)
    later = memory.open([90], DraftHints())
    later.commit([10, 11])
    assert later.propose(2).tokens == (12, 13)


def test_prompts_are_not_kept() -> None:
    memory = drafter()
    write(memory, [50, 51, 52], prompt=STORY)
    assert tree_of(memory, [90, 10, 11]) == EMPTY_TREE


def test_tenants_never_see_one_another() -> None:
    memory = drafter()
    write(memory, STORY, salt="a")
    assert tree_of(memory, [90, 10, 11], salt="b") == tree_of(memory, [90, 10, 11]) == EMPTY_TREE
    assert len(tree_of(memory, [90, 10, 11], salt="a")) > 0


def test_nothing_is_found_across_two_outputs() -> None:
    memory = drafter()
    write(memory, [10, 11])
    write(memory, [12, 13])
    assert tree_of(memory, [90, 10, 11]) == EMPTY_TREE


def test_the_past_is_bounded_and_the_oldest_goes_first() -> None:
    memory = drafter(memory=3000)
    rng = random.Random(0)
    write(memory, STORY)
    for number in range(60):
        write(memory, [rng.randrange(20, VOCAB) for _ in range(10 * number % 130 + 1)])
        assert held(memory)[""] <= 3000
    assert held(memory)[""] > 900
    assert tree_of(memory, [19, 10, 11]) == EMPTY_TREE
    write(memory, STORY)
    assert tree_of(memory, [19, 10, 11], 1).tokens == (12,)


def test_one_output_larger_than_the_memory_leaves_its_end() -> None:
    memory = drafter(memory=5)
    write(memory, STORY)
    assert held(memory) == {"": 5}
    assert tree_of(memory, [90, 14, 15], 2).tokens == (16, 17)
    write(memory, [30])
    assert held(memory)[""] <= 5


def test_no_memory_keeps_nothing() -> None:
    memory = drafter(memory=0)
    write(memory, STORY)
    assert held(memory) == {}


def test_tenants_are_bounded_and_the_one_that_wrote_nothing_for_longest_goes_first() -> None:
    memory = drafter()
    for tenant in range(40):
        write(memory, STORY, salt="regular")
        write(memory, STORY, salt=str(tenant))
    assert len(held(memory)) == 16
    assert {"regular", "39"} <= set(held(memory))
    assert "0" not in held(memory)


def test_many_short_outputs_are_few_automata() -> None:
    past: tuple[Outputs, ...] = ()
    built = 0
    for number in range(500):
        earlier = set(map(id, past))
        past = joined(past, [number % VOCAB] * 10, 4096)
        built += sum(len(part.tokens) for part in past if id(part) not in earlier)
    assert len(past) <= 12
    assert built < 12 * 5000, "each token is read again only when its part of the past doubles"


def test_a_text_longer_than_the_window_forgets_its_beginning() -> None:
    text = Text(list(range(50)), window=20)
    rng = random.Random(0)
    for _ in range(100):
        text.extend([rng.randrange(VOCAB) for _ in range(rng.randint(1, 30))])
        assert 10 <= len(text._tokens) <= 20
        assert len(text.automaton.next) <= 40
    session = SuffixSession(STORY * 10, (), 2, 20, lambda output: None)
    assert session.propose(3).tokens == (10, 11, 12)


# The door.


@pytest.mark.parametrize(
    ("option", "value"),
    [("min_match", 0), ("min_match", 65), ("memory", -1), ("memory", 1.5), ("window", 1), ("window", "all")],
)
def test_values_out_of_range_are_refused_by_name(option: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=f"{option} is {value!r}; Expected ") as caught:
        drafter(**{option: value})
    assert caught.value.param == option


def test_unknown_options_are_refused_with_the_choices() -> None:
    with pytest.raises(UnknownName, match="'depth'; choices: memory, min_match, window"):
        drafter(depth=1)


def test_it_comes_through_the_door() -> None:
    plugins = Plugins()
    plugins.register(specgen_suffix, "specgen-suffix", version="0.1.0")
    assert plugins.collect("drafters")["suffix"] is suffix


def test_the_readme_runs() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    exec(readme.split("```python\n")[1].split("```")[0], {})


class TestSuffix(DrafterContract):
    def drafter(self) -> Drafter:
        return Suffix(SuffixOptions())


class TestSuffixWithAPast(DrafterContract):
    def drafter(self) -> Drafter:
        memory = Suffix(SuffixOptions(min_match=1))
        for output in ([7, 1, 2, 3, 1, 9], [5, 5, 0], [39, 0, 1], [7, 8, 7, 2]):
            write(memory, output)
        return memory
