"""Where a text ends, and which calls processors and criteria see, whatever is drafted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from specgen import (
    Result,
)
from specgen.draft.features import Wanted
from specgen.engine.outputs import SequenceOutput
from specgen.engine.scheduler import Scheduler
from specgen.kv.pool import BlockTable
from tests.support.bench import PROMPTS, Bench, echoes, first_layers, greedy
from tests.support.core import BUSH, EAGER, Scripted, all_drafters
from tests.support.tiny import VOCABULARY, build

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama")


@pytest.fixture(scope="module")
def smaller(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its last layer: right now and then."""
    return first_layers(model, 2)


class Letters:
    """A tokenizer whose token t is the character behind the space by t, but for some that are two characters long."""

    eos_token_id = None
    chat_template = None

    def __init__(self, pairs: Mapping[int, str] | None = None) -> None:
        self.pairs = pairs or {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) - 32 for letter in text]

    def decode(self, token_ids: Sequence[int], **options: bool) -> str:
        return "".join(self.pairs.get(token, chr(32 + token)) for token in token_ids)


@pytest.fixture(scope="module")
def bench(model: PreTrainedModel, smaller: PreTrainedModel) -> Bench:
    return Bench(model, all_drafters(smaller))


@pytest.fixture(scope="module")
def certain(model: PreTrainedModel) -> Bench:
    """With a drafter that is always right, so that ends fall inside accepted blocks; one draws with Letters."""
    return Bench(model, {"echo": echoes(1.0, siblings=1, depth=7)}, tokenizer=Letters({24: "END"}))


def ended(bench: Bench, said: Sequence[int], **options: Any) -> list[Result]:
    """The same request with and without drafts; they must agree in everything but the steps."""
    found = []
    for speculation in ("off", EAGER):
        result = bench.alone(
            PROMPTS[0], prediction=list(said), speculation=speculation, **{"max_tokens": 24, **options}
        )
        assert (result.stats.num_accepted_draft_tokens > 0) == (speculation == EAGER)
        found.append(result)
    plain, drafted = found
    for name in ("ids", "text", "finish_reason", "stop"):
        assert getattr(plain, name) == getattr(drafted, name), name
    assert drafted.stats.num_spec_steps < plain.stats.num_spec_steps
    return found


@pytest.mark.parametrize("place", range(1, 12))
def test_an_end_token_inside_an_accepted_block_ends_the_text(
    certain: Bench, model: PreTrainedModel, place: int
) -> None:
    """It is the last of the ids and never shown; what the tree held behind it is forgotten."""
    said = greedy(model, PROMPTS[0], 24)
    end = said[place]
    first = said.index(end)
    if first == 0:
        pytest.skip("the first token ends the text: there is no block")
    for result in ended(certain, said, stop_token_ids=[end]):
        assert list(result.ids) == said[: first + 1]
        assert result.text == certain._builder.tokenizer.decode(said[:first])
        assert (result.finish_reason, result.stop) == ("stop", end)


def test_the_models_own_end_token_acts_alike_unless_it_is_ignored(model: PreTrainedModel) -> None:
    said = greedy(model, PROMPTS[0], 24)
    model.generation_config.eos_token_id = [said[4], 95]
    try:
        bench = Bench(model, {"echo": echoes(1.0, depth=7)})
        for result in ended(bench, said):
            assert (list(result.ids), result.stop) == (said[:5], said[4])
        for result in ended(bench, said, ignore_eos=True):
            assert (list(result.ids), result.finish_reason) == (said, "length")
    finally:
        model.generation_config.eos_token_id = None


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(("start", "length"), [(1, 1), (1, 3), (2, 5), (4, 2), (0, 7)])
def test_a_stop_string_inside_an_accepted_block_ends_the_text(
    certain: Bench, model: PreTrainedModel, start: int, length: int, include: bool
) -> None:
    """The ids end with the token that completes it; the text ends before it."""
    said = greedy(model, PROMPTS[0], 24)
    decode = certain._builder.tokenizer.decode
    text = decode(said)
    stop = decode(said[start : start + length])[: length + 1]
    at = text.index(stop)
    ids = next(said[:n] for n in range(1, 25) if len(decode(said[:n])) >= at + len(stop))
    for result in ended(certain, said, stop=[stop, "never"], include_stop_str_in_output=include):
        assert list(result.ids) == ids
        assert result.text == text[: at + len(stop) * include]
        assert (result.finish_reason, result.stop) == ("stop", stop)


def test_a_stop_string_may_end_inside_a_token(certain: Bench, model: PreTrainedModel) -> None:
    """Token 24 is the word END here: E alone stops, the rest of the token is not shown."""
    said = greedy(model, PROMPTS[0], 24)
    place = said.index(24)
    for result in ended(certain, said, stop="E"):
        assert list(result.ids) == said[: place + 1]
        assert result.text == certain._builder.tokenizer.decode(said[:place])


def test_a_beginning_of_a_stop_string_is_shown_when_the_text_ends(certain: Bench, model: PreTrainedModel) -> None:
    """It was held back, and nothing came to complete it."""
    said = greedy(model, PROMPTS[0], 24)
    text = certain._builder.tokenizer.decode(said[:6])
    for result in ended(certain, said, stop=[text[-1] + "\0"], max_tokens=6):
        assert (result.text, result.finish_reason) == (text, "length")


@pytest.mark.parametrize("most", range(2, 12))
def test_the_length_ends_the_text_inside_a_block(certain: Bench, model: PreTrainedModel, most: int) -> None:
    said = greedy(model, PROMPTS[0], 24)
    for result in ended(certain, said, max_tokens=most):
        assert (list(result.ids), result.finish_reason, result.stop) == (said[:most], "length", None)


def test_the_context_ends_the_text(model: PreTrainedModel) -> None:
    """Prompt and text fill it to the last token, and one token more of prompt is one less of text."""
    bench = Bench(model, {"echo": echoes(1.0)}, max_context=30)
    for length in (6, 7, 29):
        prompt = (PROMPTS[0] * 5)[:length]
        said = greedy(model, prompt, 30 - length)
        for options in ({"speculation": "off"}, {"speculation": EAGER}, {"max_tokens": 1000}):
            result = bench.alone(prompt, prediction=said, **options)
            assert (list(result.ids), result.finish_reason) == (said, "length")


def test_an_end_and_the_length_at_one_token_is_an_end(certain: Bench, model: PreTrainedModel) -> None:
    said = greedy(model, PROMPTS[0], 24)
    assert said[3] not in said[:3]
    for result in ended(certain, said, stop_token_ids=[said[3]], max_tokens=4):
        assert (result.finish_reason, result.stop) == ("stop", said[3])


class Diary:
    """Keeps account of its calls, and bans another token at each: it would show at once if calls were amiss."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.calls.append(ids[0].tolist())
        if len(self.calls) % 3 == 0:
            scores[:, scores[0].argmax()] = -float("inf")
        scores[:, (7 * len(self.calls)) % VOCABULARY] += 3.0
        return scores


@pytest.mark.parametrize("drafter", ["echo-half", "echo-1", "prompt-lookup", "draft-model"])
def test_a_stateful_processor_sees_the_calls_of_plain_decoding(
    model: PreTrainedModel, bench: Bench, drafter: str
) -> None:
    """The very ids, in order, as transformers' own generate shows them; also among others, and behind the penalties."""
    plain = Diary()
    expected = greedy(model, PROMPTS[0], 24, logits_processor=LogitsProcessorList([plain]), repetition_penalty=1.2)
    assert len(plain.calls) == 24
    mine = Diary()
    name = bench.add(
        PROMPTS[0],
        max_tokens=24,
        processors=[mine],
        repetition_penalty=1.2,
        prediction=expected,
        speculation={"adaptive": False, "drafters": [drafter]},
    )
    bench.step()
    bench.add(PROMPTS[3], max_tokens=12, speculation=EAGER)
    bench.add(PROMPTS[4], max_tokens=9, temperature=1.0, processors=[Diary()])
    bench.run()
    assert list(bench.result(name).ids) == expected
    assert mine.calls == plain.calls
    if drafter.startswith("echo"):
        assert bench.result(name).stats.num_accepted_draft_tokens > 3


def test_a_processor_may_keep_the_ids_it_is_shown(bench: Bench, model: PreTrainedModel) -> None:
    """Some keep the tensor, not a copy; later calls must not write into it."""
    kept: list[Tensor] = []

    def keep(ids: Tensor, scores: Tensor) -> Tensor:
        kept.append(ids)
        return scores

    said = greedy(model, PROMPTS[1], 24)
    result = bench.alone(PROMPTS[1], max_tokens=24, processors=[keep], prediction=said, speculation=EAGER)
    assert list(result.ids) == said
    assert [ids[0].tolist() for ids in kept] == [[*PROMPTS[1], *said[:n]] for n in range(24)]


@pytest.mark.parametrize(
    "end", [{"stop": "END"}, {"stop_token_ids": [24]}, {"max_tokens": 3}], ids=["string", "token", "length"]
)
def test_no_processor_is_called_behind_the_end(certain: Bench, model: PreTrainedModel, end: dict[str, Any]) -> None:
    """One call per token, though the tree held more."""
    said = greedy(model, PROMPTS[0], 24)
    calls = []

    def count(ids: Tensor, scores: Tensor) -> Tensor:
        calls.append(ids.shape[1])
        return scores

    options = {"max_tokens": 24, "prediction": said, "speculation": EAGER, "processors": [count], **end}
    result = certain.alone(PROMPTS[0], **options)
    assert result.stats.num_accepted_draft_tokens > 0
    assert calls == [len(PROMPTS[0]) + n for n in range(len(result.ids))]


def test_a_processor_runs_as_under_transformers_generate(bench: Bench) -> None:
    """Without gradients, with a row that may be written into, in float32."""
    weight = torch.nn.Parameter(torch.zeros(VOCABULARY))
    weight.data[33] = 1000.0

    def learned(ids: Tensor, scores: Tensor) -> Tensor:
        assert scores.dtype == torch.float32
        scores += weight
        scores.numpy()
        return scores

    assert bench.alone(PROMPTS[0], max_tokens=3, processors=[learned]).ids == (33, 33, 33)


class Fails:
    """Raises at its third call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            raise ZeroDivisionError("the third call")
        return scores


@pytest.mark.parametrize("where", ["processors", "stopping_criteria"])
def test_what_raises_fails_its_own_request_only(model: PreTrainedModel, where: str) -> None:
    """With what was said before; the others do not notice, and nothing is held."""
    said = greedy(model, PROMPTS[0], 12)
    drafter = Scripted(lambda ids: BUSH)
    bench = Bench(model, {"bush": drafter})
    fails = Fails()
    if where == "stopping_criteria":
        broken = bench.add(
            PROMPTS[0], max_tokens=12, stopping_criteria=[lambda ids, scores: fails(ids, scores) is None]
        )
    else:
        broken = bench.add(PROMPTS[0], max_tokens=12, processors=[fails])
    stays = bench.add(PROMPTS[3], max_tokens=12)
    bench.run()
    result = bench.result(broken)
    assert (result.finish_reason, list(result.ids)) == ("error", said[:2])
    assert isinstance(result.error, ZeroDivisionError)
    assert list(bench.result(stays).ids) == greedy(model, PROMPTS[3], 12)
    assert bench.core.counters.finished == {"error": 1, "length": 1}
    assert drafter.sessions == 0


class Watchful(Scripted):
    """One that looks at what the forward said."""

    wanted = Wanted(successors=1)


@pytest.mark.parametrize(
    ("owner", "name", "call", "said"),
    # One that ends is not published: all that it leaves is.
    [(BlockTable, "commit", 2, 0), (SequenceOutput, "features", 2, 0), (Scheduler, "publish", 1, 1)],
)
def test_what_fails_while_one_sequence_is_settled_is_its_own_end_only(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, call: int, said: int
) -> None:
    """The others have what they drew in that step, be it their last; who had spoken when it failed keeps that too."""
    drafter = Watchful(lambda ids: BUSH)
    bench = Bench(model, {"bush": drafter})
    ends, breaks, stays = (
        bench.add(prompt, max_tokens=most, logprobs=0)
        for prompt, most in ((PROMPTS[0], 1), (PROMPTS[3], 12), (PROMPTS[2], 12))
    )
    works, calls = getattr(owner, name), count(1)

    def breaks_once(*args: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise torch.OutOfMemoryError("no memory for this one")
        return works(*args, **options)

    monkeypatch.setattr(owner, name, breaks_once)
    outputs = bench.step()
    assert {output.request_id for output in outputs} == {ends, breaks, stays}
    result = bench.result(breaks)
    assert (result.finish_reason, list(result.ids)) == ("error", greedy(model, PROMPTS[3], 1)[:said])
    assert isinstance(result.error, torch.OutOfMemoryError)
    bench.run()
    assert list(bench.result(ends).ids) == greedy(model, PROMPTS[0], 1)
    assert list(bench.result(stays).ids) == greedy(model, PROMPTS[2], 12)
    assert bench.core.counters.finished == {"error": 1, "length": 2}
    assert (drafter.sessions, bench.target.pool.open_tables) == (0, 0)


def test_a_prompt_that_cannot_be_read_on_ends_alone(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(model, max_prefill_tokens=16)
    stays = bench.add(PROMPTS[0], max_tokens=12)
    bench.step()
    breaks = bench.add(PROMPTS[2], max_tokens=12)
    commit = BlockTable.commit

    def breaks_on_chunks(table: BlockTable, chain: int, accepted: Sequence[int] = ()) -> None:
        if chain == 16:
            raise RuntimeError("no chunk")
        commit(table, chain, accepted)

    monkeypatch.setattr(BlockTable, "commit", breaks_on_chunks)
    assert [output.request_id for output in bench.step()] == [stays, breaks]
    result = bench.result(breaks)
    assert (result.finish_reason, result.ids, str(result.error)) == ("error", (), "no chunk")
    bench.run()
    assert list(bench.result(stays).ids) == greedy(model, PROMPTS[0], 12)


def test_a_stopping_criterion_is_asked_after_every_token_as_by_transformers(
    certain: Bench, model: PreTrainedModel
) -> None:
    """With the same ids; the token at which it says stop is the last."""

    def criterion(diary: list[list[int]]) -> Callable[..., Tensor]:
        def stop(ids: Tensor, scores: Any, **others: Any) -> Tensor:
            diary.append(ids[0].tolist())
            return torch.tensor([len(diary) == 9])

        return stop

    plain: list[list[int]] = []
    expected = greedy(model, PROMPTS[0], 24, stopping_criteria=StoppingCriteriaList([criterion(plain)]))
    assert len(expected) == 9
    mine: list[list[int]] = []
    said = greedy(model, PROMPTS[0], 24)
    result = certain.alone(
        PROMPTS[0], max_tokens=24, prediction=said, speculation=EAGER, stopping_criteria=[criterion(mine)]
    )
    assert (list(result.ids), result.finish_reason, result.stop) == (expected, "stop", None)
    assert result.text == certain._builder.tokenizer.decode(expected)
    assert mine == plain


def test_each_sample_has_criteria_of_its_own(bench: Bench) -> None:
    """As it has processors of its own: one that counts its calls counts those of one sample."""

    class After:
        calls = 0

        def __call__(self, ids: Tensor, scores: Any) -> bool:
            self.calls += 1
            return self.calls == 5

    name = bench.add(PROMPTS[0], max_tokens=12, n=3, temperature=1.0, seed=1, stopping_criteria=[After()])
    bench.run()
    assert [len(bench.result(name, index).ids) for index in range(3)] == [5, 5, 5]


def test_each_sample_has_processors_of_its_own(bench: Bench) -> None:
    alone = bench.alone(PROMPTS[0], max_tokens=12, processors=[Diary()], temperature=1.0, seed=1)
    theirs = Diary()
    name = bench.add(PROMPTS[0], max_tokens=12, n=3, temperature=1.0, seed=1, processors=[theirs])
    bench.run()
    assert bench.result(name, 0).ids == alone.ids
    assert len({bench.result(name, index).ids for index in range(3)}) == 3
    assert theirs.calls == [], "the caller's own stays as it was"
