"""What a model's forward depends on, as a value: its tensors and all that is none of them.

An adapter that is switched, a hook, another activation, a scale in a closure change what a model says without a write
to a weight. A state is taken before a call and compared with the one that an engine was built for.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Set
from dataclasses import is_dataclass
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedConfig

Value: TypeAlias = Any
"""What can be compared with `==` and no tensor hides in."""

_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size})
# torch's and transformers' own records, which no answer depends on, and the settings of generate, read at each call.
_RECORDS = frozenset(
    {
        "_backward_hooks",
        "_backward_pre_hooks",
        "_cache",
        "_compiled_call_impl",
        "_is_full_backward_hook",
        "_is_hf_initialized",
        "_last_compile_config",
        "_load_state_dict_post_hooks",
        "_load_state_dict_pre_hooks",
        "_non_persistent_buffers_set",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "generation_config",
        "warnings_issued",
    }
)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_HOW_HOOKS_ARE_CALLED = frozenset(
    {"_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"}
)
# Dynamic RoPE keeps the frequencies of the last forward, and makes them anew in the next.
_OF_THE_LAST_FORWARD = ("inv_freq", "max_seq_len_cached", "attention_scaling")
_LIBRARIES = frozenset({"accelerate", "numpy", "peft", "specgen", "torch", "torchao", "transformers"})
_LIBRARIES |= sys.stdlib_module_names - {"__main__"}
# What an identity reads by itself, and where the files were.
_ELSEWHERE = re.compile(r"(^|\.)config\.|^name_or_path$")
_SAMPLES = 16
_WHOLE = 1 << 16
_DEEPEST = 12
_MOST_ENTRIES = 200_000


class Same:
    """An object that is compared by identity, kept alive so that no other takes its place."""

    __slots__ = ("object",)

    def __init__(self, object: object) -> None:
        self.object = object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.object is other.object

    def __hash__(self) -> int:
        return id(self.object)

    def __repr__(self) -> str:
        return f"{getattr(self.object, '__module__', '')}.{getattr(self.object, '__qualname__', type(self.object))}"


class ModelState:
    """The state of a model when it was taken. Costs some microseconds for each of the model's modules and tensors.

    A change of numbers through `Tensor.data`, of which torch keeps no record, shows on the CPU, where it concerns the
    numbers that are looked at: some of each tensor.
    """

    def __init__(self, entries: Mapping[str, Value]) -> None:
        self._entries = entries

    @classmethod
    def of(cls, model: nn.Module) -> ModelState:
        """The state of `model` now. Changes nothing."""
        return cls(_Walk(model).entries)

    def changes(self, later: ModelState) -> frozenset[str]:
        """The names of all in which `later` differs."""
        before, after = self._entries, later._entries
        return frozenset(
            name for name in before.keys() | after.keys() if before.get(name, _NONE) != after.get(name, _NONE)
        )

    def change(self, later: ModelState, but: Set[str] = frozenset()) -> str | None:
        """The name of something in which `later` differs, as a person finds it; `but`: what does not count."""
        if self._entries == later._entries:
            return None
        return min(self.changes(later) - but, key=lambda name: (name.count("."), name), default=None)

    def portable(self, but: Set[str] = frozenset()) -> list[list[str]]:
        """What of it means the same in another process: no tensors, which are read there, and no config."""
        return [
            [name, repr(_readable(value))]
            for name, value in sorted(self._entries.items())
            if name not in but and not isinstance(value, _Numbers) and not _ELSEWHERE.search(name)
        ]


class _Numbers(tuple[Value, ...]):
    """Where a tensor is and how often it was written to."""

    __slots__ = ()


_NONE = object()


class _Walk:
    """Visits all that a model refers to, each object once. Names of entries are paths of attributes."""

    def __init__(self, model: nn.Module) -> None:
        self.entries: dict[str, Value] = {}
        self._seen: dict[int, str] = {}
        self._kept: list[object] = []
        self._sampled: dict[torch.dtype, list[tuple[str, Tensor]]] = {}
        self._seen[id(model)] = ""
        self._module("", model)
        for name in ("_global_forward_pre_hooks", "_global_forward_hooks"):
            self._put(name, list(getattr(torch_module, name).values()))
        for samples in self._sampled.values():
            numbers = torch.cat([sample for _, sample in samples]).view(torch.uint8).numpy().tobytes()
            start = 0
            for path, sample in samples:
                stop = start + sample.nbytes
                self.entries[path] = _Numbers((*self.entries[path], numbers[start:stop]))
                start = stop

    def _put(self, path: str, value: object, depth: int = 0) -> None:
        found = self._value(path, value, depth)
        if not isinstance(value, Tensor):
            self.entries[path] = found

    def _module(self, path: str, module: nn.Module) -> None:
        kind, attributes = type(module), module.__dict__
        self.entries[path or "the model"] = Same(kind)
        self._class(kind)
        start = f"{path}." if path else ""
        # Copies: another thread may run the model, which then sets attributes.
        for name, tensor in list(attributes["_parameters"].items()):
            self._put(start + name, tensor)
        written = _written_by_forward(attributes)
        for name, tensor in list(attributes["_buffers"].items()):
            if not name.endswith(written):
                self._put(start + name, tensor)
        for name in _HOOKS:
            if hooks := attributes[name]:
                flags = sorted(kind for kind in _HOW_HOOKS_ARE_CALLED if kind.startswith(name))
                called = tuple(tuple(number in attributes[flag] for flag in flags) for number in list(hooks))
                self.entries[f"{start}{name[1:]}"] = (called, self._value(start + name[1:], list(hooks.values())))
        for name, value in list(attributes.items()):
            if type(value) in _PLAIN:
                if name not in _RECORDS and not name.endswith(written):
                    self.entries[start + name] = value
            elif name not in _OWN and not name.endswith(written):
                self._put(start + name, value)
        for name, child in list(attributes["_modules"].items()):
            self._put(start + name, child)

    def _class(self, kind: type) -> None:
        """A class whose forward was replaced, or a function that its forward calls by name."""
        if id(kind) in self._seen:
            return
        self._seen[id(kind)] = ""
        own = getattr(kind, "forward", None)
        forward = inspect.unwrap(own) if own else None
        if isinstance(forward, FunctionType):
            scope = forward.__globals__
            called = [scope[name] for name in forward.__code__.co_names if callable(scope.get(name))]
            name = f"{kind.__module__}.{kind.__qualname__}.forward"
            self.entries[name] = (Same(own), *map(Same, called))

    def _value(self, path: str, value: object, depth: int = 0) -> Value:
        """A value that is equal while `value` says the same; parts that may change alone get entries of their own."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        if (first := self._seen.get(id(value))) is not None:
            return "seen", first
        if isinstance(value, Tensor):
            self.entries[path] = _numbers(value)
            self._sample(path, value)
            return "tensor"
        if isinstance(value, np.ndarray):
            return _Numbers((value.shape, value.dtype.str, value.tobytes() if value.size <= _WHOLE else Same(value)))
        if depth > _DEEPEST or len(self.entries) > _MOST_ENTRIES:
            return Same(value)
        if isinstance(value, Mapping) and _is_builtin(kind):
            return tuple(
                (key if type(key) in _PLAIN else Same(key), self._value(f"{path}.{key}", item, depth + 1))
                for key, item in list(value.items())
            )
        if isinstance(value, list | tuple):
            return tuple(self._value(f"{path}.{place}", item, depth + 1) for place, item in enumerate(list(value)))
        if isinstance(value, set | frozenset):
            return frozenset(item if type(item) in _PLAIN else Same(item) for item in value)
        return self._object(path, value, depth + 1)

    def _object(self, path: str, value: object, depth: int) -> Value:
        """An object with attributes or a function, whose parts are entries; what was visited is named."""
        if isinstance(value, MethodType):
            method = (("__func__", value.__func__), ("__self__", value.__self__))
            return tuple(self._value(f"{path}.{name}", part, depth) for name, part in method)
        if isinstance(value, nn.Module):
            self._seen[id(value)] = path
            self._module(path, value)
            return "module"
        if (parts := _parts(value)) is None:
            return Same(value)
        self._seen[id(value)] = path
        self._kept.append(value)
        for name, part in parts:
            if name not in _RECORDS:
                self._put(f"{path}.{name}", part, depth)
        return value.__code__ if isinstance(value, FunctionType) else Same(type(value))

    def _sample(self, path: str, tensor: Tensor) -> None:
        """Look at some of a tensor's numbers, all tensors of a data type in one copy."""
        if tensor.device.type != "cpu" or type(tensor) not in (Tensor, nn.Parameter) or not tensor.numel():
            return
        if tensor.layout is torch.strided and tensor.is_contiguous():
            flat = tensor.detach().view(-1)
            sample = flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES]
            self._sampled.setdefault(tensor.dtype, []).append((path, sample))


_OWN = _RECORDS | _HOW_HOOKS_ARE_CALLED | {"_parameters", "_buffers", "_modules", *_HOOKS}


def _written_by_forward(attributes: Mapping[str, object]) -> tuple[str, ...]:
    """The ends of the names that a module with dynamic RoPE writes to while it runs."""
    kinds = attributes.get("rope_type")
    kinds = kinds.values() if isinstance(kinds, dict) else (kinds,)
    return _OF_THE_LAST_FORWARD if any("dynamic" in str(kind) for kind in kinds) else ()


def _numbers(tensor: Tensor) -> Value:
    """Where a tensor's numbers are, how they are read, and how often they were written to."""
    inner = tensor.__tensor_flatten__()[0] if is_traceable_wrapper_subclass(tensor) else ()
    if inner:
        return _Numbers((type(tensor).__name__, *(_numbers(getattr(tensor, name)) for name in inner)))
    version = 0 if tensor.is_inference() else tensor._version
    if tensor.layout is not torch.strided:
        return _Numbers((Same(tensor), version))
    place = 0 if tensor.is_meta else tensor.data_ptr()
    return _Numbers((place, version, tensor.shape, tensor.stride(), tensor.dtype, tensor.device))


def _parts(value: object) -> Iterator[tuple[str, object]] | None:
    """What an object's behaviour depends on, by name; None for one that is taken as it is."""
    if isinstance(value, FunctionType):
        return _parts_of_function(value)
    if isinstance(value, partial):
        return iter((("func", value.func), ("args", value.args), ("keywords", value.keywords)))
    if isinstance(value, type | ModuleType | BuiltinFunctionType | CodeType):
        return None
    known = isinstance(value, PreTrainedConfig) or is_dataclass(value)
    if not known and type(value).__module__.split(".")[0] in _LIBRARIES:
        return None
    attributes = getattr(value, "__dict__", None)
    return iter(list(attributes.items())) if isinstance(attributes, dict) else None


def _parts_of_function(function: FunctionType) -> Iterator[tuple[str, object]]:
    """Defaults, attributes, what it closes over; of a user's function the globals that it names too."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # it is not filled yet
            yield name, None
    yield "defaults", (function.__defaults__, function.__kwdefaults__)
    if function.__dict__:
        yield "attributes", function.__dict__
    if function.__module__ is None or function.__module__.split(".")[0] not in _LIBRARIES:
        scope = function.__globals__
        for name in _names(function.__code__):
            if name in scope and not isinstance(scope[name], type | ModuleType):
                yield name, scope[name]


def _names(code: CodeType) -> set[str]:
    """The globals and attributes that a function names, functions inside of it included."""
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _is_builtin(kind: type) -> bool:
    return kind.__module__.split(".")[0] in _LIBRARIES


def _readable(value: Value) -> Value:
    """The same without what differs from process to process."""
    if isinstance(value, CodeType):
        return value.co_qualname, value.co_code, [const for const in value.co_consts if type(const) in _PLAIN]
    if isinstance(value, _Numbers):
        return "tensor"
    if isinstance(value, tuple):
        return tuple(map(_readable, value))
    if isinstance(value, frozenset):
        return sorted(map(repr, map(_readable, value)))
    return value
