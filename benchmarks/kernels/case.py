"""What each kernel's benchmark offers: one call in a realistic shape, by every backend that can make it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from specgen.kernels.backends import BACKENDS, Backend, Operation, available


class Case(NamedTuple):
    """shape: what is timed, in words. calls: the same work by each backend, plain torch among them."""

    shape: str
    calls: Mapping[Backend, Callable[[], object]]


def usable(operation: Operation, device: torch.device, dtype: torch.dtype) -> list[Backend]:
    """The backends that can run an operation here, the fastest first; Triton's interpreter has no speed."""
    return [backend for backend in BACKENDS[operation] if available(backend, device, dtype)]
