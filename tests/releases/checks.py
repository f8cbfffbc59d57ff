"""What holds on every release of the dependencies: exact or refused by name, the drop-in, a real model's text.

Every third model of the table; the other two thirds would cost more than they find. Which third stays the same, so that
a failure tells of a release and not of a day.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, PreTrainedModel, RepetitionPenaltyLogitsProcessor

import specgen
from specgen.model.runner import ModelRunner
from tests.support.architectures import KV_TOKENS, NEW_TOKENS, PROMPTS, SUPPORTED
from tests.support.decoding import decode, generate
from tests.support.real import by_transformers
from tests.support.refusal import OLDER, target_or_refusal
from tests.support.tiny import MODELS, build

DROP_IN: dict[str, dict[str, Any]] = {
    "greedy": {},
    "return_dict_in_generate": {"return_dict_in_generate": True},
    "no cache": {"use_cache": False},
    "penalty": {"repetition_penalty": 1.4},
    "n-grams": {"no_repeat_ngram_size": 2},
    "least tokens": {"min_new_tokens": 6, "eos_token_id": list(range(3, 40))},
    "ends": {"eos_token_id": [7, 12, 19, 33], "pad_token_id": 0},
    "bad words": {"bad_words_ids": [[5], [8, 9]]},
    "processor": {"logits_processor": [RepetitionPenaltyLogitsProcessor(1.3)]},
}


@pytest.fixture(scope="module", autouse=True)
def on_one_thread(one_thread: None) -> None:
    """Tiny models."""


def test_what_is_tested_is_what_a_user_installs() -> None:
    assert Path(specgen.__file__).is_relative_to(sys.prefix)


@pytest.mark.parametrize("name", MODELS[::3])
def test_a_model_is_exact_or_refused_by_name(name: str) -> None:
    kind = name.split(" ", maxsplit=1)[0]
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers {version('transformers')} has no {kind}")
    model = build(name)
    if isinstance(found := target_or_refusal(model, kv_tokens=KV_TOKENS), ModelRunner):
        truths = [generate(model, prompt, NEW_TOKENS) for prompt in PROMPTS]
        assert decode(found, PROMPTS, truths) == truths
    else:
        # An older release may not offer the interface; a newer one that takes it away breaks what README promises.
        assert OLDER or name not in SUPPORTED, found


@pytest.fixture(scope="module")
def tiny() -> PreTrainedModel:
    return build("llama")


@pytest.mark.parametrize("given", DROP_IN.values(), ids=DROP_IN)
def test_the_drop_in_says_what_generate_says(tiny: PreTrainedModel, given: dict[str, Any]) -> None:
    """A batch of two, padded on the left."""
    ids = torch.tensor([list(PROMPTS[0]), [0] * (len(PROMPTS[0]) - len(PROMPTS[1])) + list(PROMPTS[1])])
    options = {"attention_mask": (ids > 0).long(), "do_sample": False, "max_new_tokens": 24, "pad_token_id": 0, **given}
    alone, ours = tiny.generate(ids, **options), tiny.generate(ids, **options, custom_generate=specgen.custom_generate)
    if given.get("return_dict_in_generate"):
        alone, ours = alone.sequences, ours.sequences
    assert ours.tolist() == alone.tolist()


@pytest.mark.parametrize("kv_format", ["native", "int8", "int4"])
def test_a_real_text_is_the_models_own_with_any_draft(smollm: Any, smollm_tokenizer: Any, kv_format: str) -> None:
    prompt = "List three colours, then say the list again: red, green, blue."
    drafting = {"adaptive": False, "drafters": ["prompt-lookup", "recycling"]}
    with specgen.wrap(smollm, smollm_tokenizer, kv_format=kv_format, kv_tokens=2048) as engine:
        for sampling in ({"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9, "seed": 5}):
            off = engine.generate(prompt, max_tokens=32, speculation="off", **sampling)
            assert engine.generate(prompt, max_tokens=32, speculation=drafting, **sampling).ids == off.ids
            if kv_format == "native" and not sampling["temperature"]:
                ids = smollm_tokenizer(prompt)["input_ids"]
                assert off.ids == by_transformers(smollm, ids, 32)
        engine.check()
