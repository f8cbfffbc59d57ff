"""The whole engine with the GPU kernels says what it says in plain torch; on a CPU Triton's interpreter runs them."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import specgen.sampling.batch_sampler
from specgen import Engine, SamplingParams
from specgen.errors import InvalidRequest, UnsupportedModel
from specgen.kernels import backends
from specgen.kernels import triton_backend as gpu_kernels
from specgen.kv.formats import FORMATS
from specgen.model.forward.eager import EagerForward
from specgen.model.runner import ModelRunner, load_runner
from specgen.types import Speculation
from tests.support.adapters import save_adapter
from tests.support.engines import watched
from tests.support.tape import Tapes, at
from tests.support.tiny import VOCABULARY, build

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GREEDY: dict[str, Any] = {"temperature": 0}
SEEDED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "seed": 7}
# Nodes at full depth in every step, so that branches and rejected rows are many.
ON = Speculation(adaptive=False)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        gpu_kernels.why_not(DEVICE, torch.float32) is not None, reason="neither a GPU nor Triton's interpreter"
    ),
]


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What rows cost in the interpreter is of no interest, and takes long to find out."""
    monkeypatch.setattr("specgen.engine.step_costs._MEASURED_ROWS", (1,))


@pytest.fixture
def imitated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter passes for a GPU, so that all kernels are used that a GPU would use."""
    monkeypatch.setattr(backends, "available", lambda *asked: backends.why_not(*asked) is None)


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> Tapes:
    """Forwards are captured, whatever the device, in few sizes, so that short texts come back to them."""
    tapes = Tapes()
    monkeypatch.setattr("specgen.model.forward.graphs.SIZES", (4, 16, 64))
    monkeypatch.setattr("specgen.model.forward.graphs.capture_on", lambda device: tapes)
    return tapes


def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts launches by the kernel's name from now on."""
    import triton

    counts: Counter[str] = Counter()
    kind = type(importlib.import_module("specgen.kernels.triton.tree_attention")._attend)
    run = kind.run

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts[(self.fn if triton.knobs.runtime.interpret else self).__name__] += 1
        return run(self, *args, **kwargs)

    monkeypatch.setattr(kind, "run", counting)
    return counts


def prompts(count: int) -> list[list[int]]:
    """Each repeats itself, so that lookup drafts."""
    generator = torch.Generator().manual_seed(0)
    some = torch.randint(3, VOCABULARY, (count, 9), generator=generator).tolist()
    return [ids + ids[:6] for ids in some]


def engine(family: str, kind: str, *, gpu: bool) -> Engine:
    model = build(family).to(DEVICE)
    options = {"kv_tokens": 512, "drafters": ["prompt-lookup"], "kv_format": kind}
    return watched(Engine(model, **options, gpu_kernels=gpu, cpu_kernels=False))


def texts(engine: Engine, count: int, tokens: int, **way: Any) -> list[tuple[int, ...]]:
    """All prompts at once."""
    results = engine.generate(prompts(count), max_tokens=tokens, ignore_eos=True, **way)
    return [tuple(result.ids) for result in results]


def check(family: str, kind: str, *, count: int = 3, tokens: int = 10) -> ModelRunner:
    """Plain torch, one after another and without drafts, is the truth for the kernels, drafted and in a batch. Returns
    the target that ran through them."""
    with engine(family, kind, gpu=False) as plain:
        truth = {}
        for name, way in (("greedy", GREEDY), ("seeded", SEEDED)):
            alone = (
                plain.generate(ids, max_tokens=tokens, ignore_eos=True, speculation="off", **way)
                for ids in prompts(count)
            )
            truth[name] = [tuple(result.ids) for result in alone]
    with engine(family, kind, gpu=True) as fast:
        assert fast.target.packed.backend.name == "triton"
        assert texts(fast, count, tokens, speculation=ON, **GREEDY) == truth["greedy"]
        assert fast.counters.drafted, "nothing was drafted, so nothing is proven"
        assert texts(fast, count, tokens, speculation=ON, **SEEDED) == truth["seeded"]
        return fast.target


def check_replayed(tapes: Tapes, target: ModelRunner) -> None:
    """Steps were replayed, and graphs look at nothing but the weights, the pool and the buffer."""
    graphs = target._graphs
    assert graphs is not None
    assert graphs._buffer is not None
    centres = [
        store.kernel_planes.centre
        for store in target.pool.layers
        if store.kernel_planes and store.kernel_planes.centre is not None
    ]
    lasting = [*target.model.parameters(), *target.model.buffers(), *target.pool.stacks, *centres, graphs._buffer]
    assert tapes.replays > len(tapes.kept) > 0
    for tape in tapes.kept:
        assert tape.launches
        assert not tape.outside.keys() - {at(tensor) for tensor in lasting}


@pytest.mark.usefixtures("imitated")
def test_the_kernels_say_what_plain_torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = launched(monkeypatch)
    check("llama", "native", count=2, tokens=5)
    assert set(counts) >= {"_attend", "_draw", "_write", "_move", "_take_parts", "_take_all"}


@pytest.mark.usefixtures("imitated")
def test_a_step_launches_and_copies_no_more_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """See `GraphForward`: the bounds of a step of greedy decoding, whatever the number of sequences."""
    copies = copied(monkeypatch)
    with engine("llama", "native", gpu=True) as fast:
        core, layers = fast._core, len(fast.target.architecture.shapes)
        begin_three(fast)
        core.step()
        counts = launched(monkeypatch)
        copies.clear()
        outputs = core.step()
    assert len(outputs) == 3
    assert copies == {"to_device": 1, "on_host": 1}
    assert counts == {"_attend": layers, "_write": layers, "_take_parts": 1, "_take_all": 1}


@pytest.mark.usefixtures("imitated")
def test_a_captured_step_is_one_copy_one_replay_and_one_copy_back(
    taped: Tapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """See `GraphForward`. A size of one row was met, captured and replayed while the engine measured what rows cost."""
    copies = copied(monkeypatch)
    with engine("llama", "native", gpu=True) as fast:
        begin_three(fast)
        (tape,) = taped.kept
        before = tape.replays
        fast._core.step()
        assert tape.replays == before, "the prompts are of another size"
        counts = launched(monkeypatch)
        copies.clear()
        outputs = fast._core.step()
    assert len(outputs) == 3
    assert taped.kept == [tape]
    assert tape.replays == before + 1
    assert copies == {"to_device": 1, "on_host": 1}
    assert counts == {"_take_parts": 1, "_take_all": 1}


def copied(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts copies to the device and back from now on."""
    from specgen.model.attention import triton_backend as gpu

    copies: Counter[str] = Counter()
    for module, name in ((gpu, "to_device"), (specgen.sampling.batch_sampler, "on_host")):
        there = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, name=name, there=there: copies.update([name]) or there(*args))
    return copies


def begin_three(fast: Engine) -> None:
    """Three greedy requests that nobody drafts for."""
    for prompt in prompts(3):
        params = SamplingParams.of({"max_tokens": 6, "temperature": 0, "speculation": "off", "ignore_eos": True})
        fast._core.add(*fast._builder.build(prompt, params, copies=False))


@pytest.mark.usefixtures("imitated")
def test_replays_say_what_plain_torch_says(taped: Tapes) -> None:
    """Drafted, in a batch, greedy and seeded."""
    check_replayed(taped, check("llama", "native", count=2, tokens=6))


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_every_kv_format(kind: str) -> None:
    check("llama", kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_every_kv_format_replayed(kind: str, taped: Tapes) -> None:
    check_replayed(taped, check("llama", kind, count=2, tokens=6))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "gemma2", "qwen3"])
def test_every_way_to_attend_replayed(family: str, taped: Tapes) -> None:
    check_replayed(taped, check(family, "native", count=2, tokens=6))


@pytest.mark.slow
def test_a_model_whose_own_code_waits_for_the_device_is_not_captured(taped: Tapes) -> None:
    """Gemma 3n asks a tensor whether it is zero: its forwards go on without graphs, and the reason is kept."""
    target = check("gemma3n_text", "native", count=2, tokens=6)
    assert not taped.kept
    assert "is_nonzero" in str(target.no_graphs)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss", "qwen3", "gemma3n_text", "llama4_text"])
def test_every_way_to_attend(family: str) -> None:
    """Windows, soft caps, sinks, normalised heads, layers that share KV, chunks."""
    check(family, "native")


@pytest.mark.slow
@pytest.mark.usefixtures("imitated", "taped")
def test_rows_of_several_adapters_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those steps are not captured, those of base rows alone are."""
    model = build("llama")
    folders = [save_adapter(model, tmp_path / name, seed=n, r=2 + 3 * n) for n, name in enumerate(("a", "b"))]
    said: dict[bool, list[tuple[int, ...]]] = {}
    counts = launched(monkeypatch)
    for gpu in (False, True):
        with engine("llama", "native", gpu=gpu) as one:
            for folder in folders:
                one.adapters.load(folder.name, folder)
            options = {"max_tokens": 6, "temperature": 0, "ignore_eos": True, "speculation": ON}
            wanted = [SamplingParams.of({**options, "adapter": adapter}) for adapter in ("a", None, "b", "a")]
            built = [one._builder.build(prompts(1)[0], params, copies=False) for params in wanted]
            said[gpu] = [stream.results()[0].ids for stream in one._runner.submit(*built)]
    assert len(set(said[False])) == 3, "each says something else, or nothing here is tested"
    assert said[True] == said[False]
    assert counts["_shrink"] == counts["_expand"] > 0


def test_they_are_used_unasked_on_a_gpu_alone() -> None:
    with Engine(build("llama").to(DEVICE), kv_tokens=64) as unasked:
        assert (unasked.target.packed.backend.name == "triton") == (DEVICE.type == "cuda")


def test_what_they_cannot_do_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match=r"gpu_kernels=True cannot be kept: its (packed )?forward "):
        Engine(build("deepseek_v3").to(DEVICE), kv_tokens=64, gpu_kernels=True)
    with pytest.raises(UnsupportedModel, match=r"data type is torch.float64; choices: torch.bfloat16"):
        Engine(build("llama").to(DEVICE, torch.float64), kv_tokens=64, gpu_kernels=True)
    with pytest.raises(InvalidRequest, match="gpu_kernels is 'yes'; choices: True, False, None"):
        Engine(build("llama"), gpu_kernels="yes")
    with pytest.raises(InvalidRequest, match="gpu_graphs is None; choices: True, False"):
        Engine(build("llama"), gpu_graphs=None)


@pytest.mark.parametrize(
    ("family", "options", "why"),
    [
        ("llama", {"graphs": False}, "gpu_graphs is False"),
        ("llama", {"gpu_kernels": False}, "attention is computed by 'torch', it must be 'triton'"),
        ("gpt_oss", {}, "model.layers.0.mlp asks the device which experts have rows"),
    ],
)
def test_forwards_that_are_not_captured_are_so_by_name(
    family: str, options: dict[str, Any], why: str, taped: Tapes
) -> None:
    target = load_runner(
        build(family).to(DEVICE), kv_tokens=64, **{"gpu_kernels": True, "cpu_kernels": False, **options}
    )
    assert target.no_graphs == why
    assert isinstance(target.current, EagerForward)
