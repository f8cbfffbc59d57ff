"""What a tenant's closed sessions wrote: automata that never change again, so that open sessions may share them."""

from __future__ import annotations

from collections.abc import Sequence

from specgen_suffix.automaton import SuffixAutomaton

_MERGED = 2048
"""An automaton over this many tokens is built in a few milliseconds, which a step can bear now and then."""
_BETWEEN = -1
"""Stands between two outputs, so that nothing is found across them. No token has this id."""


class Outputs:
    """Some outputs, one behind the other, and their automaton. Frozen once built."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tuple(tokens)
        self.automaton = SuffixAutomaton(tokens)


def joined(past: Sequence[Outputs], output: Sequence[int], most: int) -> tuple[Outputs, ...]:
    """`past` and a new output: at most `most` tokens, the oldest given up first.

    Neighbours of similar size become one, so that there are few of them and a token is read again only as often as its
    part of the past doubles.
    """
    kept = list(past)
    newest = list(output[-most:])
    while kept and len(kept[-1].tokens) <= 2 * len(newest) and len(kept[-1].tokens) + len(newest) < _MERGED:
        newest = [*kept.pop().tokens, _BETWEEN, *newest]
    room = most - len(newest)
    young = [Outputs(newest[-most:])]
    for outputs in reversed(kept):
        room -= len(outputs.tokens)
        if room < 0:
            break
        young.append(outputs)
    return tuple(reversed(young))
