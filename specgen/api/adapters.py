"""`Engine.adapters`: load, reload and unload LoRA adapters while requests run, and see where they are."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from specgen._base.openmp import release_workers
from specgen._base.torch_state import plain_torch
from specgen.engine.core import EngineCore
from specgen.engine.thread import EngineThread
from specgen.errors import AdapterRefused, UnknownName, UnsupportedModel
from specgen.lora.adapter import Adapter, AdapterOptions
from specgen.lora.cache import DRAFT, TARGET, AdapterReport
from specgen.lora.peft_files import AdapterFiles, locate
from specgen.model.runner import ModelRunner

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_REVISION = 16


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """An adapter that requests can ask for. base: the model that its config names. place: "device", "host" or "disk",
    the nearest place where its weights are. users: sequences that run or wait under this revision."""

    name: str
    revision: str
    path: str
    base: str | None
    rank: int
    bytes: int
    pinned: bool
    paired: bool
    place: str
    users: int


class EngineAdapters:
    """The adapters of one engine. Thread-safe; reading files keeps no step waiting.

    A request runs to its end under the revision that its name meant when it was made. Raises AdapterRefused, an
    InvalidRequest, for what cannot be loaded, UnknownName for a name that is not loaded; nothing has changed then.
    """

    def __init__(
        self, core: EngineCore, options: AdapterOptions, drafts: Sequence[ModelRunner], runner: EngineThread
    ) -> None:
        self._core = core
        self._cache = core.adapters
        self._options = options
        self._drafts = drafts
        self._runner = runner
        self._lock = threading.Lock()
        self._named: dict[str, Adapter] = {}
        self._loading: set[str] = set()

    def load(
        self,
        name: str,
        path: str | Path,
        *,
        pinned: bool = False,
        draft_adapter: str | Path | None = None,
        any_base: bool = False,
    ) -> AdapterInfo:
        """Load PEFT's files from the folder `path` under a new name; requests then say `adapter=name`.

        path: relative to the engine's adapter root, if it has one. pinned: it stays on the device.
        draft_adapter: the folder of an adapter for the draft model, which then drafts under it.
        any_base: take files that were made for a base of another name than this model's.
        """
        self._check_thread()
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            told = (
                "it must be 1 to 64 letters, digits, dots, dashes or underscores, and begin with one of the first two"
            )
            raise AdapterRefused(f"adapter name {name!r} is not allowed; {told}")
        with self._lock:
            if name in self._named or name in self._loading:
                raise AdapterRefused(f"adapter name {name!r} is in use; unload it, or reload it with other files")
            self._loading.add(name)
        try:
            adapter = self._read(name, path, draft_adapter, pinned=pinned, any_base=any_base)
            self._cache.add(adapter)
            with self._lock:
                self._named[name] = adapter
        finally:
            with self._lock:
                self._loading.discard(name)
        return _info(adapter)

    def reload(
        self,
        name: str,
        path: str | Path | None = None,
        *,
        draft_adapter: str | Path | None = None,
        any_base: bool = False,
    ) -> AdapterInfo:
        """Read the files again, or others from `path`, as a new revision under the same name.

        Requests that were made before go on under the old one.
        """
        self._check_thread()
        old = self.named(name)
        paths = old.path if path is None else path, old.draft_path if draft_adapter is None else draft_adapter
        adapter = self._read(name, *paths, pinned=old.pinned, any_base=any_base or old.any_base)
        self._cache.add(adapter, replacing=old)
        with self._lock:
            replaced = self._named.get(name)
            if replaced is not None:
                self._named[name] = adapter
        self._cache.retire(adapter if replaced is None else replaced)
        if replaced is None:
            raise UnknownName("adapter", name, self._named, param="adapter")
        return _info(adapter)

    def unload(self, name: str, *, timeout: float | None = None) -> bool:
        """Take no more requests for `name`, and wait until those that run under it have ended.

        The name is free at once. Returns False if some still run after `timeout` seconds; they go on.
        """
        self._check_thread()
        with self._lock:
            adapter = self._named.pop(name, None)
        if adapter is None:
            raise UnknownName("adapter", name, self._named, param="adapter")
        self._cache.retire(adapter)
        self._runner.call(lambda: self._core.drafting.forget(name))
        return self._cache.wait_unused(adapter, timeout)

    def list(self) -> list[AdapterInfo]:
        """What is loaded, in the order of loading."""
        self._runner.check_process()
        with self._lock:
            return [_info(adapter) for adapter in self._named.values()]

    def named(self, name: str) -> Adapter:
        """What `name` means now."""
        self._runner.check_process()
        with self._lock:
            if name not in self._named:
                raise UnknownName("adapter", name, self._named, param="adapter")
            return self._named[name]

    @property
    def stats(self) -> AdapterReport:
        """Where the bytes are, unloaded revisions that are still in use included."""
        return self._cache.stats

    def _check_thread(self) -> None:
        """Raise WouldDeadlock on the engine's thread, which reads no files and waits for no sequence's end, and
        EngineClosed in a forked child."""
        with self._runner.awaited():
            pass

    @plain_torch()
    def _read(
        self, name: str, path: str | Path, draft_adapter: str | Path | None, *, pinned: bool, any_base: bool
    ) -> Adapter:
        self._runner.check_open()
        files = {TARGET: self._files(path, self._core.target, any_base)}
        if draft_adapter is not None:
            files[DRAFT] = self._files(draft_adapter, self._draft_model(draft_adapter), any_base)
        # Whoever calls will wait for answers of the engine's thread.
        release_workers()
        parts = {whose: read.weights for whose, read in files.items()}
        return Adapter(
            name=name,
            revision="-".join(read.digest[:_REVISION] for read in files.values()),
            path=path,
            draft_path=draft_adapter,
            any_base=any_base,
            rank=files[TARGET].rank,
            base=files[TARGET].base,
            bytes=sum(weights.bytes for weights in parts.values()),
            parts=parts,
            pinned=pinned,
        )

    def _draft_model(self, draft_adapter: str | Path) -> ModelRunner:
        """The only one: of several, nothing says whose layers a `draft_adapter` adapts."""
        if len(self._drafts) != 1:
            have = f"{len(self._drafts)} draft models; it must have one" if self._drafts else "no draft model"
            raise AdapterRefused(f"draft_adapter is {str(draft_adapter)!r}, but this engine has {have}")
        return self._drafts[0]

    def _files(self, path: str | Path, target: ModelRunner, any_base: bool) -> AdapterFiles:
        folder = locate(path, self._options.root)
        # The first time a forward tells which layers can be adapted, and forwards are the engine's thread's.
        try:
            self._runner.call(lambda: target.adapted)
        except UnsupportedModel as error:
            raise AdapterRefused(str(error)) from error
        read = target.read_adapter(folder, max_rank=self._options.max_rank, max_bytes=self._options.device_bytes)
        base, here = read.base or "", target.model.name_or_path
        if base and here and not any_base and PurePath(base).name.lower() != PurePath(here).name.lower():
            told = f"it was made for {base!r}, and this is {here!r}"
            raise AdapterRefused(f"adapter {folder.name!r}: {told}; any_base=True takes it all the same")
        return read


def _info(adapter: Adapter) -> AdapterInfo:
    place = "device" if adapter.weights is not None else "host" if adapter.parts is not None else "disk"
    return AdapterInfo(
        adapter.name,
        adapter.revision,
        str(adapter.path),
        adapter.base,
        adapter.rank,
        adapter.bytes,
        adapter.pinned,
        adapter.draft_path is not None,
        place,
        adapter.users,
    )
