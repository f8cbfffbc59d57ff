"""The paged KV pool: one allocation per layer shape, shared by all sequences of one model.

A *slot* holds one token's key and value in every layer; a *page* is `page_size` consecutive slots. A sequence owns
whole pages through its `BlockTable`. Pages are handed out so that a sequence's slots stay consecutive where they can:
attention then reads a view instead of gathering a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specgen.errors import OutOfPages

PAGE_SIZE = 16


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Key and value of one token in one layer: `kv_heads` x `key_dim` and `kv_heads` x `value_dim`."""

    kv_heads: int
    key_dim: int
    value_dim: int


class KVPool:
    """Storage for `pages` pages. Owned by one engine and touched from its thread alone."""

    def __init__(
        self,
        layers: Sequence[LayerShape],
        pages: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        page_size: int = PAGE_SIZE,
    ) -> None:
        self.pages = pages
        self.page_size = page_size
        self.device = device
        self._free = torch.ones(pages, dtype=torch.bool)
        self._free_count = pages
        self._tables: set[BlockTable] = set()
        self._stacks: list[Tensor] = []
        self.keys: list[Tensor] = [torch.empty(0)] * len(layers)
        self.values: list[Tensor] = [torch.empty(0)] * len(layers)
        slots = pages * page_size
        for shape in dict.fromkeys(layers):
            members = [index for index, layer in enumerate(layers) if layer == shape]
            for views, dim in ((self.keys, shape.key_dim), (self.values, shape.value_dim)):
                stack = torch.empty(len(members), slots, shape.kv_heads, dim, dtype=dtype, device=device)
                self._stacks.append(stack)
                for view, index in zip(stack, members, strict=True):
                    views[index] = view

    @staticmethod
    def bytes_per_token(layers: Sequence[LayerShape], dtype: torch.dtype) -> int:
        """Bytes one token takes in all layers together."""
        return sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in layers) * dtype.itemsize

    @property
    def free_pages(self) -> int:
        """Pages that no table owns."""
        return self._free_count

    @property
    def capacity(self) -> int:
        """Tokens the whole pool holds."""
        return self.pages * self.page_size

    def open(self) -> BlockTable:
        """An empty table. The caller owns it until `release()`."""
        table = BlockTable(self)
        self._tables.add(table)
        return table

    def move(self, source: Tensor, destination: Tensor | slice) -> None:
        """Copy the slots `source` int64[n] onto the slots `destination`, in every layer."""
        for stack in self._stacks:
            stack[:, destination] = stack[:, source]

    def check(self) -> None:
        """Raise RuntimeError unless every page is either free or owned by exactly one open table."""
        owned = [page for table in self._tables for page in table.pages]
        if len(set(owned)) != len(owned):
            raise RuntimeError("KV pool: a page is owned twice")
        if self._free[owned].any() or len(owned) + int(self._free.sum()) != self.pages:
            raise RuntimeError(f"KV pool: {len(owned)} pages owned, {int(self._free.sum())} free, {self.pages} in all")
        if self._free_count != int(self._free.sum()):
            raise RuntimeError("KV pool: the count of free pages is off")

    def _take(self, count: int, after: int | None) -> list[int]:
        if count > self._free_count:
            raise OutOfPages(f"{count} pages wanted, {self._free_count} free of {self.pages}")
        taken: list[int] = []
        while len(taken) < count:
            beside = after is not None and after + 1 < self.pages and bool(self._free[after + 1])
            after = after + 1 if beside and after is not None else self._roomiest()
            self._free[after] = False
            taken.append(after)
        self._free_count -= count
        return taken

    def _roomiest(self) -> int:
        """Where a new run starts: in the middle of the longest free run, so that no neighbour's growth is stopped."""
        pad = torch.zeros(1, dtype=torch.int8)
        edges = torch.diff(self._free.to(torch.int8), prepend=pad, append=pad)
        starts, stops = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
        longest = int((stops - starts).argmax())
        start, stop = int(starts[longest]), int(stops[longest])
        return start if start == 0 else (start + stop) // 2

    def _give_back(self, pages: list[int]) -> None:
        self._free[pages] = True
        self._free_count += len(pages)


class BlockTable:
    """One sequence's slots: position p of the sequence lives in the p-th slot of its pages, in order.

    `length` counts the committed tokens whose KV is written; slots behind it hold the rows of the running step.
    """

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        self.pages: list[int] = []
        self.length = 0
        self._slots = torch.empty(0, dtype=torch.int64)
        self._consecutive = True

    @property
    def capacity(self) -> int:
        """Tokens that fit the pages owned now."""
        return len(self.pages) * self.pool.page_size

    def missing_pages(self, tokens: int) -> int:
        """Pages that `reserve(tokens)` would take."""
        return max(0, -(-tokens // self.pool.page_size) - len(self.pages))

    def reserve(self, tokens: int) -> None:
        """Own pages for `tokens` tokens in all. Raises OutOfPages, nothing changed, when the pool cannot give them."""
        missing = self.missing_pages(tokens)
        if not missing:
            return
        self.pages += self.pool._take(missing, self.pages[-1] if self.pages else None)
        size = self.pool.page_size
        pages = torch.tensor(self.pages)
        self._slots = (pages[:, None] * size + torch.arange(size)).flatten()
        self._consecutive = bool(pages.diff().eq(1).all())

    def trim(self, tokens: int) -> None:
        """Give back whole pages behind the first `tokens` slots, which rejected rows leave unused."""
        kept = -(-tokens // self.pool.page_size)
        self.pool._give_back(self.pages[kept:])
        del self.pages[kept:]
        self._slots = self._slots[: self.capacity]

    def span(self, start: int, stop: int) -> slice | Tensor:
        """Slots of positions `[start, stop)`: a slice when they are consecutive, else int64[stop - start]."""
        if self._consecutive:
            first = self.pages[0] * self.pool.page_size
            return slice(first + start, first + stop)
        return self._slots[start:stop]

    def slots(self, start: int, stop: int) -> Tensor:
        """Slots of positions `[start, stop)`, int64[stop - start]."""
        return self._slots[start:stop]

    def commit(self, chain: int, accepted: Sequence[int] = ()) -> None:
        """Keep the next `chain` rows and then the rows at offsets `accepted` behind the prefix; forget all others.

        Offsets ascend and are at least `chain`. Rows already in place are not copied.
        """
        target = self.length + chain
        kept = next((i for i, offset in enumerate(accepted) if offset != chain + i), len(accepted))
        if moved := accepted[kept:]:
            source = self._slots[[self.length + offset for offset in moved]]
            self.pool.move(source, self._slots[target + kept : target + len(accepted)])
        self.length = target + len(accepted)

    def release(self) -> None:
        """Give all pages back and close the table. Doing so twice is harmless."""
        self.trim(0)
        self.length = 0
        self.pool._tables.discard(self)
