"""What all benchmarks share: options, prompts, interleaved rounds, and the ways to show and keep results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Generic, TypeVar

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import PreTrainedModel

import specgen
from specgen.demo_model import demo_model
from specgen.model.loading import load_model, load_tokenizer

PROMPTS = Path(__file__).with_name("prompts.jsonl")
REPEAT = ("extraction", "summarization", "code_edit")
"""Categories whose answers repeat much of their prompt: what lookup lives on."""

_ROOT = Path(__file__).parents[1]
_MEANING = {"tokens": "most new tokens per prompt", "rounds": "rounds over all prompts", "limit": "most prompts"}
# Room for a table's columns where nobody says how wide the output is.
_console = Console(width=None if sys.stdout.isatty() else 140)

T = TypeVar("T")
K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much a benchmark does unless told otherwise; `limit` is the number of prompts, `None` for all."""

    tokens: int
    rounds: int
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of a prompts file, as token ids of the model at hand."""

    id: str
    category: str
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sample(Generic[T]):
    """What one system did with one prompt in one round."""

    round: int
    system: str
    prompt: Prompt
    run: T


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The options of every benchmark. Add others to it and hand it to `parse`."""
    options = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    options.add_argument("--json", type=Path, metavar="FILE", help="write results here, and a plot beside it (.png)")
    options.add_argument("--quick", action="store_true", help="a small run that shows that everything works")
    options.add_argument("--model", metavar="PATH", help="path or name of the target; default: the demo model")
    options.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    options.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        default=Path(os.environ.get("SPECGEN_PROMPTS") or PROMPTS),
        help="JSON lines of id, category, turns; default: $SPECGEN_PROMPTS, else the file beside the benchmarks",
    )
    for size, meaning in _MEANING.items():
        options.add_argument(f"--{size}", type=_positive, metavar="N", help=meaning)
    return options


def parse(
    options: argparse.ArgumentParser, argv: Sequence[str] | None, *, full: Sizes, quick: Sizes
) -> argparse.Namespace:
    """Read the command line; sizes that it does not name come from `full`, or with --quick from `quick`."""
    args = options.parse_args(argv)
    for size in _MEANING:
        if getattr(args, size) is None:
            setattr(args, size, getattr(quick if args.quick else full, size))
    return args


def load(model: str | None, dtype: str) -> tuple[PreTrainedModel, Any]:
    """The target and its tokenizer; `None` stands for the demo model."""
    transformers.utils.logging.disable_progress_bar()
    source = model or demo_model()
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise SystemExit(f"{source} has no tokenizer; a benchmark needs one for its prompts")
    # On the CPU unless torch sees an accelerator, as specgen itself loads it.
    return load_model(source, dtype=dtype, device=None).eval(), tokenizer


def read_prompts(path: Path, tokenizer: Any, limit: int | None = None) -> list[Prompt]:
    """The first turn of each line, through the chat template if there is one; `limit` takes a spread of them.

    Spec-Bench's own files can be read too: their id is called question_id.
    """
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    prompts = [
        Prompt(str(line.get("id", line.get("question_id"))), line["category"], _encode(line["turns"][0], tokenizer))
        for line in lines
    ]
    return spread(prompts, limit) if limit else prompts


def spread(prompts: Sequence[Prompt], limit: int) -> list[Prompt]:
    """The first `limit` prompts, taken in turns from the repeat group and from the rest, one category after another."""
    repeat = by_turns([p for p in prompts if p.category in REPEAT], lambda p: p.category)
    others = by_turns([p for p in prompts if p.category not in REPEAT], lambda p: p.category)
    halves = [("repeat", p) for p in repeat] + [("others", p) for p in others]
    return [prompt for _, prompt in by_turns(halves, lambda pair: pair[0])][:limit]


def interleave(
    runs: Mapping[str, Callable[[Prompt], T | None]], prompts: Sequence[Prompt], rounds: int
) -> list[Sample[T]]:
    """Let every system answer a prompt before the next prompt comes, so that a machine's moods meet all of them.

    Who begins changes from prompt to prompt. A run that answers `None` sat this prompt out. Before the first round each
    system answers one prompt unmeasured, of the repeat group if there is one, so that drafting is warm too.
    """
    for run in runs.values():
        run(spread(prompts, 1)[0])
    work = list(_turns(list(runs), prompts, rounds))
    samples = []
    for number, system, prompt in track(work, "running", console=_console, transient=True):
        if (done := runs[system](prompt)) is not None:
            samples.append(Sample(number, system, prompt, done))
    return samples


def middle(values: Sequence[float | None]) -> float | None:
    """The median of the values that are there; `None` without any."""
    known = [value for value in values if value is not None]
    return median(known) if known else None


def environment() -> dict[str, Any]:
    """What a reader has to know about the machine and the versions to judge the numbers."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "specgen": specgen.__version__,
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def settings(args: argparse.Namespace, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The options that shape the numbers; files by name only, since folders mean nothing elsewhere."""
    return {
        "model": Path(args.model or demo_model()).name,
        "dtype": args.dtype,
        "prompts": args.prompts.name,
        "prompt_count": len(prompts),
        "tokens": args.tokens,
        "rounds": args.rounds,
        "quick": args.quick,
    }


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; the first column names the row, floats get two digits, `None` a dash."""
    shown = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        shown.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        shown.add_row(*map(_cell, row))
    _console.print(shown)


def save(path: Path, benchmark: str, bars: Mapping[str, float | None], **rest: Any) -> None:
    """Write the JSON: `bars` maps flat names to numbers, those without a value are left out; `rest` is as given."""
    numbers = {name: round(value, 4) for name, value in bars.items() if value is not None}
    content = {"benchmark": benchmark, "bars": numbers, "environment": environment(), **rest}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _console.print(f"written: {path}", soft_wrap=True)


def plot(path: Path, title: str, label: str, series: Mapping[str, Mapping[str, float | None]]) -> None:
    """Draw one group of bars for each key of the inner mappings, one bar in it for each of the outer."""
    try:
        import matplotlib as mpl
    except ImportError:
        _console.print("no plot: it needs matplotlib (pip install 'specgen-llm[bench]')")
        return
    mpl.use("Agg")
    from matplotlib import pyplot

    groups = list(dict.fromkeys(group for values in series.values() for group in values))
    figure, axes = pyplot.subplots(figsize=(max(6.0, 1.1 * len(groups)), 4.5), layout="constrained")
    width = 0.85 / max(1, len(series))
    for number, (name, values) in enumerate(series.items()):
        places = [place + (number - (len(series) - 1) / 2) * width for place in range(len(groups))]
        axes.bar(places, [values.get(group) or 0.0 for group in groups], width, label=name)
    axes.set_xticks(range(len(groups)), groups, rotation=30, ha="right")
    axes.set(title=title, ylabel=label)
    axes.margins(y=0.25)  # room for the legend
    axes.legend(fontsize="small", ncols=3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    _console.print(f"written: {path}", soft_wrap=True)


def _turns(systems: Sequence[str], prompts: Sequence[Prompt], rounds: int) -> Iterator[tuple[int, str, Prompt]]:
    for number in range(rounds):
        for place, prompt in enumerate(prompts):
            first = (number + place) % len(systems)
            for system in (*systems[first:], *systems[:first]):
                yield number, system, prompt


def by_turns(items: Sequence[T], key: Callable[[T], K]) -> list[T]:
    """The items of each key in turns: all first ones, then all second ones."""
    seen: dict[K, int] = {}
    turns = []
    for item in items:
        turns.append((seen.setdefault(key(item), 0), item))
        seen[key(item)] += 1
    return [item for _, item in sorted(turns, key=lambda pair: pair[0])]


def _encode(text: str, tokenizer: Any) -> tuple[int, ...]:
    if getattr(tokenizer, "chat_template", None) is None:
        return tuple(tokenizer(text)["input_ids"])
    messages = [{"role": "user", "content": text}]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return tuple(encoded["input_ids"])


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The checkout's commit, with a plus where files differ from it; `None` outside a checkout."""
    try:
        head, changes = (
            subprocess.run(["git", *command], cwd=_ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changes else "")
