"""The whole engine with the GPU kernels says what it says in plain torch; on a CPU Triton's interpreter runs them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specgen import Engine
from specgen.errors import InvalidRequest, UnsupportedModel
from specgen.kernels import gpu_kernels
from specgen.kv.formats import FORMATS
from specgen.types import Speculation
from tests.engines import watched
from tests.models.tiny import VOCABULARY, build

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
    monkeypatch.setattr("specgen.engine._MEASURED_ROWS", (1,))


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


def check(family: str, kind: str, *, count: int = 3, tokens: int = 10) -> None:
    """Plain torch, one after another and without drafts, is the truth for the kernels, drafted and in a batch."""
    with engine(family, kind, gpu=False) as plain:
        truth = {}
        for name, way in (("greedy", GREEDY), ("seeded", SEEDED)):
            alone = (
                plain.generate(ids, max_tokens=tokens, ignore_eos=True, speculation="off", **way)
                for ids in prompts(count)
            )
            truth[name] = [tuple(result.ids) for result in alone]
    with engine(family, kind, gpu=True) as fast:
        assert fast.target._kernel == "gpu"
        assert texts(fast, count, tokens, speculation=ON, **GREEDY) == truth["greedy"]
        assert fast.counters.drafted, "nothing was drafted, so nothing is proven"
        assert texts(fast, count, tokens, speculation=ON, **SEEDED) == truth["seeded"]


def test_the_kernels_say_what_plain_torch_says() -> None:
    check("llama", "native", count=2, tokens=5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_every_kv_format(kind: str) -> None:
    check("llama", kind)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss", "qwen3", "gemma3n_text", "llama4_text"])
def test_every_way_to_attend(family: str) -> None:
    """Windows, soft caps, sinks, normalised heads, layers that share KV, chunks."""
    check(family, "native")


def test_they_are_used_unasked_on_a_gpu_alone() -> None:
    with Engine(build("llama").to(DEVICE), kv_tokens=64) as unasked:
        assert (unasked.target._kernel == "gpu") == (DEVICE.type == "cuda")


def test_what_they_cannot_do_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match=r"gpu_kernels=True cannot be kept: the seam is 'gathered'"):
        Engine(build("deepseek_v3").to(DEVICE), kv_tokens=64, gpu_kernels=True)
    with pytest.raises(UnsupportedModel, match=r"data type is torch.float64; choices: torch.bfloat16"):
        Engine(build("llama").to(DEVICE, torch.float64), kv_tokens=64, gpu_kernels=True)
    with pytest.raises(InvalidRequest, match="gpu_kernels is 'yes'; choices: True, False, None"):
        Engine(build("llama"), gpu_kernels="yes")
