"""KV formats and the prefix cache: what a token takes, what its rounding costs in quality, what cached prefixes save.

Quality: the texts beside this file, read by the packed forward in float32 with the KV of each format; perplexity and
the share of places where the likeliest next token is that of the unrounded KV. Decoding: prompts of the repeat group
with drafting, every format in turns, and native KV once more with rows that do not depend on their neighbours, which
is what the formats that round pay for. Prefixes: time to the first token of a prompt whose beginning nobody has read,
and of another one that begins alike.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import harness
from benchmarks.harness import REPEAT, Prompt, Sample, Sizes
from specgen import Engine
from specgen.kv.formats import FORMATS, NATIVE
from specgen.model.kv_calibration import calibration_ids
from specgen.model.runner import ModelRunner, load_runner
from specgen.model.segment import Segment

FULL = Sizes(tokens=64, rounds=1, limit=9)
QUICK = Sizes(tokens=16, rounds=1, limit=2)

TEXTS = Path(__file__).with_name("texts")
INVARIANT = "native, invariant"
ROUNDING = tuple(name for name in FORMATS if name != "native")
# With --quick and without.
_TEXT_TOKENS = {True: 128, False: 700}
_PREFIXES = {True: (128, 1000), False: (128, 1000, 4096)}
_PREFIX_ROUNDS = {True: 1, False: 3}
_TAIL = 8
_KV_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Quality:
    """How one format reads the texts: mean negative log-likelihood, and the likeliest token at each place."""

    nll: float
    best: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """One generation: committed tokens, steps that gave them, seconds after the first arrival."""

    tokens: int
    steps: int
    rate: float | None


@dataclass(frozen=True, slots=True)
class Prefix:
    """Seconds to the first token over a prompt of `tokens` tokens, nothing of it cached and all but its end cached."""

    tokens: int
    cold: float
    warm: float


@torch.inference_mode()
def read_texts(model: PreTrainedModel, tokenizer: Any, kind: str, texts: Sequence[Sequence[int]]) -> Quality:
    """Read each text at once with its KV kept as `kind` says."""
    # Invariant rows would change nothing but the last bits, and take their time.
    target = load_runner(
        model,
        kv_tokens=max(map(len, texts)),
        kv_format=FORMATS[kind](),
        calibration=calibration_ids(tokenizer),
        batch_invariant=False,
    )
    losses, best = [], []
    for ids in texts:
        logits = _logits(target, ids)
        losses.append(F.cross_entropy(logits[:-1], torch.tensor(ids[1:], device=logits.device), reduction="none"))
        best += logits.argmax(dim=-1).tolist()
    return Quality(float(torch.cat(losses).mean()), tuple(best))


def _logits(target: ModelRunner, ids: Sequence[int]) -> Tensor:
    table = target.pool.open()
    try:
        table.reserve(len(ids))
        return target.forward([Segment(table, ids, range(len(ids)), None, range(len(ids)))]).logits
    finally:
        table.release()


def qualities(args: argparse.Namespace) -> dict[str, Quality]:
    """All formats over all texts, in float32 whatever --dtype says: a lower one rounds more than some formats do."""
    model, tokenizer = harness.load(args.model, "float32")
    texts = [
        tokenizer(path.read_text(encoding="utf-8"))["input_ids"][: _TEXT_TOKENS[args.quick]]
        for path in sorted(TEXTS.glob("*.txt"))
    ]
    return {name: read_texts(model, tokenizer, name, texts) for name in FORMATS}


def bytes_ratio(model: PreTrainedModel, kind: str) -> tuple[int, float]:
    """Bytes of a token, and over those of bfloat16."""
    shapes = load_runner(model, kv_tokens=1, batch_invariant=False).architecture.shapes
    taken = FORMATS[kind]().bytes_per_token(shapes, torch.bfloat16)
    return taken, taken / NATIVE.bytes_per_token(shapes, torch.bfloat16)


def decode(engine: Engine, tokens: int, prompt: Prompt) -> Run:
    """A greedy stream."""
    started, arrivals = time.perf_counter(), []
    result = None
    for output in engine.stream(list(prompt.ids), temperature=0, max_tokens=tokens):
        arrivals.append((time.perf_counter() - started, len(output.tokens)))
        result = output.result
    if result is None:
        raise RuntimeError(f"prompt {prompt.id}: the stream ended without a result")
    rest = len(result.ids) - arrivals[0][1]
    rate = rest / (arrivals[-1][0] - arrivals[0][0]) if rest > 0 else None
    return Run(len(result.ids), result.stats.num_spec_steps, rate)


def decoding(args: argparse.Namespace, model: PreTrainedModel, tokenizer: Any) -> list[Sample[Run]]:
    """All formats over prompts of the repeat group, in turns."""
    prompts = [p for p in harness.read_prompts(args.prompts, tokenizer) if p.category in REPEAT]
    with ExitStack() as stack:
        options: dict[str, dict[str, Any]] = {name: {"kv_format": name} for name in FORMATS}
        options[INVARIANT] = {"batch_invariant": True}
        # The prefix cache would answer the prompts of a second round.
        runs = {
            name: partial(
                decode,
                stack.enter_context(Engine(model, tokenizer, kv_tokens=_KV_TOKENS, prefix_cache=False, **chosen)),
                args.tokens,
            )
            for name, chosen in options.items()
        }
        return harness.interleave(runs, harness.spread(prompts, args.limit or len(prompts)), args.rounds)


def prefixes(args: argparse.Namespace, model: PreTrainedModel, tokenizer: Any) -> list[Prefix]:
    """Cold and warm prompts of several lengths, native KV."""
    ids = [token for path in sorted(TEXTS.glob("*.txt")) for token in tokenizer(path.read_text())["input_ids"]]
    found = []
    with Engine(model, tokenizer, kv_tokens=2 * _KV_TOKENS) as engine:
        first_token(engine, ids[: 4 * _TAIL])
        for length in _PREFIXES[args.quick]:
            for number in range(_PREFIX_ROUNDS[args.quick]):
                # Its first token makes each round's beginning new.
                begin = [ids[number + length % 97], *islice(cycle(ids), length - 1)]
                cold, warm = (first_token(engine, [*begin, *ids[start : start + _TAIL]]) for start in (50, 90))
                found.append(Prefix(length, cold, warm))
    return found


def first_token(engine: Engine, ids: Sequence[int]) -> float:
    """Seconds until the first token is there."""
    started = time.perf_counter()
    engine.generate(list(ids), temperature=0, max_tokens=1)
    return time.perf_counter() - started


class Results:
    """All that was measured, and what is read off it."""

    def __init__(
        self,
        sizes: Mapping[str, tuple[int, float]],
        quality: Mapping[str, Quality],
        samples: Sequence[Sample[Run]],
        prefixes: Sequence[Prefix],
    ) -> None:
        self.sizes = sizes
        self.quality = quality
        self.samples = samples
        self.prefixes = prefixes

    def perplexity_ratio(self, kind: str) -> float:
        """A format's perplexity over that of unrounded KV."""
        return float(torch.tensor(self.quality[kind].nll - self.quality["native"].nll).exp())

    def agreement(self, kind: str) -> float:
        """The share of places where the likeliest token is that of unrounded KV."""
        pairs = list(zip(self.quality[kind].best, self.quality["native"].best, strict=True))
        return sum(ours == theirs for ours, theirs in pairs) / len(pairs)

    def acceptance(self, system: str) -> float:
        """Committed tokens per verify step."""
        runs = [sample.run for sample in self.samples if sample.system == system]
        return sum(run.tokens for run in runs) / max(1, sum(run.steps for run in runs))

    def rate(self, system: str) -> float | None:
        """Tokens per second, the median of all runs."""
        return harness.middle([sample.run.rate for sample in self.samples if sample.system == system])

    def invariant_cost(self) -> float | None:
        """The share of native's speed that invariant rows take, the median over prompts."""
        rates = {(s.system, s.prompt.id, s.round): s.run.rate for s in self.samples}
        pairs = [(rates[INVARIANT, *rest], rate) for (system, *rest), rate in rates.items() if system == "native"]
        return harness.middle([1 - slow / fast for slow, fast in pairs if slow and fast])

    def warm_ratio(self, length: int) -> float | None:
        """Warm over cold time to the first token."""
        return harness.middle([p.warm / p.cold for p in self.prefixes if p.tokens == length])


def headline(results: Results) -> dict[str, float | None]:
    """The bars: flat names, each a number that one can hold the next version against."""
    bars: dict[str, float | None] = {}
    for kind in ROUNDING:
        bars[f"{kind}_bytes_ratio"] = results.sizes[kind][1]
        bars[f"{kind}_ppl_ratio"] = results.perplexity_ratio(kind)
        bars[f"{kind}_top1"] = results.agreement(kind)
    bars["ttft_warm_ratio_1000"] = results.warm_ratio(1000)
    bars["ttft_warm_ratio_4096"] = results.warm_ratio(4096)
    bars["invariant_cost"] = results.invariant_cost()
    return bars


def show(results: Results, bars: Mapping[str, float | None]) -> None:
    """Print the tables."""
    columns = ["", "bytes", "x bf16", "perplexity x native", "top-1 as native", "acceptance", "tokens/s"]
    harness.table("formats", columns, [_row(results, name) for name in (*FORMATS, INVARIANT)])
    lengths = sorted({p.tokens for p in results.prefixes})
    harness.table(
        "milliseconds to the first token",
        ["prompt tokens", "cold", "warm", "warm / cold"],
        [[n, *_prefix_times(results, n), f"{results.warm_ratio(n):.3f}"] for n in lengths],
    )
    harness.table("bars", ["", "value"], [[n, None if v is None else f"{v:.4f}"] for n, v in bars.items()])


def _row(results: Results, name: str) -> list[object]:
    kind = "native" if name == INVARIANT else name
    taken, ratio = results.sizes[kind]
    quality = f"{results.perplexity_ratio(kind):.4f}", f"{results.agreement(kind):.4f}"
    return [name, taken, ratio, *quality, results.acceptance(name), results.rate(name)]


def _prefix_times(results: Results, length: int) -> tuple[float, float]:
    found = [p for p in results.prefixes if p.tokens == length]
    return 1000 * median(p.cold for p in found), 1000 * median(p.warm for p in found)


def rows(results: Results) -> dict[str, Any]:
    """The single measurements, for the JSON."""
    return {
        "formats": {
            name: {
                "bytes": results.sizes[name][0],
                "nll": quality.nll,
                "acceptance": results.acceptance(name),
                "tokens_per_second": results.rate(name),
            }
            for name, quality in results.quality.items()
        },
        "prefixes": [{"tokens": p.tokens, "cold": p.cold, "warm": p.warm} for p in results.prefixes],
        "runs": [
            {"system": s.system, "prompt": s.prompt.id, "round": s.round, "tokens": s.run.tokens, "rate": s.run.rate}
            for s in results.samples
        ],
    }


def measure(args: argparse.Namespace) -> Results:
    """Everything."""
    quality = qualities(args)
    model, tokenizer = harness.load(args.model, args.dtype)
    sizes = {name: bytes_ratio(model, name) for name in FORMATS}
    return Results(sizes, quality, decoding(args, model, tokenizer), prefixes(args, model, tokenizer))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    args = harness.parse(harness.parser("kv", __doc__), argv, full=FULL, quick=QUICK)
    results = measure(args)
    bars = headline(results)
    show(results, bars)
    if args.json:
        prompts = list(dict.fromkeys(sample.prompt for sample in results.samples))
        harness.save(args.json, "kv", bars, settings=harness.settings(args, prompts), **rows(results))
        series = {
            name: {f"{p.tokens} tokens": 1000 * getattr(p, name) for p in results.prefixes} for name in ("cold", "warm")
        }
        harness.plot(args.json.with_suffix(".png"), "kv: time to the first token", "milliseconds", series)


if __name__ == "__main__":
    main()
