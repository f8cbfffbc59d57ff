"""`batch_invariant=True`: a row's bits do not depend on its neighbours, or the model is refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from specgen import Engine
from specgen.errors import InvalidRequest, UnsupportedModel
from specgen.kernels.blocks import in_blocks
from specgen.kernels.cpu_backend import why_not
from specgen.kv.formats import FORMATS
from specgen.model.invariant_layers import InvariantLayers
from specgen.model.runner import load_runner
from tests.support.tiny import build

KEPT = (
    "llama",
    "gemma2",
    "gpt_oss",
    "deepseek_v3",
    "gpt2",
    "mixtral",
    "mistral",
    "llama4_text",
    "phi3",
    "gemma4_text (shared KV)",
)
OWN_ATTENTION = ("falcon", "gptj", "codegen")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("kind", ["native", "k8v4"])
def test_models_that_keep_it(name: str, kind: str) -> None:
    assert load_runner(build(name), kv_tokens=64, kv_format=FORMATS[kind](), batch_invariant=True).batch_invariant


@pytest.mark.parametrize("name", ["llama", "mixtral", "deepseek_v3"])
def test_models_that_keep_it_in_bfloat16(name: str) -> None:
    assert load_runner(build(name).bfloat16(), kv_tokens=64, batch_invariant=True).batch_invariant


@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_models_that_attend_by_themselves_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModel, match=r"batch_invariant=True cannot be kept: it computes attention itself"):
        load_runner(build(name), kv_tokens=64, batch_invariant=True)


@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_a_format_that_rounds_is_refused_where_it_would_not_be_exact(name: str) -> None:
    with pytest.raises(
        UnsupportedModel, match=r"kv_format='int8' is not exact: take 'native', or batch_invariant=False"
    ):
        load_runner(build(name), kv_tokens=64, kv_format=FORMATS["int8"]())
    assert not load_runner(
        build(name), kv_tokens=64, kv_format=FORMATS["int8"](), batch_invariant=False
    ).batch_invariant


def test_a_linear_layer_that_rounds_by_place_sees_one_row_at_a_time() -> None:
    model = build("llama")
    seen = []

    class Placed(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.shape[-2])
            return super().forward(x) * (1 + 1e-6 * torch.arange(x.shape[-2]))[:, None]

    model.model.layers[1].mlp.up_proj.__class__ = Placed
    layers = InvariantLayers(model)
    seen.clear()
    with layers.active(), torch.inference_mode():
        model(input_ids=torch.tensor([[5, 6, 7]]))
    assert seen == [1, 1, 1]


def test_any_layer_that_mixes_rows_is_named() -> None:
    model = build("llama")
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * (1 + 1e-6 * output.shape[1]))
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.1\.mlp \(LlamaMLP\) rounds a row differently beside"):
        load_runner(model, kv_tokens=64, batch_invariant=True)


def test_it_is_on_by_itself_for_formats_that_round_below_float64() -> None:
    model = build("llama")
    assert not load_runner(model, kv_tokens=64, cpu_kernels=False).batch_invariant
    assert load_runner(model, kv_tokens=64, kv_format=FORMATS["int4"]()).batch_invariant
    assert not load_runner(model, kv_tokens=64, kv_format=FORMATS["int4"](), batch_invariant=False).batch_invariant
    assert not load_runner(model.double(), kv_tokens=64, kv_format=FORMATS["int4"]()).batch_invariant


@pytest.mark.skipif(why_not() is not None, reason=f"no CPU kernels: {why_not()}")
def test_it_is_on_by_itself_where_kernels_make_it_cheap() -> None:
    assert load_runner(build("llama"), kv_tokens=64).batch_invariant
    assert not load_runner(build("llama"), kv_tokens=64, batch_invariant=False).batch_invariant
    mixing = build("llama")
    mixing.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * (1 + 1e-6 * output.shape[1]))
    assert not load_runner(mixing, kv_tokens=64).batch_invariant, "a model that cannot keep it runs all the same"


def test_the_engine_passes_it_on() -> None:
    with Engine(build("llama"), kv_tokens=64, batch_invariant=True) as engine:
        assert engine.target.batch_invariant
    with pytest.raises(InvalidRequest, match=r"invariant is 'yes'; choices: True, False, None"):
        Engine(build("llama"), batch_invariant="yes")


def test_forwards_are_put_back_as_they_were() -> None:
    model = build("llama")
    hooked = model.model.layers[0].mlp.up_proj
    mine = hooked.forward
    hooked.forward = mine
    layers = InvariantLayers(model)
    with layers.active():
        assert hooked.forward is not mine
        assert "forward" in model.lm_head.__dict__
    assert hooked.__dict__["forward"] is mine
    assert "forward" not in model.lm_head.__dict__


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 17])
def test_blocks_have_the_sizes_asked_for_and_no_other(rows: int) -> None:
    seen: list[int] = []

    def double(block: torch.Tensor) -> torch.Tensor:
        seen.append(len(block))
        return block * 2

    x = torch.randn(rows, 3)
    assert torch.equal(in_blocks(double, x, (4, 8)), x * 2)
    assert set(seen) <= {0, 4, 8} if rows == 0 else set(seen) <= {4, 8}


def test_native_text_is_the_same_with_and_without(smollm: PreTrainedModel) -> None:
    prompt = list(range(300, 330))
    texts = []
    for batch_invariant in (False, True):
        with Engine(smollm, kv_tokens=256, batch_invariant=batch_invariant) as engine:
            texts.append(engine.generate(prompt, temperature=0, max_tokens=12).ids)
    assert texts[0] == texts[1]
