"""Suffix decoding (after Oliaro et al. 2024, "SuffixDecoding"): what followed the end of the text before, in prompt and
output and in what the same tenant was answered earlier, as a tree with its frequencies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated

import msgspec

from specgen import (
    Drafter,
    DrafterFactory,
    DrafterSetup,
    DraftHints,
    DraftSession,
    hookimpl,
    read_options,
    takes_options,
)
from specgen_suffix.history import Outputs, joined
from specgen_suffix.session import SuffixSession

_TENANTS = 16


class SuffixOptions(msgspec.Struct, frozen=True, kw_only=True):
    """min_match: tokens that must be the same before a continuation is drafted.
    memory: tokens of past outputs that are kept for each tenant; 0 keeps none.
    window: tokens of its own text that a session looks back on.
    """

    min_match: Annotated[int, msgspec.Meta(ge=1, le=64)] = 2
    memory: Annotated[int, msgspec.Meta(ge=0)] = 16384
    window: Annotated[int, msgspec.Meta(ge=2)] = 16384


@takes_options(SuffixOptions)
def suffix(setup: DrafterSetup) -> Suffix:
    """The factory. Raises UnknownName for an option that there is not, InvalidRequest for a value out of range."""
    return Suffix(read_options("drafter 'suffix'", setup.options, SuffixOptions))


@hookimpl
def drafters() -> Mapping[str, DrafterFactory]:
    """Offer "suffix"."""
    return {"suffix": suffix}


class Suffix(Drafter):
    """Drafts what followed the longest suffixes of the text.

    An output joins the past of its tenant when its session closes; a session sees the past as it was when it opened.
    The oldest outputs are forgotten first, and so are the tenants that wrote nothing for longest.
    """

    def __init__(self, options: SuffixOptions) -> None:
        self._options = options
        self._past: dict[str, tuple[Outputs, ...]] = {}

    def open(self, prompt: Sequence[int], hints: DraftHints) -> DraftSession:
        """A session that has read `prompt` and knows the past of its tenant."""
        tenant, options = hints.cache_salt, self._options
        past = self._past.get(tenant, ())
        return SuffixSession(prompt, past, options.min_match, options.window, partial(self._keep, tenant))

    def _keep(self, tenant: str, output: Sequence[int]) -> None:
        if not output or not self._options.memory:
            return
        self._past[tenant] = joined(self._past.pop(tenant, ()), output, self._options.memory)
        while len(self._past) > _TENANTS:
            del self._past[next(iter(self._past))]
