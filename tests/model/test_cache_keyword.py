"""A model is handed its KV cache by the name that its forward knows it by, whatever the release of transformers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from specgen.kv.formats import FORMATS
from specgen.model.cache_keyword import cache_keyword, cache_of
from specgen.model.runner import load_runner
from tests.support.decoding import decode, generate
from tests.support.tiny import build

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ((5, 17, 40, 8, 8, 61, 33, 90, 12), (70, 11, 4))


class Newer(LlamaForCausalLM):
    """Knows its KV cache as `cache` alone, and returns it so."""

    def forward(
        self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, cache: Any = None, **rest: Any
    ) -> Any:
        return answer(self, "cache", cache, rest, (input_ids, attention_mask, position_ids))


class Older(LlamaForCausalLM):
    """The same with `past_key_values`."""

    def forward(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        **rest: Any,
    ) -> Any:
        return answer(self, "past_key_values", past_key_values, rest, (input_ids, attention_mask, position_ids))


class Oldest(LlamaForCausalLM):
    """The same with `cache_params`."""

    def forward(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        cache_params: Any = None,
        **rest: Any,
    ) -> Any:
        return answer(self, "cache_params", cache_params, rest, (input_ids, attention_mask, position_ids))


def answer(model: Any, name: str, cache: Any, rest: dict[str, Any], inputs: tuple[Any, ...]) -> Any:
    """What Llama says, its KV cache under `name`. Raises TypeError for a KV cache by any other name."""
    if others := rest.keys() - {"use_cache", "logits_to_keep"}:
        raise TypeError(f"forward() got an unexpected argument: {others}")
    output = LlamaForCausalLM.forward(model, *inputs, **{cache_keyword(build("llama")): cache}, **rest)
    return SimpleNamespace(logits=output.logits, **{name: cache_of(output)})


@pytest.mark.parametrize("kind", [Newer, Older, Oldest])
@pytest.mark.parametrize("kv_format", ["native", "int4"])
def test_a_model_is_packed_whatever_it_calls_its_cache(kind: type[LlamaForCausalLM], kv_format: str) -> None:
    """With formats that ask the model for its keys before the first is written, too."""
    plain, renamed = build("llama"), build("llama")
    renamed.__class__ = kind
    kv = FORMATS[kv_format]()
    truths = [generate(plain, prompt, 16) for prompt in PROMPTS]
    if not kv.lossless:
        truths = decode(load_runner(plain, kv_tokens=640, kv_format=kv), PROMPTS, truths)
    assert decode(load_runner(renamed, kv_tokens=640, kv_format=kv), PROMPTS, truths) == truths


def test_an_output_is_not_asked_for_names_that_it_warns_of(recwarn: pytest.WarningsRecorder) -> None:
    assert cache_of(CausalLMOutputWithPast()) is None
    assert not recwarn.list
