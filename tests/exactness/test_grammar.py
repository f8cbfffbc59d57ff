"""Constrained requests through the engine: whatever drafts and whoever runs beside them, the ids are those of plain
decoding under llguidance's own masks, token by token."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import llguidance.hf
import numpy as np
import pytest
import torch
from specgen_echo import EchoDrafter, EchoOptions
from transformers import PreTrainedModel

from specgen import DrafterFactory, Engine, InvalidRequest, RequestFailed, Result, hookimpl
from specgen.plugins.manager import load_plugins
from specgen.sampling.sampler import PositionKeys, gumbel_argmax
from specgen.server.constraints import constraint_of
from tests.support.engines import watched
from tests.support.tiny import build
from tests.support.tokenizers import byte_level, sentence_piece

TEXT = "\n".join(json.dumps({"name": "Bob", "age": i, "tags": ["red"], "ok": True}, indent=i % 3) for i in range(40))
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 2},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "age", "ok"],
    "additionalProperties": False,
}
CONSTRAINTS: dict[str, dict[str, Any]] = {
    "schema": {"json_schema": SCHEMA},
    "regex": {"regex": "[a-f]{3}(, [a-f]{3}){2,5}\\."},
    "open": {"regex": "[0-9a-f ]+"},
    "choice": {"choice": ["yes", "yes, sir", "no, never"]},
    "grammar": {"grammar": 'start: "(" start ")" | NAME\nNAME: /[a-z]{2,9}/'},
}
"""One that ends by itself, one that may end at any place, one whose texts begin alike, one that nests."""
TOKENIZERS = {"byte-level": byte_level(400, TEXT), "pieces": sentence_piece(120, TEXT)}
PROMPTS = ([60, 61, 62, 90, 60, 61], [70, 71, 72, 73], [110, 111, 60, 112])
TOKENS = 70
SAMPLED: dict[str, Any] = {"temperature": 1.2, "top_k": 40, "seed": 11}
GREEDY: dict[str, Any] = {"temperature": 0.0}
MODES: dict[str, Any] = {
    "off": "off",
    "auto": "auto",
    "grammar": {"drafters": ["grammar"], "adaptive": False},
    "lookup": {"drafters": ["prompt-lookup", "recycling"], "adaptive": False},
    "half": {"drafters": ["half"], "adaptive": False},
    "sure": {"drafters": ["sure"], "adaptive": False},
    "together": {"drafters": ["grammar", "half", "prompt-lookup", "recycling"], "max_nodes": 24, "adaptive": False},
}

pytestmark = pytest.mark.usefixtures("one_thread")


class Echoes:
    """Drafters that know the truth half of the time and always."""

    @staticmethod
    @hookimpl
    def drafters() -> Mapping[str, DrafterFactory]:
        half, sure = EchoOptions(hit_rate=0.5, siblings=2, depth=4), EchoOptions(siblings=1, depth=8)
        return {
            "half": lambda setup: EchoDrafter(setup.vocab_size, half),
            "sure": lambda setup: EchoDrafter(setup.vocab_size, sure),
        }


@cache
def model(family: str, name: str = "llama") -> PreTrainedModel:
    """Random weights, rows wider than the vocabulary, and an end token."""
    tokenizer = TOKENIZERS[family]
    found = build(name, vocab_size=len(tokenizer) + 13, max_position_embeddings=512)
    found.generation_config.eos_token_id = tokenizer.eos_token_id
    return found


def opened(family: str = "byte-level", name: str = "llama", **options: Any) -> Engine:
    plugins = load_plugins()
    plugins.register(Echoes, "echoes")
    drafters = ["grammar", "prompt-lookup", "recycling", "half", "sure"]
    options = {"kv_tokens": 4096, "drafters": drafters, "plugins": plugins, **options}
    return watched(Engine(model(family, name), TOKENIZERS[family], **options))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with opened() as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_is_held_in_the_end(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "engine" in request.fixturenames:
        request.getfixturevalue("engine").check()


@torch.no_grad()
def reference(
    model: PreTrainedModel,
    tokenizer: Any,
    grammar: str,
    prompt: Sequence[int],
    *,
    index: int = 0,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    max_tokens: int = TOKENS,
) -> list[int]:
    """Plain decoding: the whole text through the model for each token, masked by llguidance, no engine anywhere."""
    vocabulary = model.config.vocab_size
    matcher = llguidance.LLMatcher(llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocabulary), grammar)
    keys, ids = PositionKeys(seed, index), list(prompt)
    for _ in range(max_tokens):
        logits = model(torch.tensor([ids])).logits[0, -1].float()
        mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), count=vocabulary, bitorder="little")
        logits[torch.from_numpy(mask == 0)] = -torch.inf
        if temperature:
            logits = logits / temperature
            if top_k:
                logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
            token = gumbel_argmax(logits, keys[len(ids)])
        else:
            token = int(logits.argmax())
        ids.append(token)
        assert matcher.consume_token(token), matcher.get_error()
        if matcher.is_stopped():
            break
    return ids[len(prompt) :]


@cache
def grammar_of(name: str) -> str:
    """By llguidance's own helpers, but for white space, which the plugin bounds."""
    ((kind, value),) = CONSTRAINTS[name].items()
    if kind == "json_schema":
        pattern = r"( |\n{1,2}[ \t]{0,20})?"
        return llguidance.LLMatcher.grammar_from_json_schema(value, overrides={"whitespace_pattern": pattern})
    if kind == "choice":
        texts = " | ".join(json.dumps(text) for text in value)
        return llguidance.LLMatcher.grammar_from_lark(f"start: {texts}")
    return llguidance.grammar_from({"regex": "regex", "grammar": "lark"}[kind], value)


@cache
def truth(family: str, constraint: str, prompt: int, sampled: bool, index: int = 0, name: str = "llama") -> list[int]:
    settings = SAMPLED if sampled else GREEDY
    return reference(
        model(family, name), TOKENIZERS[family], grammar_of(constraint), PROMPTS[prompt], index=index, **settings
    )


def asked(constraint: str, sampled: bool, mode: str, prediction: Sequence[int] = (), **options: Any) -> dict[str, Any]:
    """What a request says."""
    return {
        "constraint": CONSTRAINTS[constraint],
        "max_tokens": TOKENS,
        "speculation": MODES[mode],
        "prediction": tuple(prediction) if mode != "off" else (),
        **(SAMPLED if sampled else GREEDY),
        **options,
    }


def whole(result: Result, constraint: str) -> bool:
    """Whether a finished text is what its constraint asks for."""
    ((kind, value),) = CONSTRAINTS[constraint].items()
    text = result.text.lstrip() if kind == "json_schema" else result.text
    if kind == "json_schema":
        return set(json.loads(text)) >= set(value["required"])
    if kind == "choice":
        return text in value
    return bool(text)


# The same ids.


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "seeded"])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("family", TOKENIZERS)
def test_every_way_to_draft_says_what_plain_decoding_says(family: str, constraint: str, sampled: bool) -> None:
    expected = truth(family, constraint, 0, sampled)
    with opened(family) as engine:
        for mode in MODES:
            result = engine.generate(PROMPTS[0], **asked(constraint, sampled, mode, expected))
            assert list(result.ids) == expected, mode
            assert result.finish_reason == "stop" or len(expected) == TOKENS, mode
            assert result.finish_reason == "length" or whole(result, constraint)
            assert not any(share.disabled for share in result.stats.by_drafter.values())
            if mode == "sure" and len(expected) > 9:
                assert result.stats.num_accepted_draft_tokens > len(expected) // 2


@pytest.mark.parametrize("name", ["gpt_neox", "gemma2", "qwen3"])
def test_other_architectures_do_too(name: str) -> None:
    with opened(name=name) as engine:
        for sampled in (False, True):
            expected = truth("byte-level", "schema", 1, sampled, name=name)
            for mode in ("off", "together"):
                result = engine.generate(PROMPTS[1], **asked("schema", sampled, mode, expected))
                assert list(result.ids) == expected, (sampled, mode)


def test_side_by_side_with_others_and_without_a_constraint(engine: Engine) -> None:
    plain: dict[str, Any] = {"max_tokens": 40, "temperature": 1.0, "seed": 5}
    free = [engine.generate(prompt, speculation="off", **plain).ids for prompt in PROMPTS]
    jobs = [
        (number, constraint, sampled, mode)
        for number, constraint in enumerate(CONSTRAINTS)
        for sampled in (False, True)
        for mode in ("off", "together", "half")
    ]
    random.Random(2).shuffle(jobs)
    streams = []
    for number, constraint, sampled, mode in jobs:
        prompt = number % len(PROMPTS)
        expected = truth("byte-level", constraint, prompt, sampled)
        streams.append((engine.stream(PROMPTS[prompt], **asked(constraint, sampled, mode, expected)), expected))
        streams.append((engine.stream(PROMPTS[prompt], **plain), list(free[prompt])))
    for stream, expected in streams:
        assert list(stream.results(60)[0].ids) == expected


@pytest.mark.parametrize("mode", ["off", "together"])
def test_each_sample_and_each_prompt_has_its_own_place_in_the_grammar(engine: Engine, mode: str) -> None:
    results = engine.generate(PROMPTS[0], **asked("schema", True, mode, n=3))
    assert [list(result.ids) for result in results] == [truth("byte-level", "schema", 0, True, i) for i in range(3)]
    results = engine.generate(list(PROMPTS), **asked("schema", False, mode))
    assert [list(result.ids) for result in results] == [truth("byte-level", "schema", i, False) for i in range(3)]


@pytest.mark.parametrize(
    "options",
    [
        {"kv_format": "int8"},
        {"kv_format": "k8v4", "prefix_cache": False},
        {"kv_tokens": 192, "max_prefill_tokens": 3},
        {"batch_invariant": True},
    ],
    ids=["int8", "k8v4", "few pages", "batch_invariant"],
)
def test_with_kv_formats_prefixes_and_preemption(options: dict[str, Any]) -> None:
    """KV that rounds has other truths: those without drafts, alone and cold."""
    long = [60 + number % 50 for number in range(50)]
    with opened(**options) as engine:
        jobs = [(constraint, sampled) for constraint in ("schema", "open") for sampled in (False, True)]
        alone = [engine.generate(long, **asked(*job, "off")).ids for job in jobs]
        if "kv_format" not in options:
            assert list(alone[1]) == reference(
                model("byte-level"), TOKENIZERS["byte-level"], grammar_of("schema"), long, **SAMPLED
            )
        streams = [
            (engine.stream(long, **asked(*job, mode, ids)), ids)
            for mode in ("together", "off", "half")
            for job, ids in zip(jobs, alone, strict=True)
        ]
        results = [(stream.results(60)[0], ids) for stream, ids in streams]
        assert all(result.ids == ids for result, ids in results)
        if options.get("prefix_cache", True):
            assert any(result.usage.cached_tokens for result, _ in results)
        if options.get("kv_tokens"):
            assert engine._core.scheduler.preemptions


def test_identical_requests_are_answered_alike_and_other_schemas_are_not() -> None:
    """The response cache tells constraints apart: true from 1, and properties by their order."""
    with opened(response_cache_bytes=1 << 20) as engine:
        same = {"max_tokens": 40, "temperature": 0.0}
        schemas = [{"const": True}, {"const": 1}, {"enum": ["a", "b"]}]
        texts = [engine.generate(PROMPTS[0], constraint={"json_schema": s}, **same).text.strip() for s in schemas]
        assert texts[:2] == ["true", "1"]
        assert engine.responses.stats.hits == 0
        again = engine.generate(PROMPTS[0], constraint={"json_schema": {"enum": ["a", "b"]}}, **same)
        assert again.text.strip() == texts[2]
        assert engine.responses.stats.hits == 1
        one, two = {"a": {"type": "null"}, "b": {"type": "null"}}, {"b": {"type": "null"}, "a": {"type": "null"}}
        for properties in (one, two):
            schema = {"type": "object", "properties": properties, "required": ["a", "b"], "additionalProperties": False}
            text = engine.generate(PROMPTS[0], constraint={"json_schema": schema}, **same).text
            assert list(json.loads(text)) == list(properties)


# Ends.


@pytest.mark.parametrize("mode", ["off", "together"])
def test_stop_rules_end_a_text_that_is_not_whole(engine: Engine, mode: str) -> None:
    expected = truth("byte-level", "schema", 0, False)
    text = engine.generate(PROMPTS[0], **asked("schema", False, "off")).text
    cut = engine.generate(PROMPTS[0], **asked("schema", False, mode, expected, max_tokens=7))
    assert (list(cut.ids), cut.finish_reason) == (expected[:7], "length")
    stopped = engine.generate(PROMPTS[0], **asked("schema", False, mode, expected, stop='"age"'))
    assert (stopped.text, stopped.finish_reason, stopped.stop) == (text[: text.index('"age"')], "stop", '"age"')
    token = expected[5]
    ended = engine.generate(PROMPTS[0], **asked("schema", False, mode, expected, stop_token_ids=[token]))
    assert list(ended.ids) == expected[: expected.index(token) + 1]
    assert (ended.finish_reason, ended.stop) == ("stop", token)


@pytest.mark.parametrize("mode", ["off", "together"])
def test_a_whole_text_may_end_by_an_end_token_and_ends_by_itself_where_nothing_follows(
    engine: Engine, mode: str
) -> None:
    eos = TOKENIZERS["byte-level"].eos_token_id
    wish = {eos: 50.0}
    options = asked("open", False, mode, logit_bias=wish)
    result = engine.generate(PROMPTS[0], **options)
    assert (len(result.ids), result.ids[-1], result.stop) == (2, eos, eos)
    held = engine.generate(PROMPTS[0], **options, min_tokens=6)
    assert (len(held.ids), held.ids[-1]) == (7, eos)
    ignored = engine.generate(PROMPTS[0], **options, ignore_eos=True)
    assert eos not in ignored.ids
    assert ignored.finish_reason == "length"
    other = engine.generate(PROMPTS[0], **options, ignore_eos=True, stop_token_ids=[PROMPTS[0][0]])
    assert other.finish_reason in ("length", "stop")
    # No schema may be left before its end, however much the model wishes, and its end needs no token.
    for more in ({}, {"ignore_eos": True}, {"min_tokens": 60}):
        text = engine.generate(PROMPTS[0], **asked("schema", False, mode, logit_bias=wish), **more)
        assert (text.finish_reason, text.stop) == ("stop", None)
        assert whole(text, "schema")
        assert eos not in text.ids


def test_another_end_token_ends_a_whole_text_and_no_other(engine: Engine) -> None:
    """stop_token_ids are allowed where the text may end, though they are no text of the grammar."""
    tab = TOKENIZERS["byte-level"].encode("\t", add_special_tokens=False)[0]
    options = {"stop_token_ids": [tab], "logit_bias": {tab: 60.0}, "ignore_eos": True}
    result = engine.generate(PROMPTS[0], **asked("open", False, "together", **options))
    assert (len(result.ids), result.stop) == (2, tab)
    result = engine.generate(PROMPTS[0], **asked("regex", False, "together", **options))
    assert (result.finish_reason, result.stop) == ("stop", None)
    assert tab not in result.ids


@pytest.mark.parametrize(("family", "count"), [("byte-level", 100), ("pieces", 30)])
def test_a_hundred_of_a_hundred_schemas_come_out_whole(family: str, count: int) -> None:
    schemas = [random_schema(random.Random(seed)) for seed in range(count)]
    rng = random.Random(0)
    prompts = [[rng.randrange(4, 110) for _ in range(rng.randint(2, 9))] for _ in schemas]
    with opened(family) as engine:
        both: list[list[Result]] = []
        for speculation in ("off", {"adaptive": False, "max_nodes": 16}):
            streams = [
                engine.stream(
                    prompt,
                    constraint={"json_schema": schema},
                    max_tokens=400,
                    temperature=1.0,
                    seed=number,
                    speculation=speculation,
                )
                for number, (prompt, schema) in enumerate(zip(prompts, schemas, strict=True))
            ]
            both.append([stream.results(120)[0] for stream in streams])
    off, on = both
    assert [result.ids for result in on] == [result.ids for result in off]
    assert {result.finish_reason for result in on} == {"stop"}
    assert all(holds(schema, json.loads(result.text)) for schema, result in zip(schemas, on, strict=True))
    assert sum(result.stats.num_accepted_draft_tokens for result in on) > 5 * count


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema whose texts are short, so that random weights come to their end."""
    kinds = ["string", "integer", "enum", "boolean", "null"] + ["object", "object", "array"] * bool(depth)
    kind = "object" if depth == 2 else rng.choice(kinds)
    if kind == "object":
        names = rng.sample(["name", "age", "tags", "ok", "é", 'a "b"', "x-y", ""], rng.randint(1, 3))
        return {
            "type": "object",
            "properties": {name: random_schema(rng, depth - 1) for name in names},
            "required": rng.sample(names, rng.randint(1, len(names))),
            "additionalProperties": False,
        }
    if kind == "array":
        return {"type": "array", "items": random_schema(rng, depth - 1), "maxItems": rng.randint(1, 3)}
    if kind == "string":
        return {"type": "string", "maxLength": rng.randint(1, 8)}
    if kind == "integer":
        return {"type": "integer", "minimum": -9, "maximum": rng.randint(0, 2000)}
    if kind == "enum":
        return {"enum": rng.sample(["red", "green", 1, 2.5, None, True], 2)}
    return {"type": kind}


def holds(schema: Mapping[str, Any], value: Any) -> bool:
    """Whether a value is what a schema of `random_schema` says."""
    if "enum" in schema:
        return any(type(value) is type(choice) and value == choice for choice in schema["enum"])
    kind = schema["type"]
    if kind == "object":
        known = schema["properties"]
        inside = isinstance(value, dict) and set(schema["required"]) <= set(value) <= set(known)
        return inside and all(holds(known[name], part) for name, part in value.items())
    if kind == "array":
        inside = isinstance(value, list) and len(value) <= schema["maxItems"]
        return inside and all(holds(schema["items"], part) for part in value)
    if kind == "string":
        return isinstance(value, str) and len(value) <= schema["maxLength"]
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    return isinstance(value, bool) if kind == "boolean" else value is None


@pytest.mark.parametrize("fields", ["required", "auto"])
def test_tool_calls_come_out_as_they_were_asked_for(engine: Engine, fields: str) -> None:
    """By the fields of an OpenAI request, drafted and not, of a model that begins a call where it may choose."""
    parameters = {"type": "object", "properties": {"on": {"type": "boolean"}}, "additionalProperties": False}
    tools = [
        {"type": "function", "function": {"name": name, "parameters": parameters, "strict": True}}
        for name in ("lamp", "heating")
    ]
    constraint = constraint_of({"tools": tools, "tool_choice": fields, "parallel_tool_calls": False})
    opening = TOKENIZERS["byte-level"].encode("<tool_call>", add_special_tokens=False)

    def wish(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        for token in opening[ids.shape[1] - len(PROMPTS[0]) :][:1]:
            logits[:, token] += 1000.0
        return logits

    options: dict[str, Any] = {"constraint": constraint, "max_tokens": 200, "temperature": 1.2, "processors": [wish]}
    off, on = (
        [engine.generate(PROMPTS[0], **options, seed=seed, speculation=speculation) for seed in range(4)]
        for speculation in ("off", MODES["together"])
    )
    assert [result.ids for result in on] == [result.ids for result in off]
    for result in on:
        assert result.finish_reason == "stop"
        begin, end = "<tool_call>\n", "\n</tool_call>"
        assert result.text.startswith(begin)
        assert result.text.endswith(end)
        said = json.loads(result.text[len(begin) : -len(end)])
        assert said["name"] in ("lamp", "heating")
        assert set(said["arguments"]) <= {"on"}
    assert sum(result.stats.by_drafter["grammar"].accepted for result in on) > 20


def test_the_readme_of_the_plugin_runs(engine: Engine) -> None:
    readme = (Path(__file__).parents[2] / "plugins" / "specgen-grammar" / "README.md").read_text()
    sources = re.findall(r"^```python\n(.*?)^```$", readme, flags=re.MULTILINE | re.DOTALL)
    namespace: dict[str, Any] = {"engine": engine}
    for source in sources:
        exec(source, namespace)
    assert len(sources) == 2


# What is scored.


def rows_of(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[int]]]:
    """The tokens and parents of each tree that is scored from now on, the root's row left out."""
    seen: list[tuple[list[int], list[int]]] = []
    draft = engine._core._draft

    def watching(work: Any) -> Any:
        drafted = draft(work)
        seen.extend((list(item.draft.tree.tokens), list(item.draft.tree.parents)) for item in drafted)
        return drafted

    monkeypatch.setattr(engine._core, "_draft", watching)
    return seen


def test_forbidden_nodes_never_become_rows(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An honest drafter with two wrong siblings beside each guess: hardly any of those is a letter from a to f."""
    expected = truth("byte-level", "regex", 0, False)
    letters = re_tokens("abcdef, .")
    seen = rows_of(engine, monkeypatch)
    pruned = engine.generate(PROMPTS[0], **asked("regex", False, "half", expected))
    rows = sum(len(tokens) for tokens, _ in seen)
    assert rows == pruned.stats.num_draft_tokens
    assert all(set(tokens) <= letters for tokens, _ in seen)
    monkeypatch.setattr("specgen.sampling.constraint.Constrained.prune", lambda self, tree: tree)
    seen.clear()
    whole = engine.generate(PROMPTS[0], **asked("regex", False, "half", expected))
    assert whole.ids == pruned.ids
    assert whole.stats.num_accepted_draft_tokens == pruned.stats.num_accepted_draft_tokens
    assert sum(len(tokens) for tokens, _ in seen) > 2 * rows


def re_tokens(letters: str) -> set[int]:
    """The tokens that are made of `letters` alone."""
    tokenizer = TOKENIZERS["byte-level"]
    return {token for token in range(len(tokenizer)) if set(tokenizer.decode([token])) <= set(letters)}


@pytest.mark.parametrize("seed", range(12))
def test_pruning_changes_no_token(engine: Engine, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    rng = random.Random(seed)
    schema, mode = random_schema(rng), rng.choice(["half", "together", "lookup", "grammar"])
    prompt = [rng.randrange(4, 110) for _ in range(rng.randint(1, 12))]
    options: dict[str, Any] = {
        "constraint": {"json_schema": schema},
        "max_tokens": 200,
        "temperature": rng.choice([0.0, 0.7, 1.5]),
        "min_p": rng.choice([None, 0.05]),
        "presence_penalty": rng.choice([0.0, 0.8]),
        "repetition_penalty": rng.choice([None, 1.2]),
        "seed": seed,
    }
    off = engine.generate(prompt, **options, speculation="off")
    drafted = {"speculation": MODES[mode], "prediction": off.ids}
    pruned = engine.generate(prompt, **options, **drafted)
    monkeypatch.setattr("specgen.sampling.constraint.Constrained.prune", lambda self, tree: tree)
    unpruned = engine.generate(prompt, **options, **drafted)
    assert off.ids == pruned.ids == unpruned.ids


def test_one_mask_is_computed_for_each_committed_token(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from specgen_grammar.matcher import _Following

    calls = 0
    allowed = _Following.allowed

    def counting(self: _Following) -> Any:
        nonlocal calls
        calls += 1
        return allowed(self)

    monkeypatch.setattr(_Following, "allowed", counting)
    expected = truth("byte-level", "schema", 0, False)
    for mode in ("off", "together", "sure"):
        calls = 0
        result = engine.generate(PROMPTS[0], **asked("schema", False, mode, expected))
        at_admission = 1
        assert calls == len(result.ids) + at_admission


def test_what_is_forced_is_drafted_and_always_taken(engine: Engine) -> None:
    names = ["temperature", "humidity", "pressure"]
    schema = {
        "type": "object",
        "properties": {name: {"type": "boolean"} for name in names},
        "required": names,
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
    options = {"constraint": {"json_schema": schema}, "max_tokens": 200, **SAMPLED}
    plain = engine.generate(PROMPTS[0], **options, speculation="off")
    drafted = engine.generate(PROMPTS[0], **options, speculation=MODES["grammar"])
    assert drafted.ids == plain.ids
    share = drafted.stats.by_drafter["grammar"]
    assert share.offered == share.accepted > len(plain.ids) // 2
    assert drafted.stats.num_spec_steps < len(plain.ids) // 2


# What goes wrong.

FAULTS: dict[str, tuple[Any, str]] = {
    "no such kind": ({"xml": "a"}, "unknown constraint 'xml'; choices: choice, grammar, json_object"),
    "two kinds": ({"regex": "a", "choice": ["a"]}, "it must be one kind and its value"),
    "none": ({}, "it must be one kind and its value"),
    "a number": (5, "constraint is 5; it must be one kind and its value"),
    "a list": (["regex", "a"], "it must be one kind and its value"),
    "no JSON": ({"json_schema": {"const": {1, 2}}}, "constraint 'json_schema' must hold JSON"),
    "not a number": ({"json_schema": {"const": float("nan")}}, "constraint 'json_schema' must hold JSON"),
    "malformed schema": ({"json_schema": {"type": 5}}, "json_schema cannot be compiled: type must be"),
    "unsupported keyword": ({"json_schema": {"not": {"type": "null"}}}, "Unimplemented keys"),
    "malformed text": ({"json_schema": "{"}, "json_schema is no JSON"),
    "malformed regex": ({"regex": "("}, "regex cannot be compiled"),
    "malformed grammar": ({"grammar": "start: x"}, "grammar cannot be compiled"),
    "empty choice": ({"choice": []}, "choice is []"),
    "too long": ({"regex": "a" * 70_000}, "at most 65536 are compiled"),
}


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


FAULTS["too deep"] = ({"json_schema": deep(300)}, "json_schema cannot be compiled: recursion limit")
FAULTS["far too deep"] = ({"json_schema": deep(100_000)}, "constraint 'json_schema' must hold JSON")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_constraint_is_refused_and_nobody_else_notices(engine: Engine, fault: str) -> None:
    constraint, message = FAULTS[fault]
    other = engine.stream(PROMPTS[1], **asked("schema", True, "together"))
    with pytest.raises(InvalidRequest) as caught:
        engine.generate(PROMPTS[0], constraint=constraint, max_tokens=8)
    assert message in str(caught.value)
    assert caught.value.param == "constraint"
    assert list(other.results(60)[0].ids) == truth("byte-level", "schema", 1, True)


def test_a_grammar_that_fails_on_the_way_fails_its_own_request(engine: Engine) -> None:
    wide = "start: " + " | ".join(f'"a{number}"' for number in range(3000))
    other = engine.stream(PROMPTS[1], **asked("schema", True, "together"))
    with pytest.raises(RequestFailed, match="the grammar cannot be followed"):
        engine.generate(PROMPTS[0], constraint={"grammar": wide}, max_tokens=8, speculation=MODES["together"])
    assert list(other.results(60)[0].ids) == truth("byte-level", "schema", 1, True)


def test_bans_that_leave_nothing_fail_by_name(engine: Engine) -> None:
    with pytest.raises(RequestFailed, match="no token is left to draw"):
        engine.generate(PROMPTS[0], **asked("schema", False, "together", allowed_token_ids=[60]))


@pytest.mark.slow
def test_the_real_model_says_what_it_should(smollm: PreTrainedModel, smollm_tokenizer: Any) -> None:
    """A hundred prompts on SmolLM2: all texts whole, and equal with and without drafts."""
    subjects = [
        "an apple",
        "a dog",
        "Paris",
        "the moon",
        "a bicycle",
        "the sea",
        "a violin",
        "coffee",
        "snow",
        "a train",
    ]
    schema = {
        "type": "object",
        "properties": {
            "title": {"type": "string", "maxLength": 40},
            "category": {"enum": ["animal", "place", "thing"]},
            "score": {"type": "integer", "minimum": 0, "maximum": 10},
            "keywords": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 3},
        },
        "required": ["title", "category", "score", "keywords"],
        "additionalProperties": False,
    }
    prompts = [
        [{"role": "user", "content": f"{number}. Describe {subject} as JSON with title, category, score, keywords."}]
        for number in range(10)
        for subject in subjects
    ]
    with Engine(smollm, smollm_tokenizer, kv_tokens=16384) as engine:
        options = {"constraint": {"json_schema": schema}, "max_tokens": 200}
        on, off = (
            engine.generate(prompts, **options, speculation=speculation)
            for speculation in ({"adaptive": False, "max_nodes": 12}, "off")
        )
        engine.check()
    assert [result.ids for result in on] == [result.ids for result in off]
    assert {result.finish_reason for result in on} == {"stop"}
    for result in on:
        said = json.loads(result.text)
        assert list(said) == schema["required"]
        assert said["category"] in ("animal", "place", "thing")
        assert 0 <= said["score"] <= 10
    assert sum(result.stats.num_accepted_draft_tokens for result in on) > 0
