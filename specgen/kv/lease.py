"""References to cached pages: a request's, until its table adopts them, and a pin's, until it is released."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specgen.kv.pool import KVPool


@dataclass(frozen=True, slots=True)
class Lease:
    """A cached prefix: `tokens` ids whose KV is readable in `pages`, until they are released or a table adopts them."""

    pool: KVPool
    pages: tuple[int, ...] = ()
    tokens: int = 0

    def release(self) -> None:
        """Give the pages back. Not after a table has adopted them."""
        self.pool.drop(self.pages)


class Pin:
    """Pages that stay in the pool until `release`, or until no request could run without them.

    pins: where it stands among others until then, the oldest first. The references to the pages are the caller's.
    """

    def __init__(self, pool: KVPool, pages: Sequence[int], pins: list[Pin]) -> None:
        self._pool = pool
        self._pins = pins
        self.held_pages = list(pages)
        self.tokens = len(pages) * pool.page_size
        pins.append(self)
        pool.attach(self)

    def release(self) -> None:
        """Let them go. Doing so twice is harmless."""
        if self in self._pins:
            self._pins.remove(self)
            self._pool.detach(self)
            self._pool.drop(reversed(self.held_pages))
            self.tokens = 0
