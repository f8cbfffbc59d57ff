"""Runs one adapter in the environment of its peer, where neither specgen nor the other benchmarks are installed.

    python -P serve.py ADAPTER MODEL HOME           # what an installation needs beside packages
    python -P serve.py ADAPTER MODEL HOME OPTIONS   # JSON lines: a question in, an answer out

`-P` keeps the folder of this file off the path, where an adapter would hide the package that it is named after.
OPTIONS is a JSON object: threads, dtype, tokens, and what else `assembly` says.
Question: {"prompts": [[id, ...], ...], "max_tokens": n, "setting": "lookup 10"}. Answer, a list item per prompt:
{"ids": [[id, ...], ...], "first": [seconds, ...], "early": [how many came first, ...], "seconds": to the last token},
or {"error": "..."}. The first line says {"ready": true} or {"error": "..."}.

An adapter has PIP (what pip is to install, call by call), ONE and MANY (settings for single prompts and for batches;
"plain" is without drafting), `prepare(model, home)` and `Peer(model, home, options)` with a method
`run(prompts, tokens, setting, clock)`. It imports its peer only inside of them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


class Clock:
    """Notes the tokens of each prompt as they arrive, by the time since the question."""

    def __init__(self, prompts: int) -> None:
        self.ids: list[list[int]] = [[] for _ in range(prompts)]
        self.first = [0.0] * prompts
        self.early = [0] * prompts
        self.seconds = 0.0
        self._started = time.perf_counter()

    def note(self, prompt: int, ids: Sequence[int]) -> None:
        """These tokens came now."""
        if not ids:
            return
        self.seconds = time.perf_counter() - self._started
        if not self.ids[prompt]:
            self.first[prompt], self.early[prompt] = self.seconds, len(ids)
        self.ids[prompt] += ids

    def answer(self) -> dict[str, Any]:
        """All that came."""
        return {"ids": self.ids, "first": self.first, "early": self.early, "seconds": self.seconds}


def adapter(path: Path) -> ModuleType:
    """The adapter's module."""
    spec = importlib.util.spec_from_file_location(f"adapter_of_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answer(peer: Any, question: dict[str, Any]) -> dict[str, Any]:
    """Let the peer generate; an error of its own becomes the answer."""
    prompts = question["prompts"]
    clock = Clock(len(prompts))
    try:
        peer.run(prompts, question["max_tokens"], question["setting"], clock)
    except Exception as error:
        return failure(error)
    return clock.answer()


def failure(error: Exception) -> dict[str, Any]:
    """An error in one line."""
    return {"error": " ".join(f"{type(error).__name__}: {error}".split())}


def main(path: str, model: str, home: str, options: str | None = None) -> None:
    """Prepare, or answer until nobody asks any more."""
    module = adapter(Path(path))
    if options is None:
        module.prepare(Path(model), Path(home))
        return
    # Libraries print what they like; the answers keep a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(line: dict[str, Any]) -> None:
        answers.write(json.dumps(line) + "\n")
        answers.flush()

    try:
        peer = module.Peer(Path(model), Path(home), json.loads(options))
    except Exception as error:
        say(failure(error))
        return
    say({"ready": True})
    for line in sys.stdin:
        say(answer(peer, json.loads(line)))


if __name__ == "__main__":
    main(*sys.argv[1:])
