"""What memory a process may still take, read from trees of files that look like machines and containers."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from specgen._base import memory
from specgen._base.memory import available_bytes, host_bytes, promise
from specgen.kv.formats import LayerShape
from specgen.kv.pool import KVPool

GIB, KIB = 1 << 30, 1 << 10
MEMINFO = "MemTotal: 25165824 kB\nMemFree: 108544 kB\nMemAvailable: 20971520 kB\nHugePages_Total: 0\n"
STATUS = "Name:\tpython\nVmSize:\t 4194304 kB\nVmData:\t 2097152 kB\nRssFile:\t 0 kB\n"
V2 = "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup rw,nsdelegate\n"
V1 = (
    "35 31 0:32 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "36 31 0:33 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
)
UNLIMITED = 9223372036854771712


def machine(root: Path, **files: str | int) -> Path:
    """Files by their paths, `__` for a slash; a machine with 20 of 24 GiB available, and hardly any
    free, where nothing else is said."""
    for name, text in {"proc__meminfo": MEMINFO, "proc__self__status": STATUS, **files}.items():
        file = root / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n" if isinstance(text, int) else text)
    return root


def group(root: Path, place: str, version: int = 2, **numbers: int | str) -> None:
    """A control group's files: limit, used, cached."""
    base = root / ("sys/fs/cgroup" if version == 2 else "sys/fs/cgroup/memory") / place
    base.mkdir(parents=True, exist_ok=True)
    names = {"limit": "memory.max", "used": "memory.current", "high": "memory.high"}
    if version == 1:
        names = {"limit": "memory.limit_in_bytes", "used": "memory.usage_in_bytes"}
    for name, number in numbers.items():
        if name in names:
            (base / names[name]).write_text(f"{number}\n")
    cached = numbers.get("cached", 0)
    lines = f"inactive_file {cached}\n" if version == 2 else f"inactive_file 7\ntotal_inactive_file {cached}\n"
    (base / "memory.stat").write_text(f"anon 5\n{lines}")


def test_available_counts_and_not_free(tmp_path: Path) -> None:
    assert host_bytes(machine(tmp_path)) == 20 * GIB


def test_mapped_files_are_not_taken_away_from_the_process(tmp_path: Path) -> None:
    """Weights may lie there; the kernel could drop them, and reads them again in every step."""
    assert host_bytes(machine(tmp_path, proc__self__status="RssFile: 6291456 kB\n")) == 14 * GIB


def test_a_container_of_version_2_sees_its_own_limit(tmp_path: Path) -> None:
    machine(tmp_path, proc__self__cgroup="0::/\n", proc__self__mountinfo=V2)
    group(tmp_path, "", limit=4 * GIB, used=3 * GIB, cached=GIB)
    assert host_bytes(tmp_path) == 2 * GIB


def test_the_smallest_limit_up_the_hierarchy_counts(tmp_path: Path) -> None:
    machine(tmp_path, proc__self__cgroup="0::/user.slice/app.scope\n", proc__self__mountinfo=V2)
    group(tmp_path, "user.slice/app.scope", limit="max", used=GIB)
    group(tmp_path, "user.slice", limit=5 * GIB, used=2 * GIB, cached=GIB)
    group(tmp_path, "user.slice/other.scope", limit=KIB, used=KIB)
    assert host_bytes(tmp_path) == 4 * GIB
    group(tmp_path, "user.slice/app.scope", limit=3 * GIB, used=GIB)
    assert host_bytes(tmp_path) == 2 * GIB
    group(tmp_path, "user.slice/app.scope", limit=3 * GIB, used=GIB, high=GIB + KIB)
    assert host_bytes(tmp_path) == KIB


def test_version_1_counts_below_what_is_mounted(tmp_path: Path) -> None:
    """In a container /proc names the group as the host does, and the group itself is what is mounted."""
    machine(
        tmp_path,
        proc__self__cgroup="9:cpu,cpuacct:/docker/a1\n4:memory:/docker/a1\n0::/\n",
        proc__self__mountinfo=V1.format(root="/docker/a1"),
    )
    group(tmp_path, "", version=1, limit=2 * GIB, used=GIB, cached=GIB // 2)
    assert host_bytes(tmp_path) == GIB + GIB // 2
    group(tmp_path, "", version=1, limit=UNLIMITED, used=GIB)
    assert host_bytes(tmp_path) == 20 * GIB


def test_version_1_nested_on_the_host(tmp_path: Path) -> None:
    machine(tmp_path, proc__self__cgroup="4:memory:/a/b\n", proc__self__mountinfo=V1.format(root="/"))
    group(tmp_path, "", version=1, limit=UNLIMITED, used=9 * GIB)
    group(tmp_path, "a", version=1, limit=3 * GIB, used=GIB)
    group(tmp_path, "a/b", version=1, limit=UNLIMITED, used=GIB)
    assert host_bytes(tmp_path) == 2 * GIB


@pytest.mark.parametrize("path", ["/../../elsewhere", "/not/to/be/seen"])
def test_a_group_out_of_sight_counts_as_far_as_it_is_mounted(tmp_path: Path, path: str) -> None:
    machine(tmp_path, proc__self__cgroup=f"0::{path}\n", proc__self__mountinfo=V2)
    group(tmp_path, "", limit=GIB, used=0)
    assert host_bytes(tmp_path) == GIB


def test_the_process_s_own_limits_count(tmp_path: Path) -> None:
    limits = (
        "Limit Soft Limit Hard Limit Units\nMax data size {} unlimited bytes\nMax address space {} unlimited bytes\n"
    )
    machine(tmp_path, proc__self__limits=limits.format("unlimited", 5 * GIB))
    assert host_bytes(tmp_path) == GIB
    machine(tmp_path, proc__self__limits=limits.format(2 * GIB + KIB, "unlimited"))
    assert host_bytes(tmp_path) == KIB


def test_never_below_nothing_and_broken_files_say_nothing(tmp_path: Path) -> None:
    machine(tmp_path, proc__self__cgroup="0::/\nnonsense\n\n", proc__self__mountinfo=f"odd\n{V2}")
    group(tmp_path, "", limit=GIB, used=2 * GIB)
    assert host_bytes(tmp_path) == 0
    group(tmp_path, "", limit="what", used=2 * GIB)
    assert host_bytes(tmp_path) == 20 * GIB


def test_without_proc_the_system_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=3 * GIB))
    monkeypatch.setitem(sys.modules, "psutil", told)
    assert host_bytes(tmp_path) == 3 * GIB
    monkeypatch.setitem(sys.modules, "psutil", None)
    pages = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr("os.sysconf_names", dict.fromkeys(pages, 0))
    monkeypatch.setattr("os.sysconf", pages.__getitem__)
    assert host_bytes(tmp_path) == 500 * 4096
    monkeypatch.setattr("os.sysconf_names", {})
    assert host_bytes(tmp_path) == 4 * GIB


def test_this_machine_has_no_more_than_it_says() -> None:
    (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    assert 0 < host_bytes() <= 1.2 * KIB * int(line.split()[1])


def test_what_pools_of_one_process_promise_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of a pool that nobody wrote to is not taken yet: two engines would both count on it."""
    gc.collect()
    # What engines of other tests promise is still counted, however much it is.
    monkeypatch.setattr(memory, "host_bytes", lambda: 1 << 60)
    device, before = torch.device("cpu"), available_bytes(torch.device("cpu"))
    pool = KVPool([LayerShape(2, 8, 8)], 64, dtype=torch.float32, device=device)
    assert before - available_bytes(device) == 64 * pool.page_bytes > 0
    del pool
    assert available_bytes(device) == before
    owner = type("Owner", (), {})()
    promise(owner, 1 << 60)
    assert available_bytes(device) == 0
    del owner
    assert available_bytes(device) == before


def test_a_gpu_has_what_is_free_and_what_torch_keeps_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"mem_get_info": (2 * GIB, 10 * GIB), "memory_reserved": 4 * GIB, "memory_allocated": 3 * GIB}
    for name, answer in sizes.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    assert available_bytes(torch.device("cuda", 0)) == 3 * GIB
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.5)
    assert available_bytes(torch.device("cuda", 0)) == 2 * GIB
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (5 * GIB, 6 * GIB))
    assert available_bytes(torch.device("xpu", 0)) == 5 * GIB
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 6 * GIB)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 5 * GIB)
    monkeypatch.setattr(memory, "host_bytes", lambda: 8 * GIB)
    assert available_bytes(torch.device("mps")) == GIB
