"""One way to pick a backend, and one name for an operation wherever it stands."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from specgen.kernels import backends, reference
from specgen.kernels.backends import BACKENDS, Backend, Operation, available, pick, why_not
from specgen.kernels.cpu_backend import SOURCES

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# A part of the file of products, and of that of linear layers.
FILES = {"pack_weight": "linear"}


@pytest.mark.parametrize("operation", BACKENDS)
def test_an_operation_has_one_name_in_every_place(operation: Operation) -> None:
    assert callable(getattr(reference, operation))
    for backend in BACKENDS[operation]:
        if backend == "triton" and find_spec("triton"):
            module = import_module(f"specgen.kernels.triton.{operation}")
            assert callable(getattr(module, operation))
        if backend == "cpu":
            source = (SOURCES / f"{operation}.cpp").read_text()
            assert f"{operation}(" in source
            if why_not("cpu", CPU, torch.float32) is None:
                assert getattr(torch.ops.specgen, operation)


def test_the_fastest_that_is_available_is_picked(monkeypatch: pytest.MonkeyPatch) -> None:
    there: set[Backend] = {"triton", "cpu", "torch"}
    monkeypatch.setattr(backends, "available", lambda backend, *_: backend in there)
    assert pick("top_tokens", CUDA, torch.bfloat16) == "triton"
    there.remove("triton")
    assert pick("top_tokens", CPU, torch.bfloat16) == "cpu"
    assert pick("sample_rows", CPU, torch.bfloat16) == "torch"
    there.remove("cpu")
    assert {pick(operation, CPU, torch.float32) for operation in BACKENDS} == {"torch"}


def test_reasons_name_the_value_and_the_choices() -> None:
    assert why_not("torch", CPU, torch.float64) is None
    assert "'cuda'" in str(why_not("cpu", CUDA, torch.float32))
    assert "choices: torch.bfloat16, torch.float32" in str(why_not("cpu", CPU, torch.float64))
    if find_spec("triton"):
        assert "torch.float64" in str(why_not("triton", CUDA, torch.float64))


def test_triton_s_interpreter_is_no_gpu() -> None:
    assert not available("triton", CPU, torch.float32)
