"""Programs in processes of their own: installing peers, starting adapters, asking them."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from benchmarks.decode import Run
from benchmarks.harness import Prompt
from benchmarks.peers import serve

ADAPTERS = Path(__file__).with_name("adapters")
OWN = Path(__file__).with_name("own")
_ROOT = Path(__file__).parents[2]
# Loading a model, a compiler's first run; an answer that takes longer will not come.
_PATIENCE = 600.0
# A peer's threads may spin on for a while after its answer, and would slow whoever comes next.
_SETTLE = 0.25


class PeerFailed(Exception):
    """A peer is not there, did not start or did not answer; the message says why."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A program that can be asked: how it is called, its adapter, the python that runs it, its settings."""

    name: str
    path: Path
    python: Path
    home: Path
    one: tuple[str, ...]
    many: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def systems(self) -> list[str]:
        """Its settings under the names that they have in the table."""
        return [f"{self.name} {setting}" for setting in dict.fromkeys([*self.one, *self.many])]

    def command(self, model: Path) -> list[str]:
        """Without options it prepares, with them it serves."""
        return [str(self.python), "-P", str(Path(serve.__file__)), str(self.path), str(model), str(self.home)]


def own() -> list[Adapter]:
    """specgen and transformers, in this environment. In processes too: OpenMP teams of one process slow each other."""
    here = Path(sys.executable)

    def read(name: str, stem: str, **options: Any) -> Adapter:
        path = OWN / f"{stem}.py"
        module = serve.adapter(path)
        return Adapter(name, path, here, here.parent, module.ONE, module.MANY, options)

    return [
        read("specgen eager", "specgen", compile=False),
        read("specgen compiled", "specgen", compile=True),
        read("transformers", "transformers"),
    ]


def peers(folder: Path) -> list[Adapter]:
    """All peers that there is an adapter for, whether they are installed in the folder or not."""
    found = []
    for path in sorted(ADAPTERS.glob("*.py")):
        module = serve.adapter(path)
        home = folder / path.stem
        found.append(Adapter(path.stem, path, home / "bin" / "python", home, module.ONE, module.MANY))
    return found


def install(peer: Adapter, model: Path) -> None:
    """Make the peer's environment and what its adapter prepares from the model. What is there stays."""
    if not peer.python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(peer.home)], check=True)
    for arguments in serve.adapter(peer.path).PIP:
        subprocess.run([str(peer.python), "-m", "pip", "install", *arguments], check=True)
    subprocess.run(peer.command(model), check=True)


class Process:
    """A running adapter. Raises PeerFailed from its start on when it is absent or fails."""

    def __init__(self, adapter: Adapter, model: Path, options: Mapping[str, Any]) -> None:
        if not adapter.python.exists():
            raise PeerFailed(f"not installed: python -m benchmarks.peers --install {adapter.name}")
        # Read when it has failed.
        self._log = TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [*adapter.command(model), json.dumps({**options, **adapter.options})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            encoding="utf-8",
            env={**os.environ, "OMP_NUM_THREADS": str(options["threads"]), "PYTHONPATH": str(_ROOT)},
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        try:
            self._next()
        except PeerFailed:
            self.close()
            raise

    def one(self, tokens: int, setting: str, prompt: Prompt) -> Run:
        """Continue one prompt."""
        answer = self._ask([prompt], tokens, setting)
        (ids,), (first,), (early,) = answer["ids"], answer["first"], answer["early"]
        return Run(tuple(ids), first, answer["seconds"], early, steps=0, forwards=0)

    def many(self, tokens: int, setting: str, prompts: Sequence[Prompt]) -> Run:
        """Continue prompts at the same time; the ids of all, one after another."""
        answer = self._ask(prompts, tokens, setting)
        ids = tuple(token for row in answer["ids"] for token in row)
        return Run(ids, min(answer["first"]), answer["seconds"], sum(answer["early"]), steps=0, forwards=0)

    def close(self) -> None:
        """End the adapter."""
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, prompts: Sequence[Prompt], tokens: int, setting: str) -> dict[str, Any]:
        question = {"prompts": [prompt.ids for prompt in prompts], "max_tokens": tokens, "setting": setting}
        try:
            if self._process.stdin:
                self._process.stdin.write(json.dumps(question) + "\n")
                self._process.stdin.flush()
        except OSError:
            raise PeerFailed(self._last_words()) from None
        answer = self._next()
        time.sleep(_SETTLE)
        if not all(answer["ids"]):
            raise PeerFailed("it answered without tokens")
        return answer

    def _next(self) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=_PATIENCE)
        except queue.Empty:
            self._process.kill()
            raise PeerFailed(f"no answer within {_PATIENCE:.0f} s") from None
        if line is None:
            raise PeerFailed(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerFailed(answer["error"])
        return answer

    def _listen(self) -> None:
        if self._process.stdout:
            for line in self._process.stdout:
                self._lines.put(line)
        self._lines.put(None)

    def _last_words(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return f"ended with {code}: {lines[-1]}" if lines else f"ended with {code}"
