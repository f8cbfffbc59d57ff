"""`Engine.prefix`: pin, save and load what the prefix cache holds, and see what it is worth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from specgen.engine.core import EngineCore
from specgen.engine.request_builder import RequestBuilder
from specgen.engine.thread import EngineThread
from specgen.errors import InvalidRequest
from specgen.kv.lease import Pin
from specgen.kv.offload.page_names import PageNames
from specgen.kv.offload.persistence import PrefixStore
from specgen.kv.prefix_cache import PrefixCache
from specgen.sampling.params import SamplingParams
from specgen.types import Prompt, Speculation

_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class PrefixReport:
    """What the prefix cache holds and has saved so far.

    queried_tokens of all admitted sequences, cached_tokens of them not computed. pages of page_tokens tokens each:
    cached in the pool, pinned of those, in host memory, on disk. used_pages: of the pool's total_pages, by running
    sequences and cache together. restored_pages came back from a tier; damaged ones were found so.
    """

    queries: int
    hits: int
    queried_tokens: int
    cached_tokens: int
    pages: int
    pinned_pages: int
    used_pages: int
    total_pages: int
    evicted_pages: int
    restored_pages: int
    host_pages: int
    disk_pages: int
    damaged_pages: int
    page_tokens: int
    bytes_per_token: int


class PinnedPrefix:
    """A prompt whose KV stays in the pool until `release()`; also a context manager.

    Only whole pages are pinned, and a pin gives way when no request could run otherwise: `tokens` says how much of
    the prompt is pinned now.
    """

    def __init__(self, runner: EngineThread, pin: Pin) -> None:
        self._runner = runner
        self._pin = pin

    @property
    def tokens(self) -> int:
        """Tokens that are pinned; 0 after `release`."""
        return self._pin.tokens

    def release(self) -> None:
        """Let the prompt be evicted like any other. Doing so twice is harmless."""
        self._runner.call(self._pin.release)

    def __enter__(self) -> PinnedPrefix:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


class EnginePrefix:
    """The prefix cache of one engine. Thread-safe: everything runs on the engine's thread, between two steps.

    Raises InvalidRequest when the engine was built with prefix_cache=False.
    """

    def __init__(self, core: EngineCore, runner: EngineThread, builder: RequestBuilder) -> None:
        self._core = core
        self._runner = runner
        self._builder = builder

    def pin(self, prompt: Prompt, *, cache_salt: str = "", adapter: str | None = None) -> PinnedPrefix:
        """Keep the KV of a prompt, computing it first where it is not cached.

        prompt: as for `Engine.generate`. What is pinned are its ids, so a system prompt is pinned best as the text or
        the ids that requests begin with. cache_salt: whose requests may use it. adapter: under which they run.
        """
        cache = self._cache
        draft_nothing = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            cache_salt=cache_salt,
            adapter=adapter,
            speculation=Speculation.of("off"),
        )
        for attempt in range(_ATTEMPTS):
            prepared = self._builder.build(prompt, draft_nothing, copies=False)
            request = prepared.request
            key, ids = self._core.key(request), request.ids
            pin = self._runner.call(lambda key=key, ids=ids: cache.pin(key, ids))  # type: ignore[misc]
            wanted = len(request.ids) // self._core.target.pool.page_size * self._core.target.pool.page_size
            if pin.tokens == wanted or attempt == _ATTEMPTS - 1:
                break
            # Others may evict it between its end and the next look; what is pinned already stays meanwhile.
            try:
                for stream in self._runner.submit(prepared, computed=True):
                    stream.results()
            finally:
                self._runner.call(pin.release)
        return PinnedPrefix(self._runner, pin)

    @property
    def stats(self) -> PrefixReport:
        """Counts since the engine was built, and pages now."""
        return self._runner.call(self._report)

    def clear(self) -> None:
        """Forget all that is neither in use nor pinned, in host memory and on disk too."""
        self._runner.call(lambda: self._stored.clear())

    def save(self, folder: str | Path) -> int:
        """Write the cached pages to a folder, one checksummed file each; returns how many are in it now.

        Interrupted, it leaves a folder that holds a part. The files tell what was said to those who can read them.
        """
        return self._runner.call(lambda: self._stored.save(Path(folder)))

    def load(self, folder: str | Path) -> int:
        """Bring back saved pages, as far as there is room; returns how many.

        Only pages of the same model, weights, KV format and versions; others, and damaged ones, are passed over with
        a line in the log. Evicts nothing.
        """
        return self._runner.call(lambda: self._stored.load(Path(folder)))

    @property
    def _cache(self) -> PrefixCache:
        if self._core.prefix is None:
            raise InvalidRequest("this engine has no prefix cache; build it with prefix_cache=True", param="prefix")
        return self._core.prefix

    @property
    def _stored(self) -> PrefixStore:
        return self._core.stored() or PrefixStore(self._cache, PageNames(""))

    def _report(self) -> PrefixReport:
        cache, pool = self._cache, self._core.target.pool
        tiers = cache.tiers.stats if cache.tiers else None
        return PrefixReport(
            queries=cache.stats.queries,
            hits=cache.stats.hits,
            queried_tokens=cache.stats.queried_tokens,
            cached_tokens=cache.stats.cached_tokens,
            pages=cache.pages,
            pinned_pages=len({page for pin in cache.pins for page in pin.held_pages}),
            used_pages=pool.pages - pool.free_pages,
            total_pages=pool.pages,
            evicted_pages=cache.stats.evicted_pages,
            restored_pages=cache.stats.restored_pages,
            host_pages=tiers.host_pages if tiers else 0,
            disk_pages=tiers.disk_pages if tiers else 0,
            damaged_pages=tiers.damaged if tiers else 0,
            page_tokens=pool.page_size,
            bytes_per_token=pool.bytes_per_token,
        )
