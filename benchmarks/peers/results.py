"""What is read off the runs: bars, the table, the plot's series. A batch is a prompt here, each size a category."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from benchmarks import harness
from benchmarks.decode import Results, Run, categories, rate, whole_rate

CHAT = "chat"
EAGER_OFF, EAGER_ON = "specgen eager off", "specgen eager on"
COMPILED_OFF, COMPILED_ON = "specgen compiled off", "specgen compiled on"
HF = "transformers generate"
Figure = Callable[[Run], float | None]


def batch_name(size: int) -> str:
    """The category of batches of a size."""
    return f"batch {size}"


def headline(one: Results, many: Results, peers: Sequence[str]) -> dict[str, float | None]:
    """The bars: each a median over categories, ours over theirs."""
    on, off = ours(one, COMPILED_ON, EAGER_ON), ours(one, COMPILED_OFF, EAGER_OFF)
    bars = {
        "vs_hf_generate": typical(one, on, [HF], rate),
        "vs_best_hf": typical(one, on, _of("transformers", one), rate),
        "off_vs_hf_generate": typical(one, off, [HF], rate),
        "on_vs_off": typical(one, on, [off], rate),
        "on_vs_off_chat": quickest(one.within([CHAT]), on, [off], rate),
    }
    for peer in peers:
        bars[f"vs_{peer}"] = typical(one, on, _of(peer, one), rate)
        bars[f"off_vs_{peer}"] = typical(one, off, [f"{peer} plain"], rate)
        for category in categories(one):
            bars[f"vs_{peer}_{category}"] = quickest(one.within([category]), on, _of(peer, one), rate)
    for category in categories(many):
        bars |= _batch_bars(many.within([category]), category.replace(" ", ""), peers)
    return bars


def ours(results: Results, compiled: str, eager: str) -> str:
    """The compiled system if it ran."""
    return compiled if compiled in results.systems else eager


def typical(results: Results, system: str, rivals: Sequence[str], of: Figure) -> float | None:
    """The median over categories of a system's figure over the best that a rival reaches in each."""
    return harness.middle([quickest(results.within([c]), system, rivals, of) for c in categories(results)])


def quickest(results: Results, system: str, rivals: Sequence[str], of: Figure) -> float | None:
    """A system's figure over the best rival's, the one that leaves least of the ratio."""
    ratios = [results.ratio(system, rival, of) for rival in rivals]
    return min((ratio for ratio in ratios if ratio is not None), default=None)


def show(one: Results, many: Results, skipped: Mapping[str, str], bars: Mapping[str, float | None]) -> None:
    """Print the table, what is not in it and why, and the bars."""
    parts = [one.within([c]) for c in categories(one)]
    systems = list(dict.fromkeys([*one.systems, *many.systems]))
    columns = ["tokens/s", *categories(one), "x generate", "first ms", "= plain", *categories(many)]
    rows = [
        [
            system,
            *(part.value(system, rate) for part in parts),
            typical(one, system, [HF], rate),
            _milliseconds(one, system),
            one.same((system,), _plain(system)),
            *(many.within([c]).value(system, whole_rate) for c in categories(many)),
        ]
        for system in systems
    ]
    harness.table("tokens/s after the first; of whole batches, all tokens over all seconds", columns, rows)
    if skipped:
        harness.table("not in the table", ["", "why"], [[name, reason[:120]] for name, reason in skipped.items()])
    harness.table("bars", ["", "value"], [bar for bar in bars.items() if bar[1] is not None])


def series(one: Results, many: Results) -> dict[str, dict[str, float | None]]:
    """What is plotted: each system's tokens per second by category and batch."""
    return {
        system: {
            **{c: one.within([c]).value(system, rate) for c in categories(one)},
            **{c: many.within([c]).value(system, whole_rate) for c in categories(many)},
        }
        for system in dict.fromkeys([*one.systems, *many.systems])
    }


def _batch_bars(results: Results, name: str, peers: Sequence[str]) -> dict[str, float | None]:
    on, off = ours(results, COMPILED_ON, EAGER_ON), ours(results, COMPILED_OFF, EAGER_OFF)
    rivals = {"hf": "transformers", **{peer: peer for peer in peers}}
    return {
        f"{name}_on_vs_off": results.ratio(on, off, whole_rate),
        **{
            f"{name}_vs_{short}": quickest(results, on, _of(rival, results), whole_rate)
            for short, rival in rivals.items()
        },
    }


def _of(family: str, results: Results) -> list[str]:
    return [system for system in results.systems if system.startswith(f"{family} ")]


def _plain(system: str) -> str:
    """The run without drafting whose text a system ought to keep."""
    family = system.split(" ", maxsplit=1)[0]
    if family == "specgen":
        return system.replace(" on", " off")
    return HF if family == "transformers" else f"{family} plain"


def _milliseconds(results: Results, system: str) -> float | None:
    first = results.value(system, lambda run: run.first)
    return None if first is None else 1000 * first
