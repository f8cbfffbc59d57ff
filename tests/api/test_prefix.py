"""The prefix cache in the engine: what is computed, what is not, and that nobody can tell from the text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specgen.api.engine import Engine
from specgen.config import EngineConfig
from specgen.errors import InvalidRequest, RequestFailed
from specgen.kv.formats import FORMATS
from specgen.kv.offload import page_files as pagefile
from specgen.kv.offload.page_files import read_header
from specgen.kv.radix_tree import CacheKey
from specgen.sampling.params import SamplingParams
from tests.support.engines import evict, watched
from tests.support.tiny import build

PHRASE = [5, 17, 40, 8, 61, 33, 90, 12, 77, 29]
PROMPTS = [PHRASE * 4, [*PHRASE * 3, 4, 9, 50], [*PHRASE[::-1] * 3, 7]]
NEW = 12
PAGE_BYTES = 16 * 384
HOST = {"host_cache_bytes": 1 << 24}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def opened() -> Iterator[Callable[..., Engine]]:
    """Opens engines over one model, checks them after every step and closes them."""
    engines: list[Engine] = []
    models: dict[str, Any] = {}

    def open_engine(name: str = "llama", **options: Any) -> Engine:
        model = models.setdefault(name, build(name)) if isinstance(name, str) else name
        engine = watched(Engine(model, **{"kv_tokens": 1024, "drafters": ["prompt-lookup"], **options}))
        engines.append(engine)
        return engine

    yield open_engine
    for engine in engines:
        engine.check()
        engine.close()


def texts(engine: Engine) -> list[tuple[int, ...]]:
    """What greedy and seeded sampling say to all prompts at once."""
    found = []
    for sampling in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 7}):
        found += [result.ids for result in engine.generate(PROMPTS, max_tokens=NEW, **sampling)]
    return found


def test_ten_turns_of_a_chat_compute_every_token_once(opened: Callable[..., Engine]) -> None:
    engine = opened(speculation="off")
    ids: list[int] = []
    for turn in range(10):
        ids += [turn + 3, 4, turn * 2 + 20]
        ids += engine.generate(ids, max_tokens=5, temperature=0.0).ids
    # The last token is never read by the model.
    assert engine.target.rows == len(ids) - 1


def test_ten_turns_with_drafting_compute_what_was_committed_once(opened: Callable[..., Engine]) -> None:
    """The rows of accepted tokens stay; what was rejected comes on top."""
    engine = opened(speculation={"adaptive": False})
    before, phrase = engine.target.rows, [7, 8, 9, 10]
    ids: list[int] = []
    for turn in range(10):
        ids += [*phrase, turn + 3, *phrase[: turn % 2 + 1]]
        ids += engine.generate(ids, max_tokens=5, temperature=0.0).ids
    counters = engine.counters
    assert counters.accepted
    assert counters.drafted > counters.accepted
    assert engine.target.rows - before == len(ids) - 1 + counters.drafted - counters.accepted


@pytest.mark.parametrize("speculation", ["off", {"adaptive": False}])
def test_ten_turns_of_several_samples_compute_every_token_once(speculation: Any, opened: Callable[..., Engine]) -> None:
    """Whichever sample the chat goes on with. What is new is longer than a page: else each sample reads it at once."""
    model = build("llama")
    model.config.max_position_embeddings = 512
    engine = opened(model, speculation=speculation, kv_tokens=2048)
    counters, before, expected = engine.counters, engine.target.rows, 0
    ids: list[int] = []
    for turn in range(10):
        new = [turn + 3, *PHRASE, *PHRASE, turn * 2 + 20]
        samples = engine.generate(ids + new, n=3, max_tokens=5, temperature=1.0, seed=turn)
        # What no sample read before: the last token of the turn before and the new ones; two read the last one for
        # its logits; each of the three its own, but for the last.
        expected += len(new) + (turn > 0) + 2 + 3 * 4
        ids += [*new, *samples[turn % 3].ids]
    assert bool(counters.drafted) == (speculation != "off")
    assert engine.target.rows - before == expected + counters.drafted - counters.accepted


@pytest.mark.parametrize("length", [17, 20, 33, 64, 100])
def test_samples_share_the_prompt(length: int, opened: Callable[..., Engine]) -> None:
    engine = opened(speculation="off")
    prompt = [(n * n) % 90 + 3 for n in range(length)]
    results = engine.generate(prompt, n=4, max_tokens=3, temperature=1.0, seed=1)
    # The others read the last token for its logits; each of the four then reads two of its own.
    assert engine.target.rows == length + 3 + 4 * 2
    assert [result.usage.cached_tokens for result in results] == [0, *[length - 1] * 3]


def test_prompts_that_begin_alike_are_read_once_though_they_come_at_once(opened: Callable[..., Engine]) -> None:
    """In chunks, too."""
    engine = opened(max_prefill_tokens=16, speculation="off")
    long = [(n * n) % 90 + 3 for n in range(110)]
    engine.generate([long, [*long[:32], 7]], max_tokens=1)
    assert engine.target.rows == 110 + 1


def test_tenants_do_not_hit_each_other_and_the_same_one_does(opened: Callable[..., Engine]) -> None:
    engine = opened(**HOST)
    for salt, cached in (("a", 0), ("b", 0), ("", 0), ("a", 39), ("b", 39), ("", 39)):
        result = engine.generate(PROMPTS[0], max_tokens=2, temperature=0.0, cache_salt=salt)
        assert result.usage.cached_tokens == cached


@pytest.mark.parametrize("mine", ["a", "b", ""])
def test_tenants_do_not_hit_each_others_files(mine: str, opened: Callable[..., Engine], tmp_path: Path) -> None:
    first = opened(disk_cache=tmp_path)
    first.generate(PROMPTS[0], max_tokens=2, cache_salt=mine)
    evict(first)
    again = opened(disk_cache=tmp_path)
    for salt in ("a", "b", "", mine):
        result = again.generate(PROMPTS[0], max_tokens=1, temperature=0.0, cache_salt=salt)
        assert (result.usage.cached_tokens >= 32) == (salt == mine)


def test_adapters_and_their_revisions_do_not_hit_each_other(opened: Callable[..., Engine], tmp_path: Path) -> None:
    engine = opened(disk_cache=tmp_path)
    own = engine._core._key
    kinds = [{}, {"adapter": "a"}, {"adapter": "b"}, {"adapter": "a", "revision": "2"}]
    for cached, stored in ((0, False), (39, False), (32, True)):
        for kind in kinds:
            engine._core._key = replace(own, **kind)
            assert engine.generate(PROMPTS[0], max_tokens=1).usage.cached_tokens == cached, (kind, stored)
        if cached:
            evict(engine)


@pytest.mark.parametrize("step", [1, -1])
def test_models_and_formats_do_not_hit_each_others_files(
    step: int, opened: Callable[..., Engine], tmp_path: Path
) -> None:
    """Whoever comes first; each finds its own again."""
    changed = build("llama")
    with torch.no_grad():
        changed.model.layers[1].self_attn.k_proj.weight[0, 0] += 1e-3
    others: list[tuple[Any, str]] = [("llama", kind) for kind in FORMATS]
    others += [("mistral", "native"), (changed, "native")]
    for cached in (0, 32):
        for model, kind in others[::step]:
            engine = opened(model, kv_format=kind, disk_cache=tmp_path)
            assert engine.generate(PROMPTS[0], max_tokens=1).usage.cached_tokens == cached
            evict(engine)


def test_with_constants_for_hashes_no_text_changes(
    opened: Callable[..., Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = texts(opened(prefix_cache=False))
    monkeypatch.setattr(CacheKey, "__hash__", lambda self: 7)
    memory = opened(**HOST)
    monkeypatch.setattr(pagefile, "_digest", lambda text: "7" * 64)
    for engine in (memory, opened(disk_cache=tmp_path), opened(disk_cache=tmp_path)):
        for _ in range(3):
            assert texts(engine) == expected
            evict(engine)
    assert memory.prefix.stats.restored_pages >= 8


def test_a_pinned_prompt_outlives_others(opened: Callable[..., Engine]) -> None:
    engine = opened(kv_tokens=128)
    with engine.prefix.pin(PROMPTS[0]) as pinned:
        assert pinned.tokens == 32
        assert engine.prefix.stats.pinned_pages == 2
        for n in range(6):
            engine.generate([n + 3] * 50, max_tokens=2)
        assert engine.generate(PROMPTS[0], max_tokens=1).usage.cached_tokens >= 32
    assert pinned.tokens == 0
    for n in range(6):
        engine.generate([n + 3] * 50, max_tokens=2)
    assert engine.generate(PROMPTS[0], max_tokens=1).usage.cached_tokens == 0


def test_a_pin_whose_rest_cannot_be_computed_is_released(
    opened: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was cached of the prompt was pinned first."""
    engine = opened()
    engine.generate(PROMPTS[0][:20], max_tokens=1)

    def fail(step: Any) -> None:
        assert engine._core.prefix
        assert [pin.tokens for pin in engine._core.prefix.pins] == [16]
        raise RuntimeError("the model is broken")

    with monkeypatch.context() as patch:
        patch.setattr(engine.target, "forward", fail)
        with pytest.raises(RequestFailed, match="the model is broken"):
            engine.prefix.pin(PROMPTS[0])
    assert engine.prefix.stats.pinned_pages == 0
    with engine.prefix.pin(PROMPTS[0]) as pinned:
        assert pinned.tokens == 32


def test_pins_give_way_before_a_request_waits_for_ever(opened: Callable[..., Engine]) -> None:
    engine = opened(kv_tokens=112)
    pins = [engine.prefix.pin([n + 3] * 33) for n in range(3)]
    result = engine.generate([9] * 60, max_tokens=40, temperature=0.0)
    assert len(result.ids) == 40
    assert sum(pin.tokens for pin in pins) < 96


def test_saved_prefixes_are_loaded_by_the_same_model_only(opened: Callable[..., Engine], tmp_path: Path) -> None:
    first = opened()
    expected = texts(first)
    saved = first.prefix.save(tmp_path)
    assert saved == len(list(tmp_path.iterdir())) >= 7
    second = opened()
    assert second.prefix.load(tmp_path) == saved
    assert texts(second) == expected
    assert second.generate(PROMPTS[0], max_tokens=1).usage.cached_tokens >= 32

    changed = build("llama")
    with torch.no_grad():
        changed.model.layers[1].self_attn.k_proj.weight[0, 0] += 1e-3
    for other in (opened(changed), opened(kv_format="int8"), opened("mistral")):
        assert other.prefix.load(tmp_path) == 0
    assert first.prefix.save(tmp_path) == saved


def test_a_damaged_file_costs_its_page_and_those_behind_it(opened: Callable[..., Engine], tmp_path: Path) -> None:
    first = opened()
    expected = texts(first)
    first.prefix.save(tmp_path)
    (second_page,) = (file for file in tmp_path.iterdir() if read_header(file).ids == tuple(PROMPTS[0][16:32]))
    raw = bytearray(second_page.read_bytes())
    raw[-5] ^= 4
    second_page.write_bytes(raw)
    second = opened()
    assert 0 < second.prefix.load(tmp_path) < first.prefix.stats.pages
    assert texts(second) == expected
    assert all(file.exists() for file in tmp_path.iterdir()), "a folder that was saved is not tidied up"


def test_a_cleared_cache_is_cold(opened: Callable[..., Engine], tmp_path: Path) -> None:
    engine = opened(disk_cache=tmp_path)
    engine.generate(PROMPTS[0], max_tokens=2)
    evict(engine)
    assert list(tmp_path.iterdir())
    engine.prefix.clear()
    assert not list(tmp_path.iterdir())
    assert engine.generate(PROMPTS[0], max_tokens=2).usage.cached_tokens == 0


@pytest.mark.parametrize("options", [{}, HOST, {"kv_tokens": 96}])
def test_a_closed_engine_leaves_all_it_had_to_the_next(
    options: dict[str, Any], opened: Callable[..., Engine], tmp_path: Path
) -> None:
    """Pages that were never evicted too, which are those most in use; and no file that nothing leads to."""
    first = opened(disk_cache=tmp_path, **options)
    for prompt in PROMPTS:
        first.generate(prompt, max_tokens=2, temperature=0.0)
    first.close()
    again = opened(disk_cache=tmp_path)
    files = len(list(tmp_path.iterdir()))
    assert again.prefix.stats.disk_pages == files == 5
    for prompt in PROMPTS:
        usage = again.generate(prompt, max_tokens=1, temperature=0.0).usage
        assert usage.cached_tokens == (len(prompt) - 1) // 16 * 16


@pytest.mark.parametrize("pages", [1, 2, 3, 4])
def test_a_small_folder_gets_the_pages_used_last_and_those_before_them(
    pages: int, opened: Callable[..., Engine], tmp_path: Path
) -> None:
    size = pages * (16 * 384 + 4096)
    with opened(disk_cache=tmp_path, disk_cache_bytes=size) as first:
        for prompt in PROMPTS:
            first.generate(prompt, max_tokens=2, temperature=0.0)
        first.generate(PROMPTS[0], max_tokens=2, temperature=0.0)
    again = opened(disk_cache=tmp_path, disk_cache_bytes=size)
    assert again.prefix.stats.disk_pages == len(list(tmp_path.iterdir())) == pages
    usage = again.generate(PROMPTS[0], max_tokens=1, temperature=0.0).usage
    assert usage.cached_tokens == 16 * min(pages, 2)


def test_files_that_nothing_leads_to_go_first_and_when_the_cache_is_cleared(
    opened: Callable[..., Engine], tmp_path: Path
) -> None:
    with opened(disk_cache=tmp_path) as first:
        for prompt in PROMPTS:
            first.generate(prompt, max_tokens=2, temperature=0.0)
    headers = {file: read_header(file) for file in tmp_path.iterdir()}
    (root,) = (file for file, header in headers.items() if header.ids == tuple(PROMPTS[0][:16]))
    lost = {file for file, header in headers.items() if header.ids in {tuple(PROMPTS[n][16:32]) for n in (0, 1)}}
    root.unlink()
    again = opened(disk_cache=tmp_path)
    assert again.prefix.stats.disk_pages == len(headers) - 1 - len(lost)
    disk = again._core.prefix.tiers.disk  # type: ignore[union-attr]
    assert {f"{name}.kv.safetensors" for name in list(disk._sizes)[: len(lost)]} == {file.name for file in lost}  # type: ignore[union-attr]
    again.prefix.clear()
    assert not list(tmp_path.iterdir())


def test_the_cache_keeps_to_its_bytes(opened: Callable[..., Engine]) -> None:
    engine = opened(prefix_cache_bytes=3 * 16 * 384)
    texts(engine)
    stats = engine.prefix.stats
    assert stats.bytes_per_token == 384
    assert stats.pages == 3


def test_a_request_that_can_never_fit_fails_and_the_next_one_runs(opened: Callable[..., Engine]) -> None:
    engine = opened(kv_tokens=64)
    request, samples = engine._builder.build([3] * 60, SamplingParams(), copies=False)
    object.__setattr__(request, "ids", (3,) * 80)
    with pytest.raises(Exception, match="81 tokens do not fit a KV pool of 64"):
        engine._runner.submit((request, samples))[0].results()
    assert len(engine.generate([3] * 20, max_tokens=4).ids) == 4


def test_keys_hold_what_changes_kv(opened: Callable[..., Engine]) -> None:
    llama, int8, mistral = opened(), opened(kv_format="int8"), opened("mistral")
    request, _ = llama._builder.build(PHRASE, SamplingParams(), copies=False)
    keys = {engine._core.key(request) for engine in (llama, int8, mistral)}
    assert len(keys) == 3
    assert CacheKey() not in keys


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host_cache_bytes": -1}, "host_cache_bytes is -1; it must be a whole number, at least 0"),
        ({"host_cache_bytes": None}, "host_cache_bytes is None"),
        ({"disk_cache": 7}, "disk_cache is 7; it must be a folder"),
        ({"disk_cache_bytes": 0.5}, "disk_cache_bytes is 0.5"),
        ({"prefix_cache": False, "host_cache_bytes": 9}, "host_cache_bytes is 9, but prefix_cache is off"),
        ({"prefix_cache": False, "disk_cache": "/x"}, "disk_cache is '/x', but prefix_cache is off"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        EngineConfig.of(options)


@pytest.mark.parametrize(
    "options", [{"host_cache_bytes": PAGE_BYTES - 1}, {"disk_cache_bytes": 0}, {"disk_cache_bytes": PAGE_BYTES - 1}]
)
def test_a_tier_without_room_for_a_page_is_refused_at_load(
    options: dict[str, int], opened: Callable[..., Engine], tmp_path: Path
) -> None:
    [(name, value)] = options.items()
    message = f"{name} is {value}; one page of the KV pool takes {PAGE_BYTES}"
    with pytest.raises(InvalidRequest, match=message) as caught:
        opened(disk_cache=tmp_path, **options)
    assert caught.value.param == name
    opened(host_cache_bytes=PAGE_BYTES)


def test_a_folder_that_cannot_be_used_is_refused_at_load(opened: Callable[..., Engine], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match=r"disk_cache .*file/below.* cannot be used: .*; choose a folder"):
        opened(disk_cache=tmp_path / "file" / "below")


def test_without_a_cache_there_is_nothing_to_pin(opened: Callable[..., Engine], tmp_path: Path) -> None:
    engine = opened(prefix_cache=False)
    for call in (lambda: engine.prefix.pin([3]), lambda: engine.prefix.stats, lambda: engine.prefix.save(tmp_path)):
        with pytest.raises(InvalidRequest, match="this engine has no prefix cache; build it with prefix_cache=True"):
            call()
    with pytest.raises(InvalidRequest, match="there is no folder"):
        opened().prefix.load(tmp_path / "nowhere")
