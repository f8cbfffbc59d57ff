"""Adapters come and go: what is refused changes nothing, what runs keeps its revision, nothing is held in the end."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from specgen import Engine, InvalidRequest, RequestFailed, SamplingParams, UnknownName
from specgen.errors import AdapterRefused
from specgen.lora import cache as adapter_cache
from specgen.lora.adapter import Adapter, AdapterOptions, LoraLayer, LoraWeights
from specgen.lora.cache import DRAFT, TARGET, AdapterCache, Presence
from tests.support.adapters import by_peft, save_adapter
from tests.support.broken_adapters import CONFIG, WEIGHTS, change_config, change_weights, cut, pickled
from tests.support.engines import watched
from tests.support.tiny import build

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = [5, 9, 33, 41, 7]
TOKENS = 8


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return build("llama")


@pytest.fixture(scope="module")
def root(llama: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters 0 to 7 of one size."""
    folder = tmp_path_factory.mktemp("root")
    for seed in range(8):
        save_adapter(llama, folder / str(seed), seed=seed)
    return folder


@pytest.fixture(scope="module")
def truth(llama: PreTrainedModel, root: Path) -> dict[str, tuple[int, ...]]:
    return {str(n): by_peft(llama, root / str(n), PROMPT, TOKENS) for n in range(8)}


@pytest.fixture
def opened(llama: PreTrainedModel) -> Iterator[Callable[..., Engine]]:
    engines = []

    def open_engine(**options: Any) -> Engine:
        engines.append(watched(Engine(llama, **{"kv_tokens": 2048, **options})))
        return engines[-1]

    yield open_engine
    for engine in engines:
        engine.check()
        engine.close()


# ---- what is refused


def first(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return next(iter(tensors.values()))


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a pickle": (pickled, "adapter_model.bin is a pickle"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"there is no {WEIGHTS}"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), f"there is no {CONFIG}"),
    "no JSON": (lambda folder: (folder / CONFIG).write_text("{"), "is no JSON"),
    "a list": (lambda folder: (folder / CONFIG).write_text("[]"), "holds list, not an object"),
    "a huge config": (lambda folder: (folder / CONFIG).write_text(" " * (2 << 20)), "the limit is 1048576"),
    "cut short": (cut, "cut short or damaged"),
    "no tensors": (change_weights(lambda tensors: tensors.clear()), "holds no tensors"),
    "NaN": (change_weights(lambda tensors: first(tensors).view(-1)[3].fill_(torch.nan)), "NaN or infinity"),
    "infinity": (change_weights(lambda tensors: first(tensors).view(-1)[3].fill_(torch.inf)), "NaN or infinity"),
    "whole numbers": (
        change_weights(lambda tensors: tensors.update({next(iter(tensors)): first(tensors).int()})),
        "it must be a float",
    ),
    "a tensor missing": (change_weights(lambda tensors: tensors.pop(next(iter(tensors)))), "which .* promises"),
    "a tensor too many": (
        change_weights(lambda tensors: tensors.update({"base_model.model.lm_tail.lora_A.weight": torch.ones(2, 2)})),
        "lm_tail.* belongs to no module",
    ),
    "another kind": (change_config(peft_type="IA3"), "peft_type is 'IA3'"),
    "unknown modules": (change_config(target_modules=["qkv_proj"]), "modules that this model does not have"),
    "another rank": (change_config(r=5), "another base"),
    "auto_map": (change_config(auto_map={"AutoModel": "evil.Model"}), "auto_map.* would run code"),
    "a package": (change_config(megatron_config={"a": 1}), "megatron_config.* imports a package"),
    "whole modules": (change_config(modules_to_save=["lm_head"]), "modules_to_save"),
    "experts": (change_config(target_parameters=["experts.w1"]), "target_parameters"),
    "tokens": (change_config(trainable_token_indices=[1]), "trainable_token_indices"),
    "more layers": (change_config(layer_replication=[[0, 2], [1, 3]]), "layer_replication"),
    "aLoRA": (change_config(alora_invocation_tokens=[1]), "alora_invocation_tokens"),
    "of the future": (change_config(use_hyperlora=True), "use_hyperlora=True is not supported"),
    "biases": (change_config(bias="all"), "bias='all'"),
    "a changed base": (change_config(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "a slow pattern": (change_config(target_modules="(a+)+b"), "may take for ever"),
    "too many stars": (change_config(rank_pattern={".*" * 9: 4}), "may take for ever"),
    "infinite scale": (change_config(lora_alpha=1e400), "Infinity|inf"),
    "embeddings": (change_config(target_modules=["embed_tokens"]), "embed_tokens|promises|another base"),
}


@pytest.fixture(scope="module")
def busy(llama: PreTrainedModel, root: Path) -> Iterator[Engine]:
    """An engine with one adapter, which stays as it is whatever is refused."""
    with watched(Engine(llama, kv_tokens=2048)) as engine:
        engine.adapters.load("good", root / "0")
        yield engine


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_adapter_is_refused_and_nothing_changes(
    busy: Engine, root: Path, truth: dict[str, Any], tmp_path: Path, fault: str
) -> None:
    break_it, message = FAULTS[fault]
    folder = Path(shutil.copytree(root / "1", tmp_path / "broken"))
    break_it(folder)
    before = busy.adapters.list(), busy.adapters.stats
    with pytest.raises(AdapterRefused, match=message):
        busy.adapters.load("bad", folder)
    with pytest.raises(AdapterRefused, match=message):
        busy.adapters.reload("good", folder)
    assert (busy.adapters.list(), busy.adapters.stats) == before
    assert busy.generate(PROMPT, adapter="good", max_tokens=TOKENS).ids == truth["0"]
    assert not (folder / "trace").exists()
    # The name is free, so that the right files may come.
    busy.adapters.load("bad", root / "1")
    busy.adapters.unload("bad")


def test_another_base_is_refused(opened: Callable[..., Engine], tmp_path: Path) -> None:
    engine = opened()
    for family, message in (("gpt2", "modules that this model does not have"), ("phi3", "another base")):
        with pytest.raises(AdapterRefused, match=message):
            engine.adapters.load("it", save_adapter(build(family), tmp_path / family))
    assert engine.adapters.list() == []


def test_a_base_of_another_name_is_taken_only_when_that_is_asked_for(tmp_path: Path) -> None:
    one, other = build("llama"), build("llama", seed=1)
    one.name_or_path, other.name_or_path = "maker/small", "maker/small-chat"
    folder = save_adapter(one, tmp_path / "adapter")
    with Engine(other, kv_tokens=512) as engine:
        with pytest.raises(AdapterRefused, match=r"made for 'maker/small', and this is 'maker/small-chat'.*any_base"):
            engine.adapters.load("it", folder)
        assert engine.adapters.load("it", folder, any_base=True).base == "maker/small"
        engine.adapters.reload("it")
    other.name_or_path = "/somewhere/else/Small"
    with Engine(other, kv_tokens=512) as engine:
        engine.adapters.load("it", folder)


@pytest.mark.parametrize(
    ("family", "module", "message"),
    [
        ("deepseek_v3", "kv_b_proj", "does not see the rows of a step"),
        ("qwen2_moe", "shared_expert_gate", "does not see the rows of a step"),
        ("qwen3_moe", "gate", "target_parameters"),
        ("llama", "embed_tokens", r"embed_tokens \(Embedding\), and only linear layers"),
    ],
)
def test_modules_that_see_other_rows_are_refused(tmp_path: Path, family: str, module: str, message: str) -> None:
    model = build(family)
    folder = save_adapter(model, tmp_path / family, target_modules=[module])
    with Engine(model, kv_tokens=512) as engine, pytest.raises(AdapterRefused, match=message):
        engine.adapters.load("it", folder)


def test_ranks_and_bytes_have_limits(opened: Callable[..., Engine], root: Path) -> None:
    size = opened().adapters.load("it", root / "0").bytes
    with pytest.raises(AdapterRefused, match=r"its rank is 4; the limit is 3"):
        opened(adapters={"max_rank": 3}).adapters.load("it", root / "0")
    with pytest.raises(AdapterRefused, match=r"the limit is 100"):
        opened(adapters={"device_bytes": 100}).adapters.load("it", root / "0")
    engine = opened(adapters={"host_bytes": 2 * size, "disk_bytes": size // 2})
    for name in ("a", "b"):
        engine.adapters.load(name, root / "0")
    with pytest.raises(AdapterRefused, match="unload others"):
        engine.adapters.load("c", root / "1")
    assert engine.adapters.unload("a")
    engine.adapters.load("c", root / "1")


def test_paths_stay_inside_the_root(opened: Callable[..., Engine], root: Path, tmp_path: Path) -> None:
    fence = tmp_path / "fence"
    (fence / "deep").mkdir(parents=True)
    shutil.copytree(root / "0", fence / "deep" / "inside")
    (fence / "away").symlink_to(root / "0")
    (fence / "half").mkdir()
    for name in (CONFIG, WEIGHTS):
        (fence / "half" / name).symlink_to(root / "0" / name)
    (fence / "near").symlink_to(fence / "deep")
    engine = opened(adapters={"root": fence})
    for path in (
        root / "0",
        str(fence / "deep" / "inside"),
        "../fence/deep/inside",
        "deep/../../x",
        "away",
        "half",
        "a\0b",
    ):
        with pytest.raises(AdapterRefused, match="leads out|is a link"):
            engine.adapters.load("it", path)
    with pytest.raises(AdapterRefused, match="is no folder"):
        engine.adapters.load("it", "nothing")
    engine.adapters.load("it", "deep/inside")
    engine.adapters.load("linked", "near/inside")
    engine.adapters.reload("it")


@pytest.mark.parametrize("name", ["", "a b", "../x", "x" * 65, "-x", 7, None])
def test_names_are_plain(busy: Engine, root: Path, name: Any) -> None:
    with pytest.raises(AdapterRefused, match="is not allowed"):
        busy.adapters.load(name, root / "0")


def test_a_name_is_given_once(busy: Engine, root: Path) -> None:
    with pytest.raises(AdapterRefused, match="'good' is in use"):
        busy.adapters.load("good", root / "1")
    with pytest.raises(UnknownName, match="unknown adapter 'bad'; choices: good"):
        busy.adapters.unload("bad")
    with pytest.raises(UnknownName, match="unknown adapter 'bad'; choices: good"):
        busy.adapters.reload("bad")
    with pytest.raises(UnknownName, match="unknown adapter 'bad'; choices: good"):
        busy.generate(PROMPT, adapter="bad")
    with pytest.raises(InvalidRequest, match="adapter is 7"):
        busy.generate(PROMPT, adapter=7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": 7}, "adapters.root is 7"),
        ({"max_rank": -1}, "adapters.max_rank is -1"),
        ({"device_bytes": "much"}, "adapters.device_bytes is 'much'"),
        ({"speed": 1}, "fields: root, max_rank"),
        ("all", "it must be a mapping"),
    ],
)
def test_options_are_checked(llama: PreTrainedModel, options: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Engine(llama, adapters=options)


# ---- where weights are


def test_few_bytes_on_the_device_serve_many_adapters(
    opened: Callable[..., Engine], root: Path, truth: dict[str, Any]
) -> None:
    size = opened().adapters.load("it", root / "0").bytes
    engine = opened(adapters={"device_bytes": 2 * size, "host_bytes": 3 * size})
    for n in range(8):
        engine.adapters.load(str(n), root / str(n))
    shutil.rmtree(root / "copy", ignore_errors=True)
    report = engine.adapters.stats
    assert (report.device_bytes, report.host_bytes, report.disk_bytes) == (2 * size, 3 * size, 5 * size)
    assert [info.place for info in engine.adapters.list()].count("disk") == 5
    for _ in range(2):
        streams = [engine.stream(PROMPT, adapter=str(n), max_tokens=TOKENS) for n in range(8)]
        assert [stream.results()[0].ids for stream in streams] == [truth[str(n)] for n in range(8)]
    report = engine.adapters.stats
    assert report.evicted >= 12
    assert report.fetched >= 5
    assert report.device_bytes <= 2 * size
    for n in range(8):
        engine.adapters.unload(str(n))
    assert engine.adapters.stats.adapters == 0
    assert not list(Path(engine._core.adapters._folder.name).iterdir())  # type: ignore[union-attr]


def test_pinned_adapters_stay_on_the_device(opened: Callable[..., Engine], root: Path) -> None:
    size = opened().adapters.load("it", root / "0").bytes
    engine = opened(adapters={"device_bytes": 2 * size})
    engine.adapters.load("pinned", root / "0", pinned=True)
    for n in range(1, 4):
        engine.adapters.load(str(n), root / str(n))
        engine.generate(PROMPT, adapter=str(n), max_tokens=2)
    assert [info.place for info in engine.adapters.list()] == ["device", "host", "host", "device"]
    with pytest.raises(AdapterRefused, match="must stay free for others"):
        engine.adapters.load("too", root / "4", pinned=True)
    assert engine.adapters.reload("pinned", root / "5").pinned
    engine.adapters.unload("pinned")
    engine.adapters.load("too", root / "4", pinned=True)


def test_a_lost_file_fails_its_requests_and_no_others(
    opened: Callable[..., Engine], root: Path, truth: dict[str, Any]
) -> None:
    size = opened().adapters.load("it", root / "0").bytes
    engine = opened(adapters={"device_bytes": size, "host_bytes": 0})
    engine.adapters.load("kept", root / "0")
    engine.adapters.load("lost", root / "1")
    for file in Path(engine._core.adapters._folder.name).iterdir():  # type: ignore[union-attr]
        file.write_bytes(b"nothing")
    with pytest.raises(RequestFailed):
        engine.generate(PROMPT, adapter="lost", max_tokens=TOKENS)
    assert engine.generate(PROMPT, max_tokens=TOKENS).ids
    assert engine.generate(PROMPT, adapter="kept", max_tokens=TOKENS).ids == truth["0"]
    engine.adapters.reload("lost", root / "1")
    assert engine.generate(PROMPT, adapter="lost", max_tokens=TOKENS).ids == truth["1"]


def test_a_file_that_cannot_be_read_once_is_tried_again(
    opened: Callable[..., Engine], root: Path, truth: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = opened().adapters.load("it", root / "0").bytes
    engine = opened(adapters={"device_bytes": size, "host_bytes": 0})
    engine.adapters.load("kept", root / "0")
    engine.adapters.load("other", root / "1")

    def fails(file: Path) -> Any:
        raise OSError("once")

    with monkeypatch.context() as broken:
        broken.setattr(adapter_cache, "_read", fails)
        for _ in range(2):
            with pytest.raises(RequestFailed, match="once"):
                engine.generate(PROMPT, adapter="other", max_tokens=TOKENS)
    assert engine.generate(PROMPT, adapter="other", max_tokens=TOKENS).ids == truth["1"]


def weights(size: int) -> LoraWeights:
    return LoraWeights({"a": LoraLayer(torch.ones(1, size), torch.ones(1, 1), gain=torch.ones(1))})


def adapter(name: str, **options: Any) -> Adapter:
    parts = {TARGET: weights(30), DRAFT: weights(66)}
    return Adapter(name, name, name, name, False, 1, None, sum(p.bytes for p in parts.values()), parts, **options)


def test_the_oldest_idle_one_goes_and_none_that_runs() -> None:
    a, b, c = (adapter(name) for name in "abc")
    cache = AdapterCache(AdapterOptions(device_bytes=2 * a.bytes), torch.device("cpu"))
    for each in (a, b, c):
        cache.add(each)
    assert [each.weights is not None for each in (a, b, c)] == [True, True, False]
    cache.use(a)
    assert cache.presence(a) is Presence.THERE
    cache.hold(a)
    assert cache.presence(c) is Presence.THERE
    assert [each.weights is not None for each in (a, b, c)] == [True, False, True]
    cache.use(c)
    cache.hold(c)
    assert cache.presence(b) is Presence.FULL
    cache.release(c)
    assert cache.presence(b) is Presence.THERE
    assert c.weights is c.draft_weights is None
    with pytest.raises(RuntimeError, match="sequences that are gone"):
        cache.check(busy=False)


def test_one_that_is_just_arriving_keeps_its_place() -> None:
    """Its weights may be there before it is told that it has come: its room is taken all the while."""
    a, b = adapter("a"), adapter("b")
    cache = AdapterCache(AdapterOptions(device_bytes=a.bytes), torch.device("cpu"))
    for each in (a, b):
        cache.add(each)
    a.coming = True
    assert cache.presence(b) is Presence.FULL
    cache.check(busy=False)
    a.coming = False
    assert cache.presence(b) is Presence.THERE
    cache.check(busy=False)


def test_what_comes_back_from_a_file_is_what_went() -> None:
    a, b = adapter("a"), adapter("b")
    before = a.parts
    cache = AdapterCache(AdapterOptions(device_bytes=a.bytes, host_bytes=0), torch.device("cpu"))
    cache.add(b)
    cache.add(a)
    assert a.parts is None
    assert a.file
    cache.use(a)
    assert cache.presence(a) is Presence.COMING
    cache.wait(60)
    assert cache.presence(a) is Presence.THERE
    for whose, found in ((TARGET, a.weights), (DRAFT, a.draft_weights)):
        assert found
        assert before
        expected = before[whose].layers["a"].tensors
        assert found.layers["a"].tensors.keys() == expected.keys()
        assert all(torch.equal(t, expected[k]) for k, t in found.layers["a"].tensors.items())
    # It ends when its last user has gone, who came after it was unloaded too.
    cache.retire(a)
    assert cache.stats.adapters == 2
    cache.leave(a)
    cache.use(a)
    assert cache.stats.adapters == 2
    cache.leave(a)
    assert cache.stats.adapters == 1


# ---- while requests run


def test_a_request_keeps_its_revision_and_unload_waits_for_it(
    opened: Callable[..., Engine], llama: PreTrainedModel, root: Path
) -> None:
    engine = opened()
    engine.adapters.load("it", root / "0")
    options = {"adapter": "it", "max_tokens": 90, "speculation": "off"}
    old = engine.stream(PROMPT, **options)
    assert next(old).tokens
    engine.adapters.reload("it", root / "1")
    # From here on the engine's thread waits before each step, so that both requests are there.
    gate, step = threading.Event(), engine._core.step
    core: Any = engine._core
    core.step = lambda: step() if gate.wait(60) else []
    new = engine.stream(PROMPT, **options)
    unloaded: list[bool] = []
    thread = threading.Thread(target=lambda: unloaded.append(engine.adapters.unload("it")))
    thread.start()
    while engine.adapters.list():
        pass
    with pytest.raises(UnknownName):
        engine.generate(PROMPT, **options)
    assert not unloaded
    gate.set()
    assert old.results()[0].ids == by_peft(llama, root / "0", PROMPT, 90)
    assert new.results()[0].ids == by_peft(llama, root / "1", PROMPT, 90)
    thread.join(60)
    assert unloaded == [True]
    assert engine.adapters.stats.adapters == 0


def test_two_hundred_requests_while_adapters_come_and_go(
    opened: Callable[..., Engine], root: Path, truth: dict[str, Any]
) -> None:
    size = opened().adapters.load("it", root / "0").bytes
    engine = opened(adapters={"device_bytes": 4 * size, "host_bytes": 5 * size}, max_num_seqs=8, kv_tokens=4096)
    names = [f"n{i}" for i in range(6)]
    means = {}
    for i, name in enumerate(names):
        means[engine.adapters.load(name, root / str(i)).revision] = str(i)
    base = engine.generate(PROMPT, max_tokens=TOKENS).ids
    # A stream that runs all along, and the steps in which it gained nothing.
    witness = engine.stream(PROMPT, max_tokens=120, speculation="off")
    skipped: list[int] = []
    core, step = engine._core, engine._core.step

    def counted() -> Any:
        running = any(s.request.id == witness.request_id for s in core.scheduler.running)
        outputs = step()
        if running and not any(output.request_id == witness.request_id for output in outputs):
            skipped.append(core.counters.steps)
        return outputs

    core.step = counted  # type: ignore[method-assign]
    done = threading.Event()
    errors: list[BaseException] = []

    def churn() -> None:
        draws = random.Random(1)
        try:
            while not done.is_set():
                name, number = draws.choice(names), str(draws.randrange(8))
                if draws.random() < 0.7:
                    info = engine.adapters.reload(name, root / number)
                else:
                    engine.adapters.unload(name, timeout=0)
                    info = engine.adapters.load(name, root / number)
                means[info.revision] = number
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=churn)
    thread.start()
    draws = random.Random(2)
    asked = []
    while len(asked) < 200:
        name = draws.choice([None, *names])
        mode = draws.choice(["auto", "off", {"adaptive": False, "max_nodes": 6}])
        try:
            params = SamplingParams.of({"adapter": name, "max_tokens": TOKENS, "speculation": mode})
            built = engine._builder.build(PROMPT, params, copies=False)
        except UnknownName:  # between an unload and the load
            continue
        (stream,) = engine._runner.submit(built)
        asked.append((built[0].adapter.revision if built[0].adapter else None, stream))
        if draws.random() < 0.05:
            stream.cancel()
        if len(asked) % 16 == 0:
            _finish(stream)
    results = [(revision, _finish(stream)) for revision, stream in asked]
    done.set()
    thread.join(60)
    assert not errors
    for revision, result in results:
        expected = base if revision is None else truth[means[revision]]
        assert result is None or result == expected
    assert sum(result is not None for _, result in results) > 150
    assert len(witness.results()[0].ids) == 120
    assert skipped == []
    for name in names:
        engine.adapters.unload(name)
    engine.check()
    assert engine.adapters.stats == engine.adapters.stats.__class__(0, 0, 0, 0, *_moves(engine))
    engine.prefix.clear()
    assert engine.prefix.stats.used_pages == 0


def _finish(stream: Any) -> tuple[int, ...] | None:
    """What a stream said; None if it was cancelled."""
    result = stream.results()[0]
    return None if result.finish_reason == "cancelled" else tuple(result.ids)


def _moves(engine: Engine) -> tuple[int, int]:
    return engine.adapters.stats.fetched, engine.adapters.stats.evicted


def test_nothing_refers_to_an_adapter_that_is_gone(opened: Callable[..., Engine], root: Path) -> None:
    import gc
    import weakref

    engine = opened()
    engine.adapters.load("it", root / "0")
    engine.generate(PROMPT, adapter="it", max_tokens=TOKENS)
    kept = weakref.ref(engine.adapters.named("it"))
    engine.adapters.unload("it")
    gc.collect()
    assert kept() is None


def test_peft_reads_the_config(root: Path) -> None:
    assert LoraConfig.from_pretrained(root / "0").r == 4
