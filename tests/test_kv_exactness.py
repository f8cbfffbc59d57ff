"""Speculation and batching change nothing on top of any KV format, in any dtype whose rows are invariant."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from specgen import Engine
from specgen.kv.formats import FORMATS
from specgen.types import Speculation
from tests.models.tiny import VOCABULARY, build

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


pytestmark = pytest.mark.usefixtures("one_thread")


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


def small_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    some = torch.randint(3, VOCABULARY, (3, 14), generator=generator).tolist()
    return [ids + ids[:9] for ids in some]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", SMALL)
def test_tiny_models(name: str, kind: str) -> None:
    with Engine(build(name), kv_tokens=640, kv_format=kind, invariant=True, prefix_cache=False) as engine:
        for way in (GREEDY, SEEDED):
            check(engine, small_prompts(), 12, way)


@pytest.mark.parametrize("kind", ROUNDING)
def test_tiny_models_in_float64_need_no_more_than_that(kind: str) -> None:
    with Engine(build("llama").double(), kv_tokens=640, kv_format=kind, prefix_cache=False) as engine:
        assert not engine.target.invariant
        check(engine, small_prompts(), 24, GREEDY)


@pytest.mark.parametrize("kind", ["native", "int4"])
def test_prompts_in_chunks_and_warm_prefixes(kind: str) -> None:
    prompts = small_prompts()
    with Engine(build("llama"), kv_tokens=640, kv_format=kind, invariant=True, prefix_cache=False) as engine:
        truth = texts(engine, prompts, 24, speculation=OFF, **GREEDY)
    with Engine(build("llama"), kv_tokens=640, kv_format=kind, invariant=True, max_prompt_rows=5) as engine:
        assert texts(engine, prompts, 24, speculation=ON, **GREEDY) == truth
        warm = [[*prompt, *text[:20]] for prompt, text in zip(prompts, truth, strict=True)]
        assert texts(engine, warm, 4, speculation=ON, **GREEDY) == [text[20:] for text in truth]


def test_smollm(smollm: PreTrainedModel) -> None:
    with Engine(smollm, kv_tokens=640, kv_format="k8v4", prefix_cache=False) as engine:
        assert engine.target.invariant
        check(engine, PROMPTS[:2], 8, GREEDY)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROUNDING)
@pytest.mark.parametrize("way", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_smollm_long(smollm: PreTrainedModel, kind: str, way: dict[str, Any]) -> None:
    with Engine(smollm, kv_tokens=2048, kv_format=kind) as engine:
        check(engine, PROMPTS, 64, way)


def test_smollm_in_bfloat16(demo_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_path, dtype=torch.bfloat16).eval()
    with Engine(model, kv_tokens=640, invariant=True, prefix_cache=False) as engine:
        check(engine, PROMPTS[:2], 8, GREEDY)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["native", "int4"])
@pytest.mark.parametrize("way", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_smollm_long_in_bfloat16(demo_path: Path, kind: str, way: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_path, dtype=torch.bfloat16).eval()
    with Engine(model, kv_tokens=1024, kv_format=kind, invariant=True) as engine:
        check(engine, PROMPTS, 96, way)
