"""Prompt lookup (Saxena 2023; Yang et al. 2023, "Inference with Reference"): text that repeats itself drafts itself."""

from __future__ import annotations

from collections.abc import Sequence

from specgen.draft.drafter import Drafter, DrafterSetup, DraftHints, DraftSession
from specgen.draft.ngram import NgramIndex, continuations
from specgen.draft.options import read
from specgen.types import TokenTree


class PromptLookup(Drafter):
    """Looks the last `min_match` ids up in prompt and output and drafts what followed, up to `branches` ways."""

    def __init__(self, setup: DrafterSetup) -> None:
        options = read("prompt-lookup", setup.options, {"min_match": (2, 1, 16), "branches": (3, 1, 8)})
        self._min_match, self._branches = options["min_match"], options["branches"]

    def open(self, prompt: Sequence[int], hints: DraftHints) -> DraftSession:
        """A session that knows the prompt."""
        return _Lookup(NgramIndex(prompt, self._min_match), self._branches)


class _Lookup(DraftSession):
    def __init__(self, index: NgramIndex, branches: int) -> None:
        self._index = index
        self._branches = branches

    def propose(self, max_nodes: int) -> TokenTree:
        index = self._index
        return continuations(index, index.matches(index.ids), max_nodes, self._branches)

    def commit(self, tokens: Sequence[int]) -> None:
        self._index.extend(tokens)
