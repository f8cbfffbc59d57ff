"""Idle workers go when they are told to, and an engine tells them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from specgen import Engine
from specgen._base.openmp import _pauses, release_workers
from tests.support.tiny import build

TASKS = Path("/proc/self/task")
pytestmark = pytest.mark.skipif(not TASKS.exists() or not _pauses(), reason="no libgomp")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    release_workers()
    yield
    torch.set_num_threads(before)


def _threads() -> set[str]:
    """Threads of this process, by their ids, once those that were told to go are gone. Others end when they like."""
    time.sleep(0.2)
    return {task.name for task in TASKS.iterdir()}


def _compute() -> torch.Tensor:
    return torch.arange(2_000_000, dtype=torch.float32).mul(2).add(1)


def test_workers_go_and_come_back() -> None:
    without = _threads()
    expected = _compute()
    assert _threads() - without
    release_workers()
    assert not _threads() - without
    assert torch.equal(_compute(), expected)


def _engines() -> int:
    return sum(thread.name == "specgen-engine" for thread in threading.enumerate())


def test_an_engine_that_waits_and_its_caller_keep_none() -> None:
    others = _engines()
    with Engine(build("llama"), kv_tokens=256) as engine:
        release_workers()
        without = _threads()
        for _ in range(2):
            _compute()
            engine.generate([5, 6, 7] * 20, max_tokens=8, temperature=0)
        # The engine's own thread stays for a while.
        assert _engines() == others + 1
        assert len(_threads() - without) <= 1
