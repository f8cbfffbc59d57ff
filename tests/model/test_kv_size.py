"""How large a KV pool and a context become, and what is said where that is less than the model's."""

from __future__ import annotations

from typing import Any

import pytest
from structlog.testing import capture_logs
from transformers import PreTrainedModel

from specgen import Engine, InvalidRequest
from specgen.model import kv_size as kv_size_module
from specgen.model import runner
from specgen.model.kv_size import KVSize, kv_size
from specgen.model.runner import load_runner
from tests.support.tiny import CONTEXT, build

PLENTY = 1 << 40
# As it is shipped, before the fixture of all tests makes it less.
FULL_CONTEXTS = kv_size_module._FULL_CONTEXTS


@pytest.fixture(autouse=True)
def as_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_size_module, "_FULL_CONTEXTS", FULL_CONTEXTS)


def sized(**asked: Any) -> tuple[KVSize, list[Any]]:
    with capture_logs() as logs:
        size = kv_size(**{"limit": 8192, "max_context": None, "kv_tokens": None, "token_bytes": 1000, **asked})
    return size, logs


def test_sixteen_full_contexts_where_there_is_room() -> None:
    assert sized(available=PLENTY) == (KVSize(16 * 8192, 8192), [])
    assert sized(available=PLENTY, max_context=100) == (KVSize(1600, 100), [])


def test_a_quarter_of_what_is_available_where_there_is_less() -> None:
    assert sized(available=4 * 1000 * 16000) == (KVSize(16000, 8192), [])


def test_a_context_that_shrinks_is_told_with_both_numbers() -> None:
    size, (log,) = sized(available=4 * 1000 * 1152)
    assert size == KVSize(1152, 1152)
    assert (log["log_level"], log["context"], log["model_context"]) == ("warning", 1152, 8192)
    assert "kv_tokens or max_context" in log["instead"]
    size, (log,) = sized(available=PLENTY, kv_tokens=1152)
    assert (size, log["log_level"], log["model_context"]) == (KVSize(1152, 1152), "warning", 8192)
    assert (log["reason"], log["instead"]) == ("kv_tokens is 1152", "raise kv_tokens to 8192")


def test_there_are_two_pages_whatever_there_is() -> None:
    size, (log,) = sized(available=0)
    assert (size, log["context"]) == (KVSize(32, 32), 32)


def test_what_was_asked_for_is_had_or_refused() -> None:
    """By itself the pool takes a quarter; for a context that was asked for all that is needed."""
    assert sized(available=1000 * 8192, max_context=8192) == (KVSize(8192, 8192), [])
    with pytest.raises(
        InvalidRequest, match=r"max_context is 8192: 8192 tokens.* 8 MiB, and 8 MiB.* max_context=8191"
    ) as caught:
        sized(available=1000 * 8192 - 1, max_context=8192)
    assert caught.value.param == "max_context"
    with pytest.raises(InvalidRequest, match="kv_tokens is 5000: .*take kv_tokens=4999 at most") as caught:
        sized(available=1000 * 4999, kv_tokens=5000)
    assert caught.value.param == "kv_tokens"


def test_sizes_that_contradict_one_another_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="kv_tokens is 63 and max_context is 64") as caught:
        sized(available=PLENTY, max_context=64, kv_tokens=63)
    assert caught.value.param == "kv_tokens"


def test_more_than_the_models_positions_is_the_models_and_is_told() -> None:
    size, (log,) = sized(available=PLENTY, max_context=8193)
    assert size == KVSize(16 * 8192, 8192)
    assert (log["log_level"], log["max_context"], log["context"]) == ("warning", 8193, 8192)


def test_positions_without_end() -> None:
    assert sized(available=PLENTY, limit=None)[0].context == 1 << 20


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama")


def test_a_target_is_sized_by_what_is_available(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    token_bytes = load_runner(model, kv_tokens=64).pool.bytes_per_token
    monkeypatch.setattr(runner, "available_bytes", lambda device: 4 * 96 * token_bytes)
    with capture_logs() as logs, Engine(model, drafters=[]) as engine:
        assert (engine.context_length, engine.target.pool.capacity) == (96, 96)
    (log,) = (log for log in logs if "shorter" in log["event"])
    assert (log["context"], log["model_context"]) == (96, CONTEXT)
    with Engine(model, drafters=[], max_context=CONTEXT) as engine:
        assert engine.context_length == CONTEXT
    monkeypatch.setattr(runner, "available_bytes", lambda device: (CONTEXT - 1) * token_bytes)
    with pytest.raises(InvalidRequest, match=f"max_context is {CONTEXT}: "):
        Engine(model, drafters=[], max_context=CONTEXT)


def test_a_draft_model_shrinks_no_context(model: PreTrainedModel) -> None:
    """Its pool has as many tokens as the target's; its own limit may be smaller or larger."""
    for draft in (build("llama", max_position_embeddings=64), build("llama", max_position_embeddings=4 * CONTEXT)):
        with capture_logs() as logs, Engine(model, kv_tokens=256, draft_model=draft) as engine:
            assert engine.context_length == CONTEXT
            assert not [log for log in logs if "shorter" in log["event"]]


def test_caches_that_no_memory_holds_are_refused(model: PreTrainedModel) -> None:
    for name in ("host_cache_bytes", "response_cache_bytes"):
        with pytest.raises(InvalidRequest, match=f"{name} is {1 << 50}, and [0-9]+ bytes of memory are") as caught:
            Engine(model, kv_tokens=64, **{name: 1 << 50})
        assert caught.value.param == name
