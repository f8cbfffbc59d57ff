"""Speculation and batching change nothing on top of any KV format, in any dtype whose rows are invariant."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from specgen import Engine
from specgen.engine.step_costs import StepCosts
from specgen.kernels.cpu_backend import why_not
from specgen.kv.formats import FORMATS, LayerShape
from specgen.model import packed
from specgen.sampling.params import SamplingParams
from specgen.types import Speculation
from tests.support.engines import evict, watched
from tests.support.tiny import VOCABULARY, build

ROUNDING = [name for name in FORMATS if name != "native"]
# Nodes at full depth in every step, so that branches and rejected rows are many.
ON = Speculation(adaptive=False)
OFF = "off"
# Prompts that repeat, so that lookup drafts; the last one shares nothing.
COPY = [400, 512, 633, 290, 771, 815, 402, 990]
PROMPTS = ([*COPY, *range(600, 620), *COPY], [*range(900, 950), *COPY, *range(910, 930)], list(range(2000, 2019)))
SEEDED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "seed": 7}
GREEDY: dict[str, Any] = {"temperature": 0}
# Full attention, a window, latents, sinks and experts, a soft cap.
SMALL = ("llama", "mistral", "deepseek_v3", "gpt_oss", "gemma2")


# Each model and each format; the other pairs take minutes and find the same.
QUICK_PAIRS = {*(("llama", kind) for kind in FORMATS)}
QUICK_PAIRS |= {("mistral", "int8"), ("deepseek_v3", "int4"), ("gpt_oss", "k8v4"), ("gemma2", "fp8")}

pytestmark = pytest.mark.usefixtures("one_thread")


def slow_unless(quick: bool, *values: str) -> Any:
    return pytest.param(*values, marks=[] if quick else pytest.mark.slow)


def texts(engine: Engine, prompts: Sequence[Sequence[int]], tokens: int, **options: Any) -> list[tuple[int, ...]]:
    """Each prompt alone."""
    return [tuple(engine.generate(list(p), max_tokens=tokens, ignore_eos=True, **options).ids) for p in prompts]


def batched(engine: Engine, prompts: Sequence[Sequence[int]], tokens: int, **options: Any) -> list[tuple[int, ...]]:
    """All prompts at once."""
    results = engine.generate([list(p) for p in prompts], max_tokens=tokens, ignore_eos=True, **options)
    return [tuple(result.ids) for result in results]


def check(engine: Engine, prompts: Sequence[Sequence[int]], tokens: int, way: dict[str, Any]) -> None:
    """Off and alone is the truth for on, for beside others, and for both."""
    truth = texts(engine, prompts, tokens, speculation=OFF, **way)
    drafted = engine.counters.drafted
    assert texts(engine, prompts, tokens, speculation=ON, **way) == truth
    assert engine.counters.drafted > drafted, "nothing was drafted, so nothing is proven"
    assert batched(engine, prompts, tokens, speculation=ON, **way) == truth
    assert batched(engine, prompts, tokens, speculation=OFF, **way) == truth
    engine.check()


def together(engine: Engine, prompts: Sequence[Sequence[int]], tokens: int, **options: Any) -> list[tuple[int, ...]]:
    """What greedy and seeded sampling say to each prompt, all in one batch; and that nothing of it was damaged."""
    built = [
        engine._builder.build(
            list(prompt), SamplingParams(max_tokens=tokens, ignore_eos=True, **options, **way), copies=True
        )
        for way in (GREEDY, SEEDED)
        for prompt in prompts
    ]
    return [stream.results()[0].ids for stream in engine._runner.submit(*built)]


def check_memory(
    model: PreTrainedModel, kind: str, prompts: Sequence[Sequence[int]], tokens: int, folder: Path, kv_tokens: int
) -> None:
    """Off, alone and without a cache is the truth wherever KV comes from: computed, shared, from either tier.

    kv_tokens: of a pool too small for all prompts at once.
    """

    def opened(**options: Any) -> Engine:
        return watched(
            Engine(model, **{"kv_tokens": 2048, "drafters": ["prompt-lookup"], "kv_format": kind, **options})
        )

    def alone(engine: Engine, **options: Any) -> list[tuple[int, ...]]:
        return [text for way in (GREEDY, SEEDED) for text in texts(engine, prompts, tokens, **options, **way)]

    with opened(prefix_cache=False) as engine:
        truth = alone(engine, speculation=OFF)
        assert alone(engine, speculation=ON) == truth, "computed, alone, with speculation"
        assert together(engine, prompts, tokens, speculation=ON) == truth, "computed, batched, with speculation"
        assert engine.counters.drafted, "nothing was drafted, so nothing is proven"
    pages = sum(len(prompt) // engine.target.pool.page_size for prompt in prompts)
    with opened(kv_tokens=kv_tokens, host_cache_bytes=1 << 26) as engine:
        for speculation in (ON, OFF):
            assert together(engine, prompts, tokens, speculation=speculation) == truth, "with preemption"
            evict(engine)
        assert engine._core.scheduler.preemptions
        assert engine.prefix.stats.restored_pages >= pages
    with opened(disk_cache=folder) as engine:
        assert together(engine, prompts, tokens, speculation=OFF) == truth, "cold, without speculation"
        cached = engine.prefix.stats.cached_tokens
        assert together(engine, prompts, tokens, speculation=ON) == truth, "warm"
        # Of the last page, which is not full, only what the others' rows are behind is read again.
        assert engine.prefix.stats.cached_tokens - cached >= 2 * pages * engine.target.pool.page_size
        evict(engine)
        assert together(engine, prompts, tokens, speculation=ON) == truth, "off the disk"
        assert engine.prefix.stats.restored_pages >= pages
        evict(engine)
    with opened(disk_cache=folder) as engine:
        assert alone(engine, speculation=OFF) == truth, "off the disk, in another engine"
        assert engine.prefix.stats.restored_pages >= pages
        assert engine.prefix.stats.damaged_pages == 0


def small_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    some = torch.randint(3, VOCABULARY, (3, 14), generator=generator).tolist()
    return [ids + ids[:9] for ids in some]


@pytest.mark.parametrize("name", SMALL)
def test_tiny_models_with_invariant_rows(name: str) -> None:
    with Engine(build(name), kv_tokens=640, batch_invariant=True, prefix_cache=False) as engine:
        for way in (GREEDY, SEEDED):
            check(engine, small_prompts(), 12, way)


@pytest.mark.parametrize(
    ("name", "kind"), [slow_unless((name, kind) in QUICK_PAIRS, name, kind) for name in SMALL for kind in FORMATS]
)
def test_tiny_models_wherever_kv_comes_from(name: str, kind: str, tmp_path: Path) -> None:
    prompts = [ids * 2 for ids in small_prompts()]
    check_memory(build(name), kind, prompts, 8, tmp_path, kv_tokens=160)


@pytest.mark.parametrize("kind", ROUNDING)
def test_tiny_models_in_float64_need_no_more_than_that(kind: str) -> None:
    with Engine(build("llama").double(), kv_tokens=640, kv_format=kind, prefix_cache=False) as engine:
        assert not engine.target.batch_invariant
        check(engine, small_prompts(), 24, GREEDY)


@pytest.mark.parametrize("kind", ["native", "int4"])
def test_prompts_in_chunks_and_warm_prefixes(kind: str) -> None:
    prompts = small_prompts()
    with Engine(build("llama"), kv_tokens=640, kv_format=kind, batch_invariant=True, prefix_cache=False) as engine:
        truth = texts(engine, prompts, 24, speculation=OFF, **GREEDY)
    with Engine(build("llama"), kv_tokens=640, kv_format=kind, batch_invariant=True, max_prefill_tokens=5) as engine:
        assert texts(engine, prompts, 24, speculation=ON, **GREEDY) == truth
        warm = [[*prompt, *text[:20]] for prompt, text in zip(prompts, truth, strict=True)]
        assert texts(engine, warm, 4, speculation=ON, **GREEDY) == [text[20:] for text in truth]


@pytest.mark.parametrize("kind", [slow_unless(kind in ("native", "int4"), kind) for kind in FORMATS])
def test_smollm(smollm: PreTrainedModel, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in one engine, whose pool is too small for two texts, its memory for one page."""
    # What takes seconds at load and is not looked at here.
    monkeypatch.setattr(packed, "check_invariance", lambda *args: None)
    monkeypatch.setattr(StepCosts, "measure", lambda self, target: None)
    prompts = [[*COPY, *range(600, 630), *COPY]]
    layers = [LayerShape(3, 64, 64)] * smollm.config.num_hidden_layers
    page = 16 * FORMATS[kind]().bytes_per_token(layers, torch.float32)
    options: dict[str, Any] = {"drafters": ["prompt-lookup"], "host_cache_bytes": page, "disk_cache": tmp_path}
    with watched(Engine(smollm, kv_tokens=80, kv_format=kind, **options)) as engine:
        truth = []
        for way in (GREEDY, SEEDED):
            truth += texts(engine, prompts, 4, speculation=OFF, **way)
            engine.prefix.clear()
        assert together(engine, prompts, 4, speculation=ON) == truth, "cold"
        assert together(engine, prompts, 4, speculation=OFF) == truth, "warm"
        assert engine._core.scheduler.preemptions
        evict(engine)
        assert engine.prefix.stats.host_pages == 1
        assert engine.prefix.stats.disk_pages >= 1
        restored = engine.prefix.stats.restored_pages
        assert together(engine, prompts, 4, speculation=ON) == truth, "from both tiers"
        assert engine.prefix.stats.restored_pages >= restored + 2
        assert texts(engine, prompts, 4, speculation=ON, **SEEDED) == truth[1:], "warm, alone"
        assert engine.counters.accepted, "nothing was accepted, so nothing is proven"


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_smollm_long(smollm: PreTrainedModel, kind: str, tmp_path: Path) -> None:
    with Engine(smollm, kv_tokens=2048, kv_format=kind) as engine:
        # For native KV it is on where the kernels make it cheap.
        assert engine.target.batch_invariant == (kind != "native" or why_not() is None)
        for way in (GREEDY, SEEDED):
            check(engine, PROMPTS, 64, way)
    check_memory(smollm, kind, PROMPTS, 24, tmp_path, kv_tokens=192)


def test_smollm_in_bfloat16(demo_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_path, dtype=torch.bfloat16).eval()
    with Engine(model, kv_tokens=640, batch_invariant=True, prefix_cache=False) as engine:
        check(engine, PROMPTS[:2], 8, GREEDY)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["native", "int4"])
@pytest.mark.parametrize("way", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_smollm_long_in_bfloat16(demo_path: Path, kind: str, way: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_path, dtype=torch.bfloat16).eval()
    with Engine(model, kv_tokens=1024, kv_format=kind, batch_invariant=True) as engine:
        check(engine, PROMPTS, 96, way)
