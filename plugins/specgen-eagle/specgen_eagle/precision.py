"""In which numbers a student is trained."""

from __future__ import annotations

from typing import Any

import torch

_WITHOUT_HALVES = ("DEFAULT", "AVX2")


def quick_halves(device: torch.device) -> bool:
    """Whether bfloat16 is worth computing in. Where a CPU multiplies halves one by one it takes sixty times as long."""
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability() not in _WITHOUT_HALVES


def product_dtype(model: Any) -> torch.dtype:
    """In which products are computed: the target's, or float32. Weights and their updates are float32 in any case."""
    halves = model.dtype in (torch.bfloat16, torch.float16) and quick_halves(model.device)
    return model.dtype if halves else torch.float32
