"""Random calls of `model.generate`, with and without the drop-in: same tokens, scores and errors, and whatever the
caller gave to the call ends in the same state.

Each call is drawn from a number, which a failure names. Sampled calls have one token to choose from (top_k=1), since
the coins differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

import specgen
from specgen import InvalidRequest
from tests.support.engines import close_kept
from tests.support.tiny import VOCABULARY, build

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("llama", "gpt2", "mistral")
CALLS_PER_KIND = 24
ALL_CALLS_PER_KIND = 100


class Counting(LogitsProcessor):
    """Counts its calls and favours another token each time."""

    def __init__(self) -> None:
        self.state = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.state += 1
        favoured = (input_ids[:, -1] * 5 + self.state * 11) % VOCABULARY
        return scores.scatter_add(1, favoured[:, None], torch.full((len(scores), 1), 3.0))


class Remembering(LogitsProcessor):
    """Keeps every call's ids, and bans in place what it has seen drawn in any row."""

    def __init__(self) -> None:
        self.state: list[list[list[int]]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.state.append(input_ids.tolist())
        seen = {row[-1] for call in self.state[1:] for row in call}
        scores[:, sorted(seen)[-40:]] = -torch.inf
        return scores


class ByIndex(LogitsProcessor):
    """Acts on every row by its index in the batch, in place."""

    def __init__(self) -> None:
        self.state: list[tuple[int, ...]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.state.append(tuple(scores.shape))
        for row in range(len(scores)):
            scores[row, row * 7 : row * 7 + 30] += 2.0
        return scores


class Across(LogitsProcessor):
    """Mixes the rows: each is held back from what the best of all rows wants."""

    def __init__(self) -> None:
        self.state: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        best = int(scores.max(dim=0).values.argmax())
        self.state.append(best)
        scores = scores.clone()
        scores[1:, best] = -torch.inf
        return scores


class Failing(LogitsProcessor):
    """Raises an error of its own at a step."""

    def __init__(self) -> None:
        self.state = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.state += 1
        if self.state == 4:
            raise LookupError("mine")
        return scores


class CountingStop(StoppingCriteria):
    """Ends everything at its seventh call."""

    def __init__(self) -> None:
        self.state = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.state += 1
        return torch.full((len(input_ids),), self.state >= 7)


class RowStop(StoppingCriteria):
    """Ends rows by their ids, and remembers which and whether it was given scores."""

    def __init__(self) -> None:
        self.state: list[Any] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = (input_ids.sum(dim=1) + input_ids.shape[1]) % 6 == 0
        self.state.append((input_ids.tolist(), done.tolist(), None if scores is None else len(scores)))
        return done


class Flag(StoppingCriteria):
    """A plain bool for all rows, raised by the third token of the first row."""

    def __init__(self) -> None:
        self.state: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.state.append(int(input_ids[0, -1]))
        return len(self.state) > 2 and self.state[2] % 2 == 0


class Recorder(BaseStreamer):
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.state: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.state.append(value.tolist())

    def end(self) -> None:
        self.state.append("end")


class Allowing:
    """A per-row function for `prefix_allowed_tokens_fn` that remembers who asked."""

    def __init__(self) -> None:
        self.state: list[tuple[int, int]] = []

    def __call__(self, batch_id: int, ids: Tensor) -> list[int]:
        self.state.append((batch_id, len(ids)))
        return list(range(3 + 9 * batch_id, 40 + 9 * batch_id))


PROCESSORS = (Counting, Remembering, ByIndex, Across, Failing)
CRITERIA = (CountingStop, RowStop, Flag)


@dataclass
class Call:
    """One drawn call: `settings` as they are, and makers of what has a state, called anew for each run.

    hints: how transformers would draft, which changes no text. Only the drop-in gets them: transformers' own drafts
    call what has a state in another order.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    hints: dict[str, Any] = field(default_factory=dict)
    made: dict[str, Callable[[], Any]] = field(default_factory=dict)
    own: GenerationConfig | None = None

    def run(self, model: PreTrainedModel, **more: Any) -> tuple[Any, list[Any]]:
        """What the call returns or raises, and the states that it leaves behind."""
        made = {name: make() for name, make in self.made.items()}
        config = {} if self.own is None else {"generation_config": self.own}
        found: Any
        try:
            found = model.generate(**self.settings, **config, **made, **more)
        except Exception as error:  # compared as any other outcome
            found = error
        several = [one for value in made.values() for one in (value if isinstance(value, list) else [value])]
        return found, [one.state for one in several if hasattr(one, "state")]


def drawn(seed: int) -> Call:
    """The call that a number stands for."""
    random = Random(seed)
    call = Call()
    _draw_prompts(call, random)
    settings = call.settings
    longest = settings["input_ids"].shape[1]
    settings |= random.choice(
        [{"max_new_tokens": random.randint(1, 14)}, {"max_length": longest + random.randint(1, 14)}]
    )
    settings |= random.choice([{}, {"eos_token_id": random.sample(range(3, VOCABULARY), 12)}, {"eos_token_id": 24}])
    settings |= random.choice(
        [{}, {"pad_token_id": 5}, {"eos_token_id": None}, {"eos_token_id": None, "pad_token_id": None}]
    )
    _draw_config(settings, random)
    _draw_functions(call, random)
    # transformers drafts for nothing else.
    if random.random() < 0.1 and settings.get("num_return_sequences", 1) == 1 and settings.get("use_cache", True):
        call.hints["prompt_lookup_num_tokens"] = 2
    if random.random() < 0.2:
        names = [name for name in settings if name not in ("input_ids", "attention_mask", "num_return_sequences")]
        call.own = GenerationConfig(
            bos_token_id=1, **{"pad_token_id": 0} | {name: settings.pop(name) for name in names}
        )
    return call


def _draw_prompts(call: Call, random: Random) -> None:
    rows = random.choice([1, 1, 1, 2, 3, 4])
    prompts = [[random.randrange(3, VOCABULARY) for _ in range(random.randint(1, 10))] for _ in range(rows)]
    longest = max(map(len, prompts))
    call.settings["input_ids"] = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    if random.random() < 0.9:
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        call.settings["attention_mask"] = torch.tensor(mask)
    call.settings["do_sample"] = False
    if random.random() < 0.2:
        call.settings |= {"do_sample": True, "top_k": 1, "num_return_sequences": random.choice([1, 2])}


def _draw_config(settings: dict[str, Any], random: Random) -> None:
    some: list[dict[str, Any]] = [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": random.randint(1, 8)},
        {"bad_words_ids": [[24], [7, 9], [42, 42]]},
        {"suppress_tokens": [7, 60]},
        {"begin_suppress_tokens": [8, 9, 10]},
        {"forced_eos_token_id": 24},
        {"exponential_decay_length_penalty": (3, 1.4)},
        {"sequence_bias": [[[31], 4.0], [[9, 31], -5.0]]},
        {"remove_invalid_values": True},
        {"encoder_repetition_penalty": 1.4},
        {"watermarking_config": {"bias": 2.5, "seeding_scheme": "selfhash"}},
        {"guidance_scale": 1.4},
        {"use_cache": False},
        {"max_time": 60.0},
    ]
    for one in random.sample(some, random.choice([0, 0, 1, 2])):
        settings |= one
    if random.random() < 0.4:
        settings["return_dict_in_generate"] = True
        settings |= random.choice([{}, {"output_scores": True}, {"output_scores": True, "output_logits": True}])


def _draw_functions(call: Call, random: Random) -> None:
    if random.random() < 0.45:
        kinds = random.sample(PROCESSORS, random.choice([1, 1, 2]))
        call.made["logits_processor"] = lambda: LogitsProcessorList([kind() for kind in kinds])
    if random.random() < 0.35:
        others = random.sample(CRITERIA, random.choice([1, 1, 2]))
        ends = random.choice([[], [], [MaxLengthCriteria(15)], [EosTokenCriteria([31, 42])]])
        call.made["stopping_criteria"] = lambda: StoppingCriteriaList([*(kind() for kind in others), *ends])
    if random.random() < 0.15:
        call.made["prefix_allowed_tokens_fn"] = Allowing
    if random.random() < 0.15:
        call.made["streamer"] = Recorder


def difference(expected: Any, found: Any) -> str | None:
    """How two outcomes differ; None if they do not."""
    if isinstance(expected, Exception) or isinstance(found, Exception):
        same = type(expected) is type(found) and str(expected) == str(found)
        return None if same else f"{expected!r} and {found!r}"
    if isinstance(expected, GenerateDecoderOnlyOutput) != isinstance(found, GenerateDecoderOnlyOutput):
        return f"{type(expected)} and {type(found)}"
    if isinstance(expected, Tensor):
        return None if expected.tolist() == found.tolist() else f"{expected.tolist()} and {found.tolist()}"
    for name in ("scores", "logits"):
        if why := _unlike(getattr(expected, name), getattr(found, name)):
            return f"{name}: {why}"
    return difference(expected.sequences, found.sequences)


def _unlike(expected: Any, found: Any) -> str | None:
    if expected is None or found is None:
        return None if expected is found else f"{type(expected)} and {type(found)}"
    if [one.shape for one in expected] != [one.shape for one in found]:
        return f"{len(expected)} steps and {len(found)}, or other shapes"
    for step, (one, other) in enumerate(zip(expected, found, strict=True)):
        try:
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)
        except AssertionError as error:
            return f"step {step}: {error}"
    return None


def compared(kind: str, calls: int) -> Counter[str]:
    """Run the calls of a kind of model both ways; what was refused, by parameter. Fails on the first difference."""
    model = build(kind)
    refused: Counter[str] = Counter()
    for seed in range(calls):
        call = drawn(seed * len(KINDS) + KINDS.index(kind))
        torch.manual_seed(seed)
        expected, state = call.run(model)
        found, own_state = call.run(model, custom_generate=specgen.custom_generate, **call.hints)
        if isinstance(found, InvalidRequest) and not isinstance(expected, Exception):
            refused[str(found)] += 1
            continue
        told = f"call {seed} of {kind}: {call.settings} {call.hints} {list(call.made)} {call.own}"
        assert difference(expected, found) is None, f"{difference(expected, found)}\n{told}"
        # transformers leaves a streamer open where it raises, and raises in places before it comes to ours.
        if isinstance(found, Exception) and "streamer" in call.made:
            heard = state.pop()
            assert own_state.pop() in (heard, [*heard, "end"]), told
        assert state == own_state, f"states differ after {told}"
    close_kept()
    return refused


@pytest.mark.parametrize("kind", KINDS)
def test_random_calls_return_what_transformers_returns(kind: str) -> None:
    assert not compared(kind, CALLS_PER_KIND)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_more_random_calls_return_what_transformers_returns(kind: str) -> None:
    assert not compared(kind, ALL_CALLS_PER_KIND)


def test_the_random_calls_are_of_many_kinds() -> None:
    """Else the tests above would say little."""
    calls = [drawn(seed) for seed in range(3 * CALLS_PER_KIND)]
    assert {len(call.settings["input_ids"]) for call in calls} == {1, 2, 3, 4}
    for name in ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer"):
        assert sum(name in call.made for call in calls) > 4
    assert sum(call.own is not None for call in calls) > 4
