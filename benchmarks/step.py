"""Where the time of one step goes: scheduling, drafting, the target's forward by its parts, walk, commit and text.

Steps of steady decoding, a fixed number of rows each: a drafter offers chains of a fixed length that are always
verified. Beside them transformers' own forward over one row at the same context, in turns with ours, and the floor: the
weights' bytes over the bandwidth of a plain copy.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, PreTrainedModel

from benchmarks import harness
from benchmarks.harness import Sizes
from specgen import Drafter, DraftSession, Engine, SamplingParams, TokenTree, hookimpl
from specgen.engine.sequence import Sequence as EngineSequence
from specgen.model.cache_keyword import cache_keyword
from specgen.model.profiling import row_seconds
from specgen.plugins.manager import load_plugins

FULL = Sizes(tokens=40, rounds=3)
QUICK = Sizes(tokens=6, rounds=1)

SHAPES = ((1, 1), (8, 1), (32, 1), (8, 8), (32, 8))
"""Rows of a step, and the sequences that they belong to."""
COMPILED, EAGER = "compiled", "eager"
_CONTEXT = 256
_KV_TOKENS = 8192
_COPIED = 1 << 28
# What is timed around a call, and where it stands in the table; the forward is taken apart by the profiler.
HOST = ("scheduling", "drafting", "rows", "logits", "walk", "commit")
FORWARD = ("linears", "lm head", "attention", "norms, rotary, glue")


class Chains(Drafter):
    """Offers chains of `nodes` tokens that the target hardly ever says."""

    def __init__(self, vocab_size: int) -> None:
        self.token = vocab_size - 1
        self.nodes = 0

    def open(self, prompt: Sequence[int], hints: Any) -> DraftSession:
        """A session that says the same whatever comes."""
        nodes = self.nodes
        return _Chain(TokenTree((self.token,) * nodes, tuple(range(-1, nodes - 1)), (0.5,) * nodes))


class _Plugin:
    """The door through which the chains come."""

    @hookimpl
    def drafters(self) -> Mapping[str, Callable[..., Drafter]]:
        """One drafter."""
        return {"chains": lambda setup: Chains(setup.vocab_size)}


class _Chain(DraftSession):
    def __init__(self, tree: TokenTree) -> None:
        self.tree = tree

    def propose(self, max_nodes: int) -> TokenTree:
        """The chain."""
        return self.tree

    def commit(self, tokens: Sequence[int]) -> None:
        """Learns nothing."""


@dataclass(frozen=True, slots=True)
class Steps:
    """Seconds of the parts of each step, `forward` and `step` among them."""

    rows: int
    sequences: int
    parts: Mapping[str, Sequence[float]]

    def middle(self, part: str) -> float:
        """The median over steps."""
        return median(self.parts[part]) if self.parts.get(part) else 0.0

    @property
    def host(self) -> float:
        """Seconds outside the target's forward."""
        return self.middle("step") - self.middle("forward")


class Clock:
    """Adds up the time inside wrapped calls, step by step."""

    def __init__(self) -> None:
        self.steps: dict[str, list[float]] = defaultdict(list)
        self._running: dict[str, float] = defaultdict(float)

    def wrap(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """`function`, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._running[part] += time.perf_counter() - started

        return timed

    def end_step(self) -> None:
        """Write down what the parts took since the last one."""
        for part, seconds in self._running.items():
            self.steps[part].append(seconds)
        self._running.clear()


@contextmanager
def timed(clock: Clock, places: Sequence[tuple[Any, str, str]]) -> Iterator[None]:
    """Time calls of methods, each given as its owner, its name and the part that it is counted under."""
    before = [(owner, name, getattr(owner, name), name in vars(owner)) for owner, name, _ in places]
    for owner, name, part in places:
        setattr(owner, name, clock.wrap(getattr(owner, name), part))
    try:
        yield
    finally:
        for owner, name, function, own in before:
            if own:
                setattr(owner, name, function)
            else:
                delattr(owner, name)


def _places(engine: Engine) -> list[tuple[Any, str, str]]:
    """The parts of the engine's steps."""
    core = engine._core
    return [
        (core.scheduler, "schedule", "scheduling"),
        (core.drafting, "propose", "drafting"),
        (core.drafting, "commit", "drafting"),
        (EngineSequence, "rows", "rows"),
        (engine.target, "forward", "forward"),
        (core, "_forward", "score"),
        (EngineSequence, "verify", "walk"),
        (EngineSequence, "commit", "commit"),
    ]


def steps(engine: Engine, rows: int, sequences: int, count: int) -> Steps:
    """`count` steps of `sequences` running sequences, `rows` rows in all, on the caller's thread."""
    core = engine._core
    vocabulary = engine.target.vocab_size
    chains = core.drafting.drafters["chains"]
    if isinstance(chains, Chains):
        chains.nodes = rows // sequences - 1
    clock = Clock()
    speculation = {"drafters": ["chains"], "adaptive": False} if rows > sequences else "off"
    for number in range(sequences):
        prompt = [(number * 31 + place * 7) % (vocabulary // 2) + 1 for place in range(_CONTEXT)]
        params = SamplingParams.of(
            {"max_tokens": 4 * count + 8, "temperature": 0, "ignore_eos": True, "speculation": speculation}
        )
        core.add(*engine._builder.build(prompt, params, copies=False))
    while core.scheduler.waiting or any(sequence.pending > 1 for sequence in core.scheduler.running):
        core.step()
    core.step()
    with timed(clock, _places(engine)):
        step = clock.wrap(core.step, "step")
        for _ in range(count):
            step()
            clock.end_step()
    for sequence in list(core.scheduler.running):
        core.cancel(sequence.request.id)
    core.check()
    parts = dict(clock.steps)
    inside = zip(parts.pop("score"), parts["forward"], parts["rows"], strict=True)
    parts["logits"] = [score - forward - rows for score, forward, rows in inside]
    return Steps(rows, sequences, parts)


def forward_parts(engine: Engine, rows: int) -> dict[str, float]:
    """Shares of a forward over `rows` rows, by the profiler; the head's by timing it alone."""
    target = engine.target
    row_seconds(target.current, rows)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        seconds = row_seconds(target.current, rows)
    calls = 3  # of `row_seconds`
    spent = {event.key: event.cpu_time_total / 1e6 / calls for event in profiler.key_averages()}
    linears = sum(spent.get(name, 0.0) for name in ("specgen::linear", "aten::linear", "aten::addmm"))
    attention = sum(spent.get(name, 0.0) for name in ("specgen::tree_attention", "aten::scaled_dot_product_attention"))
    head = target.model.get_output_embeddings()
    x = torch.randn(1, rows, head.in_features, dtype=target.model.dtype)
    with torch.inference_mode():
        head_seconds = median(_seconds(lambda: head(x)) for _ in range(9))
    rest = max(0.0, seconds - linears - attention)
    return dict(zip(FORWARD, (max(0.0, linears - head_seconds), head_seconds, attention, rest), strict=True))


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


class Plain:
    """transformers' own forward over one row behind `_CONTEXT` tokens."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.keyword = cache_keyword(model)
        self._forward(list(range(1, _CONTEXT + 1)))

    def run(self) -> float:
        """Seconds of one forward."""
        seconds = _seconds(lambda: self._forward([5]))
        self.cache.crop(-1)
        return seconds

    @torch.inference_mode()
    def _forward(self, ids: list[int]) -> None:
        self.model(input_ids=torch.tensor([ids]), use_cache=True, **{self.keyword: self.cache})


def floor_seconds(model: PreTrainedModel) -> float:
    """The weights' bytes over the bandwidth of a copy, bytes read and written both counted."""
    source, target = torch.zeros(_COPIED, dtype=torch.uint8), torch.ones(_COPIED, dtype=torch.uint8)
    seconds = min(_seconds(lambda: target.copy_(source)) for _ in range(5))
    weights = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in model.parameters()}
    return sum(weights.values()) / (2 * _COPIED / seconds)


@dataclass(frozen=True, slots=True)
class Results:
    """All steps by executor and shape, one entry a round; transformers' seconds; the floor; the forward's parts."""

    steps: Mapping[tuple[str, int, int], Sequence[Steps]]
    plain: Sequence[Sequence[float]]
    floor: float
    forwards: Mapping[tuple[str, int], Mapping[str, float]]

    def middle(self, executor: str, rows: int, sequences: int, part: str) -> float:
        """Seconds of a part, the median over rounds."""
        return median(one.middle(part) for one in self.steps[executor, rows, sequences])

    def ratio(self, of: Callable[[int], float]) -> float:
        """The median over rounds of a ratio taken within a round."""
        return median(of(number) for number in range(len(self.plain)))


def headline(results: Results) -> dict[str, float | None]:
    """The bars, of the best executor that there is."""
    best = COMPILED if (COMPILED, 1, 1) in results.steps else EAGER
    one, many = results.steps[best, 1, 1], results.steps[best, 32, 1]
    return {
        "row1_vs_hf": results.ratio(lambda n: one[n].middle("step") / median(results.plain[n])),
        "row32_vs_row1": results.ratio(lambda n: many[n].middle("step") / one[n].middle("step")),
        "host_share": results.ratio(lambda n: many[n].host / many[n].middle("step")),
        "floor_ratio": results.ratio(lambda n: one[n].middle("step") / results.floor),
    }


def show(results: Results, bars: Mapping[str, float | None]) -> None:
    """Print the tables."""
    columns = ["", *(f"{rows} rows, {sequences} seq." for rows, sequences in SHAPES)]
    for executor in dict.fromkeys(executor for executor, _, _ in results.steps):
        lines: list[list[object]] = [
            [part, *(1000 * results.middle(executor, *shape, part) for shape in SHAPES)]
            for part in ("step", "forward", *HOST)
        ]
        lines += [
            [f"  {part}", *(1000 * results.forwards[executor, rows][part] for rows, _ in SHAPES)] for part in FORWARD
        ]
        harness.table(f"{executor}: milliseconds", columns, lines)
    plain = 1000 * median(median(seconds) for seconds in results.plain)
    harness.table("one row, milliseconds", ["", ""], [["transformers", plain], ["floor", 1000 * results.floor]])
    harness.table("bars", ["", "value"], [[name, None if v is None else f"{v:.4f}"] for name, v in bars.items()])


def measure(args: argparse.Namespace) -> Results:
    """Everything, in rounds."""
    model, tokenizer = harness.load(args.model, args.dtype)
    executors = {EAGER: Engine(model, tokenizer, **_options(compile=False))}
    built = Engine(model, tokenizer, **_options(compile=True))
    if built.target.compiled:
        executors[COMPILED] = built
    found: dict[tuple[str, int, int], list[Steps]] = defaultdict(list)
    plain_model = Plain(model)
    plain: list[list[float]] = []
    for _ in range(args.rounds):
        plain.append([plain_model.run() for _ in range(args.tokens)])
        for name, engine in executors.items():
            for rows, sequences in SHAPES:
                found[name, rows, sequences].append(steps(engine, rows, sequences, args.tokens))
    forwards = {(name, rows): forward_parts(e, rows) for name, e in executors.items() for rows in (1, 8, 32)}
    return Results(found, plain, floor_seconds(model), forwards)


def _options(*, compile: bool) -> dict[str, Any]:
    plugins = load_plugins(only=())
    plugins.register(_Plugin(), "benchmarks", version="0")
    return {
        "kv_tokens": _KV_TOKENS,
        "prefix_cache": False,
        "drafters": ["chains"],
        "compile": compile,
        "plugins": plugins,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    args = harness.parse(harness.parser("step", __doc__), argv, full=FULL, quick=QUICK)
    results = measure(args)
    bars = headline(results)
    show(results, bars)
    if args.json:
        rows = [
            {"executor": name, "rows": r, "sequences": s, "milliseconds": {p: 1000 * one.middle(p) for p in one.parts}}
            for (name, r, s), every in results.steps.items()
            for one in every
        ]
        harness.save(args.json, "step", bars, settings=harness.settings(args, []), steps=rows)
        series = {
            part: {
                f"{name}, {rows} rows": 1000 * results.middle(name, rows, sequences, part)
                for name, rows, sequences in results.steps
                if sequences == 1
            }
            for part in ("forward", *HOST)
        }
        harness.plot(args.json.with_suffix(".png"), "step: where the time goes", "milliseconds", series)


if __name__ == "__main__":
    main()
