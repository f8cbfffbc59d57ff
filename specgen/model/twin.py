"""The engine's own copy of a model's modules around the caller's weights, and what cannot be copied so."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel

from specgen.errors import InvalidRequest, UnsupportedModel

_RANDOM_IN_TRAINING = re.compile(r"drop|jitter|noise", re.IGNORECASE)
_OF_OTHER_HEADS = re.compile(r"^(classifier|summary)_")
# What they do in training mode is named by their settings.
_READ = ("peft", "torch", "transformers")
# A method of transformers' models that warns of padding where no mask is given.
_PADDING_CHECK = "warn_if_padding_and_no_attention_mask"
# Arguments of PEFT's generate, which become hooks for the time of the call.
_PER_ROW = ("adapter_names", "alora_offsets")


def unwrapped(model: object) -> PreTrainedModel:
    """The transformers model inside of what `torch.compile` or PEFT made of one.

    Raises UnsupportedModel for what is none, and for PEFT's prompt learning, which reads more than a prompt's ids.
    """
    while True:
        if _prepares_otherwise(model) or _learns_prompts(model):
            raise UnsupportedModel(
                f"{type(model).__name__} changes what is read besides the prompt's ids (prompt learning of PEFT, or "
                "prepare_inputs_for_generation of its own), which is not packed; run it with transformers' own generate"
            )
        if isinstance(model, OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, nn.Module) and not isinstance(model, PreTrainedModel) and hasattr(model, "peft_config"):
            model = model.get_base_model()  # type: ignore[operator]
        elif isinstance(model, PreTrainedModel):
            return model
        else:
            raise UnsupportedModel(
                f"{type(model).__name__} is no transformers model, nor one in torch.compile or PEFT; give the model "
                "itself (of DataParallel and its kind: `.module`), or a path to Engine.from_pretrained"
            )


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """The same modules around the same tensors, with a config of their own.

    A packed forward goes through other attention than the caller's own calls do, which may run at the same time.
    Raises UnsupportedModel naming the module where the numbers are elsewhere or the answers hang on chance.
    """
    _check_place(model)
    _check_chance(model)
    _check_rows(model)
    shared = {id(tensor): tensor for module in model.modules() for tensor in _tensors(module)}
    try:
        made = copy.deepcopy(model, memo=shared)
    except Exception as error:  # hooks and attributes may hold anything
        raise _refuse(model, f"its modules hold something that cannot be copied ({error})") from error
    for module in made.modules():
        if hasattr(module, _PADDING_CHECK):
            setattr(module, _PADDING_CHECK, _no_check)
    return made


def _no_check(*_: object, **__: object) -> None:
    """Packed rows hold no padding: a row that is the padding token means it."""


@contextmanager
def runs_alone(given: PreTrainedModel) -> Iterator[None]:
    """Raises UnsupportedModel on the way out if, on this thread, a module of `given` itself was called.

    A function that was put in place of a forward may call what it replaced, which is the caller's, not the twin's.
    """
    names = {id(module): name for name, module in given.named_modules()}
    here, called = threading.get_ident(), list[str]()

    def note(module: nn.Module, args: tuple[object, ...]) -> None:
        if id(module) in names and threading.get_ident() == here:
            called.append(names[id(module)])

    handle = register_module_forward_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()
        if called:
            raise _refuse(
                given,
                f"a function that replaces a forward, or a hook, calls {called[0] or 'the model'} of the model that it "
                "was made for, not of the module it is called with; write it as a method (types.MethodType) that calls "
                "its own `self`",
            )


def _refuse(model: PreTrainedModel, reason: str) -> UnsupportedModel:
    return UnsupportedModel(f"model type {model.config.model_type!r}: {reason}")


def _learns_prompts(model: object) -> bool:
    config = getattr(model, "active_peft_config", None) if not isinstance(model, PreTrainedModel) else None
    return bool(getattr(config, "is_prompt_learning", False))


def _prepares_otherwise(model: object) -> bool:
    """Whether another function says what this model reads; PEFT leaves the model's own one behind."""
    method = getattr(model, "__dict__", {}).get("prepare_inputs_for_generation")
    own = getattr(type(model), "prepare_inputs_for_generation", None)
    return method is not None and getattr(method, "__func__", None) is not own


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers and plain attributes: one with a history of gradients cannot be copied."""
    for group in (module._parameters, module._buffers, module.__dict__):
        yield from (value for value in group.values() if isinstance(value, Tensor))


def _check_place(model: PreTrainedModel) -> None:
    """Weights that hooks bring when a layer is called are not there for anybody else."""
    instead = "load it onto one device (device= instead of device_map=), or run it with transformers' own generate"
    for name, module in model.named_modules():
        hook = module.__dict__.get("_hf_hook")
        for each in getattr(hook, "hooks", (hook,)):
            if getattr(each, "offload", False) or type(each).__name__ == "CpuOffload":
                told = f"{name or 'the model'} is offloaded by accelerate (cpu_offload, disk_offload or a device_map)"
                raise _refuse(model, f"{told}, and its weights come and go with each call; {instead}")
    places: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        places.setdefault(str(parameter.device), name)
    if "meta" in places:
        raise _refuse(model, f"{places['meta']} has no numbers (it is on the meta device); {instead}")
    if len(places) > 1:
        told = ", ".join(f"{name} on {device}" for device, name in places.items())
        raise _refuse(model, f"its weights are spread over {len(places)} devices ({told}); {instead}")


def _check_chance(model: PreTrainedModel) -> None:
    """In training mode a dropout makes each answer another; where nothing is random the mode changes no answer."""
    training = [(name, module) for name, module in model.named_modules() if module.training]
    chances = ((name, module, _chance(module)) for name, module in training)
    found = [(name or "the model", type(module).__name__, chance) for name, module, chance in chances if chance]
    if training and (chance := _random_setting(model.config.get_text_config(decoder=True).to_dict())):
        found.append(("the model", type(model).__name__, chance))
    for name, kind, chance in found:
        told = f"{name} ({kind}) is in training mode, where {chance} makes its answers random"
        raise _refuse(model, f"{told}; call model.eval() first")


def _chance(module: nn.Module) -> str | None:
    """What makes a module in training mode say something else than in evaluation."""
    if isinstance(module, _DropoutNd):
        return f"p={module.p}" if module.p else None
    if isinstance(module, _BatchNorm):
        return "the batch beside a row"
    code = getattr(type(module).forward, "__code__", None)
    if type(module).__module__.split(".")[0] not in _READ and code is not None and "training" in code.co_names:
        return "its own forward, which reads `training`,"
    return _random_setting(module.__dict__)


def _random_setting(settings: Mapping[str, object]) -> str | None:
    found = (
        f"{name}={value}"
        for name, value in settings.items()
        if isinstance(value, float) and value > 0
        if _RANDOM_IN_TRAINING.search(name) and not _OF_OTHER_HEADS.search(name)
    )
    return next(found, None)


def _check_rows(model: PreTrainedModel) -> None:
    """Hooks that say for each row of the caller's batch which adapter it runs under.

    PEFT takes them away when its generate returns, not when it raises: so they are taken away here.
    """
    refused = None
    for module in model.modules():
        for number, hook in list(module._forward_pre_hooks.items()):
            given = hook.keywords if isinstance(hook, partial) else {}
            if found := next((name for name in _PER_ROW if name in given), None):
                refused = found
                del module._forward_pre_hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)
    if refused:
        raise InvalidRequest(
            f"{refused} is not supported by specgen; activate one adapter (set_adapter) and call once for each, or "
            "load them with engine.adapters.load, under which rows run side by side",
            param=refused,
        )
