"""What an engine says is what its model says at that very call, whatever was done to the model in between."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import GenerationConfig, PreTrainedModel
from transformers.models.llama import modeling_llama

import specgen
from specgen import Engine, InvalidRequest, ModelChanged, RequestFailed, UnsupportedModel
from specgen.api import kept_engine as api
from specgen.model.packed import pack_model
from specgen.model.runner import ModelRunner, load_runner, reuse_pool
from tests.support.engines import close_kept
from tests.support.tiny import VOCABULARY, build

pytestmark = pytest.mark.usefixtures("one_thread")

# Longer than two pages, so that a prefix cache that was not forgotten would answer.
PROMPT = [(7 * place * place + 3 * place + 5) % 90 + 3 for place in range(40)]
NEW = 8
OPTIONS: dict[str, Any] = {"kv_tokens": 512, "drafters": {}, "batch_invariant": False}

Undo = Callable[[], Any]
GLOBAL_SCALE = torch.linspace(0.3, 2.0, VOCABULARY)


@pytest.fixture(autouse=True)
def no_engine_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The engine that the one-line helpers keep is small, and ends with the test."""
    monkeypatch.setattr(api, "wrap", lambda model, tokenizer=None: Engine(model, tokenizer, **OPTIONS))
    yield
    close_kept()


def truth(model: Any) -> list[int]:
    ids = torch.tensor([PROMPT])
    text = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW)
    return text[0, len(PROMPT) :].tolist()


def dropped_in(model: Any, **options: Any) -> list[int]:
    ids = torch.tensor([PROMPT])
    asked = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": NEW, **options}
    text = model.generate(input_ids=ids, custom_generate=specgen.custom_generate, **asked)
    return text[0, len(PROMPT) :].tolist()


def said(engine: Engine) -> list[int]:
    return list(engine.generate(PROMPT, max_tokens=NEW, temperature=0.0).ids)


# What a person may do to a model. Each answers how it is undone.


def attribute(path: str, value: Callable[[Any], Any]) -> Callable[[PreTrainedModel], Undo]:
    """Set an attribute, given what it was."""
    place, _, name = path.rpartition(".")

    def change(model: PreTrainedModel) -> Undo:
        owner: Any = model
        for part in place.split("."):
            owner = owner[int(part)] if part.isdigit() else getattr(owner, part)
        before = getattr(owner, name)
        setattr(owner, name, value(before))
        return lambda: setattr(owner, name, before)

    return change


def in_place(write: Callable[[Tensor], Any]) -> Callable[[PreTrainedModel], Undo]:
    def change(model: PreTrainedModel) -> Undo:
        weight = model.model.layers[1].mlp.up_proj.weight
        before = weight.detach().clone()
        with torch.no_grad():
            write(weight)

        def undo() -> None:
            with torch.no_grad():
                weight.copy_(before)

        return undo

    return change


def trained(model: PreTrainedModel) -> Undo:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimiser = torch.optim.AdamW(model.train().parameters(), 1e-2)
    for _ in range(3):
        model(input_ids=torch.tensor([PROMPT]), labels=torch.tensor([PROMPT])).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.eval()
    return lambda: model.load_state_dict(before)


def hooked(hook: Callable[..., Any], at: str = "lm_head", **how: Any) -> Callable[[PreTrainedModel], Undo]:
    return lambda model: model.get_submodule(at).register_forward_hook(hook, **how).remove


def halved(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return (args[0] * torch.linspace(0.2, 1, args[0].shape[-1]), *args[1:]), kwargs


def before_a_layer(model: PreTrainedModel) -> Undo:
    return model.model.layers[1].register_forward_pre_hook(halved, with_kwargs=True).remove


def for_all_modules(model: PreTrainedModel) -> Undo:
    def scale(module: nn.Module, args: Any, output: Any) -> Any:
        return output * GLOBAL_SCALE if isinstance(module, nn.Linear) and module.out_features == VOCABULARY else None

    return register_module_forward_hook(scale).remove


def method(model: PreTrainedModel) -> Undo:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(torch.tanh(self.gate_proj(x)) * self.up_proj(x))

    block: Any = model.model.layers[0].mlp
    block.forward = MethodType(forward, block)
    return lambda: block.__dict__.pop("forward")


def closure(model: PreTrainedModel) -> Undo:
    head: Any = model.lm_head
    forward = head.forward
    head.forward = lambda x: forward(x) * GLOBAL_SCALE
    return lambda: head.__dict__.pop("forward")


def replaced(owner: Any, name: str, value: Any) -> Undo:
    before = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before)


def backwards(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((x[..., half:], -x[..., :half]), dim=-1)


def turned_otherwise(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    return tuple(x * cos.unsqueeze(1) + backwards(x) * sin.unsqueeze(1) for x in (q, k))  # type: ignore[return-value]


def class_forward(model: PreTrainedModel) -> Undo:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(torch.relu(self.gate_proj(x)) * self.up_proj(x))

    return replaced(modeling_llama.LlamaMLP, "forward", forward)


def swapped_layers(model: PreTrainedModel) -> Undo:
    layers: Any = model.model.layers
    first, second = layers[0].mlp, layers[1].mlp

    def swap(one: nn.Module, other: nn.Module) -> None:
        layers[0].mlp, layers[1].mlp = one, other

    swap(second, first)
    return lambda: swap(first, second)


CHANGES: dict[str, Callable[[PreTrainedModel], Undo]] = {
    "a weight in place": in_place(lambda weight: weight.mul_(-1.5)),
    "a weight through .data": in_place(lambda weight: weight.data.mul_(-1.5)),
    "other .data": in_place(lambda weight: setattr(weight, "data", weight.data.roll(1, 0))),
    "another parameter": attribute("lm_head.weight", lambda old: nn.Parameter(old.detach().roll(1, 0))),
    "a training": trained,
    "an activation": attribute("model.layers.1.mlp.act_fn", lambda old: nn.Tanh()),
    "an activation that is a function": attribute("model.layers.0.mlp.act_fn.forward", lambda old: torch.tanh),
    "an epsilon": attribute("model.layers.2.input_layernorm.variance_epsilon", lambda old: 50.0),
    "a layer's epsilon": attribute("model.layers.1.input_layernorm.variance_epsilon", lambda old: 50.0),
    "the scale of attention": attribute("model.layers.0.self_attn.scaling", lambda old: old * 4),
    "the scale of RoPE": attribute("model.rotary_emb.attention_scaling", lambda old: old * 2),
    "the frequencies of RoPE": attribute("model.rotary_emb.inv_freq", lambda old: old * 3),
    "a layer that is another": attribute("model.layers.1.mlp.up_proj", lambda old: nn.Linear(32, 48)),
    "layers that changed places": swapped_layers,
    "a hook": hooked(lambda module, args, output: output * GLOBAL_SCALE),
    "a hook with kwargs": hooked(lambda module, args, kwargs, output: output * GLOBAL_SCALE, with_kwargs=True),
    "a hook in the middle": hooked(lambda module, args, output: output * 0.2, "model.layers.1.mlp"),
    "a hook before": before_a_layer,
    "a hook for all modules": for_all_modules,
    "a method of its own": method,
    "a function around the old one": closure,
    "a class's forward": class_forward,
    "a function of the model's code": lambda model: replaced(modeling_llama, "apply_rotary_pos_emb", turned_otherwise),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen_at_the_next_call_and_so_is_its_end(name: str) -> None:
    model = build("llama")
    with Engine(model, **OPTIONS) as engine:
        before = truth(model)
        assert dropped_in(model) == said(engine) == before
        undo = CHANGES[name](model)
        try:
            changed = truth(model)
            assert changed != before, "a change that changes nothing proves nothing"
            assert dropped_in(model) == said(engine) == changed
        finally:
            undo()
        assert dropped_in(model) == said(engine) == before == truth(model)
        engine.check()


class Steering:
    """An object whose method is a hook, with a scale."""

    def __init__(self) -> None:
        self.scale = 1.0

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + self.scale * GLOBAL_SCALE * 8


steering = Steering()


def test_what_a_hook_reads_is_part_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list that it closes over, an attribute of its object, an argument, a global, arrays that are no weights."""
    model = build("llama")
    scales, own, vector, array = [0.0], Steering(), torch.zeros(VOCABULARY), np.zeros(VOCABULARY, np.float32)
    own.scale = 0.0
    monkeypatch.setattr(steering, "scale", 0.0)
    model.lm_head.register_forward_hook(lambda module, args, output: output + scales[0] * GLOBAL_SCALE * 8)
    model.lm_head.register_forward_hook(own)
    model.lm_head.register_forward_hook(partial(lambda module, args, output, by: output - by, by=vector))
    model.lm_head.register_forward_hook(lambda module, args, output: steering(module, args, output))
    model.lm_head.register_forward_hook(lambda module, args, output: output + torch.from_numpy(array))
    changes: list[Callable[[], Any]] = [
        lambda: scales.__setitem__(0, 1.0),
        lambda: setattr(own, "scale", -3.0),
        lambda: vector.add_(GLOBAL_SCALE * 30),
        lambda: vector.data.mul_(-1),
        lambda: array.__setitem__(slice(20, 60), 90.0),
        lambda: monkeypatch.setattr(steering, "scale", 9.0),
    ]
    with Engine(model, **OPTIONS) as engine:
        texts = [truth(model)]
        for change in changes:
            change()
            texts.append(truth(model))
            assert dropped_in(model) == said(engine) == texts[-1] != texts[-2]


def test_a_config_that_is_read_at_run_time_is_part_of_the_model() -> None:
    model = build("gemma2")
    texts = []
    with Engine(model, **OPTIONS) as engine:
        for cap in (30.0, 0.5, None, 30.0):
            model.config.final_logit_softcapping = cap
            texts.append(truth(model))
            found = (dropped_in(model), said(engine))
            assert found == (texts[-1], texts[-1])


@contextmanager
def counted_targets() -> Iterator[list[ModelRunner]]:
    made: list[ModelRunner] = []
    make = ModelRunner.__init__

    def counting(self: ModelRunner, *args: Any, **options: Any) -> None:
        made.append(self)
        make(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelRunner, "__init__", counting)
        yield made


QUIET = ("llama", "gpt2", "gemma3_text", "phi3 (LongRoPE)", "gpt_oss", "deepseek_v3", "codegen", "gemma4_text")


@pytest.mark.parametrize("name", QUIET)
def test_where_nothing_changed_nothing_is_made_anew(name: str) -> None:
    """Though the model itself is used meanwhile, writes to caches of its own, and a hook collects what it sees."""
    model = build(name)
    collected: list[Any] = []
    model.lm_head.register_forward_hook(lambda module, args, output: collected.append(output.shape))
    with counted_targets() as made, Engine(model, **OPTIONS) as engine:
        for _ in range(3):
            assert dropped_in(model) == said(engine) == truth(model)
        assert len(made) == 2
    assert collected


def test_dynamic_rope_that_has_read_a_long_text_is_the_same_model() -> None:
    model = build("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with counted_targets() as made, Engine(model, **OPTIONS) as engine:
        expected = said(engine)
        model(input_ids=torch.randint(VOCABULARY, (1, 200)))
        assert said(engine) == expected == truth(model)
        assert len(made) == 1


def test_state_costs_a_few_python_calls_for_each_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a request: what is looked at grows with the modules and no faster."""
    sizes = []
    for layers in (3, 6, 9):
        model = build("llama", num_hidden_layers=layers)
        target = load_runner(model, kv_tokens=64)
        sizes.append(len(target.packed.wrapped._state._entries))
        assert len(target.packed.wrapped._state._entries) < 12 * len(list(model.modules())) + 100
    assert sizes[1] - sizes[0] == sizes[2] - sizes[1]


# PEFT and adapters.

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def adapted() -> tuple[PreTrainedModel, Any]:
    model = build("llama")
    config = peft.LoraConfig(task_type="CAUSAL_LM", **LORA)
    wrapped: Any = peft.get_peft_model(model, config, adapter_name="a").eval()
    wrapped.add_adapter("b", config)
    scatter(wrapped)
    return model, wrapped


def scatter(model: nn.Module) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.6)


def rescale(wrapped: Any) -> None:
    for module in wrapped.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("a", 3.0)


def test_the_adapter_that_is_active_at_the_call_answers() -> None:
    _, wrapped = adapted()
    steps: list[Callable[[], Any]] = [
        lambda: wrapped.set_adapter("b"),
        lambda: wrapped.set_adapter("a"),
        lambda: wrapped.base_model.disable_adapter_layers(),
        lambda: wrapped.base_model.enable_adapter_layers(),
        lambda: wrapped.base_model.set_adapter(["a", "b"]),
        lambda: wrapped.set_adapter("a"),
        lambda: wrapped.merge_adapter(),
        lambda: wrapped.unmerge_adapter(),
        lambda: rescale(wrapped),
        lambda: wrapped.delete_adapter("b"),
    ]
    texts = [truth(wrapped)]
    with Engine(wrapped, **OPTIONS) as engine:
        for step in steps:
            assert dropped_in(wrapped) == said(engine) == texts[-1]
            step()
            texts.append(truth(wrapped))
        with wrapped.disable_adapter():
            assert dropped_in(wrapped) == said(engine) == truth(wrapped) != texts[-1]
        assert dropped_in(wrapped) == said(engine) == texts[-1]
    assert len({tuple(text) for text in texts}) >= 5


def test_adapters_of_transformers_itself() -> None:
    model = build("llama")
    base = truth(model)
    for name in "ab":
        model.add_adapter(peft.LoraConfig(**LORA), adapter_name=name)
    scatter(model.eval())
    texts = []
    with Engine(model, **OPTIONS) as engine:
        for step in (lambda: model.set_adapter("a"), lambda: model.set_adapter("b"), lambda: model.disable_adapters()):
            step()
            texts.append(truth(model))
            assert dropped_in(model) == said(engine) == texts[-1]
    assert len({tuple(text) for text in texts}) == 3
    assert texts[-1] == base


@pytest.mark.parametrize("names", [["a"], ["__base__"]])
def test_an_adapter_for_each_row_is_refused_by_name(names: list[str]) -> None:
    _, wrapped = adapted()
    assert dropped_in(wrapped) == truth(wrapped)
    with pytest.raises(InvalidRequest, match="adapter_names is not supported") as caught:
        dropped_in(wrapped, adapter_names=names)
    assert caught.value.param == "adapter_names"
    assert dropped_in(wrapped) == truth(wrapped)


def test_prompt_learning_is_refused_by_name() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    wrapped: Any = peft.get_peft_model(build("llama"), config).eval()
    for ask in (lambda: dropped_in(wrapped), lambda: Engine(wrapped)):
        with pytest.raises(UnsupportedModel, match="prompt learning of PEFT"):
            ask()


# Engines that the caller holds.


def test_the_generation_config_is_read_at_the_call() -> None:
    model = build("llama")
    plain = truth(model)
    with Engine(model, **OPTIONS) as engine, counted_targets() as made:
        for config in (
            {"eos_token_id": plain[4]},
            {"repetition_penalty": 1.7},
            {"eos_token_id": [plain[2], plain[3]], "pad_token_id": 0},
        ):
            model.generation_config = GenerationConfig(**config)
            expected = truth(model)
            assert expected != plain
            found = engine.generate(PROMPT, max_tokens=NEW)
            assert dropped_in(model) == expected
            assert list(found.ids) == expected
            assert list(specgen.generate(model, PROMPT, max_tokens=NEW).ids) == expected
        model.generation_config.eos_token_id = None
        assert list(engine.generate(PROMPT, max_tokens=NEW).ids) == plain
        assert len(made) == 1  # of the one-line helpers


def test_a_change_while_requests_run_is_an_error_that_names_refresh() -> None:
    model = build("llama")
    with Engine(model, **OPTIONS) as engine:
        stream = engine.stream(PROMPT[:4], max_tokens=100, temperature=0.0, processors=[_slowly])
        next(stream)
        model.model.norm.variance_epsilon = 5.0
        with pytest.raises(ModelChanged, match=r"model\.norm\.variance_epsilon .* engine\.refresh\(\)"):
            engine.generate(PROMPT, max_tokens=2)
        engine.refresh()
        with pytest.raises(RequestFailed) as caught:
            stream.results()
        assert isinstance(caught.value.__cause__, ModelChanged)
        assert said(engine) == truth(model)
        engine.check()


def _slowly(ids: Tensor, scores: Tensor) -> Tensor:
    time.sleep(0.02)
    return scores


def test_refresh_forgets_what_was_cached_and_pinned_and_answered() -> None:
    model = build("llama")
    with Engine(model, response_cache_bytes=1 << 20, **OPTIONS) as engine:
        pin = engine.prefix.pin(PROMPT)
        first = engine.generate(PROMPT, max_tokens=NEW, temperature=0.0, seed=1)
        assert pin.tokens
        assert engine.responses.stats.responses == 1
        pool = engine.target.pool
        engine.refresh()
        assert (pin.tokens, engine.prefix.stats.pages, engine.responses.stats.responses) == (0, 0, 0)
        assert engine.target.pool is pool
        assert engine.generate(PROMPT, max_tokens=NEW, temperature=0.0, seed=1).ids == first.ids
        engine.check()


def test_a_model_that_can_be_served_no_more_is_refused_until_it_can() -> None:
    model = build("llama")
    with Engine(model, **OPTIONS) as engine:
        expected = said(engine)
        model.train()
        assert said(engine) == expected == dropped_in(model)
        model.model.layers[1].self_attn.attention_dropout = 0.5
        for _ in range(2):
            for ask in (said, lambda engine: dropped_in(engine.model), Engine.refresh):
                with pytest.raises(UnsupportedModel, match=r"training mode, where attention_dropout=0\.5 .*eval"):
                    ask(engine)
        assert said(_evaluated(engine)) == expected == dropped_in(model)


def _evaluated(engine: Engine) -> Engine:
    engine.model.eval()
    return engine


def test_a_model_of_other_sizes_needs_a_new_engine() -> None:
    pool = load_runner(build("llama"), kv_tokens=64).pool
    with pytest.raises(UnsupportedModel, match="make a new engine"):
        reuse_pool(pack_model(build("gpt2")), pool)
    model = build("llama")
    with Engine(model, **OPTIONS) as engine:
        model.resize_token_embeddings(VOCABULARY + 8)
        with pytest.raises(UnsupportedModel, match="104 tokens of vocabulary .* make a new engine"):
            said(engine)
        assert dropped_in(model) == truth(model)


def test_an_adapter_of_the_engine_stays_through_a_refresh(tmp_path: Any) -> None:
    wrapped: Any = peft.get_peft_model(build("llama"), peft.LoraConfig(task_type="CAUSAL_LM", **LORA)).eval()
    scatter(wrapped)
    wrapped.save_pretrained(tmp_path)
    model = build("llama")
    with Engine(model, **OPTIONS) as engine:
        engine.adapters.load("own", tmp_path)
        for _ in range(2):
            under = engine.generate(PROMPT, max_tokens=NEW, temperature=0.0, adapter="own")
            assert list(under.ids) == truth(wrapped) != said(engine)
            for each in (model, wrapped.base_model.model):
                each.model.norm.variance_epsilon = 5.0


def test_saved_prefixes_are_not_read_under_another_adapter(tmp_path: Any) -> None:
    """Weights and config are the same; what is active is not."""
    model, wrapped = adapted()
    with Engine(model, **OPTIONS) as engine:
        said(engine)
        assert engine.prefix.save(tmp_path) > 0
        engine.prefix.clear()
        assert engine.prefix.load(tmp_path) > 0
        wrapped.set_adapter("b")
        assert said(engine) == truth(wrapped)
        engine.prefix.clear()
        assert engine.prefix.load(tmp_path) == 0
    again, other = adapted()
    with Engine(again, **OPTIONS) as engine:
        assert engine.prefix.load(tmp_path) > 0
        assert said(engine) == truth(other)


def test_an_engine_that_loaded_its_model_looks_once_somebody_else_holds_it(tmp_path: Any) -> None:
    build("llama").save_pretrained(tmp_path)
    with Engine.from_pretrained(tmp_path, **OPTIONS) as engine:
        first = said(engine)
        engine.model.model.layers[1].input_layernorm.variance_epsilon = 50.0
        assert said(engine) == truth(engine.model) != first
