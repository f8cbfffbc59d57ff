"""The public API as users write it. `make types` checks it; nothing here runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import assert_type

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, RepetitionPenaltyLogitsProcessor

import specgen
from specgen import (
    Chat,
    Constraint,
    ConstraintSetup,
    Context,
    Drafter,
    DrafterSetup,
    DraftHints,
    DraftSession,
    Engine,
    EngineConfig,
    EngineOptions,
    KVFormat,
    LogitsProcessor,
    Matcher,
    Message,
    PreparedRequest,
    Prompt,
    Result,
    SamplingOptions,
    SamplingParams,
    Speculation,
    StepOutput,
    Stream,
    TokenTree,
    hookimpl,
)


def one_line(model: PreTrainedModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained("model")
    assert_type(specgen.generate(model, "Hello", tokenizer=tokenizer, max_tokens=8), Result)
    assert_type(specgen.generate(model, ["Hello", "Bye"], tokenizer=tokenizer), list[Result])
    assert_type(specgen.wrap(model, tokenizer, kv_format="int8"), Engine)


def loading(folder: Path) -> None:
    engine = Engine.from_pretrained(folder, dtype="bfloat16", device="cpu", draft_model="small", max_num_seqs=4)
    assert_type(engine, Engine)
    options: EngineOptions = {"drafters": {"prompt-lookup": {}}, "batch_invariant": True, "compile": "background"}
    with Engine.from_pretrained(str(folder), **options) as other:
        assert_type(other, Engine)
    Engine.from_pretrained(folder, config=EngineConfig(kv_tokens=2048), model_options={"revision": "main"})


def generating(engine: Engine) -> None:
    assert_type(engine.generate("Hello", max_tokens=8), Result)
    assert_type(engine.generate([1, 2, 3]), Result)
    assert_type(engine.generate([{"role": "user", "content": "Hello"}]), Result)
    assert_type(engine.generate(Chat([{"role": "user", "content": "Hello"}])), Result)
    assert_type(engine.generate(["Hello", "Bye"], temperature=0.8, seed=1), list[Result])
    assert_type(engine.generate([[1, 2], [3]], stop=["\n"], n=1), list[Result])
    params = SamplingParams(temperature=0.0, max_tokens=4, speculation=Speculation(max_nodes=8))
    assert_type(engine.generate("Hello", params), Result)
    options: SamplingOptions = {"constraint": {"json_schema": {"type": "object"}}, "speculation": "off"}
    result = engine.generate("Hello", **options)
    assert_type(result.text, str)
    assert_type(result.ids, tuple[int, ...])
    assert_type(result.usage.total_tokens, int)
    assert_type(result.stats.mean_acceptance_length, float)
    constraint = Constraint.of({"regex": "a+"})
    engine.generate("Hello", constraint=constraint, processors=[RepetitionPenaltyLogitsProcessor(1.2), forbid])


def forbid(ids: Tensor, logits: Tensor) -> Tensor:
    return logits.index_fill(1, ids[0], float("-inf"))


def streaming(engine: Engine) -> None:
    with engine.stream("Hello", max_tokens=8) as stream:
        assert_type(stream, Stream)
        for output in stream:
            assert_type(output, StepOutput)
            assert_type(output.text, str)
    assert_type(engine.stream([1, 2]).results(timeout=1.0), list[Result])
    prepared = engine.prepare("Hello", max_tokens=8)
    assert_type(prepared, PreparedRequest)
    assert_type(engine.start(prepared), list[Stream])


async def with_asyncio(engine: Engine) -> None:
    assert_type(await engine.agenerate("Hello", max_tokens=8), Result)
    assert_type(await engine.agenerate(["Hello", "Bye"]), list[Result])
    async with engine.stream("Hello") as stream:
        async for output in stream:
            assert_type(output, StepOutput)
        assert_type(await stream.aresults(), list[Result])


def with_state(engine: Engine, prompt: Prompt) -> None:
    engine.adapters.load("pirate", "adapters/pirate")
    assert_type(engine.generate(prompt, adapter="pirate"), Result)
    engine.prefix.clear()
    assert_type(engine.load.running, int)
    assert_type(engine.counters.accepted, int)
    assert_type(engine.encode("Hello"), list[int])
    engine.refresh()


def drop_in(ids: torch.LongTensor) -> None:
    model = AutoModelForCausalLM.from_pretrained("model")
    # transformers' own decorator hides `self` from type checkers.
    model.generate(ids, custom_generate=specgen.custom_generate, speculation="off")  # type: ignore[misc]


class Session(DraftSession):
    def propose(self, max_nodes: int) -> TokenTree:
        return specgen.chain([1, 2, 3][:max_nodes])

    def commit(self, tokens: Sequence[int]) -> None:
        pass


class Guess(Drafter):
    def open(self, prompt: Sequence[int], hints: DraftHints) -> DraftSession:
        return Session()


def guess(setup: DrafterSetup) -> Drafter:
    if setup.load_model is not None:
        assert_type(setup.load_model("small").model.vocab_size, int)
    return Guess()


class Plugin:
    @hookimpl
    def drafters(self) -> Mapping[str, specgen.DrafterFactory]:
        return {"guess": guess}

    @hookimpl
    def logits_processors(self) -> Mapping[str, specgen.LogitsProcessorFactory]:
        return {"forbid": lambda tokenizer: forbid}


def stage(context: Context) -> Context:
    return context


def constraint(setup: ConstraintSetup, matcher: Matcher) -> Matcher:
    return matcher.copy()


def kinds(kv_format: KVFormat, messages: list[Message], processor: LogitsProcessor) -> tuple[str, int]:
    return kv_format.name, len(messages)
