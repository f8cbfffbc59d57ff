"""specgen beside transformers and beside programs of their own: the same prompts, budget and threads, in turns.

Streams of one: tokens per second after the first arrival. Batches: all tokens over the seconds of the whole call. A
peer runs in an environment of its own (`--install NAME` makes it); what is absent or fails is named with its reason,
and the rest goes on.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.decode import Results, Run
from benchmarks.harness import REPEAT, Prompt, Sizes
from benchmarks.peers import assembly, foreign, results
from benchmarks.peers.assembly import Call
from specgen._base.paths import cache_folder
from specgen.demo_model import demo_model
from specgen.model.loading import load_tokenizer

FULL = Sizes(tokens=128, rounds=3, limit=12)
QUICK = Sizes(tokens=24, rounds=1, limit=4)
BATCHES = {True: [8], False: [8, 32]}
"""With --quick and without."""

TALK = ("writing", "roleplay", "reasoning", "humanities")
"""Categories that make up "chat": nothing to copy."""


def chosen_prompts(prompts: Sequence[Prompt], limit: int) -> list[Prompt]:
    """The groups chat, summarization, code_edit and extraction in turns, `limit` prompts in all."""
    talk = harness.by_turns([p for p in prompts if p.category in TALK], lambda p: p.category)
    groups = [replace(p, category=results.CHAT) for p in talk] + [p for p in prompts if p.category in REPEAT]
    picked = harness.by_turns(groups, lambda p: p.category)[:limit]
    if not picked:
        raise SystemExit(f"the prompts have no category of: {', '.join((*TALK, *REPEAT))}")
    return sorted(picked, key=lambda p: [results.CHAT, *REPEAT].index(p.category))


def batch(prompts: Sequence[Prompt], size: int) -> list[Prompt]:
    """Concurrent requests: a spread over all categories, from the start again where there are too few."""
    turns = harness.spread(prompts, size)
    return [turns[place % len(turns)] for place in range(size)]


def measure(args: argparse.Namespace, model: Path) -> tuple[Results, Results, dict[str, str]]:
    """Streams of one, batches, and what was skipped, with its reason."""
    tokenizer = load_tokenizer(model)
    if tokenizer is None:
        raise SystemExit(f"{model} has no tokenizer; a benchmark needs one for its prompts")
    read = harness.read_prompts(args.prompts, tokenizer)
    prompts = chosen_prompts(read, args.limit)
    batches = {results.batch_name(size): batch(read, size) for size in args.batches}
    skipped: dict[str, str] = {}
    with ExitStack() as stack:
        told = assembly.options(args, prompts, list(batches.values()))
        systems = assembly.assemble(args, model, told, skipped, stack)
        alone = {name: system.one for name, system in systems.items() if system.one}
        one = _results(alone, prompts, args.rounds, skipped)
        # A batch goes through the rounds as a prompt of its own.
        calls = [Prompt(name, name, ()) for name in batches]
        together = {name: _by_name(system.many, batches) for name, system in systems.items() if system.many}
        many = _results({n: run for n, run in together.items() if n not in skipped}, calls, args.rounds, skipped)
    return one, many, skipped


def rows(found: Results) -> list[dict[str, Any]]:
    """The single measurements, for the JSON."""
    return [
        {
            "round": sample.round,
            "system": sample.system,
            "prompt": sample.prompt.id,
            "category": sample.prompt.category,
            "tokens": len(sample.run.ids),
            "early": sample.run.early,
            "first_token_seconds": sample.run.first,
            "seconds": sample.run.seconds,
        }
        for sample in found.samples
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark, or install a peer."""
    args = _parse(argv)
    model = Path(args.model or demo_model())
    peers = {peer.name: peer for peer in foreign.peers(args.peers)}
    if args.install:
        foreign.install(peers[args.install], model)
        return
    one, many, skipped = measure(args, model)
    bars = results.headline(one, many, list(peers))
    results.show(one, many, skipped, bars)
    if args.json:
        settings = {**harness.settings(args, one.prompts), "batches": args.batches, "skipped": skipped}
        harness.save(args.json, "peers", bars, settings=settings, runs=rows(one) + rows(many))
        title = f"peers, {settings['model']}, {args.dtype}, {args.tokens} tokens"
        harness.plot(args.json.with_suffix(".png"), title, "tokens per second", results.series(one, many))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    options = harness.parser("peers", __doc__)
    options.add_argument(
        "--install",
        metavar="NAME",
        choices=[path.stem for path in foreign.ADAPTERS.glob("*.py")],
        help="make a peer's environment, and end",
    )
    options.add_argument(
        "--peers",
        type=Path,
        metavar="FOLDER",
        default=Path(os.environ.get("SPECGEN_PEERS") or cache_folder() / "peers"),
        help="where the peers' environments are; default: $SPECGEN_PEERS, else peers in specgen's cache folder",
    )
    options.add_argument(
        "--systems", nargs="+", metavar="NAME", help="what to run: systems, or first words of their names; default: all"
    )
    options.add_argument("--batches", nargs="*", type=int, metavar="N", help="sizes of the batches; default: 8 and 32")
    options.add_argument("--draft-model", metavar="PATH", help="for transformers' assisted generation")
    options.add_argument(
        "--head",
        type=Path,
        metavar="FOLDER",
        help="specgen drafts with it, recycling and suffix; default: as it is made",
    )
    args = harness.parse(options, argv, full=FULL, quick=QUICK)
    if args.batches is None:
        args.batches = BATCHES[args.quick]
    known = [name for adapter in assembly.adapters(args.peers) for name in adapter.systems]
    for wanted in args.systems or []:
        if not any(assembly.means(wanted, name) for name in known):
            options.error(f"--systems: no system is called {wanted!r}; there are: {', '.join(known)}")
    return args


def _results(runs: Mapping[str, Call], prompts: Sequence[Prompt], rounds: int, skipped: dict[str, str]) -> Results:
    """Let the systems run in turns. One that fails once is out, with what it did before."""
    guarded = {name: assembly.guard(name, run, skipped) for name, run in runs.items()}
    if not prompts or not guarded:
        return Results([])
    samples = harness.interleave(guarded, prompts, rounds)
    return Results([sample for sample in samples if sample.system not in skipped], list(runs))


def _by_name(many: Callable[[Sequence[Prompt]], Run], batches: Mapping[str, Sequence[Prompt]]) -> Call:
    return lambda call: many(batches[call.id])


if __name__ == "__main__":
    main()
