"""Whether the GPU kernels in `gpu/` can be used. They are Triton's; on a CPU its interpreter runs them, for tests."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """`None` if the kernels can take tensors like these."""
    if find_spec("triton") is None:
        return "triton is not installed: pip install 'specgen-llm[gpu]'"
    if dtype not in DTYPES:
        return f"the model's data type is {dtype}; choices: {', '.join(map(str, DTYPES))}"
    if device.type != "cuda" and not interpreted():
        return f"the device is {device.type!r}; it must be 'cuda', or TRITON_INTERPRET=1 be set for a trial on the CPU"
    return None


@cache
def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU. Read once, as Triton does."""
    if find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels are the way to compute there: a GPU, not its imitation."""
    return device.type == "cuda" and why_not(device, dtype) is None
