"""A prefix cache and folders of pages: what the disk tier finds at start, `save` and `load`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from specgen.errors import InvalidRequest, OutOfPages
from specgen.kv.offload.page_files import PageFiles, PageHeader
from specgen.kv.offload.page_names import PageNames
from specgen.kv.offload.tiers import Tiers, fits
from specgen.kv.pool import KVPool
from specgen.kv.prefix_cache import PrefixCache
from specgen.kv.radix_tree import CacheKey, PageNode

_HEADROOM = 1 / 16
_FILE_BYTES = 4096
"""What a file takes besides its page, at most."""


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """max_bytes: of the pool, for the prefix cache; `None` = all. host_bytes: of host memory for evicted pages.
    disk_folder, disk_bytes: where those go that memory has no room for, and most bytes there; `None` = nowhere."""

    max_bytes: int | None = None
    host_bytes: int = 0
    disk_folder: str | Path | None = None
    disk_bytes: int = 0


class PrefixStore:
    """Brings files into the tree of a cache, and its pages into files. names: of pages, under the model's identity."""

    def __init__(self, cache: PrefixCache, names: PageNames) -> None:
        self.cache = cache
        self.names = names

    def attach(self, folder: PageFiles) -> None:
        """Hang what stands in the disk tier's folder, none of it read yet."""

        def place(node: PageNode, header: PageHeader) -> bool:
            self.cache.adopt(node, header)
            return True

        for header in self._graft(folder, place):
            folder.age(header.name)

    def spill(self) -> None:
        """Write to the disk tier's folder what the pool and memory alone hold: the pages used last, as many as the
        folder has room for, and none without those before it, which a later engine finds it by."""
        tiers = self.cache.tiers
        if tiers is None or tiers.disk is None:
            return
        room = tiers.disk.max_bytes
        chosen = self._latest(None if room is None else room // (self.cache.pool.page_bytes + _FILE_BYTES))
        # From the end of each text on: what stands before others is deleted after them.
        for node in reversed(chosen):
            self.cache.store(node)

    def clear(self) -> None:
        """Forget everything that is not in use or pinned; of the disk tier's folder all of this identity, what nothing
        leads to any more included."""
        self.cache.clear()
        if self.cache.tiers is not None and (disk := self.cache.tiers.disk) is not None:
            for header in list(disk.headers(self.names.identity)):
                disk.remove(header.name)

    def save(self, path: Path) -> int:
        """Write every whole page to a folder, beside what stands there; returns how many are there now."""
        folder = PageFiles(path)
        return sum(self._save(node, folder) for node in self.cache.nodes())

    def load(self, path: Path) -> int:
        """Bring saved pages into free pages of the pool and then into the tiers; returns how many.

        Nothing is evicted for them, and some of the pool stays free for the next request.
        """
        if not path.is_dir():
            raise InvalidRequest(f"there is no folder {str(path)!r} to load a prefix cache from", param="folder")
        folder = PageFiles(path, writable=False)
        loaded = 0

        def place(node: PageNode, header: PageHeader) -> bool:
            nonlocal loaded
            done = self._load(node, header, folder)
            loaded += done
            return done

        self._graft(folder, place)
        return loaded

    def _save(self, node: PageNode, folder: PageFiles) -> bool:
        if len(node.ids) < self.cache.pool.page_size:
            return False
        rows = self.cache.rows(node) or self.cache.copied_rows(node)
        return rows is not None and folder.write(self.names.header(node), rows).stored

    def _load(self, node: PageNode, header: PageHeader, folder: PageFiles) -> bool:
        pool = self.cache.pool
        rows = folder.read(header)
        if rows is None or not fits(rows, pool.rows_of(0)):
            return False
        room = pool.free_pages > pool.pages * _HEADROOM and self.cache.has_room
        if room and node.parent is not None and (node.parent.page is not None or node.parent.parent is None):
            try:
                (page,) = pool.take(1, node.parent.page)
            except OutOfPages:
                return False
            pool.fill(page, rows)
            self.cache.house(node, page)
            pool.drop([page])
            return True
        return self.cache.keep(node, rows)

    def _latest(self, most: int | None) -> list[PageNode]:
        """The whole pages that were used last, themselves or one behind them; parents before children."""
        nodes = [node for node in self.cache.nodes() if len(node.ids) == self.cache.pool.page_size]
        used = {node: node.used for node in nodes}
        for node in reversed(nodes):
            if node.parent in used:
                used[node.parent] = max(used[node.parent], used[node])
        return sorted(nodes, key=lambda node: -used[node])[:most]

    def _graft(self, folder: PageFiles, place: Callable[[PageNode, PageHeader], bool]) -> list[PageHeader]:
        """Hang the pages of a folder, parents first. `place` says whether it could give the node a page or a copy.
        Answers those that nothing leads to."""
        below: defaultdict[str, list[PageHeader]] = defaultdict(list)
        keys: dict[CacheKey, None] = {}
        for header in folder.headers(self.names.identity):
            if len(header.ids) == self.cache.pool.page_size and header.key.keys() == asdict(CacheKey()).keys():
                below[header.parent].append(header)
                keys[CacheKey(**header.key)] = None
        for key in keys:
            stack = [(self.cache.root(key), self.names.root(key))]
            while stack:
                parent, name = stack.pop()
                placed = [(self._placed(parent, header, place), header.name) for header in below.pop(name, [])]
                stack += [(node, name) for node, name in placed if node is not None]
            self.cache.tidy(key)
        return [header for headers in below.values() for header in headers]

    def _placed(
        self, parent: PageNode, header: PageHeader, place: Callable[[PageNode, PageHeader], bool]
    ) -> PageNode | None:
        if (node := parent.children.get(header.ids)) is not None:
            return node
        if parent.parent is not None and parent.page is None and parent.copy is None:
            return None  # Pushed out again by its own children.
        node = parent.child(header.ids)
        if place(node, header):
            return node
        if parent.children.get(node.ids) is node:
            parent.remove(node)
        return None


def open_cache(
    pool: KVPool, options: CacheOptions, *, identity: Callable[[], str], token_seconds: Callable[[], float]
) -> PrefixCache:
    """A prefix cache with its tiers. Raises InvalidRequest when the folder cannot be used, or no page fits a tier."""
    page_bytes = pool.page_bytes
    if options.host_bytes:
        _check_room("host_cache_bytes", options.host_bytes, page_bytes)
    if options.disk_folder is not None:
        _check_room("disk_cache_bytes", options.disk_bytes, page_bytes)
    max_pages = None if options.max_bytes is None else options.max_bytes // page_bytes
    if not options.host_bytes and options.disk_folder is None:
        return PrefixCache(pool, max_pages=max_pages)
    disk = None
    if options.disk_folder is not None:
        try:
            disk = PageFiles(Path(options.disk_folder), options.disk_bytes)
        except OSError as error:
            message = f"disk_cache {str(options.disk_folder)!r} cannot be used: {error}; choose a folder to write to"
            raise InvalidRequest(message, param="disk_cache") from error
    tiers = Tiers(
        page_bytes=page_bytes,
        page_tokens=pool.page_size,
        host_bytes=options.host_bytes,
        disk=disk,
        token_seconds=token_seconds,
    )
    names = PageNames(identity()) if disk is not None else None
    cache = PrefixCache(pool, max_pages=max_pages, tiers=tiers, names=names)
    if disk is not None and names is not None:
        PrefixStore(cache, names).attach(disk)
    return cache


def _check_room(name: str, value: int, page_bytes: int) -> None:
    if value < page_bytes:
        raise InvalidRequest(f"{name} is {value}; one page of the KV pool takes {page_bytes}", param=name)
