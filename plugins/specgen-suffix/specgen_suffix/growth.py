"""A tree of what followed before, most frequent first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from specgen import TokenTree, best_first
from specgen_suffix.automaton import ROOT, SuffixAutomaton

_CONTEXTS = 4
_WAYS = 32
"""What went on in more ways than these says little about the next one, and would take long to sum up."""


class Context(NamedTuple):
    """A suffix of the text, `matched` tokens long, that occurs in an automaton's text: at its `state`."""

    automaton: SuffixAutomaton
    state: int
    matched: int

    def shorter(self, least: int) -> Iterator[Context]:
        """This suffix and those shorter ones that occur at more places, down to `least` tokens; none without a token
        behind it."""
        automaton, state, matched = self
        while state != ROOT and matched >= least:
            if automaton.next[state]:
                yield Context(automaton, state, matched)
            state = automaton.link[state]
            matched = automaton.length[state]


class Guess(NamedTuple):
    """A token that followed before: how sure it is, and where it leads."""

    token: int
    confidence: float
    contexts: Sequence[Context]


def longest(contexts: Iterable[Context], least: int) -> list[Context]:
    """The longest few suffixes of `least` tokens or more, of those given and all shorter ones."""
    found = [shorter for context in contexts for shorter in islice(context.shorter(least), _CONTEXTS)]
    found.sort(key=lambda context: -context.matched)
    return found[:_CONTEXTS]


def guesses(contexts: Sequence[Context], least: int) -> list[Guess]:
    """What followed in `contexts`, longest first: the surest first.

    A match of n tokens is trusted by n / (n + 1), which its continuations share by how often they came; what is left
    goes to the next shorter match, as in prediction by partial matching (Cleary and Witten 1984).
    """
    confidence: dict[int, float] = {}
    behind: dict[int, list[Context]] = {}
    left = 1.0
    for automaton, state, matched in contexts:
        follow, count = automaton.next[state], automaton.count
        if len(follow) > _WAYS:
            continue
        share = left * matched / (matched + 1) / sum(map(count.__getitem__, follow.values()))
        left /= matched + 1
        for token, target in follow.items():
            confidence[token] = confidence.get(token, 0.0) + share * count[target]
            behind.setdefault(token, []).append(Context(automaton, target, matched + 1))
    order = sorted((token for token in confidence if token >= 0), key=confidence.__getitem__, reverse=True)
    return [Guess(token, min(1.0, confidence[token]), _going_on(behind[token], least)) for token in order]


def grow(contexts: Sequence[Context], least: int, max_nodes: int) -> TokenTree:
    """The `max_nodes` nodes of highest product of confidences behind `contexts`."""
    return best_first(contexts, lambda there: guesses(there, least), max_nodes)


def _going_on(contexts: Sequence[Context], least: int) -> list[Context]:
    """The same contexts, each once; where a text ends, its longest suffix that goes on."""
    alive: dict[tuple[int, int], Context] = {}
    for context in contexts:
        if not context.automaton.next[context.state]:
            shorter = next(context.shorter(least), None)
            if shorter is None:
                continue
            context = shorter
        alive.setdefault((id(context.automaton), context.state), context)
    return list(alive.values())
