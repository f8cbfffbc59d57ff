"""What drafting is worth: each drafter alone, and drafters together, category by category, greedy and sampled.

A combination drafts in two ways: with a budget of 32 nodes that are always verified, which shows how well it guesses
on any machine, and with the budget that measures what pays, which shows what that is worth on this one. Speculation
off runs beside them on the same prompts. Samples have a seed, so that all systems continue with the same text.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks import decode, harness
from benchmarks.decode import Results, Run, categories, rate, size
from benchmarks.harness import Prompt, Sizes
from benchmarks.step import Clock, timed
from specgen import Engine, Speculation
from specgen.plugins.manager import load_plugins
from specgen.types import MAX_TREE_NODES, Result

FULL = Sizes(tokens=96, rounds=3)
QUICK = Sizes(tokens=12, rounds=1)
# With --quick and without.
_PER_CATEGORY = {True: 1, False: 5}
_BATCHES = {True: [1, 2], False: [1, 4, 16]}

OFF = "off"
NODES = 32
"""The fixed budget, nodes per step and sequence."""
_FIXED = f", {NODES} nodes"
HEAD, DRAFT_MODEL, ECHO = "eagle", "draft-model", "echo"
MODES = {"greedy": 0.0, "T=1": 1.0}
GREEDY = "greedy"
# Not drafters of their own: `prediction` needs a request that brings one, `echo` the truth.
_NOT_ALONE = ("prediction", ECHO)
# 62 nodes a step, none of them right, each of them sure of itself.
_USELESS = {"hit_rate": 0.0, "siblings": 1, "depth": 21, "confidence": 0.9}
_SEED = 1
_PAGE = 64


@dataclass(frozen=True, slots=True)
class System:
    """A way to generate: names of drafters, none for speculation off; a fixed budget, or the one that measures."""

    drafters: tuple[str, ...] = ()
    fixed: bool = False

    @property
    def name(self) -> str:
        """As it stands in tables and bars."""
        return ("+".join(self.drafters) or OFF) + (_FIXED if self.fixed else "")

    @property
    def speculation(self) -> Speculation:
        """What its requests ask for."""
        if not self.drafters:
            return Speculation.of("off")
        return Speculation(
            drafters=self.drafters, adaptive=not self.fixed, max_nodes=NODES if self.fixed else MAX_TREE_NODES
        )


@dataclass(frozen=True, slots=True)
class Drafted(Run):
    """One generation, or a batch of them: what was drafted for all of its sequences together.

    offered: nodes per drafter. accepted: tokens per drafter, counted for each that had them.
    drafting, verifying: milliseconds of a step, the median over steps.
    """

    offered: Mapping[str, int]
    accepted: Mapping[str, int]
    verified: int
    drafting: float
    verifying: float


class Bench:
    """An engine with the drafters of some systems, whose steps are timed.

    What drafters keep beyond a request they keep apart by `cache_salt`, and each pass over the prompts has one of its
    own: nobody drafts from what was said when the same prompt came before.
    """

    def __init__(self, engine: Engine, tokens: int, groups: Mapping[str, Sequence[Prompt]]) -> None:
        self._engine, self._tokens, self._groups = engine, tokens, groups
        self._clock = Clock()
        self._calls: Counter[str] = Counter()

    def time(self, stack: ExitStack) -> None:
        """Time steps until `stack` ends."""
        core = self._engine._core
        parts = [(core.drafting, name, "drafting") for name in ("propose", "observe", "commit")]
        stack.enter_context(timed(self._clock, [*parts, (core, "_forward", "verifying")]))
        step = core.step

        def whole() -> Any:
            outputs = step()
            self._clock.end_step()
            return outputs

        core.step = whole
        stack.callback(delattr, core, "step")

    def run(self, system: System, mode: str, passes: int, prompt: Prompt) -> Drafted:
        """Answer a prompt, or all prompts of a batch at once; `passes` is the number of prompts in a pass."""
        key = f"{system.name} {mode} {passes}"
        # The first call warms the engine up; it belongs to no pass.
        salt = f"{key} {(self._calls[key] - 1) // passes}"
        self._calls[key] += 1
        options = {
            "temperature": MODES[mode],
            "top_p": 1.0,
            "top_k": 0,
            "seed": _SEED,
            "max_tokens": self._tokens,
            "speculation": system.speculation,
            "cache_salt": salt,
        }
        self._clock.steps.clear()
        clock = decode.Clock()
        group = self._groups.get(prompt.id)
        results = self._one(prompt, clock, options) if group is None else self._many(group, clock, options)
        return self._drafted(clock, results)

    def _one(self, prompt: Prompt, clock: decode.Clock, options: Mapping[str, Any]) -> list[Result]:
        results = []
        for output in self._engine.stream(list(prompt.ids), **options):
            clock.note(len(output.tokens))
            results += [output.result] if output.result else []
        return results

    def _many(self, group: Sequence[Prompt], clock: decode.Clock, options: Mapping[str, Any]) -> list[Result]:
        """A batch counts all tokens over all seconds: nothing has arrived before."""
        clock.note(0)
        results: list[Result] = self._engine.generate([list(prompt.ids) for prompt in group], **options)
        clock.note(sum(len(result.ids) for result in results))
        return results

    def _drafted(self, clock: decode.Clock, results: Sequence[Result]) -> Drafted:
        stats = [result.stats for result in results]
        shares = [(name, share) for one in stats for name, share in one.by_drafter.items()]
        offered, accepted = Counter[str](), Counter[str]()
        for name, share in shares:
            offered[name] += share.offered
            accepted[name] += share.accepted
        steps = sum(one.num_spec_steps for one in stats)
        run = clock.run([token for result in results for token in result.ids], steps, steps)
        parts = {part: 1000 * median(seconds) for part, seconds in self._clock.steps.items()}
        return Drafted(
            run.ids,
            run.first,
            run.seconds,
            run.early,
            run.steps,
            run.forwards,
            offered,
            accepted,
            sum(one.num_draft_tokens for one in stats),
            parts.get("drafting", 0.0),
            parts["verifying"],
        )


def sample(prompts: Sequence[Prompt], per_category: int, limit: int | None) -> list[Prompt]:
    """The first prompts of each category, one category after the other; always the same ones in the same order."""
    turns = harness.by_turns(prompts, lambda prompt: prompt.category)
    taken: Counter[str] = Counter()
    kept = []
    for prompt in turns:
        taken[prompt.category] += 1
        kept += [prompt] if taken[prompt.category] <= per_category else []
    return kept[:limit]


def batches(prompts: Sequence[Prompt], size: int) -> dict[str, list[Prompt]]:
    """The prompts in groups of `size`, by name; the last one begins again with the first prompts."""
    return {
        f"batch {size} {number}": [prompts[(number * size + place) % len(prompts)] for place in range(size)]
        for number in range(-(-len(prompts) // size))
    }


def combinations(asked: Sequence[str] | None, offered: Sequence[str]) -> list[tuple[str, ...]]:
    """What `--drafters` says; else each drafter alone, then all of them. Raises SystemExit for an unknown name."""
    if asked is None:
        alone = [name for name in offered if name not in _NOT_ALONE]
        return [*((name,) for name in alone), *([tuple(alone)] if len(alone) > 1 else [])]
    found = [tuple(text.split("+")) for text in asked]
    for name in (name for names in found for name in names):
        if name not in offered:
            raise SystemExit(f"--drafters: no drafter is called {name!r}; there are: {', '.join(offered)}")
    return found


def merged(systems: Sequence[System]) -> System:
    """The adaptive system of most drafters, `echo` left aside; speculation off where there is none."""
    honest = [system for system in systems if ECHO not in system.drafters and not system.fixed]
    return max(honest, key=lambda system: len(system.drafters))


@dataclass(frozen=True, slots=True)
class Part:
    """The results of one mode at one batch size."""

    mode: str
    batch: int
    results: Results

    @property
    def title(self) -> str:
        """For tables and the JSON."""
        return f"{self.mode}, batch {self.batch}"


def measure(args: argparse.Namespace) -> list[Part]:
    """All systems over all prompts, in rounds, for each mode and batch size."""
    model, tokenizer = harness.load(args.model, args.dtype)
    prompts = sample(harness.read_prompts(args.prompts, tokenizer), args.per_category, args.limit)
    groups = {name: group for size in args.batches if size > 1 for name, group in batches(prompts, size).items()}
    args.sample = prompts
    with ExitStack() as stack:
        benches: dict[tuple[str, ...], Bench] = {}
        for names in dict.fromkeys(system.drafters for system in args.systems):
            engine = stack.enter_context(Engine(model, tokenizer, **_options(args, names, prompts)))
            benches[names] = Bench(engine, args.tokens, groups)
            benches[names].time(stack)
        return [
            Part(mode, size, _rounds(args, benches, mode, size, prompts))
            for mode in args.modes
            for size in args.batches
        ]


def _rounds(
    args: argparse.Namespace,
    benches: Mapping[tuple[str, ...], Bench],
    mode: str,
    batch: int,
    prompts: Sequence[Prompt],
) -> Results:
    """A batch goes through the rounds as a prompt of its own."""
    calls = list(prompts) if batch == 1 else [Prompt(name, f"batch {batch}", ()) for name in batches(prompts, batch)]
    runs = {}
    for system in args.systems:
        if batch == 1 or not system.fixed:
            runs[system.name] = _call(benches[system.drafters], system, mode, len(calls))
    return Results(harness.interleave(runs, calls, args.rounds), list(runs))


def _call(bench: Bench, system: System, mode: str, passes: int) -> Callable[[Prompt], Drafted]:
    return lambda prompt: bench.run(system, mode, passes, prompt)


def _options(args: argparse.Namespace, names: Sequence[str], prompts: Sequence[Prompt]) -> dict[str, Any]:
    chosen: dict[str, dict[str, Any]] = {name: {} for name in names}
    for name, (option, path) in _files(args).items():
        if name in chosen:
            chosen[name] = {option: path}
    if ECHO in chosen:
        chosen[ECHO] = dict(_USELESS)
    rooms = sorted((len(prompt.ids) + args.tokens + MAX_TREE_NODES + _PAGE for prompt in prompts), reverse=True)
    return {
        "drafters": chosen,
        "compile": not args.eager,
        "kv_tokens": sum((rooms * max(args.batches))[: max(args.batches)]),
        "max_num_seqs": max(args.batches),
        "prefix_cache": False,
    }


def steps(run: Run) -> int:
    """Verify steps, over all sequences."""
    return run.steps


def acceptance(results: Results, system: str) -> float | None:
    """Committed tokens per verify step, the target's own included, over all runs."""
    return results.per(system, size, steps) if results.runs(system) else None


def headline(parts: Sequence[Part], systems: Sequence[System]) -> dict[str, float | None]:
    """The bars, all of them greedy: acceptance lengths at 32 nodes, ratios of tokens per second."""
    greedy = {part.batch: part.results for part in parts if part.mode == GREEDY}
    one = greedy.get(1, Results([], []))
    best = merged(systems)
    fixed = System(best.drafters, fixed=True).name
    useless = System((*best.drafters, ECHO)).name
    by_category = [one.within([c]).ratio(best.name, OFF, rate) for c in categories(one)]
    speedups = {f"on_vs_off_b{batch}": found.ratio(best.name, OFF, rate) for batch, found in greedy.items()}
    bars = {
        "al_head": acceptance(one, System((HEAD,), fixed=True).name),
        "al_merged": acceptance(one, fixed) if len(best.drafters) > 1 else None,
        **speedups,
        "worst_category": min((r for r in by_category if r is not None), default=None),
        "useless_drafter_cost": one.ratio(useless, best.name, rate),
    }
    return {name: value for name, value in bars.items() if value is not None}


def show(parts: Sequence[Part], bars: Mapping[str, float | None]) -> None:
    """Print the tables: what each system drafts, acceptance by category, bars."""
    columns = ["", "acceptance", "offered", "verified", "drafting ms", "verifying ms", "tokens/s", "x off", "= off"]
    for part in parts:
        results = part.results
        harness.table(
            f"{part.title}; nodes per step and sequence, milliseconds per step",
            columns,
            [[name, *_figures(results, name)] for name in results.systems],
        )
        if part.batch == 1:
            _show_categories(part)
    harness.table("bars", ["", "value"], list(bars.items()))


def _figures(results: Results, system: str) -> list[float | None]:
    return [
        acceptance(results, system),
        results.per(system, lambda run: sum(run.offered.values()), steps),
        results.per(system, lambda run: run.verified, steps),
        results.value(system, lambda run: run.drafting),
        results.value(system, lambda run: run.verifying),
        results.value(system, rate),
        results.ratio(system, OFF, rate),
        results.same((system,), OFF),
    ]


def _show_categories(part: Part) -> None:
    results = part.results
    parts = [*((c, results.within([c])) for c in categories(results)), ("all", results)]
    fixed = [name for name in results.systems if name.endswith(_FIXED)]
    measured = [name for name in results.systems if name not in (OFF, *fixed)]
    harness.table(
        f"{part.title}: acceptance length with {NODES} nodes",
        ["", *(name.removesuffix(_FIXED) for name in fixed)],
        [[c, *(acceptance(within, name) for name in fixed)] for c, within in parts],
    )
    harness.table(
        f"{part.title}: tokens/s over speculation off (acceptance length), with the measured budget",
        ["", *measured],
        [[c, *(_ratio_and_length(within, name) for name in measured)] for c, within in parts],
    )


def _ratio_and_length(results: Results, system: str) -> str | None:
    ratio, length = results.ratio(system, OFF, rate), acceptance(results, system)
    return None if ratio is None or length is None else f"{ratio:.2f} ({length:.2f})"


def rows(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """The single measurements, for the JSON."""
    return [
        {
            "mode": part.mode,
            "batch": part.batch,
            "round": one.round,
            "system": one.system,
            "prompt": one.prompt.id,
            "category": one.prompt.category,
            "tokens": len(one.run.ids),
            "steps": one.run.steps,
            "tokens_per_second": one.run.rate,
            "seconds": one.run.seconds,
            "offered": dict(one.run.offered),
            "accepted": dict(one.run.accepted),
            "verified": one.run.verified,
            "drafting_milliseconds": one.run.drafting,
            "verifying_milliseconds": one.run.verifying,
        }
        for part in parts
        for one in part.results.samples
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    args = _parse(argv)
    parts = measure(args)
    bars = headline(parts, args.systems)
    show(parts, bars)
    if args.json:
        settings = {
            **harness.settings(args, args.sample),
            "systems": [system.name for system in args.systems],
            "batches": args.batches,
            "compile": not args.eager,
        }
        harness.save(args.json, "drafting", bars, settings=settings, runs=rows(parts))
        shown = next((part.results for part in parts if part.batch == 1), parts[0].results)
        series = {
            name: {c: acceptance(shown.within([c]), name) for c in categories(shown)} | {"all": acceptance(shown, name)}
            for name in shown.systems
            if name != OFF
        }
        title = f"drafting, {settings['model']}, {args.dtype}, {parts[0].mode}"
        harness.plot(args.json.with_suffix(".png"), title, "acceptance length", series)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    options = harness.parser("drafting", __doc__)
    options.add_argument(
        "--drafters",
        nargs="+",
        metavar="NAME[+NAME]",
        help="drafters and combinations; default: each that is installed, and all together",
    )
    options.add_argument("--draft-model", metavar="PATH", help=f"for the drafter '{DRAFT_MODEL}', which needs it")
    options.add_argument("--head", metavar="FOLDER", help=f"for the drafter '{HEAD}', which needs it")
    options.add_argument("--per-category", type=int, metavar="N", help="prompts of each category; default: 5")
    options.add_argument("--batches", nargs="+", type=int, metavar="N", help="sizes of batches; default: 1 4 16")
    options.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: both")
    options.add_argument("--eager", action="store_true", help="do not compile the forward; so does --quick")
    args = harness.parse(options, argv, full=FULL, quick=QUICK)
    args.per_category = args.per_category or _PER_CATEGORY[args.quick]
    args.batches = args.batches or _BATCHES[args.quick]
    args.eager = args.eager or args.quick
    args.systems = _systems(args)
    return args


def _files(args: argparse.Namespace) -> dict[str, tuple[str, str | None]]:
    """Drafters that need a file of their own, with the option that names it."""
    return {DRAFT_MODEL: ("model", args.draft_model), HEAD: ("path", args.head)}


def _systems(args: argparse.Namespace) -> list[System]:
    """Off, each combination both ways, and the largest one beside a drafter that is never right."""
    offered = load_plugins().collect("drafters")
    files = _files(args)
    known = [name for name in offered if name not in files or files[name][1]]
    named = combinations(args.drafters, known)
    systems = [System(), *(System(names, fixed) for names in named for fixed in (True, False))]
    if ECHO in offered:
        systems.append(System((*merged(systems).drafters, ECHO)))
    return list(dict.fromkeys(systems))


if __name__ == "__main__":
    main()
