"""Whether the kernels in `triton/` can be used. On a CPU Triton's interpreter runs them, for tests."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """`None` if the kernels can take tensors like these."""
    if not _is_installed():
        return "triton is not installed: pip install 'specgen-llm[gpu]'"
    if dtype not in DTYPES:
        return f"the model's data type is {dtype}; choices: {', '.join(map(str, DTYPES))}"
    if device.type != "cuda" and not interpreted():
        return f"the device is {device.type!r}; it must be 'cuda', or TRITON_INTERPRET=1 be set for a trial on the CPU"
    return None


@cache
def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU. Read once, as Triton does."""
    if not _is_installed():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


@cache
def _is_installed() -> bool:
    return find_spec("triton") is not None
