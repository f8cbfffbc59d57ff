"""Does drafting change a text, in the precision that people use? And what does it cost that it does not?

Every prompt is answered plainly and alone, then with drafting: alone and among eight others, with its beginning read
and found in the prefix cache, greedy and with a seed. The tokens must be the same. Beside it plain torch, whose rows
round differently in company: how many of its texts stay the same there, and how near the two best tokens were where a
text first parted.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks import harness
from benchmarks.harness import Prompt, Sizes
from specgen import Engine
from specgen.model.profiling import row_seconds

FULL = Sizes(tokens=128, rounds=5)
QUICK = Sizes(tokens=12, rounds=1, limit=3)

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.8, "top_p": 0.95, "seed": 7},
}
COMPILED, EAGER, TORCH = "compiled", "eager", "plain torch"
_TOGETHER = 9
_KV_TOKENS = 16384
# Plain torch is slow, and its share needs no more.
_TORCH_PROMPTS = 16
_ROWS = (1, 8, 32, 512)

Ids = tuple[int, ...]


@dataclass(slots=True)
class Found:
    """Texts that were compared: by system, setting and way, whether each was that of the plain run."""

    same: dict[tuple[str, str, str], list[bool]] = field(default_factory=dict)
    margins: list[float] = field(default_factory=list)
    costs: dict[str, float] = field(default_factory=dict)

    def share(self, system: str) -> float | None:
        """Of all texts of a system, those that did not change."""
        every = [same for (name, _, _), texts in self.same.items() if name == system for same in texts]
        return sum(every) / len(every) if every else None


class Writer:
    """Lets one engine answer all prompts in the ways that should not matter."""

    def __init__(self, engine: Engine, prompts: Sequence[Prompt], tokens: int) -> None:
        self.engine = engine
        self.prompts = [list(prompt.ids) for prompt in prompts]
        self.tokens = tokens
        self._salts = count()

    def plain(self, setting: Mapping[str, Any]) -> list[Ids]:
        """Alone, without drafts."""
        return self._alone({**setting, "speculation": "off"}, self._salt())

    def ways(self, setting: Mapping[str, Any], *, few: bool) -> dict[str, list[Ids]]:
        """With drafts; `few` leaves it at the simplest way."""
        salt = self._salt()
        drafting = {**setting, "speculation": "auto"}
        texts = {"alone, cold": self._alone(drafting, salt)}
        if not few:
            texts["alone, warm"] = self._alone(drafting, salt)
            salt = self._salt()
            texts["among others, cold"] = self._together(drafting, salt)
            texts["among others, warm"] = self._together(drafting, salt)
        return texts

    def _salt(self) -> str:
        """A tenant whose prompts nobody has read yet."""
        return f"tenant-{next(self._salts)}"

    def _alone(self, setting: Mapping[str, Any], salt: str) -> list[Ids]:
        return [
            self.engine.generate(ids, max_tokens=self.tokens, cache_salt=salt, **setting).ids for ids in self.prompts
        ]

    def _together(self, setting: Mapping[str, Any], salt: str) -> list[Ids]:
        results = self.engine.generate(self.prompts, max_tokens=self.tokens, cache_salt=salt, **setting)
        return [result.ids for result in results]


@torch.inference_mode()
def margin(model: PreTrainedModel, prompt: Sequence[int], one: Ids, other: Ids) -> float:
    """How far the best token lies above the second, in logits, where two texts part."""
    place = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    logits = model(input_ids=torch.tensor([[*prompt, *one[:place]]])).logits[0, -1].float()
    best, second = logits.topk(2).values.tolist()
    return float(best - second)


def compare(
    found: Found, system: str, engine: Engine, model: PreTrainedModel, prompts: Sequence[Prompt], tokens: int
) -> None:
    """All ways of a system against its plain run."""
    few = system == TORCH
    writer = Writer(engine, prompts[:_TORCH_PROMPTS] if few else prompts, tokens)
    for name, setting in SETTINGS.items():
        if few and name != "greedy":
            continue
        plain = writer.plain(setting)
        for way, texts in writer.ways(setting, few=few).items():
            found.same[system, name, way] = [a == b for a, b in zip(plain, texts, strict=True)]
            if few:
                found.margins += [
                    margin(model, ids, a, b) for ids, a, b in zip(writer.prompts, plain, texts, strict=True) if a != b
                ]


def cost(engine: Engine, other: Engine, rows: int, rounds: int) -> float:
    """Seconds of a forward over another engine's, the median over rounds of both in turns."""
    pairs = [(row_seconds(engine.target.current, rows), row_seconds(other.target.current, rows)) for _ in range(rounds)]
    return median(a / b for a, b in pairs)


def measure(args: argparse.Namespace) -> Found:
    """Compare texts, then time forwards."""
    model, tokenizer = harness.load(args.model, args.dtype)
    prompts = harness.read_prompts(args.prompts, tokenizer, args.limit)
    found = Found()
    common = {"kv_tokens": _KV_TOKENS, "max_num_seqs": _TOGETHER}
    with ExitStack() as stack:

        def engine(**options: Any) -> Engine:
            return stack.enter_context(Engine(model, tokenizer, **common, **options))

        eager = engine(batch_invariant=True)
        compiled = engine(batch_invariant=True, compile=True)
        torch_only = engine(batch_invariant=False, cpu_kernels=False)
        system, quick = (COMPILED, compiled) if compiled.target.compiled else (EAGER, eager)
        compare(found, system, quick, model, prompts, args.tokens)
        compare(found, TORCH, torch_only, model, prompts, args.tokens)
        careless, careful = engine(batch_invariant=False), engine(batch_invariant=True, cpu_kernels=False)
        for rows in _ROWS:
            found.costs[f"{EAGER}, {rows} rows"] = cost(eager, careless, rows, args.rounds) - 1
            found.costs[f"{TORCH}, {rows} rows"] = cost(careful, torch_only, rows, args.rounds) - 1
    return found


def headline(found: Found) -> dict[str, float | None]:
    """The bars."""
    ours = next(system for system, _, _ in found.same if system != TORCH)
    return {
        "invariant_identical": found.share(ours),
        "invariant_cost": median(value for name, value in found.costs.items() if name.startswith(EAGER)),
        "torch_identical": found.share(TORCH),
        "torch_invariant_cost": median(value for name, value in found.costs.items() if name.startswith(TORCH)),
        "torch_margin_where_texts_part": median(found.margins) if found.margins else None,
    }


def show(found: Found, bars: Mapping[str, float | None]) -> None:
    """Print the tables."""
    lines = [[*key, f"{sum(same)} of {len(same)}"] for key, same in found.same.items()]
    harness.table("texts that drafting did not change", ["system", "setting", "drafting", "same"], lines)
    costs = [[name, f"{100 * value:+.1f}%"] for name, value in found.costs.items()]
    harness.table("what invariance costs a forward", ["", "time"], costs)
    harness.table("bars", ["", "value"], [[name, None if v is None else f"{v:.4f}"] for name, v in bars.items()])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    args = harness.parse(harness.parser("invariance", __doc__), argv, full=FULL, quick=QUICK)
    found = measure(args)
    bars = headline(found)
    show(found, bars)
    if args.json:
        texts = [{"system": s, "setting": k, "way": w, "same": same} for (s, k, w), same in found.same.items()]
        harness.save(args.json, "invariance", bars, settings=harness.settings(args, []), texts=texts, costs=found.costs)
        series: dict[str, dict[str, float | None]] = {}
        for (system, setting, way), same in found.same.items():
            series.setdefault(system, {})[f"{setting}, {way}"] = sum(same) / len(same)
        harness.plot(args.json.with_suffix(".png"), "invariance: texts that stay the same", "share", series)


if __name__ == "__main__":
    main()
