"""A CUDA graph's imitation: what was launched while work was captured, done again with the same arguments.

Numbers that the host computed are baked in, as they would be on a GPU. Between two replays all that the work made is
poisoned, so that an answer can only come from memory that outlives a step. What waits for the device is refused.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from specgen.model.output import ForwardOutput

_WAITS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "unique_dim", "_unique2")


class Tape(TorchDispatchMode):
    """What is done inside, by torch and by Triton. outside: storages that it reads or writes and did not make."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: dict[int, Tensor] = {}
        self.launches = 0
        self.replays = 0
        self._done: list[tuple[Callable[[], Any], list[Tensor]]] = []
        self._made: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in _WAITS:
            raise RuntimeError(f"{func} waits for the device while it captures")
        kwargs = kwargs or {}
        self._take(args, kwargs)
        out = func(*args, **kwargs)
        made = tensors(out)
        self._made |= {at(t): t for t in made if t.numel() and at(t) not in self.outside}
        self._done.append((lambda: func(*args, **kwargs), made))
        return out

    def launch(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """A Triton kernel's."""
        self._take(args, kwargs)
        self.launches += 1
        with _disable_current_modes():
            run(*args, **kwargs)
        self._done.append((lambda: run(*args, **kwargs), []))

    def replay(self) -> None:
        """All of it again."""
        self.replays += 1
        for tensor in self._made.values():
            poison(tensor)
        for call, before in self._done:
            for new, old in zip(tensors(call()), before, strict=False):
                if at(new) != at(old):
                    old.copy_(new)

    def _take(self, *given: Any) -> None:
        self.outside |= {at(t): t for t in tensors(given) if t.numel() and at(t) not in self._made}


class Tapes:
    """Captures on tapes. kept: all of them, the oldest first."""

    def __init__(self) -> None:
        self.kept: list[Tape] = []

    def __call__(self, work: Callable[[], ForwardOutput]) -> tuple[Callable[[], None], ForwardOutput]:
        work()
        tape = Tape()
        kind: Any = type(importlib.import_module("specgen.kernels.triton.tree_attention")._attend)
        with pytest.MonkeyPatch.context() as patch, tape:
            run = kind.run
            patch.setattr(kind, "run", lambda *args, **kwargs: tape.launch(run, *args, **kwargs))
            answer = work()
        self.kept.append(tape)
        return tape.replay, answer

    @property
    def replays(self) -> int:
        return sum(tape.replays for tape in self.kept)


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def at(tensor: Tensor) -> int:
    """Where a tensor's storage lies."""
    return tensor.untyped_storage().data_ptr()


def poison(tensor: Tensor) -> None:
    """NaN, and as whole numbers what is out of every range."""
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    floats = tensor.dtype.is_floating_point
    whole.fill_(float("nan") if floats else True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)
