"""Constraints that are easy to foresee, and the plugin that offers them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from specgen import (
    ConstraintFactory,
    ConstraintSetup,
    Matcher,
    hookimpl,
)
from tests.support.tiny import VOCABULARY


class Stairs(Matcher):
    """Each token is in the same or the next block of `width` tokens as the one before, the first in the first; whole
    from the second block on, complete in the last. What stands alone in its block is forced."""

    def __init__(self, width: int, block: int = 0, vocab_size: int = VOCABULARY) -> None:
        self.width, self.block, self.vocab_size = width, block, vocab_size
        self.blocks = vocab_size // width

    def allowed(self) -> Tensor:
        blocks = torch.arange(self.vocab_size) // self.width
        return (blocks >= self.block) & (blocks <= self.block + 1) & torch.tensor(not self.is_complete())

    def may_end(self) -> bool:
        return self.block > 0

    def is_complete(self) -> bool:
        return self.block >= self.blocks - 1

    def consume(self, token: int) -> None:
        self.block = token // self.width

    def permitted(self, tokens: Sequence[int]) -> int:
        twin = self.copy()
        for count, token in enumerate(tokens):
            if not twin.allowed()[token]:
                return count
            twin.consume(token)
        return len(tokens)

    def copy(self) -> Stairs:
        return Stairs(self.width, self.block, self.vocab_size)


class Recital(Stairs):
    """One text, token by token, all of it forced."""

    TEXT = (5, 6, 7, 5, 6, 7, 90, 91)

    def __init__(self, said: int = 0) -> None:
        self.said = said

    def allowed(self) -> Tensor:
        mask = torch.zeros(VOCABULARY, dtype=torch.bool)
        mask[list(self.TEXT[self.said : self.said + 1])] = True
        return mask

    def may_end(self) -> bool:
        return self.is_complete()

    def is_complete(self) -> bool:
        return self.said == len(self.TEXT)

    def consume(self, token: int) -> None:
        self.said += 1

    def copy(self) -> Recital:
        return Recital(self.said)

    def forced(self) -> Sequence[int]:
        return self.TEXT[self.said :]


class Broken(Stairs):
    """Raises where it is told to, from the third token on."""

    def __init__(self, where: str, consumed: int = 0) -> None:
        super().__init__(8)
        self.where, self.consumed = where, consumed

    def copy(self) -> Broken:
        return Broken(self.where, self.consumed)

    def consume(self, token: int) -> None:
        self.consumed += 1
        super().consume(token)

    def __getattribute__(self, name: str) -> Any:
        if name == object.__getattribute__(self, "where") and self.consumed >= 3:
            raise ZeroDivisionError(f"{name} is broken")
        return super().__getattribute__(name)


class Offers:
    """The kinds, and one whose factory raises."""

    @staticmethod
    @hookimpl
    def constraints() -> Mapping[str, ConstraintFactory]:
        def picky(setup: ConstraintSetup, value: Any) -> Matcher:
            return Stairs({"narrow": 4, "wide": 12}[value], vocab_size=setup.vocab_size)

        return {
            "picky": picky,
            "stairs": lambda setup, value: Stairs(value, vocab_size=setup.vocab_size),
            "recital": lambda setup, value: Recital(),
            "broken": lambda setup, value: Broken(value),
        }
