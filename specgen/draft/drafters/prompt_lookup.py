"""Prompt lookup (Saxena 2023; Yang et al. 2023, "Inference with Reference"): text that repeats itself drafts itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec

from specgen._base.options import read_options, takes_options
from specgen.draft.drafter import Drafter, DrafterSetup, DraftHints, DraftSession
from specgen.draft.drafters.ngram import NgramIndex, continuations
from specgen.types import TokenTree


class LookupOptions(msgspec.Struct, frozen=True):
    """min_match: ids that must be the same before a continuation is drafted. branches: continuations at most."""

    min_match: Annotated[int, msgspec.Meta(ge=1, le=16)] = 2
    branches: Annotated[int, msgspec.Meta(ge=1, le=8)] = 3


@takes_options(LookupOptions)
class PromptLookup(Drafter):
    """Looks the last `min_match` ids up in prompt and output and drafts what followed, up to `branches` ways."""

    def __init__(self, setup: DrafterSetup) -> None:
        self._options = read_options("drafter 'prompt-lookup'", setup.options, LookupOptions)

    def open(self, prompt: Sequence[int], hints: DraftHints) -> DraftSession:
        """A session that knows the prompt."""
        return _Lookup(NgramIndex(prompt, self._options.min_match), self._options.branches)


class _Lookup(DraftSession):
    def __init__(self, index: NgramIndex, branches: int) -> None:
        self._index = index
        self._branches = branches

    def propose(self, max_nodes: int) -> TokenTree:
        index = self._index
        return continuations(index, index.matches(index.ids), max_nodes, self._branches)

    def commit(self, tokens: Sequence[int]) -> None:
        self._index.extend(tokens)
