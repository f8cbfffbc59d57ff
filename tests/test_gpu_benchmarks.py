"""What is known of the GPU path without a GPU: compiled kernels, floors on paper, and a benchmark that refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import floors, speed
from benchmarks.gpu.floors import Shape, Step
from specgen.kv.formats import FORMATS

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
# What the check must find, tried on made-up binaries: it needs triton as a compiler, which this process interprets.
FAULTS = """
from benchmarks.gpu.compiled import Line, variants
from benchmarks.gpu.launches import Binary, recorded
good = Binary("k", 128, 0, 65536, {})
assert Line("v", "gfx942", True, good).fault is None
assert "65537 bytes of shared memory; there are 65536" in Line("v", "gfx942", False, Binary("k", 1, 0, 65537, {})).fault
assert "hot and spills 2 registers" in Line("v", "sm_90", True, Binary("k", 255, 2, 0, {})).fault
assert Line("v", "sm_90", False, Binary("k", 255, 2, 0, {})).fault is None
names = set()
for variant in variants():
    with recorded() as launches:
        variant.call("sm_90")
    names |= {launch.kernel.__name__ for launch in launches}
print(sorted(names))
"""


def test_every_kernel_is_looked_at_and_faults_are_found() -> None:
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    launched = ["_attend", "_draw", "_expand", "_merge_spans", "_move", "_shrink", "_take_all", "_take_parts", "_write"]
    assert done.stdout.strip() == str(launched)


def test_the_floors_on_paper_are_those_that_are_computed() -> None:
    text = (ROOT / "benchmarks" / "gpu" / "README.md").read_text()
    shown = text.partition("<!-- floors -->\n")[2].partition("\n<!-- /floors -->")[0]
    assert shown == floors.tables(), "write it anew: python -m benchmarks.gpu.floors"
    # Llama-3.1-8B by its card: 8.03 billion numbers, of which the input embeddings are not read through.
    assert floors.LLAMA_8B.weights == pytest.approx(8.03e9 - 128_256 * 4096, rel=2e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_benchmark_says_so() -> None:
    with pytest.raises(SystemExit, match="needs a GPU that torch can use"):
        speed.main([])


@pytest.mark.parametrize("rows", [1, 4])
def test_both_attentions_of_the_benchmark_attend_alike(rows: int) -> None:
    """Over the same numbers they say the same: what is timed is the same work."""
    shape = Shape("tiny", 1, 32, 32, 4, 2, 16, 64)
    trial = speed.Attention(shape, Step(2, rows, 20), FORMATS["native"](), CPU)
    for number, segment in enumerate(trial._segments):
        span = segment.table.slots(0, segment.end)
        key, value = (side[number].transpose(0, 1) for side in trial._dense)
        trial._pool.layers[0].write(span, key, value)
    ours = trial.ours()[0].reshape(2, rows, 4, 16)
    theirs = trial.torchs().transpose(1, 2)
    assert (ours.float() - theirs.float()).abs().max() <= 3e-2
