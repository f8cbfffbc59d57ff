"""Where adapters' weights are: on the device while sequences run under them, in host memory, or in files of our own.

What the engine's thread asks is answered at once. Files are read and written on other threads; what is fetched is there
in one of the next steps.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file

from specgen._base.log import Log
from specgen._base.process import finalize_here, leave_to_parent
from specgen.errors import AdapterRefused
from specgen.lora.adapter import Adapter, AdapterOptions, LoraLayer, LoraWeights

log = Log("specgen.adapters")

TARGET, DRAFT = "target", "draft"
"""Whose layers the parts of an adapter adapt."""


class Presence(Enum):
    """Whether sequences can run under an adapter: now, in one of the next steps, or when others have ended."""

    THERE = "there"
    COMING = "coming"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """How many adapters there are; their bytes on the device, in host memory and in files; how many were fetched from
    files and evicted from the device so far.

    On a CPU what is on the device lies in host memory and counts in both.
    """

    adapters: int
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    fetched: int
    evicted: int


class AdapterCache:
    """The adapters of one engine, those in last use first to stay. Thread-safe; `presence`, `hold` and `release` are
    the engine's thread's."""

    def __init__(self, options: AdapterOptions, device: torch.device) -> None:
        self._options = options
        self._device = device
        self._adapters: dict[Adapter, None] = {}
        self._changed = threading.Condition()
        self._moving = threading.Lock()
        self._folder: TemporaryDirectory[str] | None = None
        self._numbers = count()
        self._fetched = self._evicted = 0

    def add(self, adapter: Adapter, *, replacing: Adapter | None = None) -> None:
        """Take over an adapter, in host memory. Raises AdapterRefused where there is no room for it, and forgets it.

        replacing: one that is retired as soon as this one is there.
        """
        with self._changed:
            self._check_room(adapter, replacing)
            self._adapters[adapter] = None
            adapter.coming = self._device_bytes() + adapter.bytes <= self._options.device_bytes
        if adapter.coming:
            self._fetch(adapter)
        if adapter.failure:
            self.retire(adapter)
            raise AdapterRefused(f"adapter {adapter.name!r} cannot be put on the device: {adapter.failure!r}")
        try:
            self._spill()
        except Exception as error:  # a disk
            self.retire(adapter)
            message = f"host memory is full, and files cannot be written: {error}"
            raise AdapterRefused(f"adapter {adapter.name!r}: {message}") from error

    def retire(self, adapter: Adapter) -> None:
        """No request asks for it from now on; it goes when its last user has gone."""
        with self._changed:
            adapter.retired, adapter.pinned = True, False
            self._drop_unused(adapter)

    def wait_unused(self, adapter: Adapter, timeout: float | None) -> bool:
        """Wait until no sequence uses it; False if one still does after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not adapter.users, timeout)

    def use(self, adapter: Adapter) -> None:
        """A sequence under it was queued, maybe just after it was retired."""
        with self._changed:
            adapter.users += 1
            self._adapters.setdefault(adapter)

    def leave(self, adapter: Adapter) -> None:
        """A sequence under it has ended."""
        with self._changed:
            adapter.users -= 1
            self._drop_unused(adapter)
            self._changed.notify_all()

    def presence(self, adapter: Adapter) -> Presence:
        """Whether a sequence under it can run. What is not there is sent for, and idle ones make room for it."""
        with self._changed:
            del self._adapters[adapter]
            self._adapters[adapter] = None
            if adapter.weights is not None:
                return Presence.THERE
            if adapter.coming:
                return Presence.COMING
            if not self._make_room(adapter.bytes):
                return Presence.FULL
            if self._device.type == "cpu" and adapter.parts is not None:
                self._put(adapter)
                return Presence.THERE
            threading.Thread(target=self._fetch_and_spill, args=(adapter,), name="specgen-adapter", daemon=True).start()
            adapter.coming = True
        return Presence.COMING

    def forgive(self, adapter: Adapter) -> None:
        """Those who waited for it were told that it cannot be fetched; whoever comes next tries again."""
        with self._changed:
            adapter.failure = None

    def hold(self, adapter: Adapter) -> None:
        """A sequence begins to run under an adapter that is there: it stays."""
        adapter.running += 1

    def release(self, adapter: Adapter) -> None:
        """That sequence runs no more, for now or for good."""
        adapter.running -= 1

    def wait(self, seconds: float) -> bool:
        """Wait until none is on its way to the device, or so long; False where none was."""
        with self._changed:
            if not self._any_coming():
                return False
            self._changed.wait_for(lambda: not self._any_coming(), seconds)
            return True

    def _any_coming(self) -> bool:
        return any(adapter.coming for adapter in self._adapters)

    @property
    def stats(self) -> AdapterReport:
        """Bytes now, counts since the engine was built."""
        with self._changed:
            host = sum(adapter.bytes for adapter in self._adapters if adapter.parts is not None)
            disk = sum(adapter.bytes for adapter in self._adapters if adapter.file is not None)
            count = len(self._adapters)
            return AdapterReport(count, self._device_bytes(), host, disk, self._fetched, self._evicted)

    def check(self, *, busy: bool) -> None:
        """Raise RuntimeError if anything is held that no sequence needs, or more than the device's bytes."""
        with self._changed:
            for adapter in self._adapters:
                if adapter.running > adapter.users or (adapter.users and not busy):
                    raise RuntimeError(f"adapter {adapter.name!r} is used by {adapter.users} sequences that are gone")
                if adapter.retired and not adapter.users:
                    raise RuntimeError(f"adapter {adapter.name!r} was unloaded, has no user, and is still there")
            if self._device_bytes() > self._options.device_bytes:
                raise RuntimeError(f"adapters take {self._device_bytes()} bytes, over {self._options.device_bytes}")

    def _check_room(self, new: Adapter, replaced: Adapter | None) -> None:
        options = self._options
        others = [adapter for adapter in self._adapters if adapter is not replaced]
        pinned = sum(adapter.bytes for adapter in others if adapter.pinned)
        largest = max((adapter.bytes for adapter in others if not adapter.pinned), default=0)
        needed = pinned + new.bytes + (largest if new.pinned else 0)
        if needed > options.device_bytes:
            told = f"{pinned} are pinned" + (f", and {largest} must stay free for others" if new.pinned else "")
            message = f"it takes {new.bytes} bytes; device_bytes is {options.device_bytes}, of which {told}"
            raise AdapterRefused(f"adapter {new.name!r}: {message}")
        quota = options.host_bytes + options.disk_bytes
        if (total := sum(adapter.bytes for adapter in self._adapters)) + new.bytes > quota:
            message = f"it takes {new.bytes} bytes, and {total} are loaded; host_bytes and disk_bytes are {quota}"
            raise AdapterRefused(f"adapter {new.name!r}: {message}; unload others")

    def _device_bytes(self) -> int:
        return sum(a.bytes for a in self._adapters if a.weights is not None or a.coming)

    def _make_room(self, needed: int) -> bool:
        """Take those off the device that were idle longest, as many as it needs; nothing if that is not enough."""
        excess = self._device_bytes() + needed - self._options.device_bytes
        # One that is still coming keeps its room, though its weights may be there already.
        idle = [a for a in self._adapters if a.weights is not None and not (a.running or a.pinned or a.coming)]
        if excess > sum(adapter.bytes for adapter in idle):
            return False
        for adapter in idle:
            if excess <= 0:
                break
            adapter.weights = adapter.draft_weights = None
            self._evicted += 1
            excess -= adapter.bytes
        return True

    def _put(self, adapter: Adapter) -> None:
        parts = {whose: _moved(weights, self._device) for whose, weights in (adapter.parts or {}).items()}
        adapter.weights, adapter.draft_weights = parts[TARGET], parts.get(DRAFT)

    def _drop_unused(self, adapter: Adapter) -> None:
        if adapter.retired and not adapter.users:
            self._adapters.pop(adapter, None)
            adapter.weights = adapter.draft_weights = None

    def _fetch(self, adapter: Adapter) -> None:
        """Bring an adapter to the device; its room there is kept already."""
        try:
            with self._moving:
                file = adapter.file
                if file is not None:
                    adapter.parts = _read(file)
                    adapter.file = None
                    file.unlink()
                    self._fetched += 1
                self._put(adapter)
        except BaseException as error:  # a disk, a device: those who wait for it are told, whatever it was
            log.exception("an adapter cannot be fetched", adapter=adapter.name)
            adapter.failure = error
        with self._changed:
            adapter.coming = False
            if adapter not in self._adapters:
                adapter.weights = adapter.draft_weights = None
            self._changed.notify_all()

    def _fetch_and_spill(self, adapter: Adapter) -> None:
        self._fetch(adapter)
        try:
            self._spill()
        except Exception:  # a disk: sequences run all the same, and the next one that comes or goes tries again
            log.exception("idle adapters cannot be written to files", adapter=adapter.name)

    def _spill(self) -> None:
        """Write those to files that were idle longest, while host memory holds more than it should."""
        with self._moving:
            while (adapter := self._first_to_spill()) is not None and adapter.parts is not None:
                file = self._new_file()
                try:
                    _write(file, adapter.parts)
                except BaseException:
                    file.unlink(missing_ok=True)
                    raise
                finalize_here(adapter, file.unlink, missing_ok=True)
                with self._changed:
                    adapter.file, adapter.parts = file, None

    def _first_to_spill(self) -> Adapter | None:
        with self._changed:
            there = [adapter for adapter in self._adapters if adapter.parts is not None]
            if sum(adapter.bytes for adapter in there) <= self._options.host_bytes:
                return None
            return next((a for a in there if a.weights is None and not a.coming), None)

    def _new_file(self) -> Path:
        if self._folder is None:
            self._folder = leave_to_parent(TemporaryDirectory(prefix="specgen-adapters-"))
        return Path(self._folder.name) / f"{next(self._numbers)}.safetensors"


def _moved(weights: LoraWeights, device: torch.device) -> LoraWeights:
    if device.type == "cpu":
        return weights
    moved = {
        name: LoraLayer(**{kind: tensor.to(device) for kind, tensor in layer.tensors.items()})
        for name, layer in weights.layers.items()
    }
    return LoraWeights(moved)


def _write(file: Path, parts: Mapping[str, LoraWeights]) -> None:
    save_file(
        {
            f"{whose}/{name}/{kind}": tensor
            for whose, weights in parts.items()
            for name, layer in weights.layers.items()
            for kind, tensor in layer.tensors.items()
        },
        file,
    )


def _read(file: Path) -> dict[str, LoraWeights]:
    layers: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    for key, tensor in load_file(file).items():
        whose, name, kind = key.split("/")
        layers.setdefault(whose, {}).setdefault(name, {})[kind] = tensor
    return {
        whose: LoraWeights({name: LoraLayer(**kinds) for name, kinds in named.items()})
        for whose, named in layers.items()
    }
