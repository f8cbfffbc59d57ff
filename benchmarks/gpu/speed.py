"""The GPU path on a card: first whether it is right, then the kernels beside PyTorch's and beside what the card can do,
then decoding beside transformers.

Runs where there is CUDA; elsewhere it says so and ends. Models are random weights of the 1B and 8B shapes: time hangs
on the shape alone. No number is written before the kernels' own tests have passed on the same card.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import harness
from benchmarks.gpu.floors import H100, LLAMA_8B, STEPS, Gpu, Shape, Step, floors
from specgen import Engine
from specgen.kv.formats import FORMATS, KVFormat, LayerShape
from specgen.kv.pool import KVPool
from specgen.model.attention.base import AttendingLayer
from specgen.model.attention.masks import tail_mask
from specgen.model.attention.reach import EVERYTHING
from specgen.model.attention.triton_backend import TritonBackend
from specgen.model.segment import Segment, tree_segment

LLAMA_1B = Shape("1B", 16, 2048, 8192, 32, 8, 64, 128_256)
_GATE = ("tests/kernels/triton", "tests/exactness/test_gpu.py")
_BATCHES = (1, 8, 32)
_PROMPT, _TOKENS = 512, 64
_COPIED, _SQUARE = 1 << 30, 8192
_WARM, _TIMED = 3, 20


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the card reached a second: bytes of a copy, read and written both counted, and operations of a product."""

    bandwidth: float
    operations: float


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """The median time of a call, by the device's own clock where it has one."""
    for _ in range(_WARM):
        function()
    return median(_once(function, device) for _ in range(_TIMED))


def _once(function: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        function()
        return time.perf_counter() - started
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    start.record()
    function()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def gate() -> None:
    """Run the kernels' tests on this card. Raises SystemExit if one fails: wrong kernels have no speed."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", *_GATE], check=False)
    if done.returncode:
        raise SystemExit("the kernels' tests fail on this card, so nothing is measured")


def ceilings(device: torch.device, copied: int = _COPIED, square: int = _SQUARE) -> Ceilings:
    """Measured now, on this card."""
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left = torch.randn(square, square, device=device, dtype=torch.bfloat16)
    copying, multiplying = (
        seconds(function, device) for function in (lambda: target.copy_(source), lambda: left @ left)
    )
    return Ceilings(2 * copied / copying, 2 * square**3 / multiplying)


class Attention:
    """One layer's attention in one step: our kernel over a pool, and PyTorch's over the same rows side by side."""

    def __init__(self, shape: Shape, step: Step, kind: KVFormat, device: torch.device) -> None:
        self._layer = LayerShape(shape.kv_heads, shape.head_dim, shape.head_dim)
        pages = step.sequences * -(-(step.context + step.rows) // 16)
        self._pool = KVPool([self._layer], pages, dtype=torch.bfloat16, device=device, kind=kind)
        self._segments = [self._segment(step) for _ in range(step.sequences)]
        for stack in self._pool.stacks:
            stack.view(torch.uint8).random_(0, 60)  # finite in every coding
        rows, noise = step.sequences * step.rows, torch.randn
        self._query = noise(1, shape.heads, rows, shape.head_dim, device=device, dtype=torch.bfloat16)
        keys = step.context + step.rows
        self._dense = noise(
            2, step.sequences, shape.kv_heads, keys, shape.head_dim, device=device, dtype=torch.bfloat16
        )
        self._dense_query = self._query.reshape(shape.heads, step.sequences, step.rows, -1).transpose(0, 1).contiguous()
        self._visible = self._mask(step, keys, device)
        self._batch = TritonBackend(device).begin(self._segments, self._pool)

    def _segment(self, step: Step) -> Segment:
        table = self._pool.open()
        table.reserve(step.context + step.rows)
        table.commit(step.context)
        # A binary tree below the root.
        return tree_segment(
            table, [1], [1] * (step.rows - 1), [-1 if n < 2 else n // 2 - 1 for n in range(step.rows - 1)]
        )

    def _mask(self, step: Step, keys: int, device: torch.device) -> Tensor | None:
        if step.rows == 1:
            return None
        mask = torch.ones(step.rows, keys, dtype=torch.bool)
        mask[:, step.context :] = tail_mask(self._segments[0])
        return mask.to(device)

    def ours(self) -> Tensor:
        """The kernel."""
        return self._batch.attend(
            AttendingLayer(self._pool.layers[0], EVERYTHING, scale=0.1), self._query, *self._dense
        )

    def torchs(self) -> Tensor:
        """Scaled dot-product attention over keys and values that lie side by side already."""
        key, value = self._dense
        return F.scaled_dot_product_attention(
            self._dense_query, key, value, attn_mask=self._visible, scale=0.1, enable_gqa=True
        )


def attentions(shape: Shape, steps: Sequence[Step], reached: Ceilings, device: torch.device) -> Iterator[list[object]]:
    """One line a step and format: microseconds of ours, of PyTorch's, the card's floor, and ours over the floor."""
    card = Gpu("this", reached.bandwidth, reached.operations, H100.processors)
    for step in steps:
        for name in FORMATS:
            trial = Attention(shape, step, FORMATS[name](), device)
            ours = seconds(trial.ours, device)
            theirs = seconds(trial.torchs, device) if name == "native" else None
            floor = next(f for f in floors(shape, card, step, name) if f.part == "tree_attention")
            least = floor.seconds(card) / shape.layers
            what = f"{step.sequences} x {step.rows} rows behind {step.context}, {name}"
            yield [what, 1e6 * ours, None if theirs is None else 1e6 * theirs, 1e6 * least, ours / least]


def model(shape: Shape, device: torch.device) -> LlamaForCausalLM:
    """Random weights of a shape, in bfloat16."""
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    with device:
        made = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    return made.eval()


def decoding(
    shape: Shape, device: torch.device, prompt: int = _PROMPT, tokens: int = _TOKENS
) -> Iterator[list[object]]:
    """Tokens per second at each batch: transformers eager, with a static cache and compiled, with prompt lookup (one
    stream alone), and specgen with drafting off and on."""
    made = model(shape, device)
    generator = torch.Generator().manual_seed(0)
    plain = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    ours = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    with Engine(made, kv_tokens=max(_BATCHES) * (prompt + tokens + 128), max_num_seqs=max(_BATCHES)) as engine:
        for batch in _BATCHES:
            ids = torch.randint(3, shape.vocab - 1, (batch, prompt), generator=generator)
            there = ids.to(device)
            theirs = partial(made.generate, there, attention_mask=torch.ones_like(there), **plain)
            mine = partial(engine.generate, ids.tolist(), **ours)
            calls = (
                theirs,
                partial(theirs, cache_implementation="static"),
                partial(theirs, prompt_lookup_num_tokens=8) if batch == 1 else None,
                partial(mine, speculation="off"),
                mine,
            )
            rates = [None if call is None else batch * tokens / _wall(call) for call in calls]
            yield [f"{shape.name}, batch {batch}", *rates]


DECODERS = ("transformers", "transformers static", "transformers lookup", "specgen off", "specgen on")


def _wall(call: Callable[[], object]) -> float:
    call()
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.gpu.speed", description=__doc__)
    options.add_argument("--json", type=Path, metavar="FILE", help="write results here, and a plot beside them (.png)")
    options.add_argument("--shapes", nargs="+", default=["1B", "8B"], choices=("1B", "8B"))
    args = options.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU that torch can use; torch.cuda.is_available() is False")
    gate()
    device = torch.device("cuda")
    reached = ceilings(device)
    harness.table(
        "ceilings", ["", "TB/s, TFLOP/s"], [["copy", reached.bandwidth / 1e12], ["product", reached.operations / 1e12]]
    )
    shapes = [shape for shape in (LLAMA_1B, LLAMA_8B) if shape.name in args.shapes]
    columns = ["", "tree_attention", "SDPA", "floor", "over the floor"]
    kernels = [
        [f"{shape.name}: {line[0]}", *line[1:]]
        for shape in shapes
        for line in attentions(shape, STEPS, reached, device)
    ]
    harness.table("attention of a layer, microseconds", columns, kernels)
    rates = [line for shape in shapes for line in decoding(shape, device)]
    harness.table("tokens per second", ["", *DECODERS], rates)
    if args.json:
        bars = {f"{line[0]} over floor": line[4] for line in kernels}
        rows = {"kernels": kernels, "decoding": rates, "ceilings": [reached.bandwidth, reached.operations]}
        harness.save(args.json, "gpu", bars, **rows)
        series = {name: {str(line[0]): line[1 + n] for line in rates} for n, name in enumerate(DECODERS)}
        harness.plot(args.json.with_suffix(".png"), "gpu: decoding", "tokens per second", series)


if __name__ == "__main__":
    main()
