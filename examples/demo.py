"""Ten prompts, each answered three times: by transformers alone, by specgen without drafting, by specgen with drafting.

All texts must be the same, token for token; the exit code is 1 if any is not. Run it with `make demo`.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import specgen
from specgen.demo_model import demo_model

MAX_TOKENS = 72
HEAD = Path(__file__).parents[1] / "adapters" / "smollm2-135m-instruct-eagle"
DRAFTERS: dict[str, Any] = {"prompt-lookup": {}, "recycling": {}, "eagle": {"path": HEAD}}
CODE = """def area(width, height):
    if width < 0 or height < 0:
        raise ValueError("sizes must not be negative")
    result = width * height
    return result"""
RECORD = '{"name": "Ada Lovelace", "born": 1815, "city": "London", "languages": ["English", "French"]}'
NOTES = """The meeting began at nine. Anna presented the budget for next year. Ben asked for two new servers.
The group agreed to buy one server now and one in June. The next meeting is on 14 March."""
WEEK = "- Monday: bread and butter\n- Tuesday: bread and cheese\n- Wednesday: bread and honey"
GREEDY: dict[str, Any] = {"temperature": 0.0}
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "seed": 7}
PROMPTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("chat", "What should I see in Rome in one day?", GREEDY),
    ("writing", "Write the beginning of a story about a lighthouse keeper.", GREEDY),
    ("extraction", f"List every name and date in this text.\n\n{NOTES}", GREEDY),
    ("summary", f"Summarise this text in two sentences.\n\n{NOTES}", GREEDY),
    ("code edit", f"Rename `result` to `product` and print the whole function again.\n\n{CODE}", GREEDY),
    ("JSON", f"Print this JSON again with one key per line.\n\n{RECORD}", GREEDY),
    ("translation", "Translate each word to French and repeat it: one, two, three, four, five, six.", GREEDY),
    ("math", "Write the multiplication table of 7, from 7 x 1 = 7 to 7 x 12 = 84, one line each.", GREEDY),
    ("list", f"Repeat this list, then add three more lines in the same style:\n{WEEK}", GREEDY),
    ("sampled", f"Explain what this code does, line by line.\n\n{CODE}", SAMPLED),
)
console = Console(highlight=False)


@dataclass(frozen=True)
class Run:
    """One prompt's outcome; `off` and `on` are tokens per second, `length` is the acceptance length."""

    kind: str
    identical: bool
    off: float
    on: float
    length: float


def by_transformers(model: Any, tokenizer: Any, messages: list[Any]) -> tuple[int, ...]:
    """The ids of `model.generate`: specgen has no part in it."""
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
    return tuple(output[0, inputs["input_ids"].shape[1] :].tolist())


def timed(engine: specgen.Engine, messages: list[Any], **options: Any) -> tuple[specgen.Result, float]:
    """The engine's answer, and the tokens per second after its first output: reading the prompt is not counted."""
    stream = engine.stream(messages, max_tokens=MAX_TOKENS, **options)
    first, started = next(stream), time.perf_counter()
    result = stream.results()[0]
    return result, (len(result.ids) - len(first.tokens)) / (time.perf_counter() - started)


def run(engine: specgen.Engine, kind: str, prompt: str, options: dict[str, Any]) -> Run:
    """Answer one prompt in every way and print what came out."""
    messages = [{"role": "user", "content": prompt}]
    off, off_rate = timed(engine, messages, speculation="off", **options)
    on, on_rate = timed(engine, messages, **options)
    identical, compared = on.ids == off.ids, "off = on; transformers draws other random numbers"
    if options is GREEDY:
        reference = by_transformers(engine.target.model, engine.tokenizer, messages)
        identical, compared = identical and on.ids == reference, "transformers = off = on"
    length = on.stats.mean_acceptance_length
    console.rule(kind, align="left", style="dim")
    console.print(f"> {shortened(prompt, 150)}", style="dim", markup=False)
    console.print(shortened(on.text, 300), markup=False)
    rates = f"off {off_rate:.1f} tokens/s, on {on_rate:.1f} tokens/s"
    console.print(f"{len(on.ids)} tokens; {rates}; acceptance length {length:.2f}", style="bold")
    console.print(f"identical: {'yes' if identical else 'NO'} ({compared})", style="green" if identical else "bold red")
    return Run(kind, identical, off_rate, on_rate, length)


def shortened(text: str, most: int) -> str:
    """`text`, cut where it is longer than `most`."""
    return text if len(text) <= most else f"{text[:most]} ..."


def summary(runs: list[Run]) -> Table:
    """All runs as a table."""
    table = Table("prompt", "off", "on", "on/off", "acceptance length", "identical", title="tokens per second")
    for each in runs:
        figures = (f"{each.off:.1f}", f"{each.on:.1f}", f"{each.on / each.off:.2f}", f"{each.length:.2f}")
        table.add_row(each.kind, *figures, "yes" if each.identical else "NO")
    return table


def main() -> int:
    """Run all prompts; 1 if a text differs."""
    path = demo_model()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with specgen.wrap(model, AutoTokenizer.from_pretrained(path), drafters=DRAFTERS) as engine:
        timed(engine, [{"role": "user", "content": "Hello"}])  # the first run of anything is slower
        runs = [run(engine, *prompt) for prompt in PROMPTS]
    console.print(summary(runs))
    console.print("Next: `specgen chat`, `specgen generate --help`, the other files in examples/, README.md.")
    return 0 if all(each.identical for each in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
