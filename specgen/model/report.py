"""What was chosen when a model was loaded, part by part, and why: for a person who wonders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from specgen.kernels import backends
from specgen.kernels import cpu_backend as cpu_kernels
from specgen.kernels import triton_backend as gpu_kernels
from specgen.model.attention.interface import Seam
from specgen.model.runner import ModelRunner

_PLAIN = "plain torch"
_NAMES: Mapping[backends.Backend, str] = {"triton": "Triton kernel", "cpu": "CPU kernel", "torch": _PLAIN}


@dataclass(frozen=True, slots=True)
class Choice:
    """One part of a target: what does its work, and why that does."""

    part: str
    chosen: str
    why: str


def selection(target: ModelRunner) -> list[Choice]:
    """Device, back-end of each kernel, and what this model would be refused."""
    attention, why = _attention(target)
    likeliest = backends.pick("top_tokens", target.device, target.architecture.dtype)
    moved = backends.pick("kv_commit", target.device, target.architecture.dtype)
    compiled, eager = target.why_not_compiled(), target.why_no_graphs()
    return [
        Choice("device", _device(target.device), f"{target.architecture.dtype} weights lie there"),
        Choice("seam", target.seam.value, "the packed forward says there what the model says"),
        Choice("attention", attention, why),
        Choice("KV", target.pool.kind.name, f"{target.pool.bytes_per_token} bytes a token, written by: {attention}"),
        Choice("likeliest tokens", _NAMES[likeliest], _no_kernel(target) or "one pass over the logits"),
        Choice("moved rows", _NAMES[moved], "one copy a stack" if moved == "torch" else "a GPU's memory"),
        Choice("rows invariant", "yes" if target.batch_invariant else "no", _why_invariant(target)),
        Choice("graphs", "no" if eager else "yes", eager or "all steps but large ones and those under an adapter"),
        Choice("compile=True", "no" if compiled else "possible", compiled or "the CPU kernels carry the forward"),
    ]


def _device(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _attention(target: ModelRunner) -> tuple[str, str]:
    kind = target.pool.kind
    if target.kernel == "gpu":
        if reason := target.why_no_gpu(kind):
            return _PLAIN, reason
        return "Triton kernel", "a GPU" if target.device.type == "cuda" else "asked for; Triton interprets it"
    if target.kernel == "cpu" and target.seam is Seam.DIRECT:
        if kind.lossless:
            return "CPU kernel", "built for this processor, and the data type is one of its"
        return _PLAIN, f"the CPU kernel reads KV as it is, not {kind.name!r}"
    if target.seam is not Seam.DIRECT:
        return _PLAIN, f"the seam is {target.seam.value!r}; kernels need 'direct'"
    return _PLAIN, _no_kernel(target) or "switched off, or not able to say what the model says"


def _no_kernel(target: ModelRunner) -> str | None:
    """Why no kernel can run where the target is."""
    if target.device.type != "cpu":
        return gpu_kernels.why_not(target.device, target.architecture.dtype)
    if target.architecture.dtype not in cpu_kernels.DTYPES:
        return f"no CPU kernel takes {target.architecture.dtype}"
    return cpu_kernels.why_not()


def _why_invariant(target: ModelRunner) -> str:
    if target.batch_invariant:
        return "proven when it was loaded: a row has the same bits in any company"
    return "it costs more than it gives here, or was not asked for"
