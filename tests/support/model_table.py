"""The table of architectures in docs/models.md: `python -m tests.support.model_table` prints it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from specgen.errors import UnsupportedModel
from specgen.model.attention.reach import Reach
from specgen.model.checks.architecture import Architecture
from specgen.model.runner import ModelRunner, load_runner
from tests.support.tiny import MODELS, build

START = "<!-- architectures -->"
END = "<!-- /architectures -->"
# What a message says behind the reason itself.
_AFTERTHOUGHT = re.compile(r"(, which |, so that |, not through |: its state | by [0-9.]+%).*")
_HEAD = ("| model type | how | layers, or why not |", "|---|---|---|")


def markdown() -> str:
    """One line per model of `tests.support.tiny`: those that are exact, then those that are refused."""
    return "\n".join((*_HEAD, *sorted(map(_line, MODELS), key=lambda line: "| refused |" in line)))


def listed() -> dict[str, str]:
    """The lines of docs/models.md by the name that they begin with, as they stand there."""
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    lines = text.partition(START)[2].partition(END)[0].strip().splitlines()
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines[len(_HEAD) :]}


def exact(name: str, target: ModelRunner) -> str:
    """The line of a model that a target carries."""
    return f"| {name} | {target.packed.backend.route} | {_layers(target.architecture)} |"


def refused(name: str, refusal: UnsupportedModel) -> str:
    """The line of a model that was refused."""
    reason = str(refusal).partition(": ")[2].rpartition("; ")[0]
    return f"| {name} | refused | {_AFTERTHOUGHT.sub('', reason)} |"


def _line(name: str) -> str:
    try:
        return exact(name, load_runner(build(name), kv_tokens=64))
    except UnsupportedModel as refusal:
        return refused(name, refusal)


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
