"""One step's sampling: a token for every row whose draw needs no processor, in one pass and one copy to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from torch import Tensor

from specgen.kernels.backends import pick
from specgen.kernels.draws import Draw
from specgen.kernels.sample_rows import sample_rows
from specgen.kernels.top_tokens import on_host, top_tokens
from specgen.sampling.sampler import Sampler
from specgen.tree import depths
from specgen.types import TokenTree


class AskedRows(NamedTuple):
    """The rows of one sequence whose logits are computed: the root's and each node's of `tree`; none without a tree.

    position: absolute position of the token that is drawn at the root's row.
    """

    sampler: Sampler
    position: int
    tree: TokenTree | None

    @property
    def rows(self) -> int:
        """How many there are."""
        return 0 if self.tree is None else 1 + len(self.tree)

    def draws(self, first: int) -> list[Draw]:
        """The draws of all rows, the root's being row `first`; empty unless they can be made at once."""
        if self.tree is None or self.sampler.warp is None:
            return []
        levels = enumerate((0, *depths(self.tree)))
        return [Draw(first + n, self.sampler.key(self.position + depth), self.sampler.warp) for n, depth in levels]


@dataclass(frozen=True, slots=True)
class SampledRows:
    """What `sample_batch` found.

    tokens: of each sequence the token of each of its rows. `None` where the walk has to draw them one by one with the
        sequence's sampler, which processors want, or which has to complain that no token is left.
    scores, ids: the likeliest tokens of every row, likeliest first: float[rows, count] and int64[rows, count], on the
        CPU.
    """

    tokens: list[list[int] | None]
    scores: Tensor
    ids: Tensor


def sample_batch(logits: Tensor, asked: Sequence[AskedRows], count: int) -> SampledRows:
    """Sample rows of logits [rows, vocab], which lie sequence by sequence; greedy rows are the argmax.

    Warped rows are drawn by a kernel where there is one, whichever of them the walks will come to.
    """
    at_once = pick("sample_rows", logits.device, logits.dtype) != "torch"
    draws: list[Draw] = []
    first = 0
    for one in asked:
        draws += one.draws(first) if at_once else ()
        first += one.rows
    scores, ids, drawn = on_host(*top_tokens(logits, count), sample_rows(logits, draws) if draws else None)
    best, left = iter(ids[:, 0].tolist()), iter(drawn)
    tokens: list[list[int] | None] = []
    for one in asked:
        mine = list(islice(best, one.rows))
        if one.sampler.warp and at_once:
            mine = list(islice(left, one.rows))
            tokens.append(mine if min(mine, default=0) >= 0 else None)
        else:
            tokens.append(mine if one.sampler.is_argmax else None)
    return SampledRows(tokens, scores, ids)
