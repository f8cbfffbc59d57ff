"""`specgen bench serve`: load for any OpenAI server, and what it did with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from specgen.cli.terminal import write

if TYPE_CHECKING:
    from pathlib import Path

    from aiohttp import ClientSession

    from specgen.loadtest.client import Sample
    from specgen.loadtest.report import Report

bench = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Measure a running server.")

_PROMPTS = (
    "Name three colours and say what they are used for.",
    "Repeat this list twice: apple, pear, plum, cherry, apple, pear, plum, cherry.",
    "Write a Python function that adds two numbers, then the same with type annotations.",
    "Summarise: the river rose in the night, the bridge was closed, and the school stayed open.",
)
_WARM_UP = "Say hello."


@bench.callback()
def measure() -> None:
    """Measure a running server."""


@bench.command()
def serve(
    url: Annotated[str, typer.Option(metavar="URL", help="Of any OpenAI server, with its /v1.")] = (
        "http://127.0.0.1:8000/v1"
    ),
    model: Annotated[str | None, typer.Option(metavar="NAME", help="What requests name. Default: the first.")] = None,
    api_key: Annotated[str | None, typer.Option(metavar="KEY", help="Sent with each request.")] = None,
    concurrency: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Requests at once, a run for each. Default: 1, 8 and 32.")
    ] = None,
    rate: Annotated[
        list[float] | None, typer.Option(metavar="R", help="Instead: requests a second, at random times.")
    ] = None,
    requests: Annotated[int, typer.Option(metavar="N", help="Requests of a run.")] = 64,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Most new tokens.")] = 128,
    temperature: Annotated[float, typer.Option(metavar="T", help="0 is greedy.")] = 0.0,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="JSON lines with `turns` or `prompt`. Default: four of our own.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the random times.")] = 0,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the figures, and a picture beside them.")
    ] = None,
) -> None:
    """Ask for streams in closed or open loop: times, tokens per second, acceptance, errors."""
    import asyncio
    from pathlib import Path

    _check_run(url, concurrency, rate, requests, json_file)
    fields: dict[str, object] = {"model": model, "max_tokens": max_tokens, "temperature": temperature}
    loads: list[float] = [*rate] if rate else [*(concurrency or [1, 8, 32])]
    runs = list(zip(loads, _dealt(_read(prompts, seed), len(loads), requests), strict=True))
    reports = asyncio.run(_runs(url, api_key, fields, runs, seed, is_open=bool(rate)))
    write("\n".join(line for each in reports for line in each.lines()))
    if json_file:
        _save(reports, Path(json_file))
    if any(each.errors for each in reports):
        raise typer.Exit(1)


def _check_run(
    url: str, concurrency: list[int] | None, rate: list[float] | None, requests: int, json_file: str | None
) -> None:
    """Raise InvalidRequest for what cannot be run or kept, before anything is asked."""
    from importlib.util import find_spec
    from pathlib import Path

    from specgen.errors import InvalidRequest, SpecgenError

    if rate and concurrency:
        raise InvalidRequest("concurrency and rate are two kinds of load; give one", param="rate")
    if not url.startswith(("http://", "https://")):
        raise InvalidRequest(f"url is {url!r}; it must begin with http:// or https://", param="url")
    for name, least, values in (("concurrency", 1, concurrency or []), ("requests", 1, [requests])):
        for value in values:
            if value < least:
                raise InvalidRequest(f"{name} is {value}; it must be at least {least}", param=name)
    for pace in rate or []:
        if not 0 < pace < float("inf"):
            raise InvalidRequest(f"rate is {pace}; it must be a finite number above 0", param="rate")
    if json_file and not Path(json_file).absolute().parent.is_dir():
        raise InvalidRequest(f"json is {json_file!r}, whose folder is not there", param="json")
    for package, extra in (("aiohttp", "server"), *([("matplotlib", "bench")] if json_file else [])):
        if find_spec(package) is None:
            raise SpecgenError(f"this needs {package}: pip install 'specgen-llm[{extra}]'")


async def _runs(
    url: str,
    key: str | None,
    fields: dict[str, object],
    runs: list[tuple[float, list[str]]],
    seed: int,
    *,
    is_open: bool,
) -> list[Report]:
    """A run for each load: requests at once, or with `is_open` requests a second."""
    from aiohttp import ClientSession, ClientTimeout, TCPConnector

    from specgen.loadtest.arrivals import closed_loop, open_loop
    from specgen.loadtest.client import Client
    from specgen.loadtest.report import report

    # A server may take its time; a connection for each request, however many.
    async with ClientSession(connector=TCPConnector(limit=0), timeout=ClientTimeout(total=3600)) as session:
        if fields["model"] is None:
            fields["model"] = await _first_model(session, url, key)
        client = Client(session, url, fields, key)
        _check(await client.ask(_WARM_UP))
        if is_open:
            return [report(f"{load:g}/s", await open_loop(client.ask, asked, load, seed)) for load, asked in runs]
        return [report(f"c{load:g}", await closed_loop(client.ask, asked, int(load))) for load, asked in runs]


async def _first_model(session: ClientSession, url: str, key: str | None) -> str:
    from aiohttp import ClientError

    from specgen.errors import InvalidRequest

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        async with session.get(f"{url.rstrip('/')}/models", headers=headers) as answer:
            name: str = (await answer.json())["data"][0]["id"]
            return name
    except (ClientError, KeyError, IndexError, ValueError) as error:
        raise InvalidRequest(
            f"{url} lists no models: {error}; start it, or name one with --model", param="url"
        ) from None


def _check(first: Sample) -> None:
    """The first request warms up, and shows whether there is a server at all."""
    from specgen.errors import InvalidRequest

    if first.error:
        raise InvalidRequest(f"the server does not answer: {first.error}", param="url")


def _read(file: str | None, seed: int) -> list[str]:
    """The prompts of a file in an order of its own for each seed, or else ours."""
    import random
    from pathlib import Path

    import msgspec

    from specgen.errors import InvalidRequest

    if file is None:
        return list(_PROMPTS)
    try:
        lines = [msgspec.json.decode(line) for line in Path(file).read_text(encoding="utf-8").splitlines() if line]
        found = [line["prompt"] if "prompt" in line else line["turns"][0] for line in lines]
    except (OSError, KeyError, IndexError, TypeError, msgspec.DecodeError) as error:
        raise InvalidRequest(f"prompts {file!r} cannot be read: {error}", param="prompts") from None
    random.Random(seed).shuffle(found)
    return found


def _dealt(prompts: list[str], runs: int, number: int) -> list[list[str]]:
    """Prompts for each run. None comes twice while there are others: a server may remember what it said."""
    from itertools import cycle, islice

    deck = cycle(prompts)
    return [list(islice(deck, number)) for _ in range(runs)]


def _save(reports: list[Report], path: Path) -> None:
    import msgspec

    from specgen.loadtest.report import draw

    bars = {f"{each.name}_{name}": value for each in reports for name, value in each.bars().items()}
    path.write_bytes(msgspec.json.format(msgspec.json.encode({"bars": bars})))
    draw(reports, path.with_suffix(".png"))
