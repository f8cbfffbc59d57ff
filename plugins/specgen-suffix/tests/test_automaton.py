import random

import pytest
from specgen_suffix.automaton import ROOT, SuffixAutomaton

LENGTH = 40


def text(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(2 + seed % 3) for _ in range(LENGTH)]


def occurrences(words: list[int], part: list[int]) -> int:
    return sum(words[at : at + len(part)] == part for at in range(len(words) - len(part) + 1))


def state_of(automaton: SuffixAutomaton, part: list[int]) -> int:
    state = ROOT
    for token in part:
        state = automaton.next[state][token]
    return state


@pytest.mark.parametrize("seed", range(30))
def test_every_substring_is_there_and_counted(seed: int) -> None:
    words = text(seed)
    automaton = SuffixAutomaton(words[:10])
    automaton.extend(words[10:])
    for start in range(LENGTH):
        for end in range(start + 1, min(start + 9, LENGTH + 1)):
            part = words[start:end]
            state = state_of(automaton, part)
            assert automaton.count[state] == occurrences(words, part)
            following = {words[at + len(part)] for at in range(LENGTH - len(part)) if words[at:][: len(part)] == part}
            assert set(automaton.next[state]) == following


@pytest.mark.parametrize("seed", range(30))
def test_the_longest_suffix_that_occurred_before(seed: int) -> None:
    automaton = SuffixAutomaton()
    words: list[int] = []
    for token in text(seed):
        words.append(token)
        automaton.extend([token])
        by_hand = max(n for n in range(len(words)) if n == 0 or occurrences(words, words[-n:]) > 1)
        assert automaton.length[automaton.repeated] == by_hand


@pytest.mark.parametrize("seed", range(30))
def test_another_text_is_followed_by_its_longest_suffix_that_occurs_here(seed: int) -> None:
    words, other = text(seed), text(seed + 99)
    automaton = SuffixAutomaton(words)
    state, matched = ROOT, 0
    for end, token in enumerate(other, 1):
        state, matched = automaton.follow(state, matched, token)
        by_hand = max(n for n in range(end + 1) if n == 0 or occurrences(words, other[end - n : end]))
        assert matched == by_hand
        assert state == state_of(automaton, other[end - matched : end])


@pytest.mark.parametrize("words", [[7] * 3000, [1, 2, 3] * 1000, list(range(3000)), text(1) * 75])
def test_no_text_makes_it_large_or_leaves_a_state_uncounted(words: list[int]) -> None:
    automaton = SuffixAutomaton(words)
    assert len(automaton.next) <= 2 * len(words)
    assert sum(map(len, automaton.next)) <= 3 * len(words)
    assert min(automaton.count[1:]) >= 1


def test_an_empty_text_repeats_nothing() -> None:
    assert SuffixAutomaton().repeated == ROOT
    assert SuffixAutomaton([5]).repeated == ROOT
