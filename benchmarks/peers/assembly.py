"""Which systems run: those that are asked for, are there, and do not fail."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode import Run
from benchmarks.harness import Prompt
from benchmarks.peers import foreign
from benchmarks.peers.foreign import Adapter, PeerFailed
from specgen.types import MAX_TREE_NODES

Call = Callable[[Prompt], Run]
# Plenty for one stream; and a tree with its root at the end of each sequence, and the rest of a page.
_KV_TOKENS = 8192
_ROOM = MAX_TREE_NODES + 65


@dataclass(frozen=True, slots=True)
class System:
    """A way to generate: `one` prompt, `many` at the same time. `None` where it has no such way."""

    one: Call | None
    many: Callable[[Sequence[Prompt]], Run] | None


def adapters(folder: Path) -> list[Adapter]:
    """All that can be asked, in the table's order."""
    return [*foreign.own(), *foreign.peers(folder)]


def means(wanted: str, name: str) -> bool:
    """Whether a user who writes `wanted` means the system: its name, or the first words of it."""
    return f"{name} ".startswith(f"{wanted} ")


def options(args: argparse.Namespace, prompts: Sequence[Prompt], batches: Sequence[Sequence[Prompt]]) -> dict[str, Any]:
    """What adapters are told when they start."""
    needs = (sum(len(prompt.ids) + args.tokens + _ROOM for prompt in batch) for batch in batches)
    return {
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "tokens": args.tokens,
        "longest": max(len(prompt.ids) for prompt in [*prompts, *(p for batch in batches for p in batch)]),
        "streams": max([1, *map(len, batches)]),
        "kv_tokens": max([_KV_TOKENS, *needs]),
        "draft_model": args.draft_model,
        "drafters": {"eagle": {"path": str(args.head)}, "recycling": {}, "suffix": {}} if args.head else None,
    }


def assemble(
    args: argparse.Namespace, model: Path, told: dict[str, Any], skipped: dict[str, str], stack: ExitStack
) -> dict[str, System]:
    """The systems. Reasons of those that are not there go to `skipped`; `stack` ends all."""
    systems: dict[str, System] = {}
    for adapter in adapters(args.peers):
        names = [name for name in adapter.systems if _asked(args, name)]
        if not names:
            continue
        try:
            process = foreign.Process(adapter, model, told)
        except PeerFailed as error:
            skipped |= {name: str(error) for name in names}
            continue
        stack.callback(process.close)
        systems |= {name: system for name, system in _systems(adapter, process, args.tokens) if name in names}
    return systems


def guard(name: str, run: Call, skipped: dict[str, str]) -> Callable[[Prompt], Run | None]:
    """A run that notes its first failure and from then on sits everything out."""

    def guarded(prompt: Prompt) -> Run | None:
        if name not in skipped:
            try:
                return run(prompt)
            except PeerFailed as error:
                skipped[name] = str(error)
        return None

    return guarded


def _asked(args: argparse.Namespace, name: str) -> bool:
    if name == "transformers assisted" and not args.draft_model:
        return False
    return args.systems is None or any(means(wanted, name) for wanted in args.systems)


def _systems(adapter: Adapter, process: foreign.Process, tokens: int) -> Iterator[tuple[str, System]]:
    for name in adapter.systems:
        setting = name.removeprefix(f"{adapter.name} ")
        one = partial(process.one, tokens, setting) if setting in adapter.one else None
        many = partial(process.many, tokens, setting) if setting in adapter.many else None
        yield name, System(one, many)
