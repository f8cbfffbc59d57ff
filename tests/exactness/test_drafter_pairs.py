"""Every drafter and every pair of them says what the target says: greedy and seeded, alone and in a batch, on every KV
format, behind cached prefixes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
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
from tests.support.tiny import VOCABULARY, build

pytestmark = pytest.mark.usefixtures("one_thread")

DRAFTERS = ("prompt-lookup", "recycling", "prediction", "draft-model", "suffix", "eagle", "echo")
CHOICES = [(name,) for name in DRAFTERS] + list(combinations(DRAFTERS, 2))
# The two kinds of heads that "eagle" drafts with, by the tokens that they say in one forward.
HEADS = {"level by level": 1, "parallel": 4}
CASES = [
    pytest.param(kind, names, id=f"{'+'.join(names)}, {kind}" if "eagle" in names else "+".join(names))
    for kind in HEADS
    for names in CHOICES
    if "eagle" in names or kind == "level by level"
]
COPY = [40, 51, 63, 29, 77, 81, 42, 90]
PROMPTS = ([*COPY, *range(10, 30), *COPY], [*range(30, 65), *COPY, 17, *COPY])
SETTINGS: tuple[dict[str, Any], ...] = ({"temperature": 0}, {"temperature": 0.8, "top_p": 0.95, "seed": 7})
TOKENS = 14


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama")


@pytest.fixture(scope="module")
def heads(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Untrained, but they begin as the target's last layer."""
    folders = {}
    for kind, parallel in HEADS.items():
        folders[kind] = tmp_path_factory.mktemp("head")
        recipe = Recipe(head=HeadRecipe(layers=(1, 1, 2), vocabulary=64, parallel=parallel))
        save_head(new_head(model, recipe, [Conversation(list(range(VOCABULARY)), 1)]), folders[kind], model, "tiny")
    return folders


@pytest.fixture(scope="module", params=[pytest.param(f, marks=[pytest.mark.slow] * (f != "native")) for f in FORMATS])
def engines(
    request: pytest.FixtureRequest, model: PreTrainedModel, heads: Mapping[str, Path]
) -> Iterator[dict[str, Engine]]:
    with ExitStack() as stack:
        found = {}
        for kind, path in heads.items():
            drafters: dict[str, Any] = {name: {} for name in DRAFTERS}
            drafters["draft-model"] = {"model": first_layers(model, 1)}
            drafters["eagle"] = {"path": path}
            drafters["echo"] = {"hit_rate": 0.6}
            engine = Engine(model, drafters=drafters, kv_tokens=4096, kv_format=request.param)
            found[kind] = stack.enter_context(engine)
        yield found


@pytest.fixture(scope="module")
def truth(engines: Mapping[str, Engine]) -> list[list[tuple[int, ...]]]:
    """By setting and prompt, alone and without drafts; all engines have the prompts in their prefix caches."""
    first, *others = (
        [[alone(engine, prompt, way, "off") for prompt in PROMPTS] for way in SETTINGS] for engine in engines.values()
    )
    assert all(other == first for other in others)
    return first


def alone(engine: Engine, prompt: list[int], way: dict[str, Any], speculation: Any, **more: Any) -> tuple[int, ...]:
    return engine.generate(prompt, max_tokens=TOKENS, ignore_eos=True, speculation=speculation, **way, **more).ids


@pytest.mark.parametrize(("kind", "names"), CASES)
def test_the_text_is_the_targets(
    engines: Mapping[str, Engine], truth: list[list[tuple[int, ...]]], kind: str, names: tuple[str, ...]
) -> None:
    engine = engines[kind]
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
