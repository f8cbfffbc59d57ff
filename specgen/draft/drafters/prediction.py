"""Predicted outputs: the caller says what the text will be about like, and gets it drafted where it fits."""

from __future__ import annotations

from collections.abc import Sequence

from specgen._base.options import read_options, takes_options
from specgen.draft.drafter import Drafter, DrafterSetup, DraftHints, DraftSession
from specgen.draft.drafters.ngram import NgramIndex, continuations
from specgen.draft.drafters.prompt_lookup import LookupOptions
from specgen.types import EMPTY_TREE, TokenTree


@takes_options(LookupOptions)
class Prediction(Drafter):
    """Follows `hints.prediction` from its start, and finds its way back by the last `min_match` ids after an edit."""

    def __init__(self, setup: DrafterSetup) -> None:
        self._options = read_options("drafter 'prediction'", setup.options, LookupOptions)

    def open(self, prompt: Sequence[int], hints: DraftHints) -> DraftSession:
        """A session at the start of the prediction; silent where there is none."""
        return _Follow(NgramIndex(hints.prediction, self._options.min_match), self._options.branches)


class _Follow(DraftSession):
    def __init__(self, index: NgramIndex, branches: int) -> None:
        self._index = index
        self._branches = branches
        self._output: list[int] = []
        self._next = 0

    def propose(self, max_nodes: int) -> TokenTree:
        if not self._index.ids:
            return EMPTY_TREE
        matches = self._index.matches(self._output)
        # The place reached by following on is the likeliest, whatever else looks alike.
        here = [(length, end) for length, end in matches if end == self._next]
        if not here and self._follows():
            here = [(len(self._output), self._next)]
        starts = here + [match for match in matches if match not in here]
        return continuations(self._index, starts, max_nodes, self._branches)

    def commit(self, tokens: Sequence[int]) -> None:
        self._output.extend(tokens)
        self._next += len(tokens)
        if not self._follows():
            matches = self._index.matches(self._output)
            ahead = [end for _, end in matches if end >= self._next - len(tokens)]
            self._next = min(ahead, default=matches[0][1] if matches else self._next)

    def _follows(self) -> bool:
        """Whether the last output token is the one before `_next` in the prediction."""
        ids = self._index.ids
        if not self._output:
            return self._next == 0
        return 0 < self._next <= len(ids) and ids[self._next - 1] == self._output[-1]
