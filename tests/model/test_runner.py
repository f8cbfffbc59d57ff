"""Target's own promises: rows, pages, a model that is left as it was found, sizes that are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from specgen.errors import InvalidRequest, OutOfPages, UnsupportedModel
from specgen.kv.pool import PAGE_SIZE
from specgen.model.runner import ModelRunner, load_runner
from specgen.model.segment import Segment, tree_segment
from tests.support.decoding import decode, generate, model_calls
from tests.support.refusal import supported
from tests.support.tiny import CONTEXT, VOCABULARY, WINDOW, build

PROMPT = (5, 17, 40, 8, 8, 61, 33, 90, 12, 77, 29)
TREE = ((31, 32, 33, 34, 35, 36), (-1, 0, 1, 0, -1, 4))
# One model per route, and each kind of layer.
KINDS = ("gemma4_text (shared KV)", "gpt_oss", "llama4_text", "deepseek_v3", "gptj")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def llama() -> ModelRunner:
    return load_runner(build("llama"), kv_tokens=256)


def test_logits_come_for_wanted_rows_only_in_the_order_of_the_segments(llama: ModelRunner) -> None:
    first, second = llama.pool.open(), llama.pool.open()
    first.reserve(8)
    second.reserve(8)
    with model_calls(llama.model) as calls:
        logits = llama.forward(
            [Segment(first, PROMPT[:5], range(5), None, (1, 4)), Segment(second, PROMPT[:3], range(3), None, (0,))]
        ).logits
    assert calls == [8]
    assert (llama.forwards, llama.rows) == (1, 8)
    assert logits.dtype == torch.float32
    alone = llama.model(input_ids=torch.tensor([PROMPT[:5]])).logits[0]
    torch.testing.assert_close(logits, alone[[1, 4, 0]], rtol=1e-4, atol=1e-4)


def test_a_chunk_may_want_no_logits(llama: ModelRunner) -> None:
    table = llama.pool.open()
    table.reserve(5)
    assert llama.forward([Segment(table, PROMPT[:5], range(5))]).logits.shape == (0, VOCABULARY)


def test_the_check_at_load_counts_nothing_and_holds_nothing(llama: ModelRunner) -> None:
    assert (llama.forwards, llama.rows) == (0, 0)
    assert llama.pool.free_pages == llama.pool.pages == 256 // PAGE_SIZE
    llama.pool.check()


@pytest.mark.parametrize("name", KINDS)
def test_a_tree_may_grow_over_several_forwards_in_any_order(name: str) -> None:
    target = supported(build(name), kv_tokens=256)
    table = target.pool.open()
    table.reserve(64)
    target.forward([Segment(table, PROMPT[:-1], range(len(PROMPT) - 1))])
    table.commit(len(PROMPT) - 1)
    whole = tree_segment(table, PROMPT[-1:], *TREE)
    expected = target.forward([whole]).logits

    assert whole.parents is not None
    # The later forward starts with its deepest row: what the shallow row behind it sees reaches further back.
    parts = [
        replace(whole, tokens=whole.tokens[a:b], positions=whole.positions[:b], parents=whole.parents[:b], logits=())
        for a, b in ((0, 3), (3, 4), (4, 7))
    ]
    parts[0], parts[1], parts[2] = (replace(part, logits=range(len(part.tokens))) for part in parts)
    grown = torch.cat([target.forward([part]).logits for part in parts])
    torch.testing.assert_close(grown, expected, rtol=1e-4, atol=1e-4)


def test_a_later_forward_may_start_with_its_deepest_row() -> None:
    """A window is counted from the shallowest row, wherever it stands."""
    target = load_runner(build("mistral"), kv_tokens=256)
    table = target.pool.open()
    table.reserve(64)
    target.forward([Segment(table, PROMPT, range(len(PROMPT)))])
    table.commit(len(PROMPT))
    base = table.length
    # Rows 0 and 1 are a chain; rows 2 (under row 1) and 3 (under the prefix) come in a second forward, deep one first.
    target.forward([Segment(table, (31, 32), (base, base + 1))])
    positions = (base, base + 1, base + 2, base)
    parents = (-1, 0, 1, -1)
    deep, shallow = target.forward([Segment(table, (33, 34), positions, parents, (0, 1))]).logits
    alone = target.model(input_ids=torch.tensor([[*PROMPT, 31, 32, 33]])).logits[0, -1]
    torch.testing.assert_close(deep, alone, rtol=1e-4, atol=1e-4)
    alone = target.model(input_ids=torch.tensor([[*PROMPT, 34]])).logits[0, -1]
    torch.testing.assert_close(shallow, alone, rtol=1e-4, atol=1e-4)


def test_rows_without_pages_are_an_error_not_a_guess(llama: ModelRunner) -> None:
    table = llama.pool.open()
    with pytest.raises(OutOfPages):
        table.reserve(257)
    assert table.pages == []
    assert llama.pool.free_pages == llama.pool.pages


@pytest.mark.parametrize("name", [*KINDS, "gemma3"])
def test_the_model_is_left_as_it_was_found(name: str) -> None:
    model = build(name)
    configs = [model.config, *(getattr(model.config, key) for key in model.config.sub_configs)]
    # Nested configs need not agree: a vision tower may run eagerly beside a language model on SDPA.
    configs[-1]._attn_implementation = "eager"
    before = [config._attn_implementation for config in configs]
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    text = generate(model, PROMPT, 2 * WINDOW)

    target = supported(model, kv_tokens=640)
    assert decode(target, [PROMPT, PROMPT[:4]], [text, generate(model, PROMPT[:4], 2 * WINDOW)])[0] == text

    assert [config._attn_implementation for config in configs] == before
    assert generate(model, PROMPT, 2 * WINDOW) == text
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_the_model_is_put_back_when_a_forward_fails(llama: ModelRunner) -> None:
    table = llama.pool.open()
    table.reserve(1)
    before = llama.model.config._attn_implementation
    with pytest.raises(IndexError):
        llama.forward([Segment(table, (VOCABULARY,), (0,), None, (0,))])
    assert llama.model.config._attn_implementation == before


def test_two_targets_may_share_a_model(llama: ModelRunner) -> None:
    other = load_runner(llama.model, kv_tokens=640)
    text = generate(llama.model, PROMPT, 8)
    assert decode(other, [PROMPT], [text]) == [text]
    assert llama.pool.free_pages == llama.pool.pages


@pytest.mark.parametrize("name", ["llama", *KINDS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_data_types_load(name: str, dtype: torch.dtype) -> None:
    target = supported(build(name).to(dtype), kv_tokens=256)
    assert target.pool.stacks[0].dtype == dtype


def test_the_context_ends_where_the_first_of_three_limits_is() -> None:
    model = build("llama")
    assert load_runner(model).context_length == CONTEXT
    assert load_runner(model, max_context=40).context_length == 40
    assert load_runner(model, kv_tokens=64).context_length == 64
    assert load_runner(model, max_context=10 * CONTEXT).context_length == CONTEXT


def test_longrope_models_stay_below_their_original_length() -> None:
    model = build("phi3 (LongRoPE)")
    assert model.config.max_position_embeddings == CONTEXT
    assert load_runner(model).context_length == 96


@pytest.mark.parametrize("option", ["kv_tokens", "max_context"])
@pytest.mark.parametrize("size", [0, -5])
def test_a_size_below_one_is_refused(option: str, size: int) -> None:
    with pytest.raises(InvalidRequest, match=rf"{option} is {size}; it must be at least 1"):
        load_runner(build("llama"), **{option: size})


def test_a_pool_is_rounded_up_to_pages_and_holds_two_at_least() -> None:
    model = build("llama")
    assert load_runner(model, kv_tokens=1).pool.capacity == 2 * PAGE_SIZE
    assert load_runner(model, kv_tokens=3 * PAGE_SIZE + 1).pool.capacity == 4 * PAGE_SIZE


def test_a_model_that_cannot_run_at_all_is_refused_with_its_own_words() -> None:
    model = build("llama")
    model.model.layers[0].self_attn.q_proj = torch.nn.Linear(31, 32)
    with pytest.raises(UnsupportedModel, match=r"a forward over two tokens fails \(RuntimeError: .*shapes"):
        load_runner(model)


def test_shared_kv_takes_no_room_of_its_own() -> None:
    shared = supported(build("gemma4_text (shared KV)"), kv_tokens=64).architecture
    assert shared.stores == (0, 1, 2, 2, 1)
    assert len(shared.shapes) == 3


def test_a_subclass_of_a_known_model_is_known() -> None:
    config = build("llama").config
    base = type(AutoModelForCausalLM.from_config(config))
    mine = type("MyLlama", (base,), {"__module__": __name__})
    assert load_runner(mine(config).eval(), kv_tokens=64).packed.backend.route == "direct"
