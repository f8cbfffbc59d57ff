"""Every drafter and every pair of them says what the target says: greedy and seeded, alone and in a batch, on every KV
format, behind cached prefixes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from specgen_eagle.checkpoint import save_head
from specgen_eagle.corpus import Conversation
from specgen_eagle.head_student import new_head
from specgen_eagle.recipe import HeadRecipe, Recipe
from transformers import PreTrainedModel

from benchmarks.decode import first_layers
from specgen import Engine, Speculation
from specgen.kv.formats import FORMATS
from tests.models.tiny import VOCABULARY, build

pytestmark = pytest.mark.usefixtures("one_thread")

DRAFTERS = ("prompt-lookup", "recycling", "prediction", "draft-model", "suffix", "eagle", "echo")
CHOICES = [(name,) for name in DRAFTERS] + list(combinations(DRAFTERS, 2))
COPY = [40, 51, 63, 29, 77, 81, 42, 90]
PROMPTS = ([*COPY, *range(10, 30), *COPY], [*range(30, 65), *COPY, 17, *COPY])
SETTINGS: tuple[dict[str, Any], ...] = ({"temperature": 0}, {"temperature": 0.8, "top_p": 0.95, "seed": 7})
TOKENS = 14


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama")


@pytest.fixture(scope="module")
def head(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained, but it begins as the target's last layer."""
    folder = tmp_path_factory.mktemp("head")
    recipe = Recipe(head=HeadRecipe(layers=(1, 1, 2), vocabulary=64))
    save_head(new_head(model, recipe, [Conversation(list(range(VOCABULARY)), 1)]), folder, model, "tiny")
    return folder


@pytest.fixture(scope="module", params=[pytest.param(f, marks=[pytest.mark.slow] * (f != "native")) for f in FORMATS])
def engine(request: pytest.FixtureRequest, model: PreTrainedModel, head: Path) -> Iterator[Engine]:
    drafters: dict[str, Any] = {name: {} for name in DRAFTERS}
    drafters["draft-model"] = {"model": first_layers(model, 1)}
    drafters["eagle"] = {"path": head}
    drafters["echo"] = {"hit_rate": 0.6}
    with Engine(model, drafters=drafters, kv_tokens=4096, kv_format=request.param) as engine:
        yield engine


@pytest.fixture(scope="module")
def truth(engine: Engine) -> list[list[tuple[int, ...]]]:
    """By setting and prompt, alone and without drafts."""
    return [[alone(engine, prompt, way, "off") for prompt in PROMPTS] for way in SETTINGS]


def alone(engine: Engine, prompt: list[int], way: dict[str, Any], speculation: Any, **more: Any) -> tuple[int, ...]:
    return engine.generate(prompt, max_tokens=TOKENS, ignore_eos=True, speculation=speculation, **way, **more).ids


@pytest.mark.parametrize("names", CHOICES, ids="+".join)
def test_the_text_is_the_targets(engine: Engine, truth: list[list[tuple[int, ...]]], names: tuple[str, ...]) -> None:
    speculation = Speculation(adaptive=False, max_nodes=12, drafters=names)
    offered = dict.fromkeys(names, 0)
    for way, texts in zip(SETTINGS, truth, strict=True):
        # A prediction that is right, then wrong, then right again.
        predictions = [[*text[:5], 1, *text[6:]] for text in texts]
        streams = [
            engine.stream(p, max_tokens=TOKENS, ignore_eos=True, speculation=speculation, prediction=g, **way)
            for p, g in zip(PROMPTS, predictions, strict=True)
        ]
        results = [stream.results()[0] for stream in streams]
        assert [result.ids for result in results] == texts
        assert alone(engine, PROMPTS[0], way, speculation, prediction=predictions[0]) == texts[0]
        assert all(result.usage.cached_tokens > 0 for result in results)
        for result in results:
            for name in names:
                assert result.stats.by_drafter[name].disabled is None
                offered[name] += result.stats.by_drafter[name].offered
    assert all(offered.values()), offered
    engine.check()
