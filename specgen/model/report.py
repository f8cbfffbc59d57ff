"""What was chosen when a model was loaded, part by part, and why: for a person who wonders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from specgen.kernels import backends
from specgen.model.runner import ModelRunner


@dataclass(frozen=True, slots=True)
class Choice:
    """One part of a model runner: what does its work, and why that does."""

    part: str
    chosen: str
    why: str


def selection(target: ModelRunner) -> list[Choice]:
    """Device, attention backends, kernels, and what this model would be refused."""
    packed, pool = target.packed, target.pool
    linears = "packed weights, CPU kernel" if packed.wrapped.packs_linears else "the model's own"
    return [
        Choice("device", _device(target.device), f"{target.architecture.dtype} weights lie there"),
        *_attention(target),
        Choice("KV", pool.kind.name, f"{pool.bytes_per_token} bytes a token, {pool.capacity} tokens"),
        Choice("linear layers", linears, _no_kernel("linear", target) or "one sum in one order for each number"),
        Choice("top tokens", _picked("top_tokens", target), _no_kernel("top_tokens", target) or "one pass over logits"),
        Choice("moved rows", _picked("kv_commit", target), "one launch a step on a GPU, one copy a stack elsewhere"),
        Choice("batch-invariant", "yes" if target.batch_invariant else "no", _why_invariant(target)),
        Choice("graphs", *_optional(target.no_graphs, "all steps but large ones and those under an adapter")),
        Choice("compile=True", *_optional(packed.no_compiled, "attention and linear layers are the CPU kernels'")),
    ]


def _device(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _attention(target: ModelRunner) -> Iterator[Choice]:
    """The backend, then those that come before it in the list."""
    packed = target.packed
    how = "the first of the list that can, and that says what the model says alone"
    yield Choice("attention", packed.backend.name, how)
    for name, reason in packed.passed_over.items():
        yield Choice(f"attention, not {name}", "", reason)


def _picked(operation: backends.Operation, target: ModelRunner) -> str:
    return backends.pick(operation, target.device, target.architecture.dtype)


def _no_kernel(operation: backends.Operation, target: ModelRunner) -> str | None:
    """Why plain torch does an operation where a kernel could."""
    if _picked(operation, target) != "torch":
        return None
    kernels = next(backend for backend in backends.BACKENDS[operation] if backend != "triton" or _is_gpu(target))
    return backends.why_not(kernels, target.device, target.architecture.dtype)


def _is_gpu(target: ModelRunner) -> bool:
    return target.device.type == "cuda"


def _optional(reason: str | None, otherwise: str) -> tuple[str, str]:
    return ("no", reason) if reason else ("possible", otherwise)


def _why_invariant(target: ModelRunner) -> str:
    if target.batch_invariant:
        return "proven when it was loaded: a row has the same bits whatever rows stand beside it"
    return "it costs more than it gives here, or was not asked for"
