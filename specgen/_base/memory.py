"""Memory that this process may still take: available memory, control groups' limits, free memory of accelerators.

Available is not free: a machine that has read large files has hardly any free memory, since the kernel keeps the files
until somebody needs the room.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

import torch

_UNKNOWN_BYTES = 4 << 30
_KIB = 1024

_promised = 0
# The collector may call a finalizer, which gives a promise back, on a thread that holds it.
_promising = threading.RLock()


def promise(owner: object, count: int) -> None:
    """Count `count` bytes of host memory as taken for as long as `owner` lives. A pool or a cache is not there before
    it is written to; without this every engine of a process would be sized as if it were the only one."""
    _promise(count)
    weakref.finalize(owner, _promise, -count).atexit = False


def available_bytes(device: torch.device) -> int:
    """Bytes that may still be allocated on a device: of host memory less what was promised in this process."""
    if device.type in ("cpu", "meta"):
        return max(0, host_bytes() - _promised)
    free = max(0, _free_on(device))
    # A device without memory of its own takes the host's.
    return min(free, host_bytes()) if device.type == "mps" else free


def host_bytes(root: Path = Path("/")) -> int:
    """Bytes of host memory that this process may still take: the least of what the machine has available, of what each
    control group above the process has left, and of the process's own limits.

    root: where /proc and the control groups' folders are looked for. Pages of mapped files, as weights may be, could be
    taken away and are needed all the same: they do not count as available.
    """
    status = _table(root / "proc/self/status")
    mapped = status.get("RssFile", 0)
    meminfo = _table(root / "proc/meminfo")
    bounds = [meminfo["MemAvailable"] - mapped] if "MemAvailable" in meminfo else [_asked_of_the_system()]
    bounds += _left_in_groups(root, mapped)
    bounds += _left_by_limits(root, status)
    return max(0, min(bounds))


def _promise(count: int) -> None:
    global _promised  # noqa: PLW0603 -- memory is the process's, not an object's
    with _promising:
        _promised += count


def _free_on(device: torch.device) -> int:
    """What torch can still allocate: the device's free memory and what torch's own cache holds unused."""
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    with suppress(RuntimeError, AttributeError):
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
            unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            share = torch.cuda.get_per_process_memory_fraction(device) * torch.cuda.mem_get_info(device)[1]
            return int(min(free + unused, share - torch.cuda.memory_allocated(device)))
        return int(torch.accelerator.get_memory_info(device)[0])
    return _UNKNOWN_BYTES


def _left_in_groups(root: Path, mapped: int) -> Iterator[int]:
    """For each control group from the process's own up to the topmost that is to be seen, what its limit leaves."""
    for version, mount, place in _memory_groups(root):
        folder = root / mount.relative_to("/")
        own = folder / place
        # A container may see its group as the mount itself, whatever its name is outside.
        at = own if own.is_dir() else folder
        for level in (at, *(parent for parent in at.parents if parent == folder or folder in parent.parents)):
            yield from _left_in(level, version, mapped)


def _left_in(folder: Path, version: int, mapped: int) -> Iterator[int]:
    """What the limits of one control group leave; nothing where there are none."""
    names = ("memory.max", "memory.high") if version == 2 else ("memory.limit_in_bytes",)
    limits = [limit for name in names if (limit := _number(folder / name)) is not None]
    used = _number(folder / ("memory.current" if version == 2 else "memory.usage_in_bytes"))
    if not limits or used is None:
        return
    stat = _table(folder / "memory.stat")
    cached = stat.get("inactive_file", 0) if version == 2 else stat.get("total_inactive_file", 0)
    yield min(limits) - used + max(0, cached - mapped)


def _memory_groups(root: Path) -> Iterator[tuple[int, PurePosixPath, PurePosixPath]]:
    """(version, where its hierarchy is mounted, the process's group below that) of what may limit memory."""
    mounts = {version: (at, top) for version, at, top in _mounts(root)}
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        version = 2 if number == "0" and not controllers else 1
        if version not in mounts or (version == 1 and "memory" not in controllers.split(",")):
            continue
        at, top = mounts[version]
        group = PurePosixPath(path)
        below = group.relative_to(top) if group.is_relative_to(top) else PurePosixPath()
        yield version, at, PurePosixPath() if ".." in below.parts else below


def _mounts(root: Path) -> Iterator[tuple[int, PurePosixPath, PurePosixPath]]:
    """(version, mount point, the group that is its root) of the mounted hierarchies."""
    for line in _lines(root / "proc/self/mountinfo"):
        head, _, tail = line.partition(" - ")
        kind, _, options = tail.partition(" ")
        fields = head.split()
        if len(fields) < 5:
            continue
        if kind == "cgroup2":
            yield 2, PurePosixPath(fields[4]), PurePosixPath(fields[3])
        elif kind == "cgroup" and "memory" in options.rpartition(" ")[2].split(","):
            yield 1, PurePosixPath(fields[4]), PurePosixPath(fields[3])


def _left_by_limits(root: Path, status: dict[str, int]) -> Iterator[int]:
    """What `ulimit -v` and `ulimit -d` leave."""
    for name, used in (("Max address space", "VmSize"), ("Max data size", "VmData")):
        for line in _lines(root / "proc/self/limits"):
            soft = line.removeprefix(name).split()[:1] if line.startswith(name) else []
            if soft and soft[0].isdecimal() and used in status:
                yield int(soft[0]) - status[used]


def _asked_of_the_system() -> int:
    """Without /proc: what psutil says, else what the system says of its pages."""
    with suppress(ImportError):
        psutil: Any = import_module("psutil")

        return int(psutil.virtual_memory().available)
    for pages, share in (("SC_AVPHYS_PAGES", 1), ("SC_PHYS_PAGES", 2)):
        if sys.platform != "win32" and pages in os.sysconf_names:
            return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") // share
    return _UNKNOWN_BYTES


def _lines(file: Path) -> list[str]:
    with suppress(OSError):
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    return []


def _number(file: Path) -> int | None:
    """None for "max", and where there is no such file."""
    text = "".join(_lines(file)).strip()
    return int(text) if text.isdecimal() else None


def _table(file: Path) -> dict[str, int]:
    """Lines of a name and a number, in bytes."""
    found = {}
    for line in _lines(file):
        name, *values = line.split()
        if values and values[0].isdecimal():
            found[name.removesuffix(":")] = int(values[0]) * (_KIB if values[1:] == ["kB"] else 1)
    return found
