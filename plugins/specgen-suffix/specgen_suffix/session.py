"""One sequence: where its end stands in its own text and in its tenant's past."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from specgen import DraftSession, TokenTree
from specgen_suffix.automaton import ROOT, SuffixAutomaton
from specgen_suffix.growth import Context, grow, longest
from specgen_suffix.history import Outputs

_LOOKED_BACK = 64
"""A match in the past is counted from so many tokens of the prompt."""


class Text:
    """The end of a growing text, at least half of `window` tokens and at most all, and its automaton."""

    def __init__(self, tokens: Sequence[int], window: int) -> None:
        self._window = window
        self._tokens = list(tokens[-window:])
        self.automaton = SuffixAutomaton(self._tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens; an automaton cannot forget, so a new one is built of the younger half when it is full."""
        self._tokens += tokens
        if len(self._tokens) > self._window:
            self._tokens = self._tokens[-(self._window // 2) :]
            self.automaton = SuffixAutomaton(self._tokens)
        else:
            self.automaton.extend(tokens)

    @property
    def context(self) -> Context:
        """The longest suffix that occurred before."""
        automaton = self.automaton
        return Context(automaton, automaton.repeated, automaton.length[automaton.repeated])


class SuffixSession(DraftSession):
    """Reads the text twice: into an automaton of its own, and along those of the past, which it does not change."""

    def __init__(
        self,
        prompt: Sequence[int],
        past: Sequence[Outputs],
        min_match: int,
        window: int,
        keep: Callable[[Sequence[int]], None],
    ) -> None:
        self._min_match, self._keep = min_match, keep
        self._text = Text(prompt, window)
        self._output: list[int] = []
        self._past = [Context(outputs.automaton, ROOT, 0) for outputs in past]
        self._follow(prompt[-_LOOKED_BACK:])

    def propose(self, max_nodes: int) -> TokenTree:
        """What followed the longest suffixes of the text, by how often it did."""
        return grow(longest((self._text.context, *self._past), self._min_match), self._min_match, max_nodes)

    def commit(self, tokens: Sequence[int]) -> None:
        """Read on."""
        self._text.extend(tokens)
        self._output.extend(tokens)
        self._follow(tokens)

    def close(self) -> None:
        """Leave the output to the sessions that open from now on."""
        self._keep(self._output)

    def _follow(self, tokens: Sequence[int]) -> None:
        for index, (automaton, state, matched) in enumerate(self._past):
            for token in tokens:
                state, matched = automaton.follow(state, matched, token)
            self._past[index] = Context(automaton, state, matched)
