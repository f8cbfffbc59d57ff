"""Sampling: settings act as transformers' own processors, and a draw is a function of the seed and the position."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, MinLengthLogitsProcessor, PreTrainedModel

from specgen import Engine, RequestFailed, SamplingParams
from specgen.kernels.reference import uniforms
from specgen.sampling.sampler import PositionKeys, Sampler, gumbel_argmax, logprob, processors
from specgen.types import LogitsProcessor
from tests.support.tiny import VOCABULARY, build

CPU = torch.device("cpu")
PROMPT = [9, 31, 40, 9, 31, 77]
TEXT = torch.tensor([[*PROMPT, 9, 31, 40, 12, 9, 31]])
EOS = [2, 17]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama")


@pytest.fixture(scope="module")
def engine(model: PreTrainedModel) -> Iterator[Engine]:
    with Engine(model, Letters(), kv_tokens=2048) as engine:
        yield engine


class Letters:
    """A tokenizer whose token t is the character behind the space by t; words are spelt by their letters."""

    eos_token_id = None
    chat_template = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) - 32 for letter in text]

    def decode(self, token_ids: Sequence[int], **options: bool) -> str:
        return "".join(chr(32 + token) for token in token_ids)


def theirs(model: PreTrainedModel, **settings: Any) -> LogitsProcessorList:
    """The processors that transformers' own generate builds for a prompt and settings."""
    built: list[LogitsProcessorList] = []

    def capture(model: Any, input_ids: Tensor, logits_processor: LogitsProcessorList, **others: Any) -> Tensor:
        built.append(logits_processor)
        return input_ids

    model.generate(torch.tensor([PROMPT]), custom_generate=capture, max_new_tokens=20, pad_token_id=0, **settings)
    return built[0]


def ours(params: SamplingParams, custom: Sequence[LogitsProcessor] = ()) -> list[LogitsProcessor]:
    """What specgen builds for the same prompt, with the words of `Letters`."""
    spell = Letters().encode
    return processors(
        params,
        prompt_length=len(PROMPT),
        end_ids=EOS,
        encode=lambda word: [spell(word)],
        custom=custom,
        device=CPU,
    )


def apply(functions: Sequence[LogitsProcessor], ids: Tensor, scores: Tensor) -> Tensor:
    for function in functions:
        scores = function(ids, scores)
    return scores


def rows(count: int = 12) -> Tensor:
    """Rows of logits: flat, peaked, and in between."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 1, VOCABULARY, generator=generator) * torch.linspace(0.2, 8, count)[:, None, None]


# As transformers does it.

SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "temperature": ({"temperature": 0.7}, {}),
    "top_k": ({"top_k": 5}, {}),
    "top_p": ({"top_p": 0.8}, {}),
    "top_p that keeps one": ({"top_p": 1e-6}, {}),
    "min_p": ({"min_p": 0.1}, {}),
    "typical_p": ({"typical_p": 0.6}, {}),
    "repetition_penalty": ({"repetition_penalty": 1.7}, {}),
    "a reward for repetition": ({"repetition_penalty": 0.6}, {}),
    "no_repeat_ngram_size": ({"no_repeat_ngram_size": 3}, {}),
    "bad_words": ({"bad_words": ("I?", "q")}, {"bad_words_ids": [[41, 31], [81]]}),
    "min_tokens": ({"min_tokens": 8}, {"min_new_tokens": 8, "eos_token_id": EOS}),
    "min_tokens that is over": ({"min_tokens": 6}, {"min_new_tokens": 6, "eos_token_id": EOS}),
    "banned_token_ids": ({"banned_token_ids": (3, 90, 12)}, {"suppress_tokens": [3, 90, 12]}),
    "filters together": ({"temperature": 1.4, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.95}, {}),
    "penalties together": (
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words": ("q",), "min_tokens": 9},
        {"bad_words_ids": [[81]], "min_new_tokens": 9, "eos_token_id": EOS},
    ),
    "all together": (
        {
            "repetition_penalty": 1.2,
            "no_repeat_ngram_size": 3,
            "bad_words": ("I?",),
            "min_tokens": 9,
            "banned_token_ids": (5, 6),
            "temperature": 0.8,
            "top_k": 40,
            "top_p": 0.95,
            "min_p": 0.01,
            "typical_p": 0.98,
        },
        {"bad_words_ids": [[41, 31]], "min_new_tokens": 9, "eos_token_id": EOS, "suppress_tokens": [5, 6]},
    ),
}
RENAMED = ("bad_words", "min_tokens", "banned_token_ids")


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_acts_as_transformers_own(model: PreTrainedModel, name: str) -> None:
    """Bit by bit on rows of all kinds, on the prompt alone and on a text that repeats itself."""
    settings, renamed = SETTINGS[name]
    same = {key: value for key, value in settings.items() if key not in RENAMED}
    expected = theirs(model, do_sample=True, **{"top_k": 0, **same, **renamed})
    found = ours(SamplingParams(**{"temperature": 1.0, **settings}))
    # transformers says min_new_tokens twice, once as a length of the whole text.
    order = [type(processor) for processor in expected if not isinstance(processor, MinLengthLogitsProcessor)]
    assert [type(processor) for processor in found] == order
    changed = 0
    for scores in rows():
        for ids in (TEXT[:, : len(PROMPT)], TEXT):
            mine = apply(found, ids, scores)
            assert torch.equal(mine, apply(expected, ids, scores))
            changed += not torch.equal(mine, scores)
    assert changed > 0 or name.endswith("is over"), "the setting does nothing on these rows"


def test_no_setting_is_no_processor() -> None:
    assert ours(SamplingParams(temperature=0.0)) == []
    assert ours(SamplingParams(temperature=1.0)) == []


def test_values_that_turn_a_setting_off_build_nothing() -> None:
    params = SamplingParams(
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        typical_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        logit_bias={},
    )
    assert ours(params) == []


def test_custom_processors_come_behind_the_penalties_and_before_the_temperature(model: PreTrainedModel) -> None:
    """Where transformers puts the caller's own."""

    def halved(ids: Tensor, scores: Tensor) -> Tensor:
        return torch.where(scores > 1, scores / 2, scores)

    settings: dict[str, Any] = {"repetition_penalty": 1.5, "temperature": 0.5, "top_k": 7}
    expected = theirs(model, do_sample=True, logits_processor=LogitsProcessorList([halved]), **settings)
    for scores in rows():
        mine = apply(ours(SamplingParams(**settings), [halved]), TEXT, scores)
        assert torch.equal(mine, apply(expected, TEXT, scores))


@pytest.mark.parametrize(
    ("settings", "renamed"),
    [
        ({"repetition_penalty": 1.8}, {}),
        ({"no_repeat_ngram_size": 2}, {}),
        ({"bad_words": ("J", "8t")}, {"bad_words_ids": [[42], [0, 42], [24, 84], [0, 24, 84]]}),
        ({"banned_token_ids": (24, 42)}, {"suppress_tokens": [24, 42]}),
        ({"repetition_penalty": 1.3, "no_repeat_ngram_size": 3}, {}),
    ],
)
def test_greedy_text_is_what_transformers_generates(
    engine: Engine, model: PreTrainedModel, settings: dict[str, Any], renamed: dict[str, Any]
) -> None:
    """The whole way through the engine; and the setting changes what the model would say without it."""
    same = {key: value for key, value in settings.items() if key not in RENAMED}
    expected = greedy(model, 24, **same, **renamed)
    assert list(engine.generate(PROMPT, max_tokens=24, **settings).ids) == expected
    assert expected != greedy(model, 24)


def greedy(model: PreTrainedModel, new_tokens: int, **settings: Any) -> list[int]:
    ids = torch.tensor([PROMPT])
    mask = torch.ones_like(ids)
    text = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, **settings)
    return text[0, len(PROMPT) :].tolist()


def test_min_tokens_holds_back_every_end_that_there_is(model: PreTrainedModel) -> None:
    """The model's own end tokens and the request's, as transformers' min_new_tokens does."""
    plain = greedy(model, 24)
    ends = [plain[2], plain[4]]
    assert len(greedy(model, 24, eos_token_id=ends)) == 3
    expected = greedy(model, 24, eos_token_id=ends, min_new_tokens=9)
    assert len(expected) >= 9
    model.generation_config.eos_token_id = ends[0]
    try:
        with Engine(model, kv_tokens=512) as engine:
            result = engine.generate(PROMPT, max_tokens=24, min_tokens=9, stop_token_ids=[ends[1]])
            assert list(result.ids) == expected
            assert list(engine.generate(PROMPT, max_tokens=24, ignore_eos=True).ids) == plain
    finally:
        model.generation_config.eos_token_id = None


# What transformers does not have.


@pytest.mark.parametrize(("presence", "frequency"), [(0.7, 0.0), (0.0, 0.3), (-0.5, 1.5), (2.0, -2.0)])
def test_presence_and_frequency_penalties_count_the_output_alone(presence: float, frequency: float) -> None:
    """OpenAI's formula, token by token; the prompt's tokens are not counted."""
    [penalty] = ours(SamplingParams(temperature=0.0, presence_penalty=presence, frequency_penalty=frequency))
    output = TEXT[0, len(PROMPT) :].tolist()
    for scores in rows(3):
        found = penalty(TEXT, scores)
        for token in range(VOCABULARY):
            count = output.count(token)
            expected = scores[0, token] - (count * frequency + (count > 0) * presence)
            assert found[0, token].item() == pytest.approx(expected.item(), abs=1e-6)
        assert torch.equal(penalty(TEXT[:, : len(PROMPT)], scores), scores)


def test_logit_bias_is_added_to_single_tokens() -> None:
    [bias] = ours(SamplingParams(temperature=0.0, logit_bias={4: 2.5, 90: -100.0}))
    scores = rows(1)[0]
    added = bias(TEXT, scores) - scores
    assert added[0, [4, 90]].tolist() == pytest.approx([2.5, -100.0], abs=1e-5)
    assert added.count_nonzero() == 2


def test_allowed_token_ids_ban_all_others_and_change_nothing_in_themselves() -> None:
    [allowed] = ours(SamplingParams(temperature=0.0, allowed_token_ids=(8, 3, 8)))
    scores = rows(1)[0]
    found = allowed(TEXT, scores)
    assert torch.equal(found[:, [3, 8]], scores[:, [3, 8]])
    assert (found == -math.inf).sum() == VOCABULARY - 2


def test_a_bias_may_lift_what_is_repeated_over_its_penalty() -> None:
    """In transformers' order: the bias comes first and is penalised with the rest."""
    scores = torch.zeros(1, VOCABULARY)
    found = apply(ours(SamplingParams(temperature=0.0, logit_bias={9: 3.0}, repetition_penalty=2.0)), TEXT, scores)
    assert found[0, 9] == 1.5


# The coins.


def test_uniforms_are_splitmix64_of_key_and_token() -> None:
    """Against the generator as it is written down, in whole numbers of any size."""
    mask = 2**64 - 1

    def splitmix(state: int) -> int:
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        return state ^ (state >> 31)

    for key in (0, 1, 2**62 + 12345, 2**64 - 1, 2**63):
        tokens = [0, 1, 2, 1000, 49151, 262143]
        signed = key - 2**64 if key >= 2**63 else key
        expected = [
            ((splitmix((key + (token + 1) * 0x9E3779B97F4A7C15) & mask) >> 12) + 0.5) / 2**52 for token in tokens
        ]
        assert uniforms(signed, torch.tensor(tokens)).tolist() == expected


def _key_for(output: int) -> int:
    """The key under which token 0 gets the 64-bit word `output`: SplitMix64 run backwards, as a signed number."""
    mask = 2**64 - 1

    def unshift(value: int, bits: int) -> int:
        found = value
        for _ in range(64 // bits):
            found = value ^ (found >> bits)
        return found

    state = unshift(output, 31)
    state = unshift(state * pow(0x94D049BB133111EB, -1, 2**64) & mask, 27)
    state = unshift(state * pow(0xBF58476D1CE4E5B9, -1, 2**64) & mask, 30)
    key = (state - 0x9E3779B97F4A7C15) & mask
    return key - 2**64 if key >= 2**63 else key


@pytest.mark.parametrize("output", [0, 1, 2**63, 2**64 - 2, 2**64 - 1])
def test_uniforms_are_between_0_and_1_even_at_the_ends_of_the_generator(output: int) -> None:
    """0 or 1 would make an infinite noise: a token that is drawn whatever its logit."""
    value = uniforms(_key_for(output), torch.tensor([0])).item()
    assert 0.0 < value < 1.0
    assert value == pytest.approx(output / 2**64, abs=1e-15)


def test_uniforms_are_distinct_and_even() -> None:
    values = uniforms(PositionKeys(5)[17], torch.arange(200_000))
    assert values.dtype == torch.float64
    assert len(values.unique()) == len(values)
    assert values.min() > 0
    assert values.max() < 1
    assert torch.histc(values, 10, 0, 1).tolist() == pytest.approx([20_000] * 10, rel=0.03)


def test_uniforms_of_a_token_do_not_depend_on_what_else_is_asked() -> None:
    """Filters leave a part of the vocabulary: the coins of what is left stay."""
    key = PositionKeys(5)[3]
    every = uniforms(key, torch.arange(100))
    some = torch.tensor([70, 2, 31])
    assert torch.equal(uniforms(key, some), every[some])


PINNED_KEYS = [
    -2359828239160312924,
    5448529601018347655,
    -6290410535194645531,
    194111594413669147,
    4855489042439594908,
]
PINNED_SAMPLE = 8893702929424106994
PINNED_LAST = -5214696275654277417
PINNED_UNIFORMS = [0.8640380329542549, 0.06840952279406765, 0.5585175627253044, 0.03865677192006667]
PINNED_DRAWS = [33, 49, 46, 42, 25, 46, 34, 39, 42, 41, 39, 49]


def test_the_coins_are_the_same_for_ever() -> None:
    """Seeds are promises: a text that someone has kept must come again. Change these numbers and you break them."""
    keys = PositionKeys(7)
    assert [keys[position] for position in (0, 1, 511, 512, 100_000)] == PINNED_KEYS, "seeds give other texts now"
    assert PositionKeys(7, 3)[0] == PINNED_SAMPLE
    assert PositionKeys(2**64 - 1)[1] == PINNED_LAST
    assert uniforms(keys[0], torch.tensor([0, 1, 2, 49151])).tolist() == PINNED_UNIFORMS
    scores = torch.linspace(-2, 2, 50)
    assert [gumbel_argmax(scores, keys[position]) for position in range(12)] == PINNED_DRAWS


def test_keys_can_be_asked_for_in_any_order() -> None:
    """They are the words of one Philox stream, whichever block they stand in."""
    stream = np.random.Philox(key=(3 << 64) | 11).random_raw(2100).astype(np.int64).tolist()
    keys = PositionKeys(11, 3)
    order = [0, 2099, 512, 511, 1024, 1, 0, 1023, 2099, 513]
    assert [keys[position] for position in order] == [stream[position] for position in order]


def test_keys_differ_between_seeds_samples_and_positions() -> None:
    seen = {PositionKeys(seed, sample)[place] for seed in range(5) for sample in range(5) for place in range(600)}
    assert len(seen) == 5 * 5 * 600


# The draw.


def test_what_is_banned_is_never_drawn() -> None:
    scores = torch.full((VOCABULARY,), -math.inf)
    scores[[3, 40]] = torch.tensor([-50.0, -50.5])
    assert {gumbel_argmax(scores, key) for key in range(200)} == {3, 40}


def test_rounding_in_the_last_bits_of_the_logits_moves_no_draw() -> None:
    """A forward over more rows rounds differently; the text must not follow it."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2000, generator=generator) * 3
    noise = (torch.rand(2000, generator=generator) - 0.5) * 1e-5
    keys = PositionKeys(9)
    drawn = [gumbel_argmax(scores, keys[position]) for position in range(2000)]
    assert len(set(drawn)) > 100
    assert [gumbel_argmax(scores + noise, keys[position]) for position in range(2000)] == drawn


def test_however_cold_the_likeliest_token_wins() -> None:
    """Divided by next to nothing all logits would be infinite, and the first of them would win."""
    for temperature in (1e-3, 1e-10, 1e-40, 5e-324):
        for scores in rows(12)[6:]:
            cold = apply(ours(SamplingParams(temperature=temperature)), TEXT, scores * 100)
            assert gumbel_argmax(cold[0], PositionKeys(3)[7]) == scores.argmax()


@pytest.mark.parametrize("greedy", [True, False])
def test_where_all_is_banned_the_request_fails_and_says_why(greedy: bool) -> None:
    def ban(ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -math.inf)

    sampler = Sampler([ban], greedy=greedy, keys=PositionKeys(0))
    with pytest.raises(RequestFailed, match="no token is left to draw"):
        sampler.draw(TEXT, rows(1)[0])


def test_the_sampler_calls_each_processor_once_in_order() -> None:
    calls = []

    def named(name: str) -> LogitsProcessor:
        def processor(ids: Tensor, scores: Tensor) -> Tensor:
            calls.append((name, ids.shape[1], scores[0, 5].item()))
            return scores + 1

        return processor

    sampler = Sampler([named("a"), named("b")], greedy=True, keys=PositionKeys(0))
    scores = torch.zeros(1, VOCABULARY)
    sampler.draw(TEXT, scores)
    assert calls == [("a", 12, 0.0), ("b", 12, 1.0)]


def test_a_processor_may_write_into_the_row_that_it_is_given() -> None:
    """Many do; the row stays as it is for the log-probabilities."""

    def ban(ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, 60:] = -math.inf
        return scores

    with torch.inference_mode():
        scores = torch.arange(VOCABULARY, dtype=torch.float32)[None]
    assert Sampler([ban], greedy=True, keys=PositionKeys(0)).draw(TEXT, scores) == 59
    assert scores[0, 90] == 90


def test_the_draw_belongs_to_the_position_of_the_token() -> None:
    """The same row at another position, or the same position of another sample, is drawn with other coins."""
    sampler = Sampler([], greedy=False, keys=PositionKeys(1))
    scores = torch.zeros(1, VOCABULARY)
    ids = torch.zeros(1, 300, dtype=torch.int64)
    drawn = [sampler.draw(ids[:, :length], scores) for length in range(1, 300)]
    assert drawn == [sampler.draw(ids[:, :length], scores) for length in range(1, 300)]
    assert len(set(drawn)) > 60
    other = Sampler([], greedy=False, keys=PositionKeys(1, 1))
    assert drawn != [other.draw(ids[:, :length], scores) for length in range(1, 300)]


# Log-probabilities.


def test_logprobs_are_log_softmax_with_the_likeliest_first() -> None:
    scores = rows(1)[0, 0]
    expected = torch.log_softmax(scores, dim=-1)
    found = logprob(scores, 11, 3)
    assert found.logprob == pytest.approx(expected[11].item())
    best = expected.topk(3)
    assert [token for token, _ in found.top] == best.indices.tolist()
    assert [value for _, value in found.top] == pytest.approx(best.values.tolist())
    assert logprob(scores, 11, 0).top == ()


def test_logprobs_are_those_of_the_unprocessed_model(engine: Engine, model: PreTrainedModel) -> None:
    """Whatever penalties, filters and processors that write in place do, and with drafts or without."""

    def ban(ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, 50:] = -math.inf
        return scores

    plain = engine.generate(PROMPT, max_tokens=20, temperature=2.0, processors=[ban], seed=3).ids
    for speculation in ("off", {"adaptive": False}):
        result = engine.generate(
            PROMPT,
            max_tokens=20,
            temperature=2.0,
            repetition_penalty=1.0,
            processors=[ban],
            logprobs=2,
            seed=3,
            speculation=speculation,
            prediction=list(plain),
        )
        assert result.ids == plain
        assert (result.stats.num_accepted_draft_tokens > 0) == (speculation != "off")
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([[*PROMPT, *plain]])).logits[0, len(PROMPT) - 1 : -1]
        expected = torch.log_softmax(logits, dim=-1)
        assert [score.token for score in result.logprobs] == list(plain)
        for row, score in zip(expected, result.logprobs, strict=True):
            assert score.logprob == pytest.approx(row[score.token].item(), abs=1e-3)
            assert [token for token, _ in score.top] == row.topk(2).indices.tolist()
            assert [value for _, value in score.top] == pytest.approx(row.topk(2).values.tolist(), abs=1e-3)


# What the model's generation_config says.

CONFIGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "sampling": {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 0},
    "sampling with all filters": {"do_sample": True, "temperature": 1.3, "top_k": 20, "min_p": 0.05, "typical_p": 0.9},
    "settings of sampling without sampling": {"do_sample": False, "temperature": 0.6, "top_p": 0.5, "top_k": 3},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "sampling with a penalty": {"do_sample": True, "repetition_penalty": 1.1, "top_k": 8},
    "tokens that are never said": {"suppress_tokens": [3, 90, 12]},
    "a least length": {"min_new_tokens": 8, "eos_token_id": EOS},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore:.*generation flags are not valid")
@pytest.mark.filterwarnings("ignore:Unfeasible length")
def test_defaults_of_the_model_resolve_as_in_transformers(model: PreTrainedModel, name: str) -> None:
    """A request that says nothing is decoded as `model.generate(ids)` would decode it."""
    config = GenerationConfig(pad_token_id=0, **CONFIGS[name])
    seen: list[GenerationConfig] = []

    def capture(model: Any, input_ids: Tensor, generation_config: GenerationConfig, **others: Any) -> Tensor:
        seen.append(generation_config)
        seen.append(others["logits_processor"])
        return input_ids

    before, model.generation_config = model.generation_config, config
    try:
        model.generate(torch.tensor([PROMPT]), custom_generate=capture, max_new_tokens=3)
    finally:
        model.generation_config = before
    params = SamplingParams().resolved(config)
    assert bool(params.temperature) == seen[0].do_sample
    for scores in rows():
        assert torch.equal(apply(ours(params), TEXT, scores), apply(seen[1], TEXT, scores))


def test_what_the_request_says_wins_over_the_model() -> None:
    config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.3)
    asked = SamplingParams(temperature=0.9, repetition_penalty=1.0).resolved(config)
    assert (asked.temperature, asked.top_p, asked.repetition_penalty) == (0.9, 0.9, 1.0)
    assert SamplingParams(temperature=0).resolved(config).temperature == 0
    assert ours(SamplingParams(temperature=0, repetition_penalty=1.0).resolved(config)) == []
    config = GenerationConfig(suppress_tokens=[5, 6], min_new_tokens=8)
    asked = SamplingParams(banned_token_ids=(7,), min_tokens=2).resolved(config)
    assert (asked.banned_token_ids, asked.min_tokens) == ((7,), 2)
    assert ours(SamplingParams(banned_token_ids=(), min_tokens=0).resolved(config)) == []
    assert SamplingParams(max_tokens=3).resolved(config).min_tokens == 3


def test_what_the_model_holds_back_is_held_back_as_in_transformers(model: PreTrainedModel) -> None:
    """Tokens that its generation_config suppresses, and ends before its least length, where a request asks for less."""
    plain = greedy(model, 24)
    before = model.generation_config
    model.generation_config = GenerationConfig(
        pad_token_id=0, suppress_tokens=[plain[1], plain[9]], min_new_tokens=12, eos_token_id=[plain[2], plain[4]]
    )
    try:
        expected = greedy(model, 24)
        with Engine(model, kv_tokens=512) as engine:
            assert list(engine.generate(PROMPT, max_tokens=24).ids) == expected
            assert list(engine.generate(PROMPT, max_tokens=6).ids) == expected[:6]
    finally:
        model.generation_config = before
    assert len(expected) >= 12
    assert expected != plain
    assert not {plain[1], plain[9]} & set(expected)


def test_what_is_not_followed_of_the_models_defaults_is_said_at_load(model: PreTrainedModel) -> None:
    before = model.generation_config
    quiet = GenerationConfig(num_beams=1, min_length=0, max_length=20, guidance_scale=1.0, suppress_tokens=[3])
    loud = GenerationConfig(begin_suppress_tokens=[7], forced_eos_token_id=0, bad_words_ids=[[5, 6]])
    logged = []
    try:
        for config in (quiet, loud):
            model.generation_config = config
            with capture_logs() as found, Engine(model, kv_tokens=512) as engine:
                engine.generate([PROMPT, PROMPT], max_tokens=2)
            logged.append([each["ignored"] for each in found if "generation config" in each["event"]])
    finally:
        model.generation_config = before
    ignored = {"bad_words_ids": [[5, 6]], "begin_suppress_tokens": [7], "forced_eos_token_id": 0}
    assert logged == [[], [ignored]]


@pytest.mark.parametrize("asked", [{"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}, {"typical_p": 0.9}])
def test_a_filter_without_a_temperature_means_temperature_1(asked: dict[str, Any]) -> None:
    assert SamplingParams(**asked).resolved(GenerationConfig()).temperature == 1.0
    assert SamplingParams(**asked, temperature=0.0).resolved(GenerationConfig()).temperature == 0.0
    assert SamplingParams().resolved(GenerationConfig()).temperature == 0.0


@pytest.mark.parametrize("as_list", [True, False])
def test_the_models_own_end_tokens_end_the_text_as_in_transformers(model: PreTrainedModel, as_list: bool) -> None:
    """One id or a list of them, in generation_config; the token itself is the last of the ids."""
    plain = greedy(model, 24)
    ends: Any = [plain[7], plain[4], 95] if as_list else plain[5]
    expected = greedy(model, 24, eos_token_id=ends)
    assert len(expected) < 24
    model.generation_config.eos_token_id = ends
    try:
        with Engine(model, kv_tokens=512) as engine:
            result = engine.generate(PROMPT, max_tokens=24)
            assert (list(result.ids), result.finish_reason, result.stop) == (expected, "stop", expected[-1])
    finally:
        model.generation_config.eos_token_id = None
