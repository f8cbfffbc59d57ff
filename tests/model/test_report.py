"""`selection` names what does the work, and the reason that is true for the model at hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specgen.kernels import cpu_backend as cpu_kernels
from specgen.kernels import triton_backend as gpu_kernels
from specgen.kv.formats import FORMATS
from specgen.model.report import selection
from specgen.model.runner import ModelRunner
from tests.support.tiny import build

CPU = torch.device("cpu")
needs_cpu_kernels = pytest.mark.skipif(cpu_kernels.why_not() is not None, reason="no CPU kernels")
needs_triton = pytest.mark.skipif(
    gpu_kernels.why_not(CPU, torch.float32) is not None, reason="Triton does not interpret"
)


@pytest.mark.parametrize(
    ("family", "options", "attention", "why"),
    [
        pytest.param("llama", {}, "CPU kernel", "built for this processor", marks=needs_cpu_kernels),
        pytest.param("llama", {"kv_format": FORMATS["int8"]()}, "plain torch", "not 'int8'", marks=needs_cpu_kernels),
        ("deepseek_v3", {}, "plain torch", "the seam is 'gathered'"),
        ("llama", {"cpu_kernels": False}, "plain torch", "switched off" if not cpu_kernels.why_not() else ""),
        pytest.param("llama", {"gpu_kernels": True}, "Triton kernel", "interprets it", marks=needs_triton),
    ],
)
def test_attention_is_named_with_its_reason(family: str, options: dict[str, Any], attention: str, why: str) -> None:
    choices = {choice.part: choice for choice in selection(ModelRunner(build(family), kv_tokens=64, **options))}
    assert choices["attention"].chosen == attention
    assert why in choices["attention"].why
    assert choices["device"].chosen == "cpu"
    assert choices["graphs"].chosen == "no"
    assert choices["graphs"].why == (
        "the device is 'cpu', which has none" if attention == "Triton kernel" else "no GPU kernels carry the forward"
    )
    assert (choices["compile=True"].chosen == "possible") == (attention == "CPU kernel")


def test_the_command_prints_a_line_for_each_part(tmp_path: Any) -> None:
    from typer.testing import CliRunner

    from specgen.cli.app import app

    build("llama").save_pretrained(tmp_path)
    done = CliRunner().invoke(app, ["doctor", "-m", str(tmp_path), "--kv-format", "int4"])
    assert done.exit_code == 0, done.output
    for part in ("torch ", "triton ", "device ", "attention ", "KV ", "rows invariant ", "graphs ", "compile=True "):
        assert f"\n{part}" in done.output
    assert "int4" in done.output
    refused = CliRunner().invoke(app, ["doctor", "-m", str(tmp_path), "--kv-format", "int5"])
    assert refused.exit_code == 2
