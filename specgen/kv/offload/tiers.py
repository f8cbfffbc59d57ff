"""Where evicted pages go: host memory, then disk. They come back when that is quicker than computing them again.

What is quicker is measured while it runs: seconds per page that each tier took lately, against what the engine says a
computed token costs. A tier that looked slow is looked at again after a while.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
    """A tier's copy of the page of `owner`: rows in host memory, a file of that name, or both."""

    owner: object
    rows: list[Tensor] | None = None
    name: str | None = None


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
    lost: told the owner of a copy that is gone, unless `discard` was what removed it. describe: what a file says of
    its owner. Both are set by the cache.
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
        self.lost: Callable[[object], None] = lambda owner: None
        self.describe: Callable[[Any], PageHeader] | None = None
        self.disk = disk
        self._host_pages = host_bytes // page_bytes
        self._page_tokens = page_tokens
        self._token_seconds = token_seconds
        self._host: OrderedDict[PageCopy, None] = OrderedDict()
        self._files: dict[str, PageCopy] = {}
        self._host_reads, self._disk_reads, self._disk_writes = PageSeconds(), PageSeconds(), PageSeconds()
        if disk is not None:
            disk.dropped = self._dropped

    def keep(self, owner: object, rows: Sequence[Tensor]) -> PageCopy | None:
        """Copy a page; None when no tier takes it. `rows` are views that change afterwards."""
        kept = PageCopy(owner)
        if self._host_pages:
            kept.rows = [tensor.to("cpu", copy=True) for tensor in rows]
            self._host[kept] = None
            self._shrink()
        else:
            self._write(kept, rows)
        return kept if self._is_kept(kept) else None

    def store(self, owner: object, kept: PageCopy | None, rows: Sequence[Tensor] | None) -> PageCopy | None:
        """Give a page a file, though it is in the pool or in memory; one that has a file is used now. rows: of one in
        the pool, else None. Answers its copy, if it has one."""
        kept = kept or PageCopy(owner)
        if kept.name is not None and self.disk is not None:
            self.disk.use(kept.name)
        elif (found := kept.rows if rows is None else rows) is not None:
            self._to_disk(kept, found)
        return kept if self._is_kept(kept) else None

    def adopt(self, owner: object, name: str) -> PageCopy:
        """The copy of `owner` that already stands in the folder."""
        kept = PageCopy(owner, name=name)
        self._files[name] = kept
        self._count()
        return kept

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
        """What is kept, as it was given; None when a file is damaged."""
        return kept.rows if kept.rows is not None else self._read(kept)

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

    def _is_kept(self, kept: PageCopy) -> bool:
        return kept.rows is not None or kept.name is not None

    def _shrink(self) -> None:
        while len(self._host) > self._host_pages:
            kept, _ = self._host.popitem(last=False)
            rows, kept.rows = kept.rows or [], None
            self._write(kept, rows)
            if not self._is_kept(kept):
                self.lost(kept.owner)
        self._count()

    def _write(self, kept: PageCopy, rows: Sequence[Tensor]) -> None:
        """Give a copy a file, unless writing takes longer than computing the page would."""
        if self._disk_writes.mean > self._token_seconds() * self._page_tokens:
            self._disk_writes.forgive()
        else:
            self._to_disk(kept, rows)

    def _to_disk(self, kept: PageCopy, rows: Sequence[Tensor]) -> None:
        if self.disk is None or self.describe is None or kept.name is not None:
            return
        started = time.perf_counter()
        header = self.describe(kept.owner)
        kept.name = header.name
        self._files[kept.name] = kept
        if not self.disk.write(header, rows):
            self._files.pop(header.name, None)
            kept.name = None
        else:
            self._disk_writes.observe(time.perf_counter() - started)
        self._count()

    def _read(self, kept: PageCopy) -> list[Tensor] | None:
        if self.disk is None or self.describe is None or kept.name is None:
            return None
        return self.disk.read(self.describe(kept.owner))

    def _dropped(self, name: str) -> None:
        """The folder has let go of a page."""
        kept = self._files.pop(name, None)
        if kept is None:
            return
        kept.name = None
        self._count()
        if not self._is_kept(kept):
            self.lost(kept.owner)

    def _count(self) -> None:
        self.stats.host_pages, self.stats.disk_pages = len(self._host), len(self._files)


def fits(rows: Sequence[Tensor], views: Sequence[Tensor]) -> bool:
    """Whether what was read has the pool's shapes, to the bit."""
    return len(rows) == len(views) and all(
        row.shape == view.shape and row.dtype == view.dtype for row, view in zip(rows, views, strict=True)
    )
