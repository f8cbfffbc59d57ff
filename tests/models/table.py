"""The table of architectures in docs/models.md: `python -m tests.models.table` prints it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

from specgen.errors import UnsupportedModel
from specgen.model.architecture import Architecture
from specgen.model.batch import Reach
from specgen.model.target import Target
from tests.models.tiny import MODELS, build

START = "<!-- architectures -->"
END = "<!-- /architectures -->"
# What a message says behind the reason itself.
_AFTERTHOUGHT = re.compile(r"(, which |, so that |, not through |: its state | by [0-9.]+%).*")
_HEAD = ("| model type | how | layers, or why not |", "|---|---|---|")


def markdown() -> str:
    """One line per model of `tests.models.tiny`: those that are exact, then those that are refused."""
    lines = [line for name in MODELS for line in _line(name)]
    return "\n".join((*_HEAD, *sorted(lines, key=lambda line: "| refused |" in line)))


def _line(name: str) -> Iterator[str]:
    model = build(name)
    try:
        target = Target(model, kv_tokens=64)
    except UnsupportedModel as refusal:
        reason = str(refusal).removeprefix(f"model type {model.config.model_type!r}: ").rpartition("; ")[0]
        yield f"| {name} | refused | {_AFTERTHOUGHT.sub('', reason)} |"
    else:
        yield f"| {name} | {target.seam.value} | {_layers(target.architecture)} |"


def _layers(architecture: Architecture) -> str:
    kinds = sorted({_kind(reach) for reach in architecture.reaches})
    stored = [store for store in architecture.stores if store is not None]
    return ", ".join(kinds) + (", some share KV" if len(set(stored)) < len(stored) else "")


def _kind(reach: Reach) -> str:
    if reach.window is not None:
        return "sliding"
    return "full" if reach.chunk is None else "chunked"


if __name__ == "__main__":
    sys.stdout.write(markdown() + "\n")
