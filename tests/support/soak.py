"""A server under clients who ask, read and leave for as long as one likes: `python -m tests.support.soak 600`.

Every answer is compared with what the engine says alone; memory, descriptors and pages must stay where they were.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from aiohttp import ClientSession

from specgen import Chat, Engine
from tests.support.adapters import save_adapter
from tests.support.servers import SCHEMA, World, engine, model, serving, until

CLIENTS = 32
ABORTED = 0.2
QUESTIONS = 48
WARM = 0.3
"""The share of the time after which memory is first looked at."""


@dataclass(slots=True)
class Findings:
    """What a soak saw. memory: when warm and at the end; descriptors: before the first client and behind the last."""

    answers: int = 0
    aborted: int = 0
    swapped: int = 0
    wrong: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    def look(self) -> None:
        """Note how much memory this process holds."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.memory.append(pages * os.sysconf("SC_PAGE_SIZE"))

    def count(self) -> None:
        """Note how many files this process has open."""
        self.descriptors.append(len(os.listdir("/proc/self/fd")))

    def __str__(self) -> str:
        grown = (self.memory[-1] - self.memory[0]) / 2**20
        return (
            f"{self.answers} answers, {self.aborted} aborted, adapter swapped {self.swapped} times, "
            f"{len(self.wrong)} wrong; memory {grown:+.1f} MiB, "
            f"descriptors {self.descriptors[0]} -> {self.descriptors[-1]}"
        )


def question(number: int) -> dict[str, Any]:
    """The fields of one of the questions: greedy and seeded, drafted in several ways, with and without stops, some
    held to a schema, some under an adapter."""
    found: dict[str, Any] = {
        "messages": [{"role": "user", "content": f"{'the same beginning ' * (number % 5)}{number}"}],
        "max_tokens": 6 + number % 30,
        "temperature": (0.0, 0.7, 1.2)[number % 3],
        "seed": number,
    }
    found["model"] = "mine" if number % 6 == 5 else "tiny"
    if number % 4 == 1:
        found["stop"] = ["a", "zz"]
    if number % 4 == 2:
        found["speculation"] = {"adaptive": False, "max_nodes": 1 + number % 30}
    if number % 5 == 3:
        found["prediction"] = {"type": "content", "content": "the same beginning again"}
    if number % 8 == 3:
        found["structured_outputs"] = {"json": SCHEMA}
        found["max_tokens"] = 60
    return found


def answer(own: Engine, number: int) -> str:
    """What the engine says alone, undrafted."""
    asked = question(number)
    options = {name: asked[name] for name in ("max_tokens", "temperature", "seed", "stop") if name in asked}
    if asked["model"] == "mine":
        options["adapter"] = "mine"
    if "structured_outputs" in asked:
        options["constraint"] = {"json_schema": SCHEMA}
    text: str = own.generate(Chat(asked["messages"]), speculation="off", **options).text
    return text


async def soak(seconds: float, seed: int = 0) -> Findings:
    """Run it. Raises RuntimeError if pages, leases or sessions are held at the end, TimeoutError if tasks are left."""
    findings, dice = Findings(), random.Random(seed)
    with TemporaryDirectory() as folder, engine() as own:
        own.adapters.load("mine", save_adapter(model(), Path(folder)))
        answers = [answer(own, number) for number in range(QUESTIONS)]
        async with serving(own) as world:
            findings.count()
            tasks = len(asyncio.all_tasks())
            end = time.monotonic() + seconds
            clients = [_client(world, dice, answers, end, findings) for _ in range(CLIENTS)]
            looking = asyncio.create_task(_look_when_warm(findings, seconds))
            await asyncio.gather(*clients, _swap(own, end, findings))
            await looking
            await world.idle()
            await until(lambda: len(asyncio.all_tasks()) <= tasks)
            findings.look()
            findings.count()
    return findings


async def _look_when_warm(findings: Findings, seconds: float) -> None:
    await asyncio.sleep(seconds * WARM)
    findings.look()


async def _swap(own: Engine, end: float, findings: Findings) -> None:
    """Read the adapter anew, again and again, under those who use it."""
    while time.monotonic() < end:
        await asyncio.to_thread(own.adapters.reload, "mine")
        findings.swapped += 1
        await asyncio.sleep(0.5)


async def _client(world: World, dice: random.Random, answers: list[str], end: float, findings: Findings) -> None:
    async with ClientSession() as http:
        while time.monotonic() < end:
            number = dice.randrange(QUESTIONS)
            body = {**question(number), "stream": dice.random() < 0.6}
            chunks = dice.randrange(8) if dice.random() < ABORTED else None
            said = await _ask(http, world, body, chunks)
            findings.aborted += said is None
            findings.answers += said is not None
            if said is not None and said != answers[number]:
                findings.wrong.append(f"{number}: {said!r}, not {answers[number]!r}")


async def _ask(http: ClientSession, world: World, body: dict[str, Any], chunks: int | None) -> str | None:
    """The text, or None for those who leave: after some chunks of a stream, at once otherwise."""
    said, url = "", f"{world.url}/v1/chat/completions"
    async with http.post(url, json=body) if chunks is None or body["stream"] else _gone(http, url, body) as reply:
        if reply is None:
            return None
        if not body["stream"]:
            found: str = (await reply.json())["choices"][0]["message"]["content"]
            return found
        async for line in reply.content:
            if chunks is not None:
                chunks -= 1
                if chunks < 0:
                    reply.close()
                    return None
            if line.startswith(b"data: {"):
                said += "".join(c["delta"].get("content", "") for c in json.loads(line[6:])["choices"])
    return None if chunks is not None else said


class _gone:
    """A plain request whose client does not wait for its answer."""

    def __init__(self, http: ClientSession, url: str, body: dict[str, Any]) -> None:
        self._asking = asyncio.ensure_future(http.post(url, json=body))

    async def __aenter__(self) -> None:
        await asyncio.sleep(0.01)
        self._asking.cancel()
        await asyncio.gather(self._asking, return_exceptions=True)

    async def __aexit__(self, *exc: object) -> None:
        if not self._asking.cancelled() and self._asking.exception() is None:
            self._asking.result().close()


if __name__ == "__main__":
    found = asyncio.run(soak(float(sys.argv[1])))
    sys.stdout.write(f"{found}\n" + "\n".join(found.wrong[:20]))
    sys.exit(bool(found.wrong) or found.memory[-1] - found.memory[0] > 64 << 20)
