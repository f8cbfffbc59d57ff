"""What the launchers launch, without a GPU: kernels with their arguments, compiled for any target and looked into."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMITS = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
"""Bytes of shared memory that a program may take."""
_PRODUCTS = re.compile(r"\b(HMMA|HGMMA|IMMA|QMMA|UTC\w*MMA|v_mfma\w*)")
_OPTIONS = ("num_warps", "num_stages")
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.float64: "fp64",
}


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel with its arguments, as a launcher gave them."""

    kernel: JITFunction[Any]
    arguments: dict[str, Any]
    options: dict[str, int]


@dataclass(frozen=True, slots=True)
class Binary:
    """A compiled kernel. registers and spills: 32-bit ones of a thread. shared: bytes of a program. products: the
    tensor-core instructions seen in it, and how many."""

    kernel: str
    registers: int
    spills: int
    shared: int
    products: dict[str, int]


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """All launches while the context is open; nothing runs. Tensors may be on the device "meta"."""
    found: list[Launch] = []

    def record(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        found.append(Launch(self, dict(zip(self.arg_names, args, strict=False)) | kwargs, options))

    run, JITFunction.run = JITFunction.run, record
    try:
        yield found
    finally:
        JITFunction.run = run


def compiled(launch: Launch, target: str) -> Binary:
    """Compile a launch for one of TARGETS. Raises what the compiler raises."""
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(launch.kernel.arg_names):
        kind = _kind(launch.kernel, name, value := launch.arguments[name])
        signature[name] = kind
        if kind == "constexpr":
            constants[name] = value
        elif isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    binary = triton.compile(source, target=TARGETS[target], options=launch.options)
    look = _in_cubin if "cubin" in binary.asm else _in_hsaco
    registers, spills, products = look(binary)
    counted = {name: products.count(name) for name in sorted(set(products))}
    return Binary(launch.kernel.__name__, registers, spills, int(binary.metadata.shared), counted)


def _kind(kernel: JITFunction[Any], name: str, value: Any) -> str:
    if next(p for p in kernel.params if p.name == name).is_constexpr:
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return f"*{_TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def _in_cubin(binary: Any) -> tuple[int, int, list[str]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        code = _cuobjdump("-sass", file.name)
    registers = max(int(number) for number in re.findall(r"REG:(\d+)", usage))
    # What is stored to a thread's own memory: registers that did not fit, four bytes each.
    spills = max(int(number) for number in re.findall(r"STACK:(\d+)", usage)) // 4
    return registers, spills if "STL" in code else 0, _PRODUCTS.findall(code)


def _in_hsaco(binary: Any) -> tuple[int, int, list[str]]:
    code = binary.asm["amdgcn"]
    count: Callable[[str], int] = lambda name: int(re.findall(rf"\.{name}:\s*(\d+)", code)[0])
    return count("vgpr_count"), count("vgpr_spill_count"), _PRODUCTS.findall(code)


def _cuobjdump(*arguments: str) -> str:
    return subprocess.run([_tool(), *arguments], capture_output=True, text=True, check=True).stdout


@cache
def _tool() -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
