"""Where evicted pages go: host memory, then disk. They come back when that is quicker than computing them again.

What is quicker is measured while it runs: seconds per page that each tier took lately, against what the engine says a
computed token costs. A tier that looked slow is looked at again after a while.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from specgen.kv.offload.page_files import PageFiles, PageHeader
from specgen.kv.pool import KVPool

_SMOOTHING = 0.2
_FORGIVING = 0.98


class PageSeconds:
    """Running mean of the seconds per page; nothing measured yet counts as no time, so that it is tried."""

    def __init__(self) -> None:
        self.mean = 0.0
        self._measured = False

    def observe(self, seconds: float) -> None:
        """One page took `seconds`."""
        self.mean += (_SMOOTHING if self._measured else 1.0) * (seconds - self.mean)
        self._measured = True

    def forgive(self) -> None:
        """It was too slow to be asked; in time it is asked again."""
        self.mean *= _FORGIVING


@dataclass(slots=True, eq=False)
class PageCopy:
    """A tier's copy of a page: rows in host memory, a file of that name, or both.

    header: what its file says, or would say; `None` where there is no disk.
    """

    header: PageHeader | None
    rows: list[Tensor] | None = None
    name: str | None = None

    @property
    def is_there(self) -> bool:
        """Whether anything is kept."""
        return self.rows is not None or self.name is not None


class Kept(NamedTuple):
    """The copy of a page, `None` if no tier took it, and the copies that are gone since, to make room for it."""

    copy: PageCopy | None
    lost: tuple[PageCopy, ...] = ()


@dataclass(slots=True)
class TierStats:
    """Pages that each tier holds now, and how many were refused because a copy was not sound."""

    host_pages: int = 0
    disk_pages: int = 0
    damaged: int = 0


class Tiers:
    """Copies of whole pages of one pool. Owned by its prefix cache and touched from the engine's thread alone.

    page_bytes, page_tokens: of one page. host_bytes: most bytes in host memory. disk: the folder behind it.
    token_seconds: what computing one token of a prompt costs at present.
    """

    def __init__(
        self,
        *,
        page_bytes: int,
        page_tokens: int,
        host_bytes: int,
        disk: PageFiles | None,
        token_seconds: Callable[[], float],
    ) -> None:
        self.stats = TierStats()
        self.disk = disk
        self._host_pages = host_bytes // page_bytes
        self._page_tokens = page_tokens
        self._token_seconds = token_seconds
        self._host: OrderedDict[PageCopy, None] = OrderedDict()
        self._files: dict[str, PageCopy] = {}
        self._host_reads, self._disk_reads, self._disk_writes = PageSeconds(), PageSeconds(), PageSeconds()

    def keep(self, rows: Sequence[Tensor], header: PageHeader | None) -> Kept:
        """Copy a page. `rows` are views that change afterwards."""
        copy = PageCopy(header)
        if self._host_pages:
            copy.rows = [tensor.to("cpu", copy=True) for tensor in rows]
            self._host[copy] = None
            return _kept(copy, self._shrink())
        return _kept(copy, self._write(copy, rows))

    def store(self, copy: PageCopy | None, rows: Sequence[Tensor] | None, header: PageHeader | None) -> Kept:
        """Give a page a file, though it is in the pool or in memory; one that has a file is used now.

        copy: what is kept of it already. rows: of a page in the pool, else None.
        """
        copy = copy or PageCopy(header)
        lost: list[PageCopy] = []
        if copy.name is not None and self.disk is not None:
            if not self.disk.use(copy.name):
                self._gone(copy.name)
        elif (found := copy.rows if rows is None else rows) is not None:
            lost = self._to_disk(copy, found)
        return _kept(copy, lost)

    def adopt(self, header: PageHeader) -> PageCopy:
        """The copy of a page that already stands in the folder."""
        name = header.name
        copy = self._files[name] = PageCopy(header, name=name)
        self._count()
        return copy

    def worthwhile(self, run: Sequence[PageCopy]) -> int:
        """How many pages of `run`, from the first on, to bring back: those that save most time."""
        computed = self._token_seconds() * self._page_tokens
        gain = best = 0.0
        count = 0
        for index, kept in enumerate(run, 1):
            gain += computed - self._reads(kept).mean
            if gain > best:
                best, count = gain, index
        for kept in run[count:]:
            self._reads(kept).forgive()
        return count

    def fetch(self, kept: PageCopy, pool: KVPool, page: int) -> bool:
        """Write a copy to `page`; False when it is not sound."""
        started = time.perf_counter()
        reads = self._reads(kept)
        rows = self.rows(kept)
        if rows is None or not fits(rows, pool.rows_of(page)):
            self.stats.damaged += 1
            return False
        pool.fill(page, rows)
        reads.observe(time.perf_counter() - started)
        return True

    def rows(self, kept: PageCopy) -> list[Tensor] | None:
        """What is kept, as it was given; None when a file is damaged, and then it is gone."""
        if kept.rows is not None:
            return kept.rows
        if self.disk is None or kept.header is None or kept.name is None:
            return None
        rows = self.disk.read(kept.header)
        if rows is None:
            self._gone(kept.name)
        return rows

    def settle(self, kept: PageCopy) -> bool:
        """The page is in the pool again: memory lets go of it. Whether a file of it is left."""
        self._host.pop(kept, None)
        kept.rows = None
        self._count()
        return kept.name is not None

    def discard(self, kept: PageCopy) -> None:
        """Let go of a copy, the file too. Doing so twice is harmless."""
        self.settle(kept)
        if kept.name is not None and self._files.get(kept.name) is kept:
            del self._files[kept.name]
            if self.disk is not None:
                self.disk.remove(kept.name)
        kept.name = None
        self._count()

    def check(self) -> None:
        """Raise RuntimeError if the tiers are not what they say."""
        if len(self._host) > self._host_pages or any(kept.rows is None for kept in self._host):
            raise RuntimeError("tiers: host memory holds too many pages, or pages without rows")
        if any(kept.name != name or self.disk is None or name not in self.disk for name, kept in self._files.items()):
            raise RuntimeError("tiers: a page is said to be on disk and is not in the folder")

    def _reads(self, kept: PageCopy) -> PageSeconds:
        return self._disk_reads if kept.rows is None else self._host_reads

    def _shrink(self) -> list[PageCopy]:
        """Let go of what memory has no room for, to disk where that is quick enough; what is gone altogether."""
        lost: list[PageCopy] = []
        while len(self._host) > self._host_pages:
            kept, _ = self._host.popitem(last=False)
            rows, kept.rows = kept.rows or [], None
            lost += self._write(kept, rows)
            if not kept.is_there:
                lost.append(kept)
        self._count()
        return lost

    def _write(self, kept: PageCopy, rows: Sequence[Tensor]) -> list[PageCopy]:
        """Give a copy a file, unless writing takes longer than computing the page would; what is gone for it."""
        if self._disk_writes.mean > self._token_seconds() * self._page_tokens:
            self._disk_writes.forgive()
            return []
        return self._to_disk(kept, rows)

    def _to_disk(self, kept: PageCopy, rows: Sequence[Tensor]) -> list[PageCopy]:
        if self.disk is None or kept.header is None or kept.name is not None:
            return []
        started = time.perf_counter()
        written = self.disk.write(kept.header, rows)
        gone = [copy for name in written.dropped if (copy := self._gone(name)) is not None]
        if written.stored:
            kept.name = kept.header.name
            self._files[kept.name] = kept
            self._disk_writes.observe(time.perf_counter() - started)
        self._count()
        return [copy for copy in gone if not copy.is_there]

    def _gone(self, name: str) -> PageCopy | None:
        """The folder has let go of a page; the copy that it was of."""
        copy = self._files.pop(name, None)
        if copy is not None:
            copy.name = None
        self._count()
        return copy

    def _count(self) -> None:
        self.stats.host_pages, self.stats.disk_pages = len(self._host), len(self._files)


def _kept(copy: PageCopy, lost: Sequence[PageCopy]) -> Kept:
    return Kept(copy if copy.is_there else None, tuple(other for other in lost if other is not copy))


def fits(rows: Sequence[Tensor], views: Sequence[Tensor]) -> bool:
    """Whether what was read has the pool's shapes, to the bit."""
    return len(rows) == len(views) and all(
        row.shape == view.shape and row.dtype == view.dtype for row, view in zip(rows, views, strict=True)
    )
