"""Eight requests over four adapters beside eight base requests, beside transformers with peft, and what a swap takes.

All in one run and in turns. The adapters are random ones of one rank, as strong as trained ones, so that the work is
the same and nothing is downloaded. Peft's side is its mixed batch: `generate(adapter_names=[...])`, padded on the left.
Every text of ours is compared with the same request alone.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from benchmarks import harness
from benchmarks.harness import Prompt, Sizes
from specgen import Engine, Result

FULL = Sizes(tokens=48, rounds=3, limit=8)
QUICK = Sizes(tokens=8, rounds=1, limit=4)

ADAPTERS = 4
RANK = 8
BASE, MIXED, MIXED_DRAFTED, PEFT = "specgen base", "specgen mixed", "specgen mixed, drafting", "peft mixed"
_SCALE = 0.02
_SWAPS = 10


@dataclass(frozen=True, slots=True)
class Run:
    """One batch: seconds, new tokens of all requests, and the ids of each."""

    seconds: float
    ids: tuple[tuple[int, ...], ...]

    @property
    def rate(self) -> float:
        """Tokens per second over the batch."""
        return sum(map(len, self.ids)) / self.seconds


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print the tables, and write the JSON if that was asked for."""
    options = harness.parser("lora", __doc__)
    options.add_argument("--modules", default="q_proj,k_proj,v_proj,o_proj", help="modules that the adapters adapt")
    args = harness.parse(options, argv, full=FULL, quick=QUICK)
    model, tokenizer = harness.load(args.model, args.dtype)
    prompts = harness.read_prompts(args.prompts, tokenizer, args.limit)
    with TemporaryDirectory() as scratch:
        folders = make_adapters(model, Path(scratch), args.modules.split(","))
        beside = peft_model(model, folders)
        engine = Engine(model, tokenizer, prefix_cache=False)
        with engine:
            for name, folder in folders.items():
                engine.adapters.load(name, folder)
            runs = measure(args, engine, beside, tokenizer, prompts, list(folders))
            identical = compare(args, engine, prompts, list(folders), runs[MIXED][0])
        swaps = swap_seconds(model, tokenizer, prompts[0], folders)
    report(args, prompts, runs, identical, swaps)


def make_adapters(model: PreTrainedModel, root: Path, modules: Sequence[str]) -> dict[str, Path]:
    """Random adapters, saved by peft."""
    folders = {}
    for number in range(ADAPTERS):
        torch.manual_seed(number)
        config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=list(modules))
        adapted = get_peft_model(copy.deepcopy(model), config)
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if ".lora_B." in name:
                    weight.normal_(std=_SCALE)
        folders[f"adapter-{number}"] = root / str(number)
        adapted.save_pretrained(folders[f"adapter-{number}"])
    return folders


def peft_model(model: PreTrainedModel, folders: Mapping[str, Path]) -> Any:
    """The model under all adapters, as peft serves them."""
    (first, folder), *others = folders.items()
    beside = PeftModel.from_pretrained(copy.deepcopy(model), folder, adapter_name=first)
    for name, other in others:
        beside.load_adapter(other, adapter_name=name)
    return beside.eval()


def measure(
    args: argparse.Namespace,
    engine: Engine,
    beside: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    names: Sequence[str],
) -> dict[str, list[Run]]:
    """All systems in turns, after one round that does not count."""
    mixed = [names[number % len(names)] for number in range(len(prompts))]
    base: list[str | None] = [None] * len(prompts)
    systems: dict[str, Callable[[], Run]] = {
        BASE: lambda: batch(engine, prompts, base, args.tokens, "off"),
        MIXED: lambda: batch(engine, prompts, mixed, args.tokens, "off"),
        MIXED_DRAFTED: lambda: batch(engine, prompts, mixed, args.tokens, "auto"),
        PEFT: lambda: batch_by_peft(beside, tokenizer, prompts, mixed, args.tokens),
    }
    runs: dict[str, list[Run]] = {system: [] for system in systems}
    for number in range(args.rounds + 1):
        for system, run in systems.items():
            done = run()
            if number:
                runs[system].append(done)
    return runs


def batch(engine: Engine, prompts: Sequence[Prompt], adapters: Sequence[str | None], tokens: int, how: str) -> Run:
    """All prompts at once, each under its adapter."""
    options: dict[str, Any] = {"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True, "speculation": how}
    started = time.perf_counter()
    streams = [engine.stream(p.ids, adapter=a, **options) for p, a in zip(prompts, adapters, strict=True)]
    results: list[Result] = [stream.results()[0] for stream in streams]
    return Run(time.perf_counter() - started, tuple(result.ids for result in results))


@torch.inference_mode()
def batch_by_peft(beside: Any, tokenizer: Any, prompts: Sequence[Prompt], adapters: Sequence[str], tokens: int) -> Run:
    """The same by `generate`, padded on the left."""
    longest = max(len(prompt.ids) for prompt in prompts)
    padding = [longest - len(prompt.ids) for prompt in prompts]
    started = time.perf_counter()
    found = beside.generate(
        input_ids=torch.tensor([[0] * n + list(p.ids) for n, p in zip(padding, prompts, strict=True)]),
        attention_mask=torch.tensor([[0] * n + [1] * len(p.ids) for n, p in zip(padding, prompts, strict=True)]),
        adapter_names=list(adapters),
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    return Run(time.perf_counter() - started, tuple(tuple(row[longest:].tolist()) for row in found))


def compare(
    args: argparse.Namespace, engine: Engine, prompts: Sequence[Prompt], names: Sequence[str], run: Run
) -> float:
    """The share of texts of a mixed batch that are those of the same requests alone."""
    alone = [
        batch(engine, [prompt], [names[number % len(names)]], args.tokens, "off").ids[0]
        for number, prompt in enumerate(prompts)
    ]
    return sum(a == b for a, b in zip(alone, run.ids, strict=True)) / len(prompts)


def swap_seconds(
    model: PreTrainedModel, tokenizer: Any, prompt: Prompt, folders: Mapping[str, Path]
) -> dict[str, float]:
    """From asking to the first token under another adapter than the last one, less the same under the same adapter.

    resident: both are on the device. cold: the device holds one, host memory none: it comes from a file.
    load: from files in a folder to a name that requests can use.
    """
    names = list(folders)[:2]
    found = {}
    with Engine(model, tokenizer, prefix_cache=False) as engine:
        loads = []
        for name in names:
            started = time.perf_counter()
            size = engine.adapters.load(name, folders[name]).bytes
            loads.append(time.perf_counter() - started)
        found["load"] = min(loads)
        found["resident"] = first_token(engine, prompt, names) - first_token(engine, prompt, names[:1])
    with Engine(model, tokenizer, prefix_cache=False, adapters={"device_bytes": size, "host_bytes": 0}) as engine:
        for name in names:
            engine.adapters.load(name, folders[name])
        found["cold"] = first_token(engine, prompt, names) - first_token(engine, prompt, names[:1])
    return found


def first_token(engine: Engine, prompt: Prompt, names: Sequence[str]) -> float:
    """The median of seconds to a first token, under one name after the other."""
    seconds = []
    for number in range(_SWAPS):
        started = time.perf_counter()
        engine.generate(
            prompt.ids, adapter=names[number % len(names)], max_tokens=1, temperature=0.0, speculation="off"
        )
        seconds.append(time.perf_counter() - started)
    return median(seconds[2:])


def report(
    args: argparse.Namespace,
    prompts: Sequence[Prompt],
    runs: Mapping[str, Sequence[Run]],
    identical: float,
    swaps: Mapping[str, float],
) -> None:
    """Tables, and the JSON."""
    rates = {system: median(run.rate for run in done) for system, done in runs.items()}
    title = f"{len(prompts)} requests, {args.tokens} tokens each, {ADAPTERS} adapters of rank {RANK}"
    harness.table(title, ("system", "tokens/s"), list(rates.items()))
    harness.table("swap", ("adapter", "ms"), [(name, 1000 * seconds) for name, seconds in swaps.items()])
    if args.json is None:
        return
    bars = {
        "mixed_vs_base": rates[MIXED] / rates[BASE],
        "mixed_vs_peft": rates[MIXED] / rates[PEFT],
        "mixed_drafted_vs_mixed": rates[MIXED_DRAFTED] / rates[MIXED],
        "swap_ms_resident": 1000 * max(0.0, swaps["resident"]),
        "swap_ms_cold": 1000 * max(0.0, swaps["cold"]),
        "load_ms": 1000 * swaps["load"],
        "identical": identical,
    }
    settings = {**harness.settings(args, prompts), "modules": args.modules, "rank": RANK}
    harness.save(args.json, "lora", bars, settings=settings, tokens_per_second=rates)
    harness.plot(
        args.json.with_suffix(".png"), title, "tokens per second", {name: {"": r} for name, r in rates.items()}
    )


if __name__ == "__main__":
    main()
