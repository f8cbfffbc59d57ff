"""Token recycling (Luo et al. 2024, "Turning Trash into Treasure"): what the target held likely behind a token
lately, also behind nodes that were not accepted, it may say there again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Annotated, Any, TypeAlias, TypeVar

import msgspec
import torch
from torch import Tensor

from specgen._base.options import read_options, takes_options
from specgen.draft.drafter import Drafter, DrafterSetup, DraftHints, DraftSession
from specgen.draft.features import Features, Wanted
from specgen.draft.growth import best_first
from specgen.types import TokenTree

_TENANTS = 16
_TRUST, _CHANCE = 0.55, 0.02
"""A token's successors were likely in another context than the one at hand: how often they came on SmolLM2, as a line
over their share among each other."""
_NEWS = 0.5
"""What a forward says counts as much as all that was said behind the same token before."""
_MOST_HEARD = 16
"""Forwards that wait to be learned from."""

_Key = TypeVar("_Key")
_Successors: TypeAlias = tuple[list[int], list[float]]
"""Tokens and their confidences, most confident first."""


class RecyclingOptions(msgspec.Struct, frozen=True):
    """successors: tokens kept behind each token. memory: tokens whose successors are kept, per session and tenant,
    at some 0.8 kB each."""

    successors: Annotated[int, msgspec.Meta(ge=1, le=32)] = 8
    memory: Annotated[int, msgspec.Meta(ge=1)] = 16384


@takes_options(RecyclingOptions)
class Recycling(Drafter):
    """Keeps for each token the likeliest successors that the target named lately, and drafts along them.

    What a session learned joins the memory of its tenant when it closes; a session sees its tenant's memory as it was
    when it opened. The tokens seen longest ago are forgotten first, and so are tenants.
    """

    def __init__(self, setup: DrafterSetup) -> None:
        self._options = read_options("drafter 'recycling'", setup.options, RecyclingOptions)
        self.wanted = Wanted(successors=self._options.successors)
        self._tenants: dict[str, Mapping[int, _Successors]] = {}

    def open(self, prompt: Sequence[int], hints: DraftHints) -> DraftSession:
        """A session that knows the last token of `prompt` and what its tenant's closed sessions learned."""
        known = self._tenants.get(hints.cache_salt, {})
        return _Recycling(self, hints.cache_salt, known, self._options, prompt[-1])

    def keep(self, tenant: str, learned: dict[int, _Successors]) -> None:
        """Take over what a session learned. Open sessions hold the old mapping, so a new one is made."""
        known = self._tenants.pop(tenant, {})
        merged = {token: known[token] for token in known if token not in learned} | learned
        _forget(merged, self._options.memory)
        self._tenants[tenant] = merged
        _forget(self._tenants, _TENANTS)


class _Recycling(DraftSession):
    def __init__(
        self,
        drafter: Recycling,
        tenant: str,
        known: Mapping[int, _Successors],
        options: RecyclingOptions,
        last: int,
    ) -> None:
        self._drafter, self._tenant, self._options = drafter, tenant, options
        self._known = known
        self._learned: dict[int, _Successors] = {}
        self._last = last
        self._heard: list[tuple[tuple[int, ...], Tensor, Tensor]] = []

    def observe(self, features: Features) -> None:
        """Heard now, learned when someone asks: several forwards at once are quicker, and few ask where few pay."""
        if features.successors is None or features.scores is None:
            return
        self._heard.append((features.asked, features.successors, features.scores))
        if len(self._heard) == _MOST_HEARD:
            self._learn()

    def propose(self, max_nodes: int) -> TokenTree:
        """The nodes of highest product of confidences, along what the target named."""
        self._learn()
        return best_first(self._last, self._successors, max_nodes)

    def commit(self, tokens: Sequence[int]) -> None:
        if tokens:
            self._last = tokens[-1]

    def close(self) -> None:
        self._learn()
        if self._learned:
            self._drafter.keep(self._tenant, self._learned)

    def _learn(self) -> None:
        if not self._heard:
            return
        asked, successors, scores = zip(*self._heard, strict=True)
        self._heard.clear()
        rows, shares = _rows(torch.cat(successors), torch.cat(scores), self._options.successors)
        said = zip(rows, shares, strict=True)
        for tokens in asked:
            # From the last row to the first: where a token was asked twice, the likelier place has the last word.
            for token, (row, share) in reversed(list(zip(tokens, islice(said, len(tokens)), strict=True))):
                earlier = self._learned.pop(token, None) or self._known.get(token)
                self._learned[token] = _mixed((row, share), earlier) if earlier else (row, share)
        _forget(self._learned, self._options.memory)

    def _successors(self, token: int) -> list[tuple[int, float, int]]:
        tokens, confidence = self._learned.get(token) or self._known.get(token) or ([], [])
        return list(zip(tokens, confidence, tokens, strict=True))


def _rows(successors: Tensor, scores: Tensor, count: int) -> tuple[list[list[int]], list[list[float]]]:
    """Of each row the `count` likeliest tokens, and how sure they are.

    successors: int64[rows, k], likeliest first. scores: float32[rows, k], their logits.
    """
    shares = scores[:, :count].float().softmax(-1).mul(_TRUST).add(_CHANCE).nan_to_num(0.0)
    return successors[:, :count].tolist(), shares.tolist()


def _mixed(news: _Successors, earlier: _Successors) -> _Successors:
    """The surest of both, as many as the news has; where they are as sure, the news come first."""
    mixed = {token: _NEWS * confidence for token, confidence in zip(*news, strict=True)}
    for token, confidence in zip(*earlier, strict=True):
        mixed[token] = mixed.get(token, 0.0) + (1.0 - _NEWS) * confidence
    surest = sorted(mixed, key=mixed.__getitem__, reverse=True)[: len(news[0])]
    return surest, [mixed[token] for token in surest]


def _forget(memory: dict[_Key, Any], most: int) -> None:
    """Drop what was put in first, until `most` are left."""
    for key in list(islice(memory, max(0, len(memory) - most))):
        del memory[key]
