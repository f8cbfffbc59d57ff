"""`selection` names what does the work, and the reason that is true for the model at hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specgen.kernels import cpu_backend as cpu_kernels
from specgen.kernels import triton_backend as gpu_kernels
from specgen.kv.formats import FORMATS
from specgen.model.report import selection
from specgen.model.runner import load_runner
from tests.support.tiny import build

CPU = torch.device("cpu")
needs_cpu_kernels = pytest.mark.skipif(cpu_kernels.why_not() is not None, reason="no CPU kernels")
needs_triton = pytest.mark.skipif(
    gpu_kernels.why_not(CPU, torch.float32) is not None, reason="Triton does not interpret"
)


@pytest.mark.parametrize(
    ("family", "options", "attention", "passed_over"),
    [
        pytest.param("llama", {}, "cpu", {"triton": ""}, marks=needs_cpu_kernels),
        pytest.param(
            "llama", {"kv_format": FORMATS["int8"]()}, "torch", {"cpu": "kv_format is 'int8'"}, marks=needs_cpu_kernels
        ),
        ("deepseek_v3", {}, "torch-gathered", {"torch": "its "}),
        ("gptj", {}, "torch-dense", {"torch": "layer 0 (GPTJBlock) computes attention itself"}),
        ("llama", {"cpu_kernels": False}, "torch", {"cpu": "cpu_kernels is False"}),
        ("llama", {"gpu_kernels": False, "cpu_kernels": False}, "torch", {"triton": "gpu_kernels is False"}),
        pytest.param("llama", {"gpu_kernels": True}, "triton", {}, marks=needs_triton),
    ],
)
def test_attention_is_named_with_the_backends_before_it_and_their_reasons(
    family: str, options: dict[str, Any], attention: str, passed_over: dict[str, str]
) -> None:
    choices = {choice.part: choice for choice in selection(load_runner(build(family), kv_tokens=64, **options))}
    assert choices["attention"].chosen == attention
    for name, reason in passed_over.items():
        assert reason in choices[f"attention, not {name}"].why
        assert choices[f"attention, not {name}"].why
    assert choices["device"].chosen == "cpu"
    assert choices["graphs"].chosen == "no"
    assert choices["graphs"].why == (
        "the device is 'cpu', which has none"
        if attention == "triton"
        else f"attention is computed by {attention!r}, it must be 'triton'"
    )
    assert (choices["compile=True"].chosen == "possible") == (attention == "cpu")


def test_the_command_prints_a_line_for_each_part(tmp_path: Any) -> None:
    from typer.testing import CliRunner

    from specgen.cli.app import app

    build("llama").save_pretrained(tmp_path)
    done = CliRunner().invoke(app, ["doctor", "-m", str(tmp_path), "--kv-format", "int4"])
    assert done.exit_code == 0, done.output
    for part in ("torch ", "triton ", "device ", "attention ", "KV ", "batch-invariant ", "graphs ", "compile=True "):
        assert f"\n{part}" in done.output
    assert "int4" in done.output
    refused = CliRunner().invoke(app, ["doctor", "-m", str(tmp_path), "--kv-format", "int5"])
    assert refused.exit_code == 2
