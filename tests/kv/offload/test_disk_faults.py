"""Whatever happens to the files of the disk tier and of adapters: never a crash, never a wrong token."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs
from transformers import PreTrainedModel

from specgen.errors import AdapterRefused
from specgen.lora import cache as adapter_cache
from specgen.lora.adapter import Adapter, AdapterOptions, LoraLayer, LoraWeights
from specgen.lora.cache import TARGET, AdapterCache, Presence
from tests.support.disk_faults import FULL, KILLS, no_room_at, no_room_in_a_file, opened, prompts, said
from tests.support.engines import evict
from tests.support.tiny import build

FORMATS = ("native", "int4")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama")


def some(seed: int = 0, count: int = 4) -> list[list[int]]:
    return [prompt for prompt, _ in zip(prompts(seed), range(count), strict=False)]


def test_engines_killed_while_they_write(model: PreTrainedModel, tmp_path: Path) -> None:
    command = (
        "import sys, torch; torch.set_num_threads(1); from tests.support.disk_faults import victim; victim(sys.argv[1])"
    )
    subprocess.run(
        [sys.executable, "-c", command, str(tmp_path)], check=True, cwd=Path(__file__).parents[3], timeout=120
    )
    texts = [prompt for seed in range(KILLS) for prompt in some(seed)]
    with opened(model, prefix_cache=False) as engine:
        expected = said(engine, texts)
    with opened(model, disk_cache=tmp_path) as engine:
        assert said(engine, texts) == expected
        # Each had written its first text when it was killed.
        assert engine.prefix.stats.restored_pages >= 3 * KILLS
        assert engine.prefix.stats.damaged_pages == 0


@pytest.mark.parametrize("where", FULL)
def test_a_full_disk(model: PreTrainedModel, where: str, tmp_path: Path) -> None:
    with opened(model, prefix_cache=False) as engine:
        expected = said(engine, some())
    with opened(model, disk_cache=tmp_path) as engine:
        disk = engine._core.prefix.tiers.disk  # type: ignore[union-attr]
        with FULL[where](), capture_logs() as logs:
            for _ in range(3):
                assert said(engine, some()) == expected
                evict(engine)
                disk._pause_until = 0.0  # type: ignore[union-attr]
        assert logs, "nothing went wrong, so nothing is proven"
        assert not list(tmp_path.glob("*.part"))
        for _ in range(2):
            assert said(engine, some()) == expected, "there is room again"
            evict(engine)
        assert len(list(tmp_path.iterdir())) == engine.prefix.stats.disk_pages >= 12


def damaged(raw: bytes, how: str, rng: random.Random) -> bytes:
    at = rng.randrange(len(raw))
    if how == "cut":
        return raw[:at]
    return raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("how", ["flipped", "cut"])
@pytest.mark.parametrize("seed", range(3))
def test_damaged_files(model: PreTrainedModel, kind: str, how: str, seed: int, tmp_path: Path) -> None:
    """While the engine that wrote them runs, and before another begins with them."""
    rng = random.Random(seed)
    with opened(model, kv_format=kind, prefix_cache=False) as engine:
        expected = said(engine, some())
    for _ in range(2):
        with opened(model, kv_format=kind, disk_cache=tmp_path) as engine, capture_logs() as logs:
            for _ in range(2):
                assert said(engine, some()) == expected
                evict(engine)
                for file in rng.sample(sorted(tmp_path.iterdir()), 4):
                    file.write_bytes(damaged(file.read_bytes(), how, rng))
        assert any(line["event"] == "a page on disk is of no use" for line in logs)


def adapter(name: str) -> Adapter:
    """One that is larger than what a file may be where there is no room in it."""
    weights = LoraWeights({"layer": LoraLayer(torch.zeros(4, 256), torch.zeros(256, 4))})
    return Adapter(name, "revision", name, None, False, 4, None, weights.bytes, {TARGET: weights})


FULL_FOR_ADAPTERS = {
    "open": lambda: no_room_at(adapter_cache, "_write"),
    "write": no_room_in_a_file,
    "folder": lambda: no_room_at(adapter_cache, "TemporaryDirectory"),
}


def cache_of_one() -> AdapterCache:
    """Room for one adapter on the device and in host memory."""
    size = adapter("any").bytes
    options = AdapterOptions(device_bytes=size, host_bytes=size, disk_bytes=3 * size)
    return AdapterCache(options, torch.device("cpu"))


@pytest.mark.parametrize("where", FULL_FOR_ADAPTERS)
def test_an_adapter_that_a_full_disk_has_no_room_for_is_refused(where: str) -> None:
    """As often as it is tried; what was there before stays as it was, and nothing is left of it."""
    cache = cache_of_one()
    cache.add(adapter("first"))
    before = cache.stats
    with FULL_FOR_ADAPTERS[where]():
        for name in "abcde":
            with pytest.raises(AdapterRefused, match=f"^adapter '{name}': host memory is full, and files cannot be"):
                cache.add(adapter(name))
            assert cache.stats == before
    assert cache._folder is None or not list(Path(cache._folder.name).iterdir())
    cache.check(busy=False)
    for name in "abc":
        cache.add(adapter(name))
    assert (cache.stats.adapters, cache.stats.disk_bytes) == (4, 3 * before.host_bytes)


def test_an_adapter_is_fetched_though_a_full_disk_has_no_room_for_another() -> None:
    cache, first, second = cache_of_one(), adapter("first"), adapter("second")
    for each in (first, second):
        cache.add(each)
    assert second.file
    with no_room_in_a_file(), capture_logs() as logs:
        assert cache.presence(second) is Presence.COMING
        for thread in threading.enumerate():
            if thread.name == "specgen-adapter":
                thread.join(60)
        assert cache.presence(second) is Presence.THERE
    assert [(line["event"], line["adapter"]) for line in logs] == [
        ("idle adapters cannot be written to files", "second")
    ]
    assert (first.file, cache.stats.host_bytes) == (None, 2 * first.bytes), (
        "more than it should be, until there is room"
    )
    cache.add(adapter("third"))
    assert (cache.stats.host_bytes, cache.stats.disk_bytes) == (first.bytes, 2 * first.bytes)
