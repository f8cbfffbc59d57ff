"""The CPU kernels: built from the sources in `csrc/` for the machine at hand, once, and kept in the cache folder.

They are torch operators, `torch.ops.specgen`:

pack_weight(weight) -> packed   a linear layer's weight [outputs, inputs], in the order in which `linear` reads it
linear(x, weights, biases, outputs)   x [..., inputs] through several packed weights, side by side: [..., sum(outputs)]
bmm(x, weight)                  [batch, rows, inputs] by [batch, inputs, columns], weights as they lie
segmented_lora(y, x, bounds, downs, ups)   in place
top_tokens(logits, count)       values and ids
tree_attention(...)             over planes of a KV pool, by the plan of `specgen.model.attention.cpu_plan`

What each computes, `specgen.kernels.reference` says under the same name.

bfloat16 or float32, sums in float32. A number of an output is one sum in one order: a row's bits do not depend on the
rows beside it. bfloat16 products use AMX tiles where the processor has them, or else AVX-512 BF16 where it has that.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from specgen._base.log import Log
from specgen._base.paths import cache_folder

log = Log("specgen.kernels")

SOURCES = Path(__file__).with_name("csrc")
DTYPES = (torch.bfloat16, torch.float32)
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC")
# The stable interface of torch 2.10: what is built with one torch runs with every later one.
_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
_SECONDS = 300


class KernelsUnavailable(Exception):
    """Why there are no CPU kernels; plain torch does their work."""


@cache
def why_not() -> str | None:
    """`None` once the operators are loaded, which the first call sees to; else why they cannot be."""
    try:
        torch.ops.load_library(str(_built()))
        _register_shapes()
    except Exception as error:  # a compiler, a linker, a full disk: all of it means plain torch
        reason = str(error) if isinstance(error, KernelsUnavailable) else repr(error)
        log.info("no CPU kernels, plain torch does their work", reason=reason)
        return reason
    return None


def why_not_for(device: torch.device, dtype: torch.dtype) -> str | None:
    """`None` if the kernels can take tensors of this device and dtype."""
    if device.type != "cpu":
        return f"the device is {device.type!r}; it must be 'cpu'"
    if dtype not in DTYPES:
        return f"the data type is {dtype}; choices: {', '.join(map(str, DTYPES))}"
    return why_not()


def _built() -> Path:
    """The library, built now if it is not in the cache."""
    if os.environ.get("SPECGEN_CPU_KERNELS") == "0":
        raise KernelsUnavailable("SPECGEN_CPU_KERNELS is 0")
    if platform.system() != "Linux" or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        raise KernelsUnavailable("they are written for Linux and processors with AVX2 or AVX-512")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise KernelsUnavailable("there is no C++ compiler; install g++, or name one in CXX")
    library = cache_folder() / "kernels" / f"{_digest(compiler)}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        # Beside it, so that the finished library appears at once, whoever else builds it too.
        with TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / library.name
            _compile(compiler, built)
            built.replace(library)
    return library


def _compile(compiler: str, library: Path) -> None:
    torch_folder = Path(torch.__file__).parent
    command = [compiler, *_FLAGS, _TARGET, f"-I{torch_folder / 'include'}", *map(str, _sources("*.cpp"))]
    command += [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if done.returncode:
        raise KernelsUnavailable(f"{compiler} fails: {done.stderr.strip()[-500:]}")


def _digest(compiler: str) -> str:
    """Everything that the library depends on."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=_SECONDS, check=True)
    parts = [version.stdout, *_FLAGS, _TARGET, platform.machine(), _processor()]
    parts += [path.read_text(encoding="utf-8") for path in _sources("*")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What the processor can do, as far as the compiler may use it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line for line in lines if line.startswith("flags")), "")


def _sources(pattern: str) -> Sequence[Path]:
    return sorted(SOURCES.glob(pattern))


def _register_shapes() -> None:
    """What the operators answer, without numbers: for compilers."""
    torch.library.register_fake("specgen::linear", _linear_shape)
    torch.library.register_fake("specgen::bmm", torch.bmm)
    torch.library.register_fake("specgen::tree_attention", _attention_shape)


def _linear_shape(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], outputs: list[int]) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(outputs))


def _attention_shape(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])
