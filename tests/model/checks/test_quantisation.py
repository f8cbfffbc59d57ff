"""Models that transformers loaded quantised: the tokens of its own generate, or a refusal by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, TorchAoConfig

from specgen import Engine
from specgen.errors import InvalidRequest, UnsupportedModel
from specgen.kernels.cpu_backend import why_not
from specgen.model.checks.quantisation import check_quantised, quantised_layers
from specgen.model.fingerprint import kv_identity
from specgen.model.packed_linear import PackedLinear, pack_linears
from specgen.model.runner import load_runner
from specgen.model.twin import twin
from tests.support.decoding import generate
from tests.support.tiny import build

torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ([5, 17, 40, 8, 8, 61, 33, 90, 12, 77, 29, 5, 17, 40, 8], [88, 1, 60], [3, 4, 3, 4, 3, 4, 3])
NEW = 24
_BY_16 = torchao.PerGroup(16)
WEIGHTS_ALONE: dict[str, Any] = {
    "int8": lambda: TorchAoConfig(torchao.Int8WeightOnlyConfig(version=2)),
    "int8, embeddings too": lambda: TorchAoConfig(
        torchao.Int8WeightOnlyConfig(version=2), include_input_output_embeddings=True
    ),
    "int4": lambda: TorchAoConfig(torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=_BY_16)),
    "float8": lambda: TorchAoConfig(torchao.Float8WeightOnlyConfig()),
}


def by_row() -> Any:
    return TorchAoConfig(torchao.Int8DynamicActivationInt8WeightConfig(version=2))


def by_one_scale() -> Any:
    return TorchAoConfig(torchao.Int8DynamicActivationInt8WeightConfig(granularity=torchao.PerTensor(), version=2))


def quantised(folder: Path, config: Any, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    build("llama", seed=seed).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@pytest.mark.parametrize("cpu_kernels", [True, False])
@pytest.mark.parametrize("kind", WEIGHTS_ALONE)
def test_the_tokens_are_those_of_generate(tmp_path: Path, kind: str, cpu_kernels: bool) -> None:
    model = quantised(tmp_path, WEIGHTS_ALONE[kind]())
    assert len(list(quantised_layers(model))) >= 21
    expected = [tuple(generate(model, prompt, NEW)) for prompt in PROMPTS]
    with Engine(model, kv_tokens=512, cpu_kernels=cpu_kernels) as engine:
        options: dict[str, Any] = {"temperature": 0, "max_tokens": NEW}
        for prompt, text in zip(PROMPTS, expected, strict=True):
            assert engine.generate(prompt, speculation="off", **options).ids == text
            drafted = engine.generate(prompt, prediction=list(text), speculation={"adaptive": False}, **options)
            assert drafted.ids == text
        assert tuple(result.ids for result in engine.generate(PROMPTS, **options)) == tuple(expected)


@pytest.mark.parametrize("kind", WEIGHTS_ALONE)
def test_a_seed_gives_one_text_drafted_or_not(tmp_path: Path, kind: str) -> None:
    with Engine(quantised(tmp_path, WEIGHTS_ALONE[kind]()), kv_tokens=512) as engine:
        options: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_tokens": NEW}
        alone = [engine.generate(prompt, speculation="off", **options).ids for prompt in PROMPTS]
        together = engine.generate(PROMPTS, speculation={"adaptive": False}, **options)
        assert [result.ids for result in together] == alone


def test_quantised_layers_are_left_alone_and_their_weights_shared(tmp_path: Path) -> None:
    model = quantised(tmp_path, WEIGHTS_ALONE["int8"]())
    ours = twin(model)
    pack_linears(ours)
    assert all(mine is yours for mine, yours in zip(ours.parameters(), model.parameters(), strict=True))
    assert not any(isinstance(layer, PackedLinear) for _, layer in quantised_layers(model))
    assert type(ours.get_submodule("model.layers.0.mlp.up_proj")) is nn.Linear


@pytest.mark.parametrize("kind", WEIGHTS_ALONE)
def test_kv_of_another_quantised_model_is_told_apart(tmp_path: Path, kind: str) -> None:
    target = load_runner(quantised(tmp_path, WEIGHTS_ALONE[kind]()), kv_tokens=64)

    def name(model: PreTrainedModel) -> str:
        return kv_identity(model, target.pool, arithmetic="")

    mine = name(target.model)
    assert name(quantised(tmp_path, WEIGHTS_ALONE[kind]())) == mine
    assert name(quantised(tmp_path, WEIGHTS_ALONE[kind](), seed=1)) != mine
    changed = quantised(tmp_path, WEIGHTS_ALONE[kind]())
    changed.model.layers[2].mlp.up_proj.weight.scale.mul_(2)
    assert name(changed) != mine


def test_activations_in_codes_are_refused_in_float32(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.self_attn\.q_proj \(Int8Tensor\) rounds what it reads"):
        load_runner(quantised(tmp_path, by_row()), kv_tokens=64)
    check_quantised(quantised(tmp_path, by_row(), dtype=torch.bfloat16), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_scale_for_all_rows_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedModel, match=r"q_proj \(Int8Tensor\) quantises what it reads by one scale for all"):
        load_runner(quantised(tmp_path, by_one_scale(), dtype=dtype), kv_tokens=64)


def test_weights_alone_pass_in_half_precision(tmp_path: Path) -> None:
    model = quantised(tmp_path, WEIGHTS_ALONE["int8"](), dtype=torch.bfloat16)
    assert load_runner(model, kv_tokens=64).architecture.dtype == torch.bfloat16


@pytest.mark.skipif(why_not() is not None, reason=f"no CPU kernels: {why_not()}")
def test_what_compiled_would_not_be_invariant_is_not_compiled(tmp_path: Path) -> None:
    target = load_runner(quantised(tmp_path, WEIGHTS_ALONE["int8"]()), kv_tokens=64, compile=True)
    assert target.batch_invariant
    assert not target.compiled
    assert "q_proj is quantised, and compiled" in str(target.packed.no_compiled)
    assert load_runner(build("llama"), kv_tokens=64).packed.no_compiled is None


def test_from_pretrained_quantises(tmp_path: Path) -> None:
    config = WEIGHTS_ALONE["int8"]
    expected = tuple(generate(quantised(tmp_path, config()), PROMPTS[0], NEW))
    with Engine.from_pretrained(tmp_path, quantization_config=config(), kv_tokens=512) as engine:
        assert list(quantised_layers(engine.target.model))
        assert engine.generate(PROMPTS[0], temperature=0, max_tokens=NEW, ignore_eos=True).ids == expected


def test_a_quantiser_that_cannot_do_it_is_named(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(InvalidRequest, match=r"cannot be loaded: .*conversion of the weights"):
        Engine.from_pretrained(
            tmp_path, quantization_config=TorchAoConfig(torchao.Int4WeightOnlyConfig(group_size=32)), device="cpu"
        )
