"""An engine's core without its thread, whose every step is checked, and what it is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from specgen_echo import echo
from transformers import PreTrainedModel

from specgen import (
    Drafter,
    DrafterSetup,
    Result,
    SamplingParams,
    Speculation,
    StepOutput,
)
from specgen.context.pipeline import ContextPipeline
from specgen.draft.features import Wanted
from specgen.engine.core import EngineCore
from specgen.engine.request_builder import RequestBuilder
from specgen.model.runner import load_runner
from specgen.plugins.manager import load_plugins
from specgen.sampling.constraint import Constraints, ConstraintSetup
from tests.support.tiny import VOCABULARY

PROMPTS = (
    [9, 31, 40, 9, 31, 77],
    [5],
    list(range(20, 60)),
    [3, 4, 3, 4, 3, 4, 3, 4, 3],
    [88, 1, 60, 61, 62, 88, 1, 60],
    [70] * 17,
    [12, 90, 33],
    [44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 44, 45],
)


def first_layers(model: PreTrainedModel, count: int) -> PreTrainedModel:
    cut = deepcopy(model)
    cut.config.num_hidden_layers = count
    cut.model.layers = cut.model.layers[:count]
    return cut


def greedy(model: PreTrainedModel, prompt: Sequence[int], new_tokens: int, **settings: Any) -> list[int]:
    """The new tokens of transformers' own greedy generate."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    text = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, **settings)
    return text[0, len(prompt) :].tolist()


class Bench:
    """An engine's core without its thread. Every step is looked at: one forward, nothing lost, nothing held."""

    def __init__(
        self,
        model: PreTrainedModel,
        drafters: Mapping[str, Drafter] | None = None,
        *,
        tokenizer: Any = None,
        kv_tokens: int = 2048,
        max_context: int | None = None,
        max_num_seqs: int = 16,
        max_prefill_tokens: int = 512,
        compile: bool = False,
    ) -> None:
        layers = Wanted.union(drafter.wanted for drafter in (drafters or {}).values()).layers
        self.target = load_runner(model, kv_tokens=kv_tokens, max_context=max_context, layers=layers, compile=compile)
        # Without the prefix cache: rows are counted here, and every page must be free in the end.
        self.core = EngineCore(
            self.target,
            drafters or {},
            max_num_seqs=max_num_seqs,
            max_prefill_tokens=max_prefill_tokens,
            prefix_cache=None,
        )
        stages = load_plugins().collect("context_stages")
        self._builder = RequestBuilder(
            tokenizer=tokenizer,
            model=model,
            vocab_size=self.target.vocab_size,
            context_length=self.target.context_length,
            device=self.target.device,
            pipeline=ContextPipeline.build(("chat-template",), stages, tokenizer),
            drafters=tuple(drafters or ()),
            plugin_processors={},
            constraints=Constraints({}, ConstraintSetup(tokenizer, self.target.vocab_size)),
            adapter_named={}.__getitem__,
            speculation=Speculation(),
        )
        self.outputs: dict[tuple[str, int], list[StepOutput]] = {}
        self.results: dict[tuple[str, int], Result] = {}

    def add(self, prompt: Sequence[int], **options: Any) -> str:
        """Queue a request; its name is what the other methods take."""
        request, samples = self._builder.build(list(prompt), SamplingParams.of(options), copies=False)
        self.core.add(request, samples)
        return request.id

    def step(self) -> list[StepOutput]:
        """One step, which must be one forward."""
        forwards = self.target.forwards
        outputs = self.core.step()
        assert self.target.forwards == forwards + 1
        return self.take(outputs)

    def take(self, outputs: list[StepOutput]) -> list[StepOutput]:
        """Keep outputs, and check that the parts make the whole."""
        self.core.check()
        for output in outputs:
            key = output.request_id, output.index
            assert key not in self.results, "an output behind the last one"
            self.outputs.setdefault(key, []).append(output)
            if output.result:
                parts = self.outputs[key]
                assert output.result.ids == tuple(token for part in parts for token in part.tokens)
                assert output.result.text == "".join(part.text for part in parts)
                assert output.result.logprobs == tuple(score for part in parts for score in part.logprobs)
                self.results[key] = output.result
        return outputs

    def run(self) -> None:
        """Steps until nothing is left; then nothing is held."""
        while self.core.busy:
            self.step()
        pool = self.target.pool
        assert pool.free_pages == pool.pages

    def cancel(self, name: str) -> list[StepOutput]:
        return self.take(self.core.cancel(name))

    def result(self, name: str, index: int = 0) -> Result:
        return self.results[name, index]

    def alone(self, prompt: Sequence[int], **options: Any) -> Result:
        """One request by itself from start to end."""
        name = self.add(prompt, **options)
        self.run()
        return self.result(name)


def echoes(hit_rate: float, **options: Any) -> Drafter:
    return echo(DrafterSetup(VOCABULARY, options={"hit_rate": hit_rate, **options}))
