"""What a request's constraint leaves no choice but: drafted, so that the walk takes it in one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from specgen._base.options import read_options, takes_options
from specgen.draft.drafter import Drafter, DrafterSetup, DraftHints, DraftSession
from specgen.tree import chain
from specgen.types import TokenTree


class _NoOptions(msgspec.Struct, frozen=True):
    """There are none."""


@takes_options(_NoOptions)
class Grammar(Drafter):
    """Drafts the tokens that a constraint forces: sure, and found without the model."""

    def __init__(self, setup: DrafterSetup) -> None:
        read_options("drafter 'grammar'", setup.options, _NoOptions)

    def open(self, prompt: Sequence[int], hints: DraftHints) -> DraftSession:
        """A session that is silent where nothing is forced."""
        return _Forced(hints.forced)


class _Forced(DraftSession):
    """Keeps nothing: the constraint follows the committed tokens by itself."""

    def __init__(self, forced: Callable[[], Sequence[int]]) -> None:
        self._forced = forced

    def propose(self, max_nodes: int) -> TokenTree:
        return chain(self._forced()[:max_nodes])

    def commit(self, tokens: Sequence[int]) -> None:
        pass
