"""`specgen bench serve`, against our own server: what it sends, what it counts, what it writes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from specgen.cli.app import app
from specgen.cli.bench import _dealt, _read
from specgen.loadtest.arrivals import closed_loop, open_loop
from specgen.loadtest.client import Sample
from specgen.loadtest.report import percentiles, report
from tests.support.servers import World, engine, serving

pytestmark = pytest.mark.usefixtures("one_thread")


async def invoke(world: World, *arguments: object) -> Any:
    command = ["bench", "serve", "--url", f"{world.url}/v1", *map(str, arguments)]
    return await asyncio.to_thread(CliRunner().invoke, app, command)


@pytest.fixture
async def steady() -> AsyncIterator[World]:
    """A server that drafts the same whatever steps take: one node."""
    async with serving(engine(speculation={"adaptive": False, "max_nodes": 1})) as world:
        yield world


async def test_it_measures_a_server_in_closed_and_open_loop(steady: World, tmp_path: Path) -> None:
    file = tmp_path / "load.json"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"turns": ["one two one two"]}\n{"prompt": "ab"}\n')
    options = ("--requests", 4, "--max-tokens", 9, "--json", file, "--prompts", prompts)
    done = await invoke(steady, "--concurrency", 1, "--concurrency", 3, *options)
    assert done.exit_code == 0, done.output
    assert "c1: 4 requests, 0 errors" in done.stdout
    assert "acceptance length 1." in done.stdout
    bars = json.loads(file.read_text())["bars"]
    assert bars["c1_errors"] == bars["c3_errors"] == 0
    assert bars["c3_tokens_per_second"] > 0
    assert 0 < bars["c1_first_p50"] <= bars["c1_first_p99"] <= bars["c1_whole_p99"]
    assert file.with_suffix(".png").stat().st_size > 1000
    found = await steady.metrics()
    # One request before, to warm up.
    assert found['specgen:generation_tokens_total{model_name="tiny"}'] == 9 * 9
    done = await invoke(steady, "--rate", 200, *options)
    assert "200/s: 4 requests, 0 errors" in done.stdout


def test_no_run_asks_what_another_asked_while_there_are_other_prompts(tmp_path: Path) -> None:
    """A server that remembers its answers would look faster than it is."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"number {n}"}) for n in range(6)))
    orders = []
    for seed in (0, 0, 1):
        runs = _dealt(_read(str(prompts), seed), 2, 3)
        assert {*runs[0], *runs[1]} == {f"number {n}" for n in range(6)}
        orders.append(runs)
    assert orders[0] == orders[1] != orders[2]
    assert _dealt(["a", "b"], 2, 3) == [["a", "b", "a"], ["b", "a", "b"]]


async def test_errors_are_counted_and_told(shared_engine: Any, tmp_path: Path) -> None:
    async with serving(shared_engine, api_keys=("k",), key_rate="3/minute") as world:
        done = await invoke(world, "--api-key", "k", "--requests", 6, "--max-tokens", 2, "--concurrency", 2)
        assert done.exit_code == 1
        assert "6 requests, 4 errors" in done.stdout
        done = await invoke(world, "--api-key", "wrong")
        assert done.exit_code == 2
        assert "lists no models" in done.stderr


async def test_no_server_and_no_prompts_are_told(world: World, tmp_path: Path) -> None:
    done = await asyncio.to_thread(CliRunner().invoke, app, ["bench", "serve", "--url", "http://127.0.0.1:9/v1"])
    assert done.exit_code == 2
    done = await invoke(world, "--prompts", tmp_path / "none")
    assert done.exit_code == 2
    assert "cannot be read" in done.stderr


async def test_a_closed_loop_has_so_many_at_once_and_an_open_one_does_not_wait() -> None:
    running, most = 0, 0

    async def ask(prompt: str) -> Sample:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1
        return Sample(0.0, error=prompt)

    prompts = [str(number) for number in range(12)]
    assert [sample.error for sample in await closed_loop(ask, prompts, 3)] == prompts
    assert most == 3
    assert [sample.error for sample in await open_loop(ask, prompts, rate=1e6, seed=1)] == prompts
    assert most > 3


def test_figures_of_samples() -> None:
    good = [Sample(0.0, 1.0 + n, [0.1 * n + 0.1, 0.5, 0.9], tokens=5, acceptance=2.0) for n in range(4)]
    found = report("x", [*good, Sample(0.0, 9.0, error="no")])
    assert (found.requests, found.errors, found.seconds, found.tokens) == (5, 1, 9.0, 20)
    assert found.first == (pytest.approx(0.2), pytest.approx(0.4), pytest.approx(0.4))
    assert found.per_token[0] == pytest.approx(0.6 / 4)
    assert found.acceptance == 2.0
    assert found.bars()["requests_per_second"] == pytest.approx(4 / 9)
    assert percentiles([]) == (0.0, 0.0, 0.0)
    assert percentiles([float(n) for n in range(1, 101)]) == (50.0, 90.0, 99.0)
