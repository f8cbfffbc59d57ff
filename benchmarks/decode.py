"""Decode speed of one stream, greedy: transformers and its ways to draft, specgen without and with drafting.

All systems run the same model object over the same prompts, prompt by prompt in turns. A rate counts the tokens after
the first arrival, so that reading the prompt, which no drafting shortens, stays out of it. A last part repeats some
prompts in float32 and compares the tokens.

Without --draft-model the draft model is the target's first layers. Untrained as it is, it is nearly always wrong: it
shows what a useless drafter costs, here and in transformers, and needs few prompts for that.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from benchmarks import harness
from benchmarks.harness import REPEAT, Prompt, Sample, Sizes, middle
from specgen import Engine
from specgen.model.loading import load_model

FULL = Sizes(tokens=64, rounds=1)
QUICK = Sizes(tokens=24, rounds=1, limit=4)

HF, LOOKUP, LOOKUP_SHORT, ASSISTED = "transformers", "lookup 10", "lookup 3", "assisted"
OFF, ON, ON_DRAFT = "specgen off", "specgen on", "specgen on + draft"
SYSTEMS = (HF, LOOKUP, LOOKUP_SHORT, ASSISTED, OFF, ON, ON_DRAFT)
OURS = (OFF, ON, ON_DRAFT)
PLAIN = {HF: HF, LOOKUP: HF, LOOKUP_SHORT: HF, ASSISTED: HF, OFF: OFF, ON: OFF, ON_DRAFT: OFF}
"""Each system's own run without drafting, whose text it must keep."""

# With --quick and without.
_EXACT_PROMPTS = {True: 3, False: 8}
_DRAFT_PROMPTS = {True: 2, False: 6}
_DRAFT_LAYERS = 8
# As deep as our own drafter's trees, for the same draft model.
_ASSISTANT_TOKENS = 5
# Plenty for one stream; the default pool is made for many and would take gigabytes per engine.
_KV_TOKENS = 8192

Runs = Mapping[str, Callable[[Prompt], "Run | None"]]


@dataclass(frozen=True, slots=True)
class Run:
    """One generation. `forwards` of the target, the prompt's included; `steps` are those of them that gave tokens.

    first, seconds: from the call to the first tokens, to the last ones. early: how many tokens came first.
    """

    ids: tuple[int, ...]
    first: float
    seconds: float
    early: int
    steps: int
    forwards: int

    @property
    def rate(self) -> float | None:
        """Tokens per second after the first arrival; `None` where nothing came after it."""
        rest = len(self.ids) - self.early
        return rest / (self.seconds - self.first) if rest > 0 else None


class Clock(BaseStreamer):
    """Notes when tokens arrive: transformers hands over the prompt first, then what each forward of the target gave."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.arrivals: list[tuple[float, int]] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Tokens have arrived, or the prompt."""
        if self._prompt_seen:
            self.note(value.numel())
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing more comes."""

    def note(self, tokens: int) -> None:
        """Write down that `tokens` arrived now."""
        self.arrivals.append((time.perf_counter() - self.started, tokens))

    def run(self, ids: Sequence[int], steps: int, forwards: int) -> Run:
        """All that was noted."""
        (first, early), (last, _) = self.arrivals[0], self.arrivals[-1]
        return Run(tuple(ids), first, last, early, steps, forwards)


def run_transformers(model: PreTrainedModel, tokens: int, options: Mapping[str, Any], prompt: Prompt) -> Run:
    """`model.generate`, greedy; `options` say how it drafts."""
    ids = torch.tensor([prompt.ids], device=model.device)
    eos = model.generation_config.eos_token_id
    pad = eos[0] if isinstance(eos, list) else eos
    generate: Any = model.generate
    clock = Clock()
    output = generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=tokens,
        pad_token_id=pad,
        streamer=clock,
        **options,
    )
    steps = len(clock.arrivals)
    return clock.run(output[0, ids.shape[1] :].tolist(), steps, steps)


def run_specgen(engine: Engine, tokens: int, speculation: str, prompt: Prompt) -> Run:
    """A stream of the engine, greedy."""
    before = engine.counters.steps
    clock = Clock()
    result = None
    for output in engine.stream(list(prompt.ids), temperature=0, max_tokens=tokens, speculation=speculation):
        clock.note(len(output.tokens))
        result = output.result
    if result is None:
        raise RuntimeError(f"prompt {prompt.id}: the stream ended without a result")
    return clock.run(result.ids, result.stats.num_spec_steps, engine.counters.steps - before)


def first_layers(model: PreTrainedModel, count: int = _DRAFT_LAYERS) -> PreTrainedModel:
    """A draft model without training: the target's first layers (at most a third) under its own norm and head."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = min(count, max(1, model.config.num_hidden_layers // 3))
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    draft = AutoModelForCausalLM.from_config(config, dtype=model.dtype).to(model.device).eval()
    weights = model.state_dict()
    # Copies: transformers and specgen both hang things on a model's modules, so target and draft share none.
    draft.load_state_dict({name: weights[name] for name in draft.state_dict()})
    draft.generation_config = copy.deepcopy(model.generation_config)
    loaded: PreTrainedModel = draft
    return loaded


def build(model: PreTrainedModel, tokenizer: Any, draft: PreTrainedModel, tokens: int, stack: ExitStack) -> Runs:
    """All systems; `stack` closes the engines. Ours share the model with transformers."""
    draft.generation_config.num_assistant_tokens = _ASSISTANT_TOKENS
    engine = stack.enter_context(Engine(model, tokenizer, kv_tokens=_KV_TOKENS, prefix_cache=False))
    drafting = stack.enter_context(
        Engine(model, tokenizer, kv_tokens=_KV_TOKENS, prefix_cache=False, draft_model=draft)
    )
    return {
        HF: partial(run_transformers, model, tokens, {}),
        LOOKUP: partial(run_transformers, model, tokens, {"prompt_lookup_num_tokens": 10}),
        LOOKUP_SHORT: partial(run_transformers, model, tokens, {"prompt_lookup_num_tokens": 3}),
        ASSISTED: partial(run_transformers, model, tokens, {"assistant_model": draft}),
        OFF: partial(run_specgen, engine, tokens, "off"),
        ON: partial(run_specgen, engine, tokens, "auto"),
        ON_DRAFT: partial(run_specgen, drafting, tokens, "auto"),
    }


class Results:
    """All samples, and what is read off them. Medians: over a prompt's rounds first, then over the prompts."""

    def __init__(self, samples: Sequence[Sample[Run]], systems: Sequence[str] = SYSTEMS) -> None:
        self.samples = samples
        self.prompts = list(dict.fromkeys(sample.prompt for sample in samples))
        self.systems = [name for name in systems if any(sample.system == name for sample in samples)]
        self._runs = {(s.system, s.prompt.id, s.round): s.run for s in samples}

    def within(self, categories: Collection[str]) -> Results:
        """The same for the prompts of some categories."""
        return Results([sample for sample in self.samples if sample.prompt.category in categories], self.systems)

    def runs(self, system: str, prompt: Prompt | None = None) -> list[Run]:
        """A system's runs, by round; of one prompt or of all."""
        prompts = [prompt] if prompt else self.prompts
        rounds = range(1 + max((sample.round for sample in self.samples), default=-1))
        found = (self._runs.get((system, p.id, r)) for p in prompts for r in rounds)
        return [run for run in found if run is not None]

    def value(self, system: str, of: Callable[[Run], float | None]) -> float | None:
        """The median of a figure."""
        return middle([middle([of(run) for run in self.runs(system, prompt)]) for prompt in self.prompts])

    def ratio(self, system: str, base: str, of: Callable[[Run], float | None]) -> float | None:
        """The median of a figure over the base system's in the same round on the same prompt."""
        return middle(
            [middle([_over(of(a), of(b)) for a, b in self.pairs(system, base, prompt)]) for prompt in self.prompts]
        )

    def pairs(self, system: str, base: str, prompt: Prompt) -> list[tuple[Run, Run]]:
        """Both systems' runs on a prompt, by round; none where one of them did not run."""
        ours, theirs = self.runs(system, prompt), self.runs(base, prompt)
        return list(zip(ours, theirs, strict=True)) if ours and theirs else []

    def same(self, systems: Collection[str], base: str) -> float | None:
        """The share of prompts on which all of the systems gave the base system's tokens, in every round.

        Of the prompts that all of them answered; `None` if there are none.
        """
        pairs = [[self.pairs(system, base, prompt) for system in systems] for prompt in self.prompts]
        kept = [all(a.ids == b.ids for runs in each for a, b in runs) for each in pairs if all(each)]
        return sum(kept) / len(kept) if kept else None

    def per(self, system: str, count: Callable[[Run], int], base: Callable[[Run], int]) -> float | None:
        """A count over another count, each summed over all runs."""
        runs = self.runs(system)
        return _over(sum(map(count, runs)), sum(map(base, runs)))


def rate(run: Run) -> float | None:
    """Tokens per second after the first arrival."""
    return run.rate


def whole_rate(run: Run) -> float:
    """Tokens per second of the whole call, the prompt's share included."""
    return len(run.ids) / run.seconds


def size(run: Run) -> int:
    """Committed tokens."""
    return len(run.ids)


def headline(results: Results, exact: Results, dtype: str) -> dict[str, float | None]:
    """The bars: flat names, each a number that one can hold the next version against."""
    repeat = results.within(REPEAT)
    steps: Callable[[Run], int] = lambda run: run.steps
    by_category = [results.within([c]).ratio(ON, OFF, rate) for c in categories(results)]
    return {
        "identical": exact.same(OURS, HF),
        f"identical_{dtype}": results.same((ON,), OFF),
        f"identical_{dtype}_draft_model": results.same((ON_DRAFT,), OFF),
        f"identical_{dtype}_off_vs_hf": results.same((OFF,), HF),
        f"identical_{dtype}_hf_lookup": results.same((LOOKUP,), HF),
        "off_vs_hf": results.ratio(OFF, HF, rate),
        "on_vs_hf": results.ratio(ON, HF, rate),
        "on_vs_off": results.ratio(ON, OFF, rate),
        "on_vs_off_worst_category": min((r for r in by_category if r is not None), default=None),
        "repeat_on_vs_off": repeat.ratio(ON, OFF, rate),
        "repeat_on_vs_hf": repeat.ratio(ON, HF, rate),
        "repeat_on_vs_hf_lookup": repeat.ratio(ON, LOOKUP, rate),
        "repeat_hf_lookup_vs_hf": repeat.ratio(LOOKUP, HF, rate),
        "draft_model_vs_off": results.ratio(ON_DRAFT, OFF, rate),
        "hf_lookup_vs_hf": results.ratio(LOOKUP, HF, rate),
        "hf_assisted_vs_hf": results.ratio(ASSISTED, HF, rate),
        "whole_off_vs_hf": results.ratio(OFF, HF, whole_rate),
        "whole_on_vs_hf": results.ratio(ON, HF, whole_rate),
        "first_token_off_vs_hf": results.ratio(OFF, HF, lambda run: run.first),
        "acceptance_length": results.per(ON, size, steps),
        "acceptance_length_repeat": repeat.per(ON, size, steps),
        "acceptance_length_draft_model": results.per(ON_DRAFT, size, steps),
        "tokens_per_second_hf": results.value(HF, rate),
        "tokens_per_second_off": results.value(OFF, rate),
        "tokens_per_second_on": results.value(ON, rate),
    }


def show(results: Results, bars: Mapping[str, float | None]) -> None:
    """Print the tables: systems, categories, bars."""
    harness.table(
        "systems",
        ["", "prompts", "tokens/s", "x transformers", "first ms", "forwards/token", "acceptance", "= own plain run"],
        [[name, *_figures(results, name)] for name in results.systems],
    )
    harness.table(
        "tokens/s by category (x transformers)",
        ["", *results.systems],
        [[c, *(_rate_and_ratio(part, s) for s in results.systems)] for c, part in _parts(results)],
    )
    harness.table("bars", ["", "value"], list(bars.items()))


def rows(results: Results) -> list[dict[str, Any]]:
    """The single measurements, for the JSON."""
    return [
        {
            "round": sample.round,
            "system": sample.system,
            "prompt": sample.prompt.id,
            "category": sample.prompt.category,
            "prompt_tokens": len(sample.prompt.ids),
            "tokens": len(sample.run.ids),
            "tokens_per_second": sample.run.rate,
            "first_token_seconds": sample.run.first,
            "seconds": sample.run.seconds,
            "steps": sample.run.steps,
            "forwards": sample.run.forwards,
        }
        for sample in results.samples
    ]


def measure(args: argparse.Namespace) -> Results:
    """Time the systems asked for; those with a useless draft model on a few of the prompts."""
    few = None if args.draft_model else _DRAFT_PROMPTS[args.quick]
    with ExitStack() as stack:
        prompts, runs = _prepare(args, args.dtype, args.limit, stack)
        chosen = {name: runs[name] for name in SYSTEMS if name in args.systems}
        for name in {ASSISTED, ON_DRAFT} & set(chosen):
            chosen[name] = partial(_among, set(harness.spread(prompts, few or len(prompts))), chosen[name])
        return Results(harness.interleave(chosen, prompts, args.rounds))


def compare(args: argparse.Namespace) -> Results:
    """Some of the prompts in float32, where drafting may not change a token of what transformers says."""
    limit = min(_EXACT_PROMPTS[args.quick], args.limit or _EXACT_PROMPTS[args.quick])
    with ExitStack() as stack:
        prompts, runs = _prepare(args, "float32", limit, stack)
        return Results(harness.interleave({name: runs[name] for name in (HF, *OURS)}, prompts, rounds=1))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options = harness.parser("decode", __doc__)
    options.add_argument(
        "--systems",
        nargs="+",
        metavar="NAME",
        choices=SYSTEMS,
        default=[name for name in SYSTEMS if name != LOOKUP_SHORT],
        help=f"what to run, out of: {', '.join(SYSTEMS)}; default: all but '{LOOKUP_SHORT}'",
    )
    options.add_argument("--draft-model", metavar="PATH", help="default: the first 8 layers of the target")
    args = harness.parse(options, argv, full=FULL, quick=QUICK)
    results = measure(args)
    exact = compare(args)
    bars = headline(results, exact, args.dtype)
    show(results, bars)
    if args.json:
        settings = harness.settings(args, results.prompts)
        harness.save(args.json, "decode", bars, settings=settings, runs=rows(results))
        title = f"decode, {settings['model']}, {args.dtype}, {args.tokens} tokens"
        series = {s: {c: part.value(s, rate) for c, part in _parts(results)} for s in results.systems}
        harness.plot(args.json.with_suffix(".png"), title, "tokens per second", series)


def _prepare(args: argparse.Namespace, dtype: str, limit: int | None, stack: ExitStack) -> tuple[list[Prompt], Runs]:
    model, tokenizer = harness.load(args.model, dtype)
    draft = load_model(args.draft_model, dtype=dtype, device=None) if args.draft_model else first_layers(model)
    prompts = harness.read_prompts(args.prompts, tokenizer, limit)
    return prompts, build(model, tokenizer, draft, args.tokens, stack)


def _among(prompts: Collection[Prompt], run: Callable[[Prompt], Run | None], prompt: Prompt) -> Run | None:
    """Run it if it is one of `prompts`."""
    return run(prompt) if prompt in prompts else None


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def categories(results: Results) -> list[str]:
    """The categories of the prompts, in order."""
    return list(dict.fromkeys(prompt.category for prompt in results.prompts))


def _parts(results: Results) -> list[tuple[str, Results]]:
    parts = [(category, results.within([category])) for category in categories(results)]
    return [*parts, ("repeat group", results.within(REPEAT)), ("all", results)]


def _figures(results: Results, system: str) -> list[float | None]:
    first = results.value(system, lambda run: run.first)
    return [
        sum(bool(results.runs(system, prompt)) for prompt in results.prompts),
        results.value(system, rate),
        results.ratio(system, HF, rate),
        None if first is None else 1000 * first,
        results.per(system, lambda run: run.forwards, size),
        results.per(system, size, lambda run: run.steps),
        results.same((system,), PLAIN[system]),
    ]


def _rate_and_ratio(results: Results, system: str) -> str | None:
    value, ratio = results.value(system, rate), results.ratio(system, HF, rate)
    if value is None:
        return None
    return f"{value:.1f}" if ratio is None else f"{value:.1f} ({ratio:.2f})"


if __name__ == "__main__":
    main()
