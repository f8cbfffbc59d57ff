"""Every causal LM of transformers that fits is exact over noisy trees; every other is refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specgen.errors import UnsupportedModel
from specgen.kv.pool import BlockTable
from specgen.model.attention.cpu_backend import CpuBatch
from specgen.model.attention.reach import EVERYTHING, Reach
from specgen.model.runner import ModelRunner, load_runner
from specgen.model.segment import Segment, tree_segment
from tests.support import decoding
from tests.support import model_table as table
from tests.support.architectures import KV_TOKENS, NEW_TOKENS, PROMPTS, REFUSED, SUPPORTED
from tests.support.decoding import decode, follows, generate, uncached
from tests.support.tiny import MODELS, VOCABULARY, WINDOW, build

# One for each way to attend: every route, every mix of layers, KV shared between layers, soft caps and sinks.
EVERY_KIND = ("deepseek_v3", "gemma2", "gemma4_text (shared KV)", "gpt_oss", "gptj", "llama", "llama4_text", "mistral")

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True, slots=True)
class Case:
    """A model, its target with and without CPU kernels, and what transformers' own generate says to `PROMPTS`."""

    name: str
    model: PreTrainedModel
    target: ModelRunner
    plain: ModelRunner
    truths: list[list[int]]


@pytest.fixture(scope="module", params=SUPPORTED)
def case(request: pytest.FixtureRequest) -> Case:
    model = build(request.param)
    target = load_runner(model, kv_tokens=KV_TOKENS)
    plain = load_runner(model, kv_tokens=KV_TOKENS, cpu_kernels=False)
    return Case(request.param, model, target, plain, [generate(model, prompt, NEW_TOKENS) for prompt in PROMPTS])


@pytest.fixture(scope="module")
def listed() -> Mapping[str, str]:
    """The table in docs/models.md, by the names of the models."""
    lines = table.listed()
    assert lines, "docs/models.md has no table of architectures"
    return lines


def test_fifty_model_types_and_more_are_proven() -> None:
    assert REFUSED.keys() <= set(MODELS)
    assert len({name.split(" ", maxsplit=1)[0] for name in SUPPORTED}) >= 90


def test_the_docs_list_each_model_once_and_no_others(listed: Mapping[str, str]) -> None:
    assert list(listed) == [*SUPPORTED, *sorted(REFUSED)]


def test_every_kind_of_the_table_is_among_those_that_are_proven_to_fail(listed: Mapping[str, str]) -> None:
    kinds = {name: listed[name].split(" | ", maxsplit=1)[1] for name in SUPPORTED}
    assert {kinds[name] for name in EVERY_KIND} == set(kinds.values())


def test_noisy_trees_say_what_generate_says(case: Case) -> None:
    assert decode(case.target, PROMPTS, case.truths) == case.truths
    assert decode(case.plain, PROMPTS, case.truths) == case.truths


def test_generate_itself_says_what_its_model_says_without_a_cache(case: Case) -> None:
    for prompt, truth in zip(PROMPTS, case.truths, strict=True):
        assert follows(case.model, prompt, truth)
    # A text of one or two tokens would prove little.
    assert len({token for truth in case.truths for token in truth}) >= 6


def test_the_docs_say_how_it_is_carried(case: Case, listed: Mapping[str, str]) -> None:
    assert listed[case.name] == table.exact(case.name, case.target), "run: python -m tests.support.model_table"


@pytest.mark.parametrize("case", EVERY_KIND, indirect=True)
def test_a_wrong_mask_shows(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "tree_segment", _as_a_chain)
        assert decode(case.target, PROMPTS, case.truths) != case.truths
        assert decode(case.plain, PROMPTS, case.truths) != case.truths
    if set(case.target.architecture.reaches) != {EVERYTHING}:
        monkeypatch.setattr(Reach, "oldest", lambda reach, position: 0)
        monkeypatch.setattr(Reach, "allows", lambda reach, query, key: torch.ones(1, 1, dtype=torch.bool))
        attend = CpuBatch.attend
        monkeypatch.setattr(
            CpuBatch,
            "attend",
            lambda batch, layer, *rest: attend(batch, layer._replace(reach=EVERYTHING), *rest),
        )
        for target in (case.target, case.plain):
            assert decode(target, PROMPTS, case.truths) != case.truths, "a forgotten window does not show"


def _as_a_chain(table: BlockTable, chain: Sequence[int], tokens: Sequence[int], parents: Sequence[int]) -> Segment:
    return replace(tree_segment(table, chain, tokens, parents), parents=None)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exact_is_refused_by_name(name: str, listed: Mapping[str, str]) -> None:
    with pytest.raises(UnsupportedModel) as refusal:
        load_runner(build(name), kv_tokens=KV_TOKENS)
    message = str(refusal.value)
    assert REFUSED[name] in message
    assert message.startswith("model type '")
    assert message.endswith("run it with transformers' own generate")
    assert listed[name] == table.refused(name, refusal.value), "run: python -m tests.support.model_table"


def test_a_row_that_was_left_out_of_the_move_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    target = load_runner(model, kv_tokens=KV_TOKENS)
    truths = [generate(model, prompt, NEW_TOKENS) for prompt in PROMPTS]
    monkeypatch.setattr(target.pool, "move", lambda source, destination: None)
    assert decode(target, PROMPTS, truths) != truths


def test_the_slow_way_to_check_generate_agrees_with_the_quick_one() -> None:
    model = build("gemma2")
    truth = generate(model, PROMPTS[1], 2 * WINDOW)
    assert uncached(model, PROMPTS[1], 2 * WINDOW) == truth
    assert not follows(model, PROMPTS[1], [*truth[:-1], (truth[-1] + 1) % VOCABULARY])


def test_a_window_that_the_kv_cache_does_not_tell_of_is_refused() -> None:
    model = build("qwen2")
    model.model.layers[1].self_attn.sliding_window = 4096
    with pytest.raises(UnsupportedModel, match=r"layer 1 .* looks back over 4096 tokens, but its KV cache says None"):
        load_runner(model, kv_tokens=KV_TOKENS)


def test_a_window_that_only_the_config_tells_of_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import DynamicCache
    from transformers.models.mistral import modeling_mistral

    monkeypatch.setattr(modeling_mistral, "DynamicCache", lambda config: DynamicCache())
    with pytest.raises(UnsupportedModel, match=r"layer 0 .* looks back over 8 tokens by its config and None by its"):
        load_runner(build("mistral"), kv_tokens=KV_TOKENS)


def test_what_a_layer_asks_of_its_attention_is_never_ignored() -> None:
    model = build("llama")

    def ask(module: torch.nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object]) -> object:
        return args, {**kwargs, "attn_bias": torch.zeros(1)}

    model.model.layers[2].self_attn.register_forward_pre_hook(ask, with_kwargs=True)
    with pytest.raises(UnsupportedModel, match="layer 2 .* asks its attention for attn_bias"):
        load_runner(model, kv_tokens=KV_TOKENS)
