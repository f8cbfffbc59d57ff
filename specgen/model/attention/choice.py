"""Which attention backend carries a model: the first of one ordered list that can, and says what the model says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from specgen.errors import UnsupportedModel
from specgen.kernels import backends
from specgen.kv.formats import KVFormat
from specgen.model.attention.base import AttentionBackend
from specgen.model.attention.cpu_backend import CpuBackend
from specgen.model.attention.torch_backend import TorchBackend
from specgen.model.checks.architecture import Architecture, refuse
from specgen.model.checks.equivalence import EQUIVALENCE_PAGES, difference
from specgen.model.forward.eager import EagerForward
from specgen.model.wrapped import WrappedModel


class Chosen(NamedTuple):
    """The backend that carries a model, and by their names why those before it do not."""

    backend: AttentionBackend
    passed_over: dict[str, str]


def choose_backend(model: WrappedModel, kv_format: KVFormat, *, cpu_kernels: bool, gpu_kernels: bool | None) -> Chosen:
    """The fastest backend whose packed forward is the model's own, on two sequences and a branching tree.

    Raises UnsupportedModel when there is none, with the reason of the one that needs no kernel, and where
    `gpu_kernels=True` asks for Triton's and they are not it.
    """
    reasons: dict[str, str] = {}
    for name, found in _backends(model.architecture, cpu_kernels=cpu_kernels, gpu_kernels=gpu_kernels):
        if isinstance(found, str):
            reasons[name] = found
        elif reason := found.unusable(model.architecture, kv_format) or _difference(model, found):
            reasons[name] = reason
        else:
            return Chosen(found, reasons)
        if name == "triton" and gpu_kernels:
            raise UnsupportedModel(f"gpu_kernels=True cannot be kept: {reasons[name]}; take gpu_kernels=None")
    own_attention = model.architecture.no_interface is not None
    raise refuse(model.model, reasons["torch-dense" if own_attention else "torch"])


def _backends(
    architecture: Architecture, *, cpu_kernels: bool, gpu_kernels: bool | None
) -> Iterator[tuple[str, AttentionBackend | str]]:
    """All of them by name, the fastest first; a reason in the place of one that is not even to be tried."""
    yield "triton", _triton(architecture, gpu_kernels)
    yield "cpu", CpuBackend() if cpu_kernels else "cpu_kernels is False"
    for route in ("direct", "gathered", "dense"):
        backend = TorchBackend(route)
        yield backend.name, backend


def _triton(architecture: Architecture, asked: bool | None) -> AttentionBackend | str:
    if asked is False:
        return "gpu_kernels is False"
    if reason := backends.why_not("triton", architecture.device, architecture.dtype):
        return reason
    if not (asked or backends.available("triton", architecture.device, architecture.dtype)):
        return "Triton would interpret its kernels here, which is for tests; gpu_kernels=True does so"
    # Triton is installed on purpose, and slow to import.
    from specgen.model.attention.triton_backend import TritonBackend

    return TritonBackend(architecture.device)


def _difference(model: WrappedModel, backend: AttentionBackend) -> str | None:
    """How the forward differs from the model's own; with KV as it is, where rounding hides nothing."""
    pool = model.architecture.new_pool(EQUIVALENCE_PAGES)
    return difference(EagerForward(model, backend, pool), model.model, model.architecture)
