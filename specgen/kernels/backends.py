"""What can compute where, and why not: Triton's kernels on a GPU, C++ kernels on a CPU, plain torch everywhere.

The one way to pick. Each operation has one name in up to five places: its contract and dispatch in `kernels/`, the
reference in `reference.py`, the kernels in `triton/` and `csrc/`, and its tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

import torch

from specgen.kernels import cpu_backend, triton_backend

Backend: TypeAlias = Literal["triton", "cpu", "torch"]
Operation: TypeAlias = Literal[
    "tree_attention", "kv_write", "kv_commit", "top_tokens", "sample_rows", "segmented_lora", "linear", "bmm"
]

BACKENDS: Final[Mapping[Operation, tuple[Backend, ...]]] = {
    "tree_attention": ("triton", "cpu", "torch"),
    "kv_write": ("triton", "torch"),
    "kv_commit": ("triton", "torch"),
    "top_tokens": ("triton", "cpu", "torch"),
    "sample_rows": ("triton", "torch"),
    "segmented_lora": ("triton", "cpu", "torch"),
    "linear": ("cpu", "torch"),
    "bmm": ("cpu", "torch"),
}
"""Operation -> the backends that have it, the fastest first."""


def why_not(backend: Backend, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend cannot take tensors of this device and dtype; `None` if it can. The first call for the CPU builds
    its kernels."""
    if backend == "triton":
        return triton_backend.why_not(device, dtype)
    if backend == "cpu":
        return cpu_backend.why_not_for(device, dtype)
    return None


def available(backend: Backend, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a backend is the way to compute there; Triton's interpreter, which is for tests, is not."""
    if backend == "triton" and device.type != "cuda":
        return False
    return why_not(backend, device, dtype) is None


def pick(operation: Operation, device: torch.device, dtype: torch.dtype) -> Backend:
    """The fastest backend that is available for an operation on tensors of this device and dtype."""
    return next(backend for backend in BACKENDS[operation] if available(backend, device, dtype))
