"""References to cached pages: a request's, until its table adopts them, and a pin's, until it is released."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from specgen.kv.pool import KVPool

if TYPE_CHECKING:
    from specgen.kv.prefix_cache import PrefixCache


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
    """Pages that stay in the pool until `release`, or until no request could run without them."""

    def __init__(self, cache: PrefixCache, pages: Sequence[int]) -> None:
        self._cache = cache
        self.held_pages = list(pages)
        self.tokens = len(pages) * cache.pool.page_size
        cache.pins.append(self)
        cache.pool.attach(self)

    def release(self) -> None:
        """Let them go. Doing so twice is harmless."""
        if self in self._cache.pins:
            self._cache.pins.remove(self)
            self._cache.pool.detach(self)
            self._cache.pool.drop(reversed(self.held_pages))
            self.tokens = 0
