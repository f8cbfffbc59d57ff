"""The drop-in for `model.generate`: what transformers drops on the way, who runs when, and what ends what.

That it returns what transformers returns is in test_api.py, and of random calls in test_dropin_random.py.
"""

from __future__ import annotations

import inspect
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import accelerate
import pytest
import torch
from structlog.testing import capture_logs
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from torch import Tensor
from transformers import (
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.generation.streamers import BaseStreamer

import specgen
from specgen import InvalidRequest, UnsupportedModel
from specgen.api.dropin import custom_generate as dropin
from specgen.api.dropin.arguments import keep_arguments_for
from specgen.api.kept_engine import engine_of
from tests.support.engines import close_kept
from tests.support.letters import SECONDS, until
from tests.support.tiny import VOCABULARY, build

PROMPT = [9, 31, 40, 9, 31, 77]
BATCH = {
    "input_ids": torch.tensor([[9, 31, 40, 9, 31, 77], [0, 0, 60, 61, 60, 61], [0, 0, 0, 0, 0, 5]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]]),
}
ONE = {name: value[:1] for name, value in BATCH.items()}
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_engine_stays() -> Iterator[None]:
    dropin._warn.cache_clear()
    yield
    close_kept()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Token t is the character behind the space by t."""
    made = Tokenizer(BPE({chr(32 + token): token for token in range(VOCABULARY)}, []))
    made.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made)


class Recorder(BaseStreamer):
    """Keeps what it gets; raises in the place of a token if told to."""

    def __init__(self, fails_at: int = -1) -> None:
        self.got: list[Any] = []
        self.fails_at = fails_at

    def put(self, value: Tensor) -> None:
        if len(self.got) == self.fails_at:
            raise LookupError("mine")
        self.got.append(value.tolist())

    def end(self) -> None:
        self.got.append("end")


class Raising(LogitsProcessor):
    """Raises what it is given at its third call."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 3 and self.error is not None:
            raise self.error
        return scores


class RaisingStop(StoppingCriteria):
    """Raises what it is given at its third call."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> bool:
        self.calls += 1
        if self.calls == 3:
            raise self.error
        return False


def drop_in(model: PreTrainedModel, **settings: Any) -> Any:
    return model.generate(**settings, custom_generate=specgen.custom_generate)


def same(model: PreTrainedModel, **settings: Any) -> bool:
    """Whether both ways return the same tokens."""
    return bool(drop_in(model, **settings).equal(model.generate(**settings)))


# Who decodes.


@pytest.mark.parametrize("inputs", [ONE, BATCH], ids=["row", "rows"])
def test_a_plain_call_is_the_engines_on_this_release_of_transformers(
    model: PreTrainedModel, inputs: dict[str, Tensor]
) -> None:
    """Whatever the release calls what it hands over."""
    with capture_logs() as logs:
        assert same(model, **inputs, **GREEDY, repetition_penalty=1.1, eos_token_id=2)
    assert not [event for event in logs if event["log_level"] == "warning"]
    counters = engine_of(model).counters
    assert sum(counters.finished.values()) == len(inputs["input_ids"])


def test_the_caller_is_told_once_when_and_why_nothing_is_drafted(model: PreTrainedModel) -> None:
    settings = {**GREEDY, "logits_processor": LogitsProcessorList([Raising()])}
    with capture_logs() as logs:
        for _ in range(2):
            assert same(model, **BATCH, **settings)
    (event,) = (event for event in logs if event["log_level"] == "warning")
    assert event["why"] == "Raising sees all rows of the batch at once"


def _filled_cache(model: PreTrainedModel) -> dict[str, Any]:
    out = model(input_ids=torch.tensor([PROMPT[:4]]), use_cache=True)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {"input_ids": torch.tensor([PROMPT]), name: getattr(out, name)}


OTHER_INPUTS: dict[str, Callable[[PreTrainedModel], dict[str, Any]]] = {
    "a cache with content": _filled_cache,
    "embeddings": lambda model: {"inputs_embeds": model.get_input_embeddings()(torch.tensor([PROMPT]))},
    "padding on the right": lambda _: {
        "input_ids": torch.tensor([[5, 6, 0]]),
        "attention_mask": torch.tensor([[1, 1, 0]]),
    },
    "a hole in the mask": lambda _: {
        "input_ids": torch.tensor([PROMPT]),
        "attention_mask": torch.tensor([[0, 1, 1, 0, 1, 1]]),
    },
    "other positions": lambda _: {
        "input_ids": torch.tensor([PROMPT]),
        "position_ids": torch.tensor([[3, 4, 5, 6, 7, 8]]),
    },
}


@pytest.mark.parametrize("name", OTHER_INPUTS)
def test_inputs_that_an_engine_would_not_see_are_the_models_own_affair(model: PreTrainedModel, name: str) -> None:
    """Each run gets its own: a cache is filled by the call."""
    expected = model.generate(**OTHER_INPUTS[name](model), **GREEDY)
    assert drop_in(model, **OTHER_INPUTS[name](model), **GREEDY).tolist() == expected.tolist()


@pytest.mark.parametrize("rows", [ONE, BATCH], ids=["row", "rows"])
def test_hidden_states_are_transformers_own(model: PreTrainedModel, rows: dict[str, Tensor]) -> None:
    settings = {**GREEDY, "output_hidden_states": True, "return_dict_in_generate": True}
    expected, found = model.generate(**rows, **settings), drop_in(model, **rows, **settings)
    assert found.sequences.equal(expected.sequences)
    assert found.hidden_states[3][1].equal(expected.hidden_states[3][1])


AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "nothing": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("after", AROUND)
@pytest.mark.parametrize("first", ["nothing", "no_grad"])
def test_what_stands_around_the_call_holds_in_it(first: str, after: str) -> None:
    """And for that call alone: the engine is made in the first and used in the second."""
    model = build("llama")
    for name in (first, after):
        with AROUND[name]():
            own = LogitsProcessorList([Raising()])
            assert same(model, **ONE, **GREEDY, suppress_tokens=[7], logits_processor=own), name
            assert same(model, **BATCH, **GREEDY, suppress_tokens=[7]), name


@pytest.mark.parametrize("eos", [None, 24])
@pytest.mark.parametrize("inputs", [ONE, BATCH], ids=["row", "rows"])
def test_rows_that_a_stop_string_ended(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, inputs: dict[str, Tensor], eos: int | None
) -> None:
    """Without an end token transformers goes on writing in them until all have ended."""
    settings = {**GREEDY, "eos_token_id": eos, "min_new_tokens": 6 if eos else None}
    free = model.generate(**inputs, **settings)[:, len(PROMPT) :].tolist()
    strings = [tokenizer.decode(row[3:5]) for row in free[:2]]
    stopped = {"stop_strings": strings, "tokenizer": tokenizer}
    assert same(model, **inputs, **settings, **stopped)
    assert drop_in(model, **inputs, **settings, **stopped)[:, len(PROMPT) :].tolist() != free


# Streamers.


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3}, {"do_sample": True, "top_k": 1}], ids=str)
@pytest.mark.parametrize("inputs", [ONE, BATCH], ids=["row", "rows"])
def test_a_streamer_gets_what_transformers_gives_it(
    model: PreTrainedModel, inputs: dict[str, Tensor], settings: dict[str, Any]
) -> None:
    expected, found = Recorder(), Recorder()
    settings = {**GREEDY, **settings}
    out = model.generate(**inputs, **settings, streamer=expected)
    assert drop_in(model, **inputs, **settings, streamer=found).equal(out)
    assert found.got == expected.got
    assert found.got[-1] == "end"


def test_a_streamer_reaches_a_partial_of_the_drop_in(model: PreTrainedModel) -> None:
    found = Recorder()
    chosen = partial(specgen.custom_generate, speculation="off")
    text = model.generate(**ONE, **GREEDY, streamer=found, custom_generate=chosen)
    assert [token for (token,) in found.got[1:-1]] == text[0, len(PROMPT) :].tolist()


def test_the_loop_of_a_web_page_gets_its_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=SECONDS)
    thread = threading.Thread(target=partial(drop_in, model, **ONE, **GREEDY, streamer=streamer))
    thread.start()
    text = "".join(streamer)
    thread.join(SECONDS)
    assert text == tokenizer.decode(model.generate(**ONE, **GREEDY)[0, len(PROMPT) :])


@pytest.mark.parametrize("inputs", [ONE, BATCH], ids=["row", "rows"])
def test_a_streamer_is_ended_where_something_raises(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    """Whoever reads it would wait for ever."""
    cases: list[tuple[Recorder, dict[str, Any], type[Exception]]] = [
        (Recorder(), {"logits_processor": LogitsProcessorList([Raising(LookupError("mine"))])}, LookupError),
        (Recorder(fails_at=4), {}, LookupError),
        (Recorder(), {"dola_layers": "low", "trust_remote_code": True}, Exception),
        (Recorder(), {"speculation": "fast"}, InvalidRequest),
    ]
    for streamer, settings, error in cases:
        with pytest.raises(error):
            drop_in(model, **inputs, **GREEDY, **settings, streamer=streamer)
        assert streamer.got[-1] == "end"


def test_other_callables_get_what_they_always_got(model: PreTrainedModel) -> None:
    got: dict[str, Any] = {}

    def other(model: PreTrainedModel, input_ids: Tensor, streamer: Any = None, **kwargs: Any) -> Tensor:
        got.update(kwargs, streamer=streamer)
        return input_ids

    model.generate(**ONE, **GREEDY, streamer=Recorder(), custom_generate=other)
    assert got["streamer"] is None
    assert "tokenizer" not in got


def test_a_release_that_sorts_its_arguments_elsewhere_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(GenerationMixin, "_extract_generation_mode_kwargs")
    with capture_logs() as logs:
        keep_arguments_for(specgen.custom_generate)
    assert [event["log_level"] for event in logs] == ["warning"]


# What ends a call before its end.


@pytest.mark.parametrize(
    "error", [LookupError("mine"), StopIteration(), KeyboardInterrupt(), SystemExit(3)], ids=lambda error: repr(error)
)
def test_what_the_callers_code_raises_arrives_as_itself(model: PreTrainedModel, error: BaseException) -> None:
    """And the engine serves the next call."""
    for inputs in (ONE, BATCH):
        for raising in (
            {"logits_processor": LogitsProcessorList([Raising(error)])},
            {"stopping_criteria": StoppingCriteriaList([RaisingStop(error)])},
        ):
            with pytest.raises(type(error)) as caught:
                drop_in(model, **inputs, **GREEDY, **raising)
            assert caught.value is error
    assert same(model, **ONE, **GREEDY)
    until(lambda: engine_of(model).load.running == 0)


def test_an_interrupted_call_is_cancelled(model: PreTrainedModel) -> None:
    main = threading.main_thread().ident
    assert main is not None

    class Interrupting(LogitsProcessor):
        calls = 0

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 4:
                signal.pthread_kill(main, signal.SIGINT)
            time.sleep(0.002)
            return scores

    processor = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        drop_in(model, **ONE, **{**GREEDY, "max_new_tokens": 110}, logits_processor=LogitsProcessorList([processor]))
    until(lambda: engine_of(model).load.running == 0)
    assert processor.calls < 110


@pytest.mark.parametrize("inputs", [ONE, BATCH], ids=["one", "batch"])
@pytest.mark.parametrize("end", [-1, [-1, VOCABULARY + 3], [-1, 7]])
def test_an_end_token_that_is_no_token_ends_nothing(
    model: PreTrainedModel, inputs: dict[str, Tensor], end: int | list[int]
) -> None:
    asked = {**inputs, **GREEDY, "eos_token_id": end}
    got = model.generate(**asked, custom_generate=specgen.custom_generate)
    assert got.tolist() == model.generate(**asked).tolist()


def test_offloaded_weights_are_refused_by_name_at_the_call() -> None:
    offloaded = accelerate.cpu_offload(build("llama"), execution_device="cpu")
    with pytest.raises(UnsupportedModel, match="offloaded by accelerate"):
        offloaded.generate(**ONE, **GREEDY, custom_generate=specgen.custom_generate)
