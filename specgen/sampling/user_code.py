"""Processors and stopping criteria that came with a request, told apart from those of specgen and of plugins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class UserCodeRaised(Exception):
    """Carries what a caller's own function raised from there to the end of its sequence, whatever it was."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(repr(error))
        self.error = error


@dataclass(frozen=True, slots=True)
class UserCode:
    """A caller's own function. What it raises comes out as UserCodeRaised: StopIteration or SystemExit would mean
    something to those it passes through."""

    function: Callable[..., Any]

    def __call__(self, *arguments: object) -> Any:
        """What the function returns. Raises UserCodeRaised."""
        try:
            return self.function(*arguments)
        except BaseException as error:
            raise UserCodeRaised(error) from None
