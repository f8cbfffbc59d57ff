"""Models that cannot be copied around their weights are refused by name; functions in place of a forward are right."""

from __future__ import annotations

import threading
from pathlib import Path
from types import MethodType
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specgen import Engine, InvalidRequest, UnsupportedModel
from specgen.model.twin import runs_alone, twin, unwrapped
from tests.support.tiny import build

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = [9, 31, 40, 9, 31, 77]
OPTIONS: dict[str, Any] = {"kv_tokens": 256, "drafters": {}}


def truth(model: PreTrainedModel) -> list[int]:
    ids = torch.tensor([PROMPT])
    text = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
    return text[0, len(PROMPT) :].tolist()


def said(model: Any) -> list[int]:
    with Engine(model, **OPTIONS) as engine:
        return list(engine.generate(PROMPT, max_tokens=8, temperature=0.0).ids)


def test_offloaded_weights_are_refused_by_name(tmp_path: Path) -> None:
    for model in (
        accelerate.cpu_offload(build("llama"), execution_device="cpu"),
        accelerate.disk_offload(build("llama"), str(tmp_path / "disk"), execution_device="cpu"),
        accelerate.cpu_offload_with_hook(build("llama"), execution_device="cpu")[0],
    ):
        with pytest.raises(UnsupportedModel, match=r"is offloaded by accelerate \(cpu_offload, disk_offload or a dev"):
            Engine(model)
    model = build("llama")
    model.lm_head.to("meta")
    with pytest.raises(UnsupportedModel, match=r"lm_head\.weight has no numbers"):
        Engine(model)


def test_a_device_map_is_never_undone(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "model")
    folder = tmp_path / "model"
    expected = said(build("llama"))
    for place in ("cpu", "auto", {"": "cpu"}):
        with Engine.from_pretrained(folder, model_options={"device_map": place}, **OPTIONS) as engine:
            assert list(engine.generate(PROMPT, max_tokens=8, temperature=0.0).ids) == expected
    partly = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(UnsupportedModel, match=r"lm_head is offloaded by accelerate"):
        Engine.from_pretrained(folder, model_options={"device_map": partly, "offload_folder": str(tmp_path / "off")})
    with pytest.raises(InvalidRequest, match="device_map='cpu' says where the weights go, and so does device='cpu'"):
        Engine.from_pretrained(folder, device="cpu", model_options={"device_map": "cpu"})


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (torch.rand(1) if self.training else 0)


def noisy(model: PreTrainedModel) -> None:
    layer = Noisy(32, 96, bias=False)
    layer.weight = model.lm_head.weight
    model.lm_head = layer


CHANCES = {
    "a dropout": (lambda m: setattr(m.model.layers[0].mlp, "act_fn", nn.Dropout(0.3)), "act_fn .Dropout.* p=0.3"),
    "a setting": (lambda m: setattr(m.model.layers[0].self_attn, "attention_dropout", 0.1), "attention_dropout=0.1"),
    "the config": (lambda m: setattr(m.config, "attention_dropout", 0.1), "attention_dropout=0.1"),
    "code of one's own": (noisy, "lm_head .Noisy.* which reads `training`"),
}


@pytest.mark.parametrize("name", CHANCES)
def test_chance_in_training_mode_is_refused_by_name(name: str) -> None:
    change, message = CHANCES[name]
    model = build("llama")
    change(model)
    model.train()
    with pytest.raises(UnsupportedModel, match=message + r".*call model\.eval\(\) first"):
        Engine(model, **OPTIONS)
    assert said(model.eval()) == truth(model)
    assert model.lm_head.training is False


def test_where_nothing_is_random_training_mode_is_served() -> None:
    model = build("llama").train()
    assert said(model) == truth(model)
    assert all(module.training for module in model.modules())


def test_a_forward_that_calls_the_model_it_was_taken_from_is_refused_by_name() -> None:
    model = build("llama")
    forward = model.forward

    def scaled(*args: Any, **options: Any) -> Any:
        output = forward(*args, **options)
        output.logits = output.logits * 2
        return output

    model.forward = scaled
    with pytest.raises(UnsupportedModel, match=r"calls model of the model that it was made for.*types\.MethodType"):
        Engine(model)


def test_a_callers_own_call_meanwhile_is_no_reason_to_refuse() -> None:
    model = build("llama")
    with runs_alone(model):
        caller = threading.Thread(target=lambda: model(torch.tensor([PROMPT])))
        caller.start()
        caller.join()


def test_what_torch_compiles_is_taken_as_what_it_is_made_of() -> None:
    model = build("llama")
    compiled: Any = torch.compile(model, backend="eager")
    assert unwrapped(compiled) is model
    assert said(compiled) == truth(model)
    model.model.layers[0].compile(backend="eager")
    assert said(model) == truth(model)


@pytest.mark.parametrize("given", [nn.DataParallel(build("llama")), nn.Linear(2, 2), "path/to/model", None])
def test_what_is_no_model_is_refused_by_name(given: Any) -> None:
    with pytest.raises(UnsupportedModel, match=f"{type(given).__name__} is no transformers model"):
        Engine(given)


def test_another_way_to_prepare_inputs_is_refused_by_name() -> None:
    model: Any = build("llama")
    own = model.prepare_inputs_for_generation
    model.prepare_inputs_for_generation = own
    assert said(model) == truth(model)
    model.prepare_inputs_for_generation = MethodType(lambda self, ids, **more: own(ids[:, -3:], **more), model)
    with pytest.raises(UnsupportedModel, match="prepare_inputs_for_generation of its own"):
        Engine(model)


def test_attributes_with_a_history_of_gradients_are_shared() -> None:
    model = build("llama")
    model.model.last = model.lm_head.weight * 2
    assert twin(model).model.last is model.model.last


def test_what_cannot_be_copied_is_named() -> None:
    model = build("llama")
    model.model.lock = threading.Lock()
    with pytest.raises(UnsupportedModel, match="cannot be copied .*lock"):
        Engine(model)


def test_a_row_of_the_padding_token_warns_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers takes it for padding without a mask; the caller's own model goes on saying so."""
    said: list[str] = []
    monkeypatch.setattr("transformers.modeling_utils.logger.warning_once", said.append)
    model = build("gpt2")
    model.config.pad_token_id = 7
    ids = torch.tensor([[7, 8, 7]])
    twin(model)(input_ids=ids)
    assert not said
    model(input_ids=ids)
    assert any("attention_mask" in message for message in said)
