"""Bytes and operations of each kernel in one step of a model, and the least time that a GPU takes for them.

`python -m benchmarks.gpu.floors` prints the tables of README.md beside this file; a test compares.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from specgen.kernels.triton.kv_splits import starts
from specgen.kv.formats import FORMATS, LayerShape


@dataclass(frozen=True, slots=True)
class Gpu:
    """A card by its data sheet: bytes of memory and bfloat16 operations (dense, products and sums counted) a second,
    and its multiprocessors."""

    name: str
    bandwidth: float
    operations: float
    processors: int


@dataclass(frozen=True, slots=True)
class Shape:
    """A model of the Llama family."""

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def weights(self) -> int:
        """Numbers that every row meets: of the linear layers and the head."""
        width, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = 2 * self.hidden * width + 2 * self.hidden * kv + 3 * self.hidden * self.inner
        return self.layers * layer + self.vocab * self.hidden


@dataclass(frozen=True, slots=True)
class Step:
    """sequences: each with `rows` rows (1 is plain decoding) behind `context` committed tokens."""

    sequences: int
    rows: int
    context: int


@dataclass(frozen=True, slots=True)
class Floor:
    """What a part of a step moves and computes. launches: of a step, in all layers."""

    part: str
    bytes: float
    operations: float
    launches: int

    def seconds(self, gpu: Gpu) -> float:
        """No card that keeps to its data sheet takes less."""
        return max(self.bytes / gpu.bandwidth, self.operations / gpu.operations)


H100 = Gpu("H100 SXM", 3.35e12, 989e12, 132)
LLAMA_8B = Shape("8B", 32, 4096, 14336, 32, 8, 128, 128_256)
STEPS = (Step(1, 1, 4096), Step(1, 17, 4096), Step(32, 1, 4096), Step(32, 4, 4096))
_RANK = 16
_LANES, _PROGRAMS = 16, 2


def floors(shape: Shape, gpu: Gpu, step: Step, kind: str = "native") -> Iterator[Floor]:
    """The parts of a step, in bfloat16."""
    rows = step.sequences * step.rows
    yield Floor("linear layers", 2.0 * shape.weights, 2.0 * shape.weights * rows, 7 * shape.layers + 1)
    layer = LayerShape(shape.kv_heads, shape.head_dim, shape.head_dim)
    kept = FORMATS[kind]().bytes_per_token([layer], torch.bfloat16) * shape.layers
    keys = step.context + step.rows
    operations = 4.0 * rows * keys * shape.heads * shape.head_dim * shape.layers
    yield Floor("tree_attention", float(step.sequences * keys * kept), operations, shape.layers)
    # Cut along the keys only where there are fewer tiles than the card has room for, as in
    # `specgen.model.attention.gpu_plan`.
    tiles = step.sequences * -(-step.rows * shape.heads // shape.kv_heads // _LANES)
    cut = _PROGRAMS * gpu.processors // shape.kv_heads // tiles > 1
    partials = cut * rows * (len(starts(keys)) - 1) * shape.heads * (shape.head_dim + 2) * 4 * shape.layers
    yield Floor("its spans merged", 2.0 * partials, 0.0, cut * shape.layers)
    new = 2 * 2 * shape.kv_heads * shape.head_dim * shape.layers
    yield Floor("kv_write", float(rows * (new + kept)), 0.0, shape.layers)
    yield Floor("top_tokens", 2.0 * rows * shape.vocab, 0.0, 2)
    yield Floor("kv_commit, all rows", 2.0 * rows * kept, 0.0, 1)
    width, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sides = 2 * (shape.hidden + width) + 2 * (shape.hidden + kv) + 3 * (shape.hidden + shape.inner)
    low = _RANK * sides * shape.layers
    yield Floor(f"segmented_lora, rank {_RANK}, one adapter", 2.0 * low, 2.0 * low * rows, 14 * shape.layers)


def table(shape: Shape, gpu: Gpu, step: Step, kind: str = "native") -> str:
    """One step in markdown."""
    lines = [
        f"{step.sequences} x {step.rows} rows behind {step.context} tokens, KV `{kind}`:",
        "",
        f"| part | MB | GFLOP | launches | floor on {gpu.name}, us |",
        "|---|---|---|---|---|",
    ]
    for floor in floors(shape, gpu, step, kind):
        megabytes, operations, micros = floor.bytes / 1e6, floor.operations / 1e9, 1e6 * floor.seconds(gpu)
        lines.append(f"| {floor.part} | {megabytes:,.1f} | {operations:,.1f} | {floor.launches} | {micros:,.1f} |")
    return "\n".join(lines)


def tables() -> str:
    """All that README.md shows."""
    every = [(step, "native") for step in STEPS] + [(STEPS[2], "int8"), (STEPS[2], "int4")]
    return "\n\n".join(table(LLAMA_8B, H100, step, kind) for step, kind in every)


if __name__ == "__main__":
    print(tables())
