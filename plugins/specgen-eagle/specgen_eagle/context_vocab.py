"""Words of a text that its head cannot say: names, mostly, which answers copy. The target's own rows score them.

A head's vocabulary is a part of the target's, as each row of it costs time in every forward (EAGLE-3's d2t). Heads that
were trained against the target's rows, left as they are, can say every other token of the target too, once its row is
there; of a text's own tokens there are few.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from specgen_eagle.head import EagleHead

_MOST = 256
_PADDING = 2  # a compiler treats sizes of 0 and 1 as something else
NOTHING = -1
_ALIKE = 0.01  # a share of the norm: half precision rounds by less


class TargetRows:
    """Rows of the target's head for tokens that `head` cannot say.

    rows: [vocabulary, width], the target's; `None` if the head was not trained against these.
    """

    def __init__(self, head: EagleHead, rows: Tensor | None) -> None:
        self.rows = rows
        self.device = head.lm_head.weight.device
        self._said = frozenset(head.tokens.tolist())

    def lends(self, token: int) -> bool:
        """Whether a token has a row here that the head has not."""
        return self.rows is not None and token not in self._said


class Borrowed:
    """What one text borrows: the latest tokens of it that the head cannot say."""

    def __init__(self, lender: TargetRows, text: Sequence[int]) -> None:
        self._lender = lender
        self._ids: dict[int, None] = {}
        self._words: Tensor | None = None
        self.add(text)

    def add(self, text: Sequence[int]) -> None:
        """Borrow what `text` holds; what was there longest goes, counted from where the text held it last."""
        held = set(self._ids)
        for token in filter(self._lender.lends, text):
            self._ids.pop(token, None)
            self._ids[token] = None
        if self._ids.keys() != held:
            self._ids = dict.fromkeys(list(self._ids)[-_MOST:])
            self._words = None

    @property
    def words(self) -> Tensor:
        """The tokens, int64[n], n at least 2, and -1 where there is none. Not to be changed."""
        if self._words is None:
            self._words = torch.tensor([NOTHING] * _PADDING + list(self._ids), device=self._lender.device)
        return self._words


def lender(head: EagleHead, target_head: object) -> TargetRows:
    """For a head and the target's output layer. One that is quantised, or elsewhere, lends nothing."""
    rows, own = getattr(target_head, "weight", None), head.lm_head.weight
    if type(rows) is not nn.Parameter or not rows.is_floating_point():
        return TargetRows(head, None)
    if rows.shape[1:] != own.shape[1:] or rows.device != own.device:
        return TargetRows(head, None)
    rows = rows.detach()
    same = rows[head.tokens].to(own).sub(own).float().norm() <= _ALIKE * own.float().norm()
    return TargetRows(head, rows if same else None)
