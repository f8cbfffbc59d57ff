"""Disks without room, and engines that are killed while they write."""

from __future__ import annotations

import errno
import os
import random
import resource
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from specgen import Engine
from specgen.kv.offload import page_files as pagefile
from tests.support.engines import evict, watched
from tests.support.tiny import build

KILLS = 10


def opened(model: PreTrainedModel, **options: Any) -> Engine:
    return watched(Engine(model, **{"kv_tokens": 512, "drafters": ["prompt-lookup"], **options}))


def prompts(seed: int) -> Iterator[list[int]]:
    """Texts without end, always the same ones. Of three pages each, so that most of what is written has a parent."""
    rng = random.Random(seed)
    while True:
        yield [rng.randrange(3, 96) for _ in range(50)]


def said(engine: Engine, texts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """What it says to all of them, and that nothing leaks."""
    found = engine.generate([list(text) for text in texts], max_tokens=6, temperature=0.0)
    engine.check()
    return [result.ids for result in found]


def victim(folder: str) -> None:
    """Engines that do nothing but write pages, one after the other, each killed at some moment."""
    model, rng = build("llama"), random.Random(1)
    for seed in range(KILLS):
        reads, writes = os.pipe()
        child = os.fork()
        if not child:
            with opened(model, disk_cache=folder) as engine:
                for prompt in prompts(seed):
                    said(engine, [prompt])
                    evict(engine)
                    os.write(writes, b".")
        os.close(writes)
        assert os.read(reads, 1), "it ended by itself"
        # Within some more pages, at any point of one.
        subprocess.run(["sleep", str(rng.uniform(0, 0.1))], check=True)
        os.kill(child, 9)
        os.waitpid(child, 0)
        os.close(reads)


@contextmanager
def no_room_in_a_file() -> Iterator[None]:
    """Writing stops in the middle of a page."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def no_room_in_the_end() -> Iterator[None]:
    """Writing seems to work, until what was written is flushed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pagefile, "_private", lambda path, flags: os.open("/dev/full", os.O_WRONLY))
        yield


@contextmanager
def no_room_at(owner: object, name: str) -> Iterator[None]:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, full)
        yield


FULL = {
    "open": lambda: no_room_at(pagefile, "_private"),
    "write": no_room_in_a_file,
    "flush": no_room_in_the_end,
    "rename": lambda: no_room_at(Path, "replace"),
    "touch": lambda: no_room_at(os, "utime"),
}
