"""`min_tokens` against every other way to end a text: vLLM's rule, the same tokens with drafting and without."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from specgen import Engine, Result
from tests.support.tiny import build
from tests.support.tokenizers import byte_level

SPEECH = "the quick brown fox jumps over the lazy dog and a b c d e f "
PROMPT = "the quick brown fox"
PREDICTED = {"drafters": ["prediction"], "adaptive": False, "max_nodes": 8}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    tokenizer = byte_level(300, SPEECH)
    model = build("llama", vocab_size=len(tokenizer))
    with Engine(model, tokenizer, kv_tokens=2048, drafters={"prediction": {"min_match": 1}}) as engine:
        yield engine


def drafted(engine: Engine, **options: Any) -> list[Result]:
    """The samples, which are the same when what they say is drafted in trees of several tokens."""
    options |= {"max_tokens": 16, "seed": 5}
    plain = engine.generate(PROMPT, speculation="off", **options)
    samples = plain if isinstance(plain, list) else [plain]
    again = engine.generate(PROMPT, speculation=PREDICTED, prediction=samples[0].ids, **options)
    others = again if isinstance(again, list) else [again]
    said = [[(each.ids, each.text, each.finish_reason, each.stop) for each in run] for run in (samples, others)]
    assert said[0] == said[1]
    assert others[0].stats.num_accepted_draft_tokens
    return samples


class Writes:
    """Makes the model write the letters of a text, one after the other."""

    def __init__(self, engine: Engine, text: str) -> None:
        self.ids = [engine.tokenizer.convert_tokens_to_ids(letter) for letter in text]
        self.start = len(engine.tokenizer.encode(PROMPT))

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self.ids[(ids.shape[1] - self.start) % len(self.ids)]] += 1e4
        return scores


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("least", [0, 2, 3, 4, 8])
def test_a_stop_string_ends_no_text_before_it_has_min_tokens(engine: Engine, least: int, temperature: float) -> None:
    """The letters abcabc...: the string is complete with every third token."""
    options = {"processors": [Writes(engine, "abc")], "min_tokens": least, "temperature": temperature}
    [result] = drafted(engine, stop=["c"], **options)
    length = next(n for n in range(3, 16, 3) if n > least)
    assert (len(result.ids), result.text, result.stop) == (length, ("abc" * 9)[: length - 1], "c")
    [result] = drafted(engine, stop=["ca"], include_stop_str_in_output=True, **options)
    # It may begin in the first tokens and end behind them.
    length = next(n for n in range(4, 16, 3) if n > least)
    assert (len(result.ids), result.text) == (length, ("abc" * 9)[:length])


def test_a_stop_string_that_stands_in_the_first_tokens_alone_changes_nothing(engine: Engine) -> None:
    [result] = drafted(engine, stop=["abcd"], min_tokens=5, processors=[Writes(engine, "abcdefghijklmnop")])
    assert (result.text, result.finish_reason) == ("abcdefghijklmnop", "length")


@pytest.mark.parametrize("name", ["stop_token_ids", "the model's own"])
def test_no_end_token_is_among_the_first_even_if_a_processor_writes_it(engine: Engine, name: str) -> None:
    """It is held back; one that a processor forces all the same is a token like others, as in vLLM."""
    text = "<|end|>" if name == "the model's own" else "e"
    end = engine.tokenizer.convert_tokens_to_ids(text)
    options = {"stop_token_ids": [end]} if name == "stop_token_ids" else {}

    class Ends:
        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            scores[:] = -torch.inf
            scores[:, end] = 0
            return scores

    [result] = drafted(engine, min_tokens=6, processors=[Ends()], **options)
    assert (result.ids, result.finish_reason, result.stop) == ((end,) * 7, "stop", end)
    assert result.text == ("" if end == engine.tokenizer.eos_token_id else text * 6)
    if name != "stop_token_ids":
        [result] = drafted(engine, min_tokens=6, ignore_eos=True, processors=[Ends()])
        assert (len(result.ids), result.finish_reason) == (16, "length")


def test_what_lets_nothing_follow_ends_all_the_same(engine: Engine) -> None:
    """A criterion of the caller's as in transformers, a constraint that is complete."""

    def third(ids: Tensor, scores: Tensor) -> Tensor:
        return torch.tensor([ids.shape[1] >= len(engine.tokenizer.encode(PROMPT)) + 3])

    [result] = drafted(engine, min_tokens=10, stopping_criteria=[third])
    assert (len(result.ids), result.finish_reason) == (3, "stop")
    [result] = drafted(engine, min_tokens=10, constraint={"choice": ["yes", "no"]})
    assert (result.text in ("yes", "no"), result.finish_reason) == (True, "stop")


def test_a_constraint_that_may_go_on_does(engine: Engine) -> None:
    [result] = drafted(engine, min_tokens=10, constraint={"regex": "[a-z]*"})
    assert len(result.ids) > 10


def test_each_of_several_samples_has_its_own_count(engine: Engine) -> None:
    for result in drafted(engine, n=3, temperature=1.0, min_tokens=4, stop=["e", " ", "a", "o"]):
        assert len(result.ids) > 4 or result.finish_reason == "length"
