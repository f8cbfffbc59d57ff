"""The paged KV pool: one allocation per layer shape, shared by all sequences of one model.

A *slot* holds one token's key and value in every layer; a *page* is `page_size` consecutive slots. A sequence refers
to whole pages through its `BlockTable`, the prefix cache through its nodes; a page is free when nobody refers to it.
Rows that anyone but their writer may read are never written again. Pages are handed out so that a sequence's slots stay
consecutive where they can: attention then reads a view instead of gathering a copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from specgen._base.memory import promise
from specgen.errors import OutOfPages
from specgen.kernels.backends import pick
from specgen.kernels.kv_commit import kv_commit
from specgen.kv.formats import NATIVE, KVFormat, LayerShape, LayerStore

PAGE_SIZE = 16


class Holder(Protocol):
    """Whoever refers to pages: a table, a prefix cache."""

    @property
    def held_pages(self) -> Iterable[int]:
        """One entry per reference."""


class Reserve(Protocol):
    """Someone who holds pages that nobody needs now, and gives them up when they are wanted."""

    def evict(self, count: int) -> None:
        """Give up `count` of its idle pages, or all of them."""

    def idled(self, page: int) -> None:
        """The last one besides the reserve has let go of a page that was shelved."""


class KVPool:
    """Storage for `pages` pages of a KV format. Owned by one engine and touched from its thread alone."""

    def __init__(
        self,
        layers: Sequence[LayerShape],
        pages: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        kind: KVFormat = NATIVE,
        page_size: int = PAGE_SIZE,
    ) -> None:
        self.pages = pages
        self.page_size = page_size
        self.device = device
        self.kind = kind
        self.dtype = dtype
        self.shapes = tuple(layers)
        self.bytes_per_token = kind.bytes_per_token(layers, dtype)
        self.page_bytes = page_size * self.bytes_per_token
        self._holders: set[Holder] = set()
        self._reserve: Reserve | None = None
        self._free = torch.ones(pages, dtype=torch.bool)
        self._free_count = pages
        self._references = [0] * pages
        self._shelved: set[int] = set()
        self._idle_count = 0
        self.stacks: list[Tensor] = []
        stores: dict[int, LayerStore] = {}
        for shape in dict.fromkeys(layers):
            members = [index for index, layer in enumerate(layers) if layer == shape]
            stacks = [
                torch.empty(len(members), pages * page_size, *plane.shape, dtype=plane.dtype, device=device)
                for plane in kind.planes(shape, dtype)
            ]
            self.stacks += stacks
            for place, index in enumerate(members):
                stores[index] = LayerStore(kind, shape, dtype, [stack[place] for stack in stacks])
        self.layers = [stores[index] for index in range(len(layers))]
        if device.type == "cpu":
            promise(self, pages * self.page_bytes)

    @property
    def free_pages(self) -> int:
        """Pages that nobody refers to."""
        return self._free_count

    def has(self, count: int) -> bool:
        """Whether `take(count)` would succeed."""
        return count <= self._free_count + self._idle_count

    @property
    def idle_pages(self) -> int:
        """Pages that only the reserve refers to. Each can be given up: see `PrefixCache.publish`."""
        return self._idle_count

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.page_size)

    @property
    def open_tables(self) -> int:
        """Tables that were opened and not released."""
        return sum(isinstance(holder, BlockTable) for holder in self._holders)

    @property
    def capacity(self) -> int:
        """Tokens the whole pool holds."""
        return self.pages * self.page_size

    def open(self) -> BlockTable:
        """An empty table. The caller owns it until `release()`."""
        table = BlockTable(self)
        self.attach(table)
        return table

    def attach(self, holder: Holder) -> None:
        """Know of one who refers to pages, so that `check` can count."""
        self._holders.add(holder)

    def detach(self, holder: Holder) -> None:
        """One refers to no page any more. Doing so twice is harmless."""
        self._holders.discard(holder)

    def ask(self, reserve: Reserve) -> None:
        """When there are too few pages, ask `reserve` to give up some from now on: a prefix cache."""
        self._reserve = reserve

    def move(self, source: Tensor, destination: Tensor) -> None:
        """Copy the slots `source` int64[n] onto the slots `destination` int64[n], in every layer.

        In order: none may be copied onto one that is still to be copied.
        """
        kv_commit(self.stacks, source, destination, backend=pick("kv_commit", self.device, self.dtype))

    def take(self, count: int, after: int | None = None) -> list[int]:
        """`count` free pages with one reference each, behind the page `after` where possible. Raises OutOfPages."""
        if count > self._free_count and self._reserve is not None:
            self._reserve.evict(count - self._free_count)
        if count > self._free_count:
            raise OutOfPages(f"{count} pages wanted, {self._free_count} free of {self.pages}")
        taken: list[int] = []
        while len(taken) < count:
            beside = after is not None and after + 1 < self.pages and bool(self._free[after + 1])
            after = after + 1 if beside and after is not None else self._roomiest()
            self._free[after] = False
            self._references[after] = 1
            taken.append(after)
        self._free_count -= count
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """One reference more to each of `pages`, which are in use."""
        for page in pages:
            self._idle_count -= self._references[page] == 1 and page in self._shelved
            self._references[page] += 1

    def shelve(self, page: int) -> None:
        """One reference more to a page in use: the reserve's, which may be asked to give it up."""
        self.share([page])
        self._shelved.add(page)

    def unshelve(self, page: int) -> None:
        """The reserve's reference back."""
        self._idle_count -= self._references[page] == 1
        self._shelved.remove(page)
        self.drop([page])

    def rows_of(self, page: int) -> list[Tensor]:
        """A page's content, one tensor [layers, page_size, ...] per stack; views."""
        start = page * self.page_size
        return [stack[:, start : start + self.page_size] for stack in self.stacks]

    def fill(self, page: int, rows: Sequence[Tensor]) -> None:
        """Write what `rows_of` gave."""
        for view, values in zip(self.rows_of(page), rows, strict=True):
            view.copy_(values)

    def drop(self, pages: Iterable[int]) -> None:
        """One reference less to each of `pages`; those that nobody refers to are free."""
        for page in pages:
            if not self._references[page]:
                raise RuntimeError(f"KV pool: page {page} is given back though nobody refers to it")
            self._references[page] -= 1
            if not self._references[page]:
                self._free[page] = True
                self._free_count += 1
            elif self._references[page] == 1 and page in self._shelved:
                self._idle_count += 1
                if self._reserve is not None:
                    self._reserve.idled(page)

    def references(self, page: int) -> int:
        """How many refer to a page."""
        return self._references[page]

    def check(self) -> None:
        """Raise RuntimeError unless the references to every page are those of its holders."""
        held = Counter(page for holder in self._holders for page in holder.held_pages)
        for page, count in enumerate(self._references):
            if held[page] != count or bool(self._free[page]) != (count == 0):
                raise RuntimeError(f"KV pool: page {page} has {count} references, its holders have {held[page]}")
        if self._free_count != int(self._free.sum()):
            raise RuntimeError("KV pool: the count of free pages is off")
        if self._idle_count != sum(self._references[page] == 1 for page in self._shelved):
            raise RuntimeError("KV pool: the count of idle pages is off")

    def _roomiest(self) -> int:
        """Where a new run starts: in the middle of the longest free run, so that no neighbour's growth is stopped."""
        pad = torch.zeros(1, dtype=torch.int8)
        edges = torch.diff(self._free.to(torch.int8), prepend=pad, append=pad)
        starts, stops = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
        longest = int((stops - starts).argmax())
        start, stop = int(starts[longest]), int(stops[longest])
        return start if start == 0 else (start + stop) // 2


class BlockTable:
    """One sequence's slots: position p of the sequence lives in the p-th slot of its pages, in order.

    Slots behind the committed tokens hold the rows of the running step.
    """

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        self.pages: list[int] = []
        self._length = 0
        self._slots = torch.empty(0, dtype=torch.int64)
        self._consecutive = True

    @property
    def length(self) -> int:
        """Committed tokens whose KV is written."""
        return self._length

    @property
    def held_pages(self) -> list[int]:
        """The pages this table refers to."""
        return self.pages

    @property
    def capacity(self) -> int:
        """Tokens that fit the pages at hand."""
        return len(self.pages) * self.pool.page_size

    def adopt(self, pages: Sequence[int], length: int) -> None:
        """Begin an empty table with `pages`, whose references the caller hands over, and `length` committed tokens."""
        self.pages = list(pages)
        self._length = length
        self._number()

    def missing_pages(self, tokens: int) -> int:
        """Pages that `reserve(tokens)` would take."""
        return max(0, self.pool.pages_for(tokens) - len(self.pages))

    def reserve(self, tokens: int) -> None:
        """Have pages for `tokens` tokens in all. Raises OutOfPages, nothing changed, when the pool cannot give them."""
        missing = self.missing_pages(tokens)
        if missing:
            self.pages += self.pool.take(missing, self.pages[-1] if self.pages else None)
            self._number()

    def trim(self, tokens: int) -> None:
        """Give back whole pages behind the first `tokens` slots, which rejected rows leave unused."""
        kept = self.pool.pages_for(tokens)
        self.pool.drop(self.pages[kept:])
        del self.pages[kept:]
        self._slots = self._slots[: self.capacity]

    def span(self, start: int, stop: int) -> slice | Tensor:
        """Slots of positions `[start, stop)`: a slice when they are consecutive, else int64[stop - start]."""
        if self._consecutive and self.pages:
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
        self._length = target + len(accepted)

    def rewind(self, length: int) -> None:
        """Forget the committed tokens behind the first `length`; the pages stay."""
        self._length = min(self._length, length)

    def release(self) -> None:
        """Give all pages back and close the table. Doing so twice is harmless."""
        self.trim(0)
        self._length = 0
        self.pool.detach(self)

    def _number(self) -> None:
        size = self.pool.page_size
        pages = torch.tensor(self.pages, dtype=torch.int64)
        self._slots = (pages[:, None] * size + torch.arange(size)).flatten()
        self._consecutive = bool(pages.diff().eq(1).all())
