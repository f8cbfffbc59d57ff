"""`specgen serve` beside another OpenAI server over the same model, asked by the same client: 1, 8 and 32 at once.

Both servers stand ready, and take turns: whoever is not asked does nothing. No prompt comes twice, so that neither
profits from what it has said. The other server is `transformers serve` (`pip install 'transformers[serving]'`), or
what `--peer` says.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shlex
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import msgspec
from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector

from benchmarks import harness
from benchmarks.harness import Sizes
from specgen.demo_model import demo_model
from specgen.loadtest.arrivals import closed_loop
from specgen.loadtest.client import Client
from specgen.loadtest.report import Report, report

FULL = Sizes(tokens=64, rounds=1)
QUICK = Sizes(tokens=8, rounds=1)

OURS, PEER = "specgen serve", "peer"
TRANSFORMERS = "{python} -m transformers.cli.transformers serve {model} --port {port} --dtype {dtype}"
_CLIENTS = (1, 8, 32)
_READY_SECONDS = 300.0
_WARM_UP = 3


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options = harness.parser("serving", __doc__)
    options.add_argument("--peer", metavar="COMMAND", default=TRANSFORMERS, help=f"default: {TRANSFORMERS}")
    options.add_argument("--engine", metavar="JSON", default="{}", help="settings of our engine, over those of --quick")
    options.add_argument("--clients", nargs="+", type=int, metavar="N", default=list(_CLIENTS), help="default: 1 8 32")
    options.add_argument("--requests", type=int, metavar="N", default=32, help="of each run; default: 32")
    args = harness.parse(options, argv, full=FULL, quick=QUICK)
    args.model = args.model or str(demo_model())
    prompts = _texts(args.prompts)
    with ExitStack() as stack:
        places = {name: stack.enter_context(_server(name, command)) for name, command in _commands(args).items()}
        found = asyncio.run(_measure(args, places, prompts))
    bars = headline(found)
    show(found, bars)
    if args.json:
        settings = {**harness.settings(args, []), "requests": args.requests, "peer": args.peer, "engine": args.engine}
        runs = [{"system": s, "clients": n, **one.bars()} for (s, n), every in found.items() for one in every]
        harness.save(args.json, "serving", bars, settings=settings, runs=runs)
        series = {name: {f"{n} clients": _rate(found, name, n) for n in args.clients} for name in (OURS, PEER)}
        harness.plot(args.json.with_suffix(".png"), "serving", "tokens per second", series)


def headline(found: Mapping[tuple[str, int], Sequence[Report]]) -> dict[str, float | None]:
    """Ratios of tokens per second, of neighbours before the median over rounds; and failed requests of ours."""
    bars: dict[str, float | None] = {}
    for name, clients in found:
        if name == OURS:
            pairs = zip(found[OURS, clients], found[PEER, clients], strict=True)
            bars[f"ours_vs_tf_c{clients}"] = harness.middle([a.rate / b.rate if b.rate else None for a, b in pairs])
    bars["errors"] = float(sum(one.errors for (name, _), every in found.items() for one in every if name == OURS))
    return bars


def show(found: Mapping[tuple[str, int], Sequence[Report]], bars: Mapping[str, float | None]) -> None:
    """Print the tables."""
    rows = [
        [
            f"{name}, {clients}",
            _rate(found, name, clients),
            1000 * median(one.first[0] for one in every),
            1000 * median(one.first[2] for one in every),
            1000 * median(one.per_token[0] for one in every),
            sum(one.errors for one in every),
        ]
        for (name, clients), every in found.items()
    ]
    columns = ["server, clients", "tokens/s", "first ms", "first ms, p99", "later ms", "errors"]
    harness.table("serving; medians over rounds", columns, rows)
    harness.table("bars", ["", "value"], list(bars.items()))


def _rate(found: Mapping[tuple[str, int], Sequence[Report]], name: str, clients: int) -> float:
    return median(one.rate for one in found[name, clients])


async def _measure(
    args: argparse.Namespace, places: Mapping[str, str], prompts: Sequence[str]
) -> dict[tuple[str, int], list[Report]]:
    """Runs of each server, in turns."""
    deck = _deck(prompts)
    found: dict[tuple[str, int], list[Report]] = defaultdict(list)
    async with ClientSession(connector=TCPConnector(limit=0), timeout=ClientTimeout(total=3600)) as session:
        clients = {name: await _client(session, url, args) for name, url in places.items()}
        for client in clients.values():
            for _ in range(_WARM_UP):
                await client.ask(next(deck))
        for turn in range(args.rounds):
            for number in args.clients:
                # One deal for both: their texts are as long as each other's.
                asked = [next(deck) for _ in range(args.requests)]
                for name in list(clients) if turn % 2 == 0 else reversed(list(clients)):
                    samples = await closed_loop(clients[name].ask, asked, number)
                    found[name, number].append(report(f"{name}, {number}", samples))
    return found


async def _client(session: ClientSession, url: str, args: argparse.Namespace) -> Client:
    """A client of a server that answers by now. One that lists no models is asked for the path of the model."""
    end = time.monotonic() + _READY_SECONDS
    while True:
        try:
            async with session.get(f"{url}/models") as answer:
                model = (await answer.json())["data"][0]["id"] if answer.status == 200 else args.model
                return Client(session, url, {"model": model, "max_tokens": args.tokens, "temperature": 0.0})
        except (ClientError, KeyError, IndexError, ValueError) as error:
            if time.monotonic() > end:
                raise SystemExit(f"{url} does not answer: {error!r}") from None
            await asyncio.sleep(0.5)


def _commands(args: argparse.Namespace) -> dict[str, str]:
    fields = {"python": sys.executable, "model": args.model, "dtype": args.dtype}
    ours = "{python} -m specgen serve {model} --port {port} --dtype {dtype} --config {config}"
    engine = {"compile": not args.quick, **json.loads(args.engine)}
    return {
        OURS: _filled(ours, {**fields, "config": json.dumps({"log_level": "error", "engine": engine})}),
        PEER: _filled(args.peer, fields),
    }


def _filled(command: str, fields: Mapping[str, str]) -> str:
    for name, value in fields.items():
        command = command.replace(f"{{{name}}}", shlex.quote(value))
    return command


@contextmanager
def _server(name: str, command: str) -> Iterator[str]:
    """Its address while it runs."""
    with TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        words = [_file(word, Path(folder)) for word in shlex.split(command.replace("{port}", str(port)))]
        log = Path(folder) / "log.txt"
        with log.open("wb") as output:
            process = subprocess.Popen(words, stdout=output, stderr=output, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        try:
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            if process.poll() is not None:
                sys.stderr.write(f"{name} has ended:\n{log.read_text(errors='replace')[-2000:]}\n")
            process.terminate()
            process.wait(60)


def _file(word: str, folder: Path) -> str:
    """Settings become a file that holds them."""
    if not word.startswith("{"):
        return word
    (folder / "config.json").write_text(word, encoding="utf-8")
    return str(folder / "config.json")


def _texts(path: Path) -> list[str]:
    """First turns, in an order of their own."""
    lines = [msgspec.json.decode(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    found = [str(line["turns"][0]) for line in lines]
    random.Random(0).shuffle(found)
    return found


def _deck(prompts: Sequence[str]) -> Iterator[str]:
    """All prompts, and when they are used up the same again with a number in front, which no server has seen."""
    yield from prompts
    turn = 1
    while True:
        turn += 1
        yield from (f"{turn}. {prompt}" for prompt in prompts)


if __name__ == "__main__":
    main()
