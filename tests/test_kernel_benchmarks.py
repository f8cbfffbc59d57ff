"""The benchmark of each operation calls what it says: every backend answers what plain torch answers."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor

from specgen.kernels.backends import BACKENDS, Operation, available

CPU = torch.device("cpu")
DTYPE = torch.float32


@pytest.mark.parametrize("operation", BACKENDS)
@torch.inference_mode()
def test_the_first_case_of_each_operation(operation: Operation) -> None:
    case = next(iter(import_module(f"benchmarks.kernels.{operation}").cases(CPU, DTYPE)))
    backends = [backend for backend in BACKENDS[operation] if available(backend, CPU, DTYPE)]
    assert list(case.calls) == backends
    assert backends[-1] == "torch"
    wanted = case.calls["torch"]()
    for call in case.calls.values():
        found = call()
        assert type(found) is type(wanted)
        sides = zip(found, wanted, strict=True) if isinstance(found, tuple) else [(found, wanted)]
        for one, other in sides:
            if isinstance(one, Tensor):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-2)
