"""What users get wrong: every mistake is a typed error that names field, value and choices, and harms nobody else.

Each case is tried while another request runs on the same engine, which must not notice.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import fields
from transformers import LogitsProcessorList, PreTrainedModel, TemperatureLogitsWarper

import specgen
from specgen import (
    ContextLengthExceeded,
    DrafterMismatch,
    Engine,
    InvalidRequest,
    LogitsProcessorFactory,
    SamplingParams,
    Speculation,
    UnknownName,
)
from specgen._base.option_names import REQUEST
from specgen.config import EngineConfig
from specgen.model.loading import load_tokenizer
from specgen.plugins.manager import load_plugins
from tests.support.tiny import CONTEXT, VOCABULARY, build
from tests.support.tokenizers import sentence_piece

PROMPT = [9, 31, 40, 9, 31, 77]
LONG = 60


pytestmark = pytest.mark.usefixtures("one_thread")


class Letters:
    """A tokenizer whose token t is the character behind the space by t."""

    eos_token_id = None
    chat_template = None

    def __call__(self, text: str) -> Mapping[str, list[int]]:
        return {"input_ids": self.encode(text)}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) - 32 for letter in text]

    def decode(self, token_ids: Sequence[int], **options: bool) -> str:
        return "".join(chr(32 + token) for token in token_ids)


class Picky:
    """A plugin with a processor that takes one option and wants it positive."""

    @staticmethod
    @specgen.hookimpl
    def logits_processors() -> Mapping[str, LogitsProcessorFactory]:
        def picky(tokenizer: Any, *, strength: float) -> Any:
            if strength <= 0:
                raise ValueError("strength must be positive")
            return lambda ids, scores: scores * strength

        return {"picky": picky}


class Uncopyable:
    """A processor that holds something of which there is one."""

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores

    def __deepcopy__(self, memo: object) -> Uncopyable:
        raise TypeError("there is only one of me")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama")


@pytest.fixture(scope="module")
def engine(model: PreTrainedModel) -> Iterator[Engine]:
    plugins = load_plugins()
    plugins.register(Picky, "picky")
    with Engine(model, Letters(), plugins=plugins, kv_tokens=2048) as engine:
        yield engine


@pytest.fixture(scope="module")
def wordless(model: PreTrainedModel) -> Iterator[Engine]:
    """An engine without a tokenizer."""
    with Engine(model, kv_tokens=2048) as engine:
        yield engine


@pytest.fixture(scope="module")
def neighbours(engine: Engine, wordless: Engine) -> tuple[int, ...]:
    """What the other request says when nobody makes mistakes beside it."""
    texts = {each.generate(PROMPT, max_tokens=LONG, temperature=1.2, seed=3).ids for each in (engine, wordless)}
    assert len(texts) == 1
    return texts.pop()


def refused(engine: Engine, neighbours: tuple[int, ...], call: Callable[[], object]) -> InvalidRequest:
    """The error of `call`, made while another request runs; that one goes on to its end."""
    stream = engine.stream(PROMPT, max_tokens=LONG, temperature=1.2, seed=3)
    next(stream)
    with pytest.raises(InvalidRequest) as caught:
        call()
    assert stream.results(30)[0].ids == neighbours
    engine.check()
    return caught.value


# Prompts.

PROMPTS: dict[str, tuple[Any, str, str]] = {
    "nothing": ([], "prompt", r"the prompt is \[\]; it must be text, a list of token ids or a list of messages"),
    "no text": ("", "prompt", "the prompt has no tokens"),
    "None": (None, "prompt", "the prompt is None"),
    "a number": (5, "prompt", "the prompt is 5"),
    "one message": ({"role": "user", "content": "hi"}, "prompt", "the prompt is {'role'.*one message is a list of one"),
    "what a tokenizer returns": ({"input_ids": [5, 6]}, "prompt", "the prompt is {'input_ids'.*give `input_ids`, as a"),
    "another mapping": ({"text": "hi"}, "prompt", "the prompt is {'text': 'hi'}; it must be text.*, not empty$"),
    "half a surrogate pair": ("a\ud83d", "prompt", r"the prompt holds '\\ud83d', which is half a surrogate pair"),
    "bytes": (b"hi", "prompt", "the prompt is b'hi'; it must be text"),
    "an array": (np.array([5, 6]), "prompt", r"the prompt is array.*give its `tolist\(\)`"),
    "a list of tensors": ([torch.tensor(5)], "prompt", r"the prompt holds tensor\(5\).*give its `tolist\(\)`"),
    "a batch of tensors": (torch.tensor([[5, 6]]), "prompt", r"the prompt is tensor\(\[\[5, 6\]\]\).*`tolist\(\)`"),
    "an id too high": ([5, VOCABULARY], "prompt", f"prompt holds {VOCABULARY}; token ids are 0 to {VOCABULARY - 1}"),
    "a negative id": ([5, -1], "prompt", f"prompt holds -1; token ids are 0 to {VOCABULARY - 1}"),
    "a fraction": ([5, 1.5], "prompt", "the prompt holds 1.5"),
    "not a number": ([5, math.nan], "prompt", "the prompt holds nan"),
    "a truth": ([5, True], "prompt", "the prompt holds True"),
    "words behind ids": ([5, "six"], "prompt", "the prompt holds 'six'"),
    "a message behind ids": ([5, {"role": "user"}], "prompt", "the prompt holds {'role'"),
    "an empty prompt among others": ([[5, 6], []], "prompt", r"the prompt is \[\]"),
    "an id among prompts": ([[5, 6], 7], "prompt", "the prompt is 7"),
    "a tensor": (torch.tensor([5, 6]), "prompt", r"the prompt is tensor\(\[5, 6\]\)"),
    "an array of fractions": ([np.float32(5)], "prompt", "the prompt holds"),
    "messages where there is no template": ([{"role": "user", "content": "hi"}], "messages", "no chat template"),
    "too long": ([5] * CONTEXT, "prompt", f"the prompt has {CONTEXT} tokens; at most {CONTEXT - 1} fit"),
}


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, "generate") for name in PROMPTS] + [(name, "stream") for name in PROMPTS if "among" not in name],
)
def test_a_prompt_that_cannot_be_read_is_refused(
    engine: Engine, neighbours: tuple[int, ...], name: str, method: str
) -> None:
    prompt, param, message = PROMPTS[name]
    error = refused(engine, neighbours, lambda: getattr(engine, method)(prompt, max_tokens=4))
    assert error.param == param
    assert says(error, message)
    assert isinstance(error, ContextLengthExceeded) == (name == "too long")


def says(error: InvalidRequest, message: str) -> bool:
    """Whether the message holds what it should, which is given as a pattern."""
    return re.search(message, str(error)) is not None


def test_the_longest_prompt_that_fits_is_served(engine: Engine) -> None:
    result = engine.generate([5] * (CONTEXT - 1))
    assert (len(result.ids), result.finish_reason) == (1, "length")


@pytest.mark.parametrize(
    "prompt",
    [
        [np.int64(9), np.int32(31), np.uint8(40)],
        list(np.array([9, 31, 40])),
        (9, 31, 40),
        range(9, 12),
        torch.tensor([9, 31, 40]).tolist(),
    ],
    ids=["numpy numbers", "list of an array", "tuple", "range", "list of a tensor"],
)
def test_whole_numbers_of_any_kind_are_ids(engine: Engine, prompt: Sequence[int]) -> None:
    expected = engine.generate([int(token) for token in prompt], max_tokens=5)
    assert engine.generate(prompt, max_tokens=5).ids == expected.ids


# Options.

HUGE = 2**64
OPTIONS: list[tuple[str, Any, str]] = [
    ("temperature", math.nan, "temperature is nan; it must be a finite number from 0"),
    ("temperature", math.inf, "temperature is inf; it must be a finite number from 0"),
    ("temperature", -0.1, "temperature is -0.1; it must be a finite number from 0"),
    ("temperature", "hot", "temperature is 'hot'; it must be a finite number from 0"),
    ("temperature", True, "temperature is True; it must be a finite number from 0"),
    ("temperature", [0.5], r"temperature is \(0.5,\); it must be a finite number from 0"),
    ("temperature", 10**400, "temperature is 1000.*; it must be a finite number from 0"),
    ("presence_penalty", -(10**400), "presence_penalty is -1000.*; it must be a finite number from -2 to 2"),
    ("top_p", torch.tensor(0.5), r"top_p is tensor\(0.5.*; it must be a finite number above 0 to 1"),
    ("top_p", 0, "top_p is 0; it must be a finite number above 0 to 1"),
    ("top_p", 1.01, "top_p is 1.01; it must be a finite number above 0 to 1"),
    ("top_p", math.nan, "top_p is nan"),
    ("typical_p", 0.0, "typical_p is 0.0; it must be a finite number above 0 to 1"),
    ("min_p", -0.5, "min_p is -0.5; it must be a finite number from 0 to 1"),
    ("min_p", 2, "min_p is 2; it must be a finite number from 0 to 1"),
    ("top_k", -1, "top_k is -1; it must be a whole number, at least 0"),
    ("top_k", 2.0, "top_k is 2.0; it must be a whole number, at least 0"),
    ("top_k", True, "top_k is True; it must be a whole number, at least 0"),
    ("repetition_penalty", 0, "repetition_penalty is 0; it must be a finite number above 0"),
    ("repetition_penalty", -1.0, "repetition_penalty is -1.0"),
    ("presence_penalty", 2.1, "presence_penalty is 2.1; it must be a finite number from -2 to 2"),
    ("frequency_penalty", "x", "frequency_penalty is 'x'; it must be a finite number from -2 to 2"),
    ("no_repeat_ngram_size", -2, "no_repeat_ngram_size is -2; it must be a whole number, at least 0"),
    ("min_tokens", -1, "min_tokens is -1; it must be a whole number, at least 0"),
    ("min_tokens", 9, "min_tokens 9 exceeds max_tokens 4"),
    ("max_tokens", 0, "max_tokens is 0; it must be a whole number, at least 1"),
    ("max_tokens", True, "max_tokens is True; it must be a whole number, at least 1"),
    ("max_tokens", 1e3, "max_tokens is 1000.0; it must be a whole number, at least 1"),
    ("seed", -1, f"seed is -1; it must be a whole number, 0 to {HUGE - 1}"),
    ("seed", HUGE, f"seed is {HUGE}; it must be a whole number, 0 to {HUGE - 1}"),
    ("seed", "abc", "seed is 'abc'; it must be a whole number"),
    ("n", 0, "n is 0; it must be a whole number, 1 to 128"),
    ("n", 129, "n is 129; it must be a whole number, 1 to 128"),
    ("n", True, "n is True; it must be a whole number, 1 to 128"),
    ("logprobs", 21, "logprobs is 21; it must be a whole number, 0 to 20"),
    ("logprobs", True, "logprobs is True; it must be a whole number, 0 to 20"),
    ("logit_bias", {VOCABULARY: 1.0}, f"logit_bias holds {VOCABULARY}; token ids are 0 to {VOCABULARY - 1}"),
    ("logit_bias", {"5": 1.0}, "logit_bias '5': 1.0 is not token id: finite number"),
    ("logit_bias", {5: math.inf}, "logit_bias 5: inf is not token id: finite number"),
    ("logit_bias", {5: "much"}, "logit_bias 5: 'much' is not token id: finite number"),
    ("logit_bias", {5: True}, "logit_bias 5: True is not token id: finite number"),
    ("logit_bias", {5: 10**400}, "logit_bias 5: 1000.* is not token id: finite number"),
    ("logit_bias", {torch.tensor(5): 1}, r"logit_bias tensor\(5\): 1 is not token id: finite number"),
    ("logit_bias", {-1: 1.0}, "logit_bias holds -1; token ids are"),
    ("logit_bias", {True: 1.0}, "logit_bias holds True; token ids are"),
    ("logit_bias", [(5, 1.0)], "logit_bias: it must be a mapping, not"),
    ("allowed_token_ids", [], "allowed_token_ids is empty"),
    ("allowed_token_ids", [VOCABULARY], f"allowed_token_ids holds {VOCABULARY}; token ids are 0 to"),
    ("allowed_token_ids", 5, "allowed_token_ids is 5; it must be a list"),
    ("banned_token_ids", [-1], "banned_token_ids holds -1; token ids are 0 to"),
    ("banned_token_ids", ["a"], "banned_token_ids holds 'a'; token ids are 0 to"),
    ("banned_token_ids", "abc", "banned_token_ids is 'abc'; it must be a list"),
    ("stop_token_ids", [1.0], "stop_token_ids holds 1.0; token ids are 0 to"),
    ("stop_token_ids", [VOCABULARY], f"stop_token_ids holds {VOCABULARY}; token ids are 0 to {VOCABULARY - 1}"),
    ("stop_token_ids", [np.int64(VOCABULARY)], f"stop_token_ids holds {VOCABULARY}; token ids are 0 to"),
    ("stop_token_ids", [np.bool_(1)], "stop_token_ids holds .*True.*; token ids are 0 to"),
    ("stop_token_ids", [torch.tensor(5)], r"stop_token_ids holds tensor\(5\); token ids are 0 to"),
    ("allowed_token_ids", torch.tensor([5]), r"allowed_token_ids is tensor.* it must be a list: give its tolist\(\)"),
    ("prediction", [np.float32(5)], "prediction holds 5.0; token ids are 0 to"),
    ("stop_token_ids", 5, "stop_token_ids is 5; it must be a list"),
    ("stop_token_ids", np.array([1, 2]), r"stop_token_ids is array\(\[1, 2\]\); it must be a list"),
    ("bad_words", [""], "bad_words holds ''; it must hold non-empty strings"),
    ("bad_words", [5], "bad_words holds 5; it must hold non-empty strings"),
    ("stop", "", "stop holds ''; it must hold non-empty strings"),
    ("stop", ["ok", ""], "stop holds ''; it must hold non-empty strings"),
    ("stop", [b"x"], "stop holds b'x'; it must hold non-empty strings"),
    ("stop", ["ok", "\ud800"], r"stop holds '\\ud800', which is half a surrogate pair and no text"),
    ("bad_words", ["\udfff"], r"bad_words holds '\\udfff', which is half a surrogate pair and no text"),
    ("prediction", "a\ud800", r"prediction holds '\\ud800', which is half a surrogate pair and no text"),
    ("stop", 5, "stop is 5; it must be a list"),
    ("ignore_eos", "no", "ignore_eos is 'no'; choices: True, False"),
    ("skip_special_tokens", 0, "skip_special_tokens is 0; choices: True, False"),
    ("include_stop_str_in_output", "yes", "include_stop_str_in_output is 'yes'; choices: True, False"),
    ("processors", [5], "processors holds 5; it must hold callables"),
    ("processors", TemperatureLogitsWarper(0.5), "processors is <.*>; it must be a list"),
    ("stopping_criteria", ["never"], "stopping_criteria holds 'never'; it must hold callables"),
    ("plugin_processors", {"pickey": {}}, "unknown logits processor 'pickey'; choices: picky"),
    ("plugin_processors", {"picky": {}}, "logits processor 'picky' refuses {}: .*strength"),
    ("plugin_processors", {"picky": {"power": 1}}, "logits processor 'picky' refuses {'power': 1}: .*power"),
    ("plugin_processors", {"picky": {"strength": -1}}, "refuses {'strength': -1}: strength must be positive"),
    ("plugin_processors", {"picky": None}, "the options of 'picky' must be a mapping, not None"),
    ("plugin_processors", ["picky"], "plugin_processors: it must be a mapping, not"),
    ("prediction", [VOCABULARY], f"prediction holds {VOCABULARY}; token ids are 0 to"),
    ("prediction", 5, "prediction is 5; it must be a list"),
    ("speculation", "on", "speculation is 'on'; choices: 'auto', 'off', or a mapping"),
    ("speculation", True, "speculation is True; choices: 'auto', 'off', or a mapping"),
    ("speculation", {"max_nodes": 64}, "max_nodes is 64; it must be 0 to 63"),
    ("speculation", {"max_nodes": -1}, "max_nodes is -1; it must be 0 to 63"),
    ("speculation", {"max_nodes": "many"}, "max_nodes.*fields: drafters, max_nodes, adaptive"),
    ("speculation", {"depth": 4}, "depth.*fields: drafters, max_nodes, adaptive"),
    ("speculation", {"drafters": "prompt-lookup"}, "drafters.*fields: drafters, max_nodes, adaptive"),
    ("speculation", {"drafters": ["magic"]}, "unknown drafter 'magic'; choices: grammar, prediction, prompt-lookup"),
    (
        "speculation",
        Speculation(drafters=("echo",)),
        "unknown drafter 'echo'; choices: grammar, prediction, prompt-lookup",
    ),
]


@pytest.mark.parametrize(("name", "value", "message"), OPTIONS, ids=[f"{n}={v!r}"[:50] for n, v, _ in OPTIONS])
def test_an_option_out_of_range_is_refused_by_name(
    engine: Engine, neighbours: tuple[int, ...], name: str, value: Any, message: str
) -> None:
    """The message has the value and what is allowed; `param` is the field, as a server's error object wants it."""
    options = {"max_tokens": 4, name: value}
    error = refused(engine, neighbours, lambda: engine.generate(PROMPT, **options))
    assert says(error, message)
    assert error.param == name
    with pytest.raises(InvalidRequest):
        engine.generate(PROMPT, SamplingParams(**options))


@pytest.mark.parametrize("name", [each.name for each in fields(SamplingParams) if each.default is not None])
def test_none_is_refused_where_it_is_no_default(name: str) -> None:
    """Among keywords it means that nothing was said; in `SamplingParams` it would be a value."""
    with pytest.raises(InvalidRequest, match=f"{name} is None; leave it out for its default") as caught:
        SamplingParams(**{name: None, "frequency_penalty": None if name == "frequency_penalty" else 0.5})
    assert caught.value.param == name


def test_more_logprobs_than_tokens_are_refused() -> None:
    with Engine(build("llama", vocab_size=16), kv_tokens=512) as engine:
        with pytest.raises(InvalidRequest, match="logprobs is 17; the vocabulary has 16 tokens") as caught:
            engine.generate([5, 6], max_tokens=2, logprobs=17)
        assert len(engine.generate([5, 6], max_tokens=2, logprobs=16).logprobs[0].top) == 16
    assert caught.value.param == "logprobs"


def test_an_unknown_option_is_refused_with_the_choices(engine: Engine, neighbours: tuple[int, ...]) -> None:
    error = refused(engine, neighbours, lambda: engine.generate(PROMPT, max_new_tokens=5))
    assert isinstance(error, UnknownName)
    assert error.param == "max_new_tokens"
    assert says(error, "unknown option 'max_new_tokens'; choices: .*max_tokens.*, top_p")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("max_new_tokens", "what you mean is max_tokens$"),
        ("do_sample", "what you mean is temperature; 0 is greedy"),
        ("stop_strings", "what you mean is stop$"),
        ("num_return_sequences", "what you mean is n$"),
        ("max_completion_tokens", "what you mean is max_tokens$"),
        ("response_format", "what you mean is constraint="),
        ("streamer", "what you mean is the method `stream`"),
        ("num_beams", "there is no beam search"),
        ("max_token", "did you mean 'max_tokens'"),
        ("temprature", "did you mean 'temperature'"),
        ("flavour", "top_p, trace, typical_p$"),
    ],
)
def test_what_others_call_an_option_is_told(name: str, meant: str) -> None:
    with pytest.raises(UnknownName, match=f"unknown option '{name}'; choices: .*{meant}") as caught:
        SamplingParams.of({name: 1})
    assert caught.value.param == name


def test_every_option_that_is_meant_is_one() -> None:
    known = {*SamplingParams.__struct_fields__, "nothing", "the", "draft_model"}
    assert all(re.split(r"[^a-z_]", meant)[0] in known for meant in REQUEST.values())
    assert not known & set(REQUEST)


def test_params_and_keywords_at_once_are_refused(engine: Engine, neighbours: tuple[int, ...]) -> None:
    error = refused(engine, neighbours, lambda: engine.generate(PROMPT, SamplingParams(), top_k=5))
    assert error.param == "params"
    assert says(error, "not both: top_k")
    error = refused(engine, neighbours, lambda: engine.generate(PROMPT, {"top_k": 5}))
    assert error.param == "params"
    assert says(error, r"params is {'top_k': 5}; it must be SamplingParams")


@pytest.mark.parametrize("name", ["processors", "stopping_criteria"])
def test_what_cannot_be_copied_serves_one_sequence_only(engine: Engine, neighbours: tuple[int, ...], name: str) -> None:
    """Where several need their own, it is refused before anything runs."""

    class Never(Uncopyable):
        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> Any:
            return scores if name == "processors" else False

    options: dict[str, Any] = {name: [Never()], "max_tokens": 3}
    assert len(engine.generate(PROMPT, **options).ids) == 3
    for call in (
        lambda: engine.generate(PROMPT, n=2, **options),
        lambda: engine.generate([PROMPT, PROMPT], **options),
        lambda: engine.stream(PROMPT, n=2, **options),
    ):
        error = refused(engine, neighbours, call)
        assert error.param == name
        assert says(error, "cannot be copied, and several sequences need their own: there is only one of me")


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"stop": "x"}, "stop", "stop needs a tokenizer, and this engine has none"),
        ({"bad_words": ["x"]}, "bad_words", "bad_words needs a tokenizer, and this engine has none"),
        ({"prediction": "as text"}, "prediction", "prediction as text needs a tokenizer; give token ids"),
    ],
)
def test_what_needs_a_tokenizer_says_so(
    wordless: Engine, neighbours: tuple[int, ...], options: dict[str, Any], param: str, message: str
) -> None:
    error = refused(wordless, neighbours, lambda: wordless.generate(PROMPT, **options))
    assert error.param == param
    assert says(error, message)


@pytest.mark.parametrize("prompt", ["text", [{"role": "user", "content": "hi"}]], ids=["text", "messages"])
def test_without_a_tokenizer_a_prompt_is_token_ids(wordless: Engine, neighbours: tuple[int, ...], prompt: Any) -> None:
    error = refused(wordless, neighbours, lambda: wordless.generate(prompt))
    assert error.param == "prompt"
    assert says(error, "there is no tokenizer; send the prompt as token ids")


def test_one_bad_prompt_of_several_runs_none_of_them(engine: Engine, neighbours: tuple[int, ...]) -> None:
    finished = engine.counters.finished.get("length", 0)
    refused(engine, neighbours, lambda: engine.generate([PROMPT, [VOCABULARY]], max_tokens=3))
    assert engine.counters.finished["length"] == finished + 1, "only the neighbour ran"


# A tokenizer that knows more tokens than the model has logits for, as after `add_tokens` without a resize.


@pytest.fixture(scope="module")
def larger(model: PreTrainedModel) -> Iterator[Engine]:
    class Added(Letters):
        eos_token_id = VOCABULARY + 1

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [VOCABULARY if letter == "\u263a" else ord(letter) - 32 for letter in text]

    with Engine(model, Added(), kv_tokens=2048) as engine:
        yield engine


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("a\u263a", {}, f"prompt holds {VOCABULARY}; token ids are 0 to {VOCABULARY - 1}"),
        (
            PROMPT,
            {"bad_words": ["ok", "b\u263a"]},
            f"bad_words holds 'b\u263a', .* with token id {VOCABULARY}; .*0 to 95",
        ),
        (
            PROMPT,
            {"prediction": "b\u263a"},
            f"prediction holds 'b\u263a', which .* with token id {VOCABULARY}; .*0 to 95",
        ),
        (PROMPT, {"stop_token_ids": [VOCABULARY]}, f"stop_token_ids holds {VOCABULARY}; token ids are 0 to"),
    ],
)
def test_a_text_that_the_model_has_no_token_for_is_refused(
    larger: Engine, neighbours: tuple[int, ...], prompt: Any, options: dict[str, Any], message: str
) -> None:
    error = refused(larger, neighbours, lambda: larger.generate(prompt, max_tokens=4, **options))
    assert error.param == next(iter(options), "prompt")
    assert says(error, message)


def test_an_end_token_that_the_model_cannot_say_ends_nothing(larger: Engine, neighbours: tuple[int, ...]) -> None:
    """A stop string that it cannot spell in one token is one all the same: it may come in others."""
    options = {"max_tokens": LONG, "temperature": 1.2, "seed": 3, "stop": "\u263a"}
    assert larger.generate(PROMPT, min_tokens=3, **options).ids == neighbours


def test_a_bad_word_that_is_no_token_is_refused(model: PreTrainedModel) -> None:
    class Empty(Letters):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return []

    with Engine(model, Empty(), kv_tokens=512) as engine:
        with pytest.raises(
            InvalidRequest, match="bad_words holds 'x', which the tokenizer makes no token of"
        ) as caught:
            engine.generate(PROMPT, max_tokens=2, bad_words=["x"])
        assert caught.value.param == "bad_words"


# What looks odd and is fine.


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1, "top_p": 1, "top_k": 10**6, "min_p": 0, "repetition_penalty": 2, "presence_penalty": 1},
        {"temperature": np.float64(0.7)},
        {"temperature": 1e-3, "seed": 0},
        {"stop": "~~", "bad_words": "zz"},
        {"stop": ["~~"], "stop_token_ids": {90, 91}, "banned_token_ids": range(3)},
        {"processors": LogitsProcessorList([TemperatureLogitsWarper(0.5)])},
        {"logit_bias": {5: 1}, "allowed_token_ids": (5, 6, 7)},
        {"plugin_processors": {"picky": {"strength": 2}}},
        {"speculation": {}, "prediction": []},
        {"temperature": None, "stop": None, "speculation": None, "seed": None},
        {"seed": HUGE - 1, "temperature": 1.0},
        {"logprobs": 0},
        {"temperature": np.float32(0.7), "top_k": np.int32(5), "seed": np.uint64(3), "logprobs": np.int8(1)},
        {"logit_bias": {np.int64(5): np.float32(1)}, "allowed_token_ids": list(np.array([5, 6]))},
        {"stop_token_ids": [np.int64(90)], "banned_token_ids": {np.int32(3)}, "prediction": tuple(np.array([5, 6]))},
        {"top_k": 10**30, "no_repeat_ngram_size": 10**30, "temperature": 1.0},
    ],
    ids=lambda options: " ".join(options),
)
def test_whole_numbers_lists_and_none_are_taken_as_they_are_meant(engine: Engine, options: dict[str, Any]) -> None:
    assert len(engine.generate(PROMPT, max_tokens=4, **options).ids) == 4


def test_one_string_is_one_string(engine: Engine) -> None:
    """Not the list of its letters."""
    text = engine.generate(PROMPT, max_tokens=12).text
    assert engine.generate(PROMPT, max_tokens=12, stop=text[3:5]).text == text[:3]
    assert engine.generate(PROMPT, SamplingParams(max_tokens=12, stop=text[3:5])).text == text[:3]
    assert engine.generate(PROMPT, max_tokens=12, bad_words=text[5:7]).text[:6] == text[:6]


def test_a_config_takes_names_as_an_engine_does() -> None:
    config = EngineConfig(drafters=["prompt-lookup"], context="chat-template")  # type: ignore[arg-type]
    assert config == EngineConfig.of({"drafters": "prompt-lookup", "context": ["chat-template"]})
    assert (config.drafters, config.context) == ({"prompt-lookup": {}}, ("chat-template",))
    assert EngineConfig.of({"drafters": [], "draft_model": "small"}).drafters == {"draft-model": {"model": "small"}}


# Engines.

ENGINES: dict[str, tuple[dict[str, Any], type[Exception], str | None, str]] = {
    "an unknown option": ({"max_batch": 3}, UnknownName, "max_batch", "unknown engine option 'max_batch'; choices:"),
    "an unknown drafter": (
        {"drafters": ["magic"]},
        UnknownName,
        "drafters",
        "unknown drafter 'magic'; choices: draft-model",
    ),
    "an unknown option of a drafter": (
        {"drafters": {"prompt-lookup": {"length": 3}}},
        UnknownName,
        "length",
        "option of drafter 'prompt-lookup'.* 'length'; choices: branches, min_match",
    ),
    "an option of a drafter out of range": (
        {"drafters": {"prompt-lookup": {"branches": 99}}},
        InvalidRequest,
        "branches",
        "drafter 'prompt-lookup': branches is 99",
    ),
    "no room": ({"kv_tokens": 0}, InvalidRequest, "kv_tokens", "kv_tokens is 0; it must be a whole number, at least 1"),
    "room as text": ({"kv_tokens": "1G"}, InvalidRequest, "kv_tokens", "kv_tokens is '1G'; it must be a whole"),
    "no context": ({"max_context": 0}, InvalidRequest, "max_context", "max_context is 0"),
    "a true number": ({"max_num_seqs": True}, InvalidRequest, "max_num_seqs", "max_num_seqs is True"),
    "no prompt rows": ({"max_prefill_tokens": -5}, InvalidRequest, "max_prefill_tokens", "max_prefill_tokens is -5"),
    "odd speculation": ({"speculation": "fast"}, InvalidRequest, "speculation", "speculation is 'fast'; choices:"),
    "speculation with nobody": (
        {"speculation": {"drafters": ["echo"]}},
        UnknownName,
        "speculation",
        "unknown drafter 'echo'; choices: grammar, prediction, prompt-lookup",
    ),
    "a disk cache nowhere": ({"disk_cache": ""}, InvalidRequest, "disk_cache", "disk_cache is ''; it must be a folder"),
    "drafters that are no names": (
        {"drafters": 5},
        InvalidRequest,
        "drafters",
        "drafters is 5; it must be names, or a mapping of names and options",
    ),
    "drafters in a list with their options": (
        {"drafters": [{"prompt-lookup": {}}]},
        InvalidRequest,
        "drafters",
        r"drafters is \[{'prompt-lookup': {}}\]; it must be names, or a mapping of names and options",
    ),
    "a drafter with None for options": (
        {"drafters": {"prompt-lookup": None}},
        InvalidRequest,
        "drafters",
        "drafters: the options of 'prompt-lookup' must be a mapping, not None",
    ),
    "stages that are no list": (
        {"context": 5},
        InvalidRequest,
        "context",
        "context is 5; it must be a stage, or a list of stages",
    ),
    "stages in a mapping": (
        {"context": {"chat-template": {}}},
        InvalidRequest,
        "context",
        "context is {'chat-template': {}}; it must be a stage, or a list of stages",
    ),
    "a prefix cache that is off as text": (
        {"prefix_cache": "off"},
        InvalidRequest,
        "prefix_cache",
        "prefix_cache is 'off'; choices: True, False",
    ),
    "room on a disk that is not used": (
        {"disk_cache_bytes": 5},
        InvalidRequest,
        "disk_cache_bytes",
        "disk_cache_bytes is 5, but disk_cache is None; set it too",
    ),
    "an unknown stage": ({"context": ["template"]}, UnknownName, "context", "unknown context stage 'template'"),
    "a draft model that is not there": (
        {"draft_model": "/nowhere/at/all"},
        InvalidRequest,
        "model",
        "model '/nowhere/at/all' cannot be loaded",
    ),
}


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_that_cannot_be_is_refused_when_it_is_built(model: PreTrainedModel, name: str) -> None:
    options, kind, param, message = ENGINES[name]
    with pytest.raises(kind, match=message) as caught:
        Engine(model, **{"kv_tokens": 512, **options})
    assert isinstance(caught.value, InvalidRequest)
    assert caught.value.param == param


def test_a_config_and_keywords_at_once_are_refused(model: PreTrainedModel) -> None:
    """Misspelt ones too."""
    with pytest.raises(InvalidRequest, match="^give config or keywords, not both: max_num_seqs, nonsense$") as caught:
        Engine(model, config=EngineConfig(kv_tokens=512), max_num_seqs=2, nonsense=3)
    assert caught.value.param == "config"
    with pytest.raises(InvalidRequest, match="^config is {'kv_tokens': 512}; it must be EngineConfig, or keywords$"):
        Engine(model, config={"kv_tokens": 512})  # type: ignore[arg-type]


def test_a_drafter_of_another_vocabulary_is_refused(model: PreTrainedModel) -> None:
    other = deepcopy(model)
    other.resize_token_embeddings(VOCABULARY + 8)
    with pytest.raises(DrafterMismatch, match=f"vocabulary of {VOCABULARY + 8}, the target of {VOCABULARY}"):
        Engine(model, kv_tokens=512, draft_model=other)


def test_code_that_comes_with_a_model_runs_only_where_it_is_trusted(model: PreTrainedModel, tmp_path: Path) -> None:
    """As the model, as the draft model, as a tokenizer; nobody at the terminal is asked."""
    trace = tmp_path / "trace"
    (tmp_path / "own.py").write_text(f"import pathlib\npathlib.Path({str(trace)!r}).touch()\nraise ImportError\n")
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": ["own.Tokenizer", None]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "canary", "auto_map": own}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Tokenizer", "auto_map": own}))
    for build_one in (lambda: Engine.from_pretrained(tmp_path), lambda: Engine(model, draft_model=str(tmp_path))):
        with pytest.raises(InvalidRequest, match="(?s)cannot be loaded.*trust_remote_code"):
            build_one()
    assert load_tokenizer(tmp_path) is None
    assert not trace.exists()
    with pytest.raises(InvalidRequest, match="cannot be loaded"):
        Engine.from_pretrained(tmp_path, model_options={"trust_remote_code": True})
    assert trace.exists(), "it was no trap"


def test_a_damaged_tokenizer_is_not_none(tmp_path: Path) -> None:
    """A server would start without one, and refuse every chat."""
    sentence_piece(40, "ab abc").save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path) is not None
    file = tmp_path / "tokenizer.json"
    for damaged in (file.read_bytes()[: file.stat().st_size // 2], b'{"version": "1.0"}', b""):
        file.write_bytes(damaged)
        with pytest.raises(InvalidRequest, match="^the tokenizer of '.*' cannot be loaded: .") as caught:
            load_tokenizer(tmp_path)
        assert caught.value.param == "model"
    for file in tmp_path.iterdir():
        file.unlink()
    assert load_tokenizer(tmp_path) is None


def test_a_model_that_is_not_there_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="model '/nowhere/at/all' cannot be loaded") as caught:
        Engine.from_pretrained("/nowhere/at/all")
    assert caught.value.param == "model"
    with pytest.raises(InvalidRequest, match="dtype is 'int4'; choices: auto, float32") as caught:
        Engine.from_pretrained("/nowhere/at/all", dtype="int4")
    assert caught.value.param == "dtype"
