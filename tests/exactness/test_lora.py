"""Adapters change a text exactly as peft does: alone, in a batch of many, drafted or not, with all other settings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import PreTrainedModel

from specgen import DrafterFactory, Engine, Result, SamplingParams, hookimpl
from specgen.draft.drafters.translation import draft_model
from specgen.errors import AdapterRefused
from specgen.model.forward.compiled import CompiledForward, CompiledModel
from specgen.model.runner import load_runner
from specgen.plugins.manager import load_plugins
from tests.support.adapters import ATTENTION, by_peft, save_adapter
from tests.support.engines import watched
from tests.support.tiny import build

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = [5, 9, 33, 41, 7, 9, 33, 41]
TOKENS = 12
DRAFTED = {"speculation": {"adaptive": False, "max_nodes": 8}}
MODES: tuple[dict[str, Any], ...] = ({"speculation": "off"}, DRAFTED)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True, "r": 3},
    "patterns": {"rank_pattern": {"{0}": 2}, "alpha_pattern": {"{1}": 3}},
    "DoRA": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "all linear": {"target_modules": "all-linear"},
    "some layers": {"layers_to_transform": [0, 2]},
}


def kind_of(name: str, family: str) -> dict[str, Any]:
    """LoraConfig's fields for a kind, with the family's module names in its patterns."""
    modules = ATTENTION[family]
    return {
        key: {pattern.format(*modules): number for pattern, number in value.items()} if "pattern" in key else value
        for key, value in KINDS[name].items()
    }


def together(engine: Engine, *requests: dict[str, Any], prompt: list[int] = PROMPT) -> list[Result]:
    """Results of requests that are queued in time for one step."""
    options = [SamplingParams.of({"max_tokens": TOKENS, **request}) for request in requests]
    streams = engine._runner.submit(*(engine._builder.build(prompt, each, copies=False) for each in options))
    return [stream.results()[0] for stream in streams]


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return build("llama")


@pytest.fixture(scope="module")
def folders(llama: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four adapters of llama: other ranks, other modules, other kinds."""
    root = tmp_path_factory.mktemp("adapters")
    made = {
        "small": {"r": 2},
        "wide": {"r": 8, "target_modules": "all-linear"},
        "dora": {"r": 4, "use_dora": True},
        "mlp": {"r": 3, "target_modules": ["gate_proj", "down_proj"]},
    }
    return {name: save_adapter(llama, root / name, seed=n, **kind) for n, (name, kind) in enumerate(made.items())}


@pytest.fixture(scope="module")
def truth(llama: PreTrainedModel, folders: dict[str, Path]) -> dict[str | None, tuple[int, ...]]:
    said: dict[str | None, tuple[int, ...]] = {n: by_peft(llama, f, PROMPT, TOKENS) for n, f in folders.items()}
    said[None] = by_peft(llama, None, PROMPT, TOKENS)
    assert len(set(said.values())) == 5, "each says something else, or nothing here is tested"
    return said


@pytest.fixture
def opened(llama: PreTrainedModel, folders: dict[str, Path]) -> Iterator[Callable[..., Engine]]:
    engines = []

    def open_engine(model: PreTrainedModel = llama, *, load: bool = True, **options: Any) -> Engine:
        engines.append(watched(Engine(model, **{"kv_tokens": 2048, **options})))
        for name, folder in folders.items() if load else ():
            engines[-1].adapters.load(name, folder)
        return engines[-1]

    yield open_engine
    for engine in engines:
        engine.check()
        engine.close()


@pytest.mark.parametrize("family", ATTENTION)
def test_every_kind_says_what_peft_says(family: str, tmp_path: Path) -> None:
    model = build(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    frozen = [weight.requires_grad for weight in model.parameters()]
    base = by_peft(model, None, PROMPT, TOKENS)
    with watched(Engine(model, kv_tokens=1024)) as engine:
        for name in KINDS if family in ("llama", "gpt2") else ("plain", "patterns", "DoRA"):
            config = kind_of(name, family)
            folder = save_adapter(model, tmp_path / name, **config)
            engine.adapters.load("it", folder)
            said = by_peft(model, folder, PROMPT, TOKENS)
            assert said != base, name
            if not config.get("lora_bias") or family == "gpt2":  # peft cannot merge a bias into a layer without one
                assert by_peft(model, folder, PROMPT, TOKENS, merged=True) == said, name
            for mode in MODES:
                found = engine.generate(PROMPT, adapter="it", max_tokens=TOKENS, **mode)
                assert found.ids == said, (name, mode)
            assert engine.generate(PROMPT, max_tokens=TOKENS).ids == base, name
            assert engine.adapters.unload("it")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [weight.requires_grad for weight in model.parameters()] == frozen


@pytest.mark.parametrize("mode", MODES)
def test_one_batch_mixes_base_and_four_adapters(
    opened: Callable[..., Engine], truth: dict[str | None, tuple[int, ...]], mode: dict[str, Any]
) -> None:
    engine = opened()
    # The same one twice, and not side by side.
    names = ["wide", None, "small", "dora", "wide", "mlp", None]
    found = together(engine, *({"adapter": name, **mode} for name in names))
    assert [result.ids for result in found] == [truth[name] for name in names]
    if mode is DRAFTED:
        assert sum(result.stats.num_accepted_draft_tokens for result in found) > 0


def test_a_step_over_five_adapters_is_one_forward(opened: Callable[..., Engine]) -> None:
    engine = opened()
    engine.adapters.load("fifth", engine.adapters.list()[0].path)
    forwards, rows = engine.target.forwards, engine.target.rows
    names = [*(info.name for info in engine.adapters.list()), None]
    assert len(names) == 6
    together(engine, *({"adapter": name, "speculation": "off"} for name in names))
    assert engine.target.forwards - forwards == TOKENS
    assert engine.target.rows - rows == 6 * (len(PROMPT) + TOKENS - 1)


def test_a_step_of_base_rows_runs_the_forward_that_there_was(
    opened: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened()
    monkeypatch.setattr(engine.target.adapted, "over", None)
    engine.generate(PROMPT, max_tokens=4)
    assert not any("forward" in module.__dict__ for module in engine.target.model.modules())


def test_seeded_texts_are_those_of_the_merged_model(
    opened: Callable[..., Engine], llama: PreTrainedModel, folders: dict[str, Path]
) -> None:
    from peft import PeftModel

    options = {"temperature": 0.9, "top_p": 0.9, "seed": 3, "repetition_penalty": 1.1}
    engine = opened()
    found = together(engine, *({"adapter": name, **options} for name in folders), {"seed": 1, "temperature": 1.0})
    for name, result in zip(folders, found, strict=False):
        merged: Any = PeftModel.from_pretrained(copy.deepcopy(llama), folders[name]).merge_and_unload()
        alone = opened(merged, load=False).generate(PROMPT, max_tokens=TOKENS, speculation="off", **options)
        assert alone.ids == result.ids, name


@pytest.mark.parametrize("options", [{"kv_format": "int8"}, {"max_prefill_tokens": 3}, {"cpu_kernels": False}])
def test_adapters_go_with_other_settings(opened: Callable[..., Engine], options: dict[str, Any]) -> None:
    together_engine, alone_engine = opened(**options), opened(**options)
    names = ["small", None, "wide", "dora", "mlp"]
    found = together(together_engine, *({"adapter": name, **DRAFTED} for name in names))
    for name, result in zip(names, found, strict=True):
        assert alone_engine.generate(PROMPT, adapter=name, max_tokens=TOKENS, speculation="off").ids == result.ids


def test_prefixes_are_shared_within_a_revision_and_not_across(
    opened: Callable[..., Engine], llama: PreTrainedModel, tmp_path: Path
) -> None:
    engine = opened(load=False)
    prompt = PROMPT * 5
    options = {"max_tokens": 4, "adapter": "it"}
    engine.adapters.load("it", save_adapter(llama, tmp_path / "one", seed=1))
    engine.generate(prompt, max_tokens=4)
    first = engine.generate(prompt, **options)
    again = engine.generate(prompt, **options)
    assert (first.usage.cached_tokens, again.usage.cached_tokens > 0) == (0, True)
    assert first.ids == again.ids == by_peft(llama, tmp_path / "one", prompt, 4)
    engine.adapters.reload("it", save_adapter(llama, tmp_path / "two", seed=2))
    other = engine.generate(prompt, **options)
    assert other.usage.cached_tokens == 0
    assert other.ids == by_peft(llama, tmp_path / "two", prompt, 4)
    # The same files are the same revision, also when they come back.
    engine.adapters.reload("it", tmp_path / "one")
    assert engine.generate(prompt, **options).usage.cached_tokens == again.usage.cached_tokens
    with engine.prefix.pin(prompt, adapter="it") as pin:
        assert pin.tokens > 0


def test_answers_are_shared_within_a_revision_and_not_across(opened: Callable[..., Engine]) -> None:
    engine = opened(response_cache_bytes=1 << 20)
    for name in (None, "small", "small", "wide", None):
        engine.generate(PROMPT, adapter=name, max_tokens=4)
    assert (engine.responses.stats.misses, engine.responses.stats.hits) == (3, 2)


def test_rows_under_an_adapter_do_not_depend_on_their_neighbours(
    llama: PreTrainedModel, folders: dict[str, Path]
) -> None:
    from specgen.model.segment import Segment

    half = copy.deepcopy(llama).to(torch.bfloat16)
    target = load_runner(half, kv_tokens=512, batch_invariant=True)
    weights = [
        target.read_adapter(folder, max_rank=64, max_bytes=1 << 30).weights
        for folder in folders.values()
        if target.adapted
    ]

    def read(*adapters: Any, parts: tuple[int, ...] = (len(PROMPT),)) -> list[torch.Tensor]:
        tables = [target.pool.open() for _ in adapters]
        rows: list[list[torch.Tensor]] = [[] for _ in adapters]
        start = 0
        for part in parts:
            ids, positions = PROMPT[start : start + part], range(start, start + part)
            for table in tables:
                table.reserve(start + part)
            segments = [Segment(t, ids, positions, None, range(part), a) for t, a in zip(tables, adapters, strict=True)]
            for mine, logits in zip(rows, target.forward(segments).logits.split(part), strict=True):
                mine.append(logits)
            for table in tables:
                table.commit(part)
            start += part
        for table in tables:
            table.release()
        return [torch.cat(mine) for mine in rows]

    company = [weights[0], None, *weights[1:], weights[0]]
    found = read(*company)
    for adapter, logits in zip(company, found, strict=True):
        assert torch.equal(read(adapter)[0], logits)
        assert torch.equal(read(adapter, parts=(3, 1, 1, 3))[0], logits)


def test_a_paired_adapter_drafts_and_acceptance_is_known_by_adapter(
    opened: Callable[..., Engine], llama: PreTrainedModel, folders: dict[str, Path], truth: dict[str | None, Any]
) -> None:
    drafting = {"drafters": ["draft-model"], "adaptive": False}
    engine = opened(draft_model=llama, load=False)
    engine.adapters.load("paired", folders["wide"], draft_adapter=folders["wide"])
    engine.adapters.load("alone", folders["wide"])
    assert [info.paired for info in engine.adapters.list()] == [True, False]
    names = ("paired", "alone", None)
    paired, alone, base = together(engine, *({"adapter": name, "speculation": drafting} for name in names))
    assert paired.ids == alone.ids == truth["wide"]
    assert base.ids == truth[None]
    # The same model under the same adapter is always right; without it nearly never.
    assert paired.stats.draft_acceptance_rate > 2 * alone.stats.draft_acceptance_rate
    assert paired.stats.num_spec_steps == base.stats.num_spec_steps < alone.stats.num_spec_steps
    learned = engine._core.drafting._learned
    hits = {name: _share_of_hits(learned[name]["draft-model"].calibration) for name in ("paired", "alone", "")}
    assert hits["paired"] > hits["alone"] < hits[""]
    assert engine.adapters.unload("alone")
    assert "alone" not in learned


def _share_of_hits(calibration: Any) -> float:
    tallies = [tally for kind in calibration._tallies for tally in kind]
    return sum(tally.hits for tally in tallies) / sum(tally.trials for tally in tallies)


def test_a_draft_adapter_needs_a_draft_model(opened: Callable[..., Engine], folders: dict[str, Path]) -> None:
    engine = opened(load=False)
    with pytest.raises(AdapterRefused, match="no draft model"):
        engine.adapters.load("it", folders["wide"], draft_adapter=folders["wide"])
    assert engine.adapters.list() == []


class Second:
    """A plugin's drafter that drafts with a model too."""

    @staticmethod
    @hookimpl
    def drafters() -> dict[str, DrafterFactory]:
        return {"second": draft_model}


def test_a_draft_adapter_needs_one_draft_model(
    opened: Callable[..., Engine], llama: PreTrainedModel, folders: dict[str, Path]
) -> None:
    """Of two, it would be checked against one and used by both."""
    plugins = load_plugins()
    plugins.register(Second, "second")
    named = {"draft-model": {"model": llama}, "second": {"model": build("gpt2")}}
    engine = opened(load=False, plugins=plugins, drafters=named)
    told = "^draft_adapter is .*wide', but this engine has 2 draft models; it must have one$"
    with pytest.raises(AdapterRefused, match=told):
        engine.adapters.load("it", folders["wide"], draft_adapter=folders["wide"])
    assert engine.adapters.list() == []
    assert engine.adapters.load("it", folders["wide"]).paired is False


def test_a_compiled_engine_refuses_adapters(
    opened: Callable[..., Engine], folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened(load=False)
    monkeypatch.setattr(engine.target, "_forward", CompiledForward(cast("CompiledModel", None), engine.target.pool))
    with pytest.raises(AdapterRefused, match="compile=False"):
        engine.adapters.load("it", folders["wide"])


@pytest.mark.slow
def test_the_shipped_adapters_say_what_peft_says(smollm: PreTrainedModel, smollm_tokenizer: Any) -> None:
    root = Path(__file__).parents[2] / "adapters"
    shipped = {path.parent.name: path.parent for path in sorted(root.glob("*/adapter_config.json"))}
    assert len(shipped) >= 2
    messages = [{"role": "user", "content": "What is the capital of Spain?"}]
    with Engine(smollm, smollm_tokenizer) as engine:
        for name, folder in shipped.items():
            engine.adapters.load(name, folder)
        prompt = smollm_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        names = [*shipped, None]
        found = together(engine, *({"adapter": n, "ignore_eos": True} for n in names), prompt=list(prompt))
        for name, result in zip(names, found, strict=True):
            assert result.ids == by_peft(smollm, shipped.get(name or ""), prompt, TOKENS)
