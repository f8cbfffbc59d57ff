"""`specgen serve` as a process: settings from everywhere, and what signals do to it."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast
from urllib.error import HTTPError

import openai
import pytest
from typer.testing import CliRunner

from specgen import Engine
from specgen.cli.app import app
from specgen.cli.serve import _run
from specgen.errors import InvalidRequest, UnknownName
from specgen.server.admission import AdmissionControl
from specgen.server.config import ServerConfig
from specgen.server.serve import bound, serve
from tests.support.servers import HELLO, model, tokenizer

PLUGIN = """import time
from specgen import hookimpl

def slow(tokenizer, *, seconds=0.02):
    def process(ids, logits):
        time.sleep(seconds)
        return logits
    return process

@hookimpl
def logits_processors():
    return {"slow": slow}
"""
SECONDS = 60
Start = Callable[..., "Process"]


class Process:
    """A server in a process."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(folder), "SPECGEN_PLUGINS": "slowly", "SPECGEN_SERVER_PORT": "0"}
        command = [sys.executable, "-m", "specgen", "serve", str(folder / "tiny"), "--log-format", "json", *arguments]
        self.popen = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        assert self.popen.stderr
        for line in self.popen.stderr:
            self.lines.append(line)
            if found := re.match(r"serving at (http://\S+)", line):
                self.url = found[1]
                break
        else:
            raise AssertionError("".join(self.lines))
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="key", max_retries=0, timeout=SECONDS)

    def stream(self, tokens: int) -> Any:
        """A chat that takes 20 ms for each token."""
        extra = {"plugin_processors": {"slow": {}}, "ignore_eos": True}
        asked: Any = {"model": "tiny", "messages": HELLO, "max_tokens": tokens, "extra_body": extra, "stream": True}
        return self.client.chat.completions.create(**asked)

    def status(self, path: str) -> int:
        """What a GET is answered."""
        try:
            with urllib.request.urlopen(f"{self.url}{path}", timeout=SECONDS) as answer:
                status: int = answer.status
                return status
        except HTTPError as error:
            return error.code

    def end(self) -> tuple[int, str]:
        """Wait for the end: exit code and log."""
        _, rest = self.popen.communicate(timeout=SECONDS)
        return self.popen.returncode, "".join(self.lines) + rest


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts servers, and kills what is left of them."""
    model().save_pretrained(tmp_path / "tiny")
    tokenizer().save_pretrained(tmp_path / "tiny")
    (tmp_path / "slowly.py").write_text(PLUGIN)
    info = tmp_path / "slowly-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: slowly\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[specgen]\nslowly = slowly\n")
    started: list[Process] = []

    def begin(*arguments: str) -> Process:
        started.append(Process(tmp_path, *arguments))
        return started[-1]

    yield begin
    for process in started:
        if process.popen.poll() is None:
            process.popen.kill()


def test_sigterm_lets_streams_end_and_takes_no_new_ones(start: Start) -> None:
    process = start()
    assert (process.status("/health"), process.status("/ready")) == (200, 200)
    stream = process.stream(tokens=100)
    next(stream)
    process.popen.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + SECONDS
    while process.status("/ready") == 200:
        assert time.monotonic() < deadline
    with pytest.raises(openai.InternalServerError) as caught:
        process.stream(tokens=5)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["Retry-After"]
    chunks = list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"
    code, log = process.end()
    assert code == 0, log
    events = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert {"serving", "answered", "draining", "stopped"} <= {event["event"] for event in events}
    assert all("timestamp" in event for event in events)


@pytest.mark.slow
def test_what_takes_too_long_is_told_so_at_the_end(start: Start) -> None:
    process = start("--shutdown-timeout", "0.5")
    stream = process.stream(tokens=400)
    next(stream)
    process.popen.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIError, match="shutting down"):
        list(stream)
    assert process.end()[0] == 0


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(start: Start) -> None:
    process = start("--shutdown-timeout", "60")
    stream = process.stream(tokens=400)
    next(stream)
    process.popen.send_signal(signal.SIGTERM)
    while process.status("/ready") == 200:
        time.sleep(0.05)
    process.popen.send_signal(signal.SIGTERM)
    code, log = process.end()
    assert code == 0, log
    # All 400 would have been waited for otherwise.
    (answered,) = (json.loads(line) for line in log.splitlines() if '"/v1/chat/completions"' in line)
    assert answered["seconds"] < 400 * 0.02
    assert answered["status"] == 499


def test_settings_come_from_file_environment_and_flags(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text('port = 1\nhost = "file"\nmax_queued = 7\n[engine]\nkv_format = "int8"\nmax_num_seqs = 3\n')
    environment = {"SPECGEN_SERVER_PORT": "2", "SPECGEN_SERVER_API_KEYS": '["a", "b"]', "OTHER": "x"}
    found = ServerConfig.load(file, environment, {"port": 3, "host": None, "engine": {"max_num_seqs": 5}})
    assert (found.port, found.host, found.max_queued, found.api_keys) == (3, "file", 7, ("a", "b"))
    assert found.engine == {"kv_format": "int8", "max_num_seqs": 5}
    assert ServerConfig.load(None, environment).port == 2
    (tmp_path / "server.json").write_text('{"port": 9}')
    assert ServerConfig.load(tmp_path / "server.json", {}).port == 9


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"prot": 1}, UnknownName, "unknown server setting in the command line: 'prot'; choices: admin_key"),
        ({"port": 99999}, InvalidRequest, "port"),
        ({"max_queued": -1}, InvalidRequest, "max_queued"),
        ({"metrics_compat": "x"}, InvalidRequest, "metrics_compat"),
        ({"api_keys": [""]}, InvalidRequest, "a key is empty"),
        ({"api_keys": ["a b"]}, InvalidRequest, "visible"),
        ({"allowed_hosts": ["http://llm.example"]}, InvalidRequest, "allowed_hosts holds 'http://llm.example'"),
        ({"allowed_hosts": ["*.example"]}, InvalidRequest, r"allowed_hosts holds '\*.example'"),
        ({"max_waiting_seconds": 0}, InvalidRequest, "max_waiting_seconds"),
        ({"max_connections": 0}, InvalidRequest, "max_connections"),
        ({"engine": "foo"}, InvalidRequest, "engine in the command line is 'foo'; it must hold settings by name"),
    ],
)
def test_bad_settings_are_refused_by_name(values: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        ServerConfig.load(None, {}, values)


@pytest.mark.parametrize("rate", ["0/minute", "-1/minute", "often"])
def test_a_rate_that_lets_nobody_in_is_refused(rate: str) -> None:
    with pytest.raises(InvalidRequest, match="key_rate is"):
        AdmissionControl(ServerConfig(key_rate=rate), 1)


@pytest.mark.parametrize(
    ("host", "message"),
    [("127.0.0.1", "port {port} of host '127.0.0.1' is already in use"), ("no.such.host.invalid", "host 'no.such")],
)
def test_a_place_that_is_not_to_be_had_is_told_before_a_model_is_loaded(
    host: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, with exit code 2."""
    monkeypatch.setattr("specgen.cli.serve.engine_of", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr("specgen.server.logs.configure", lambda _: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = CliRunner().invoke(app, ["serve", "nothing", "--host", host, "--port", str(port)])
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.splitlines()
    assert message.format(port=port) in line


def test_what_the_environment_says_of_the_engine_must_be_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECGEN_SERVER_ENGINE", "foo")
    done = CliRunner().invoke(app, ["serve", "nothing"])
    assert done.exit_code == 2, done.output
    assert "engine in the environment is 'foo'" in done.stderr


async def test_a_port_that_another_took_meanwhile_is_told(shared_engine: Engine) -> None:
    """Two servers may have bound the same while they loaded their models; one of them listens first."""
    with bound(ServerConfig(port=0)) as first:
        config = ServerConfig(port=first[0].getsockname()[1])
        with bound(config) as second:
            first[0].listen()
            with pytest.raises(InvalidRequest, match=f"port {config.port}"):
                await serve(shared_engine, config, second)


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("port = ")
    for name in ("bad.toml", "missing.toml"):
        with pytest.raises(InvalidRequest, match=name):
            ServerConfig.load(tmp_path / name, {})


def test_what_was_built_before_the_first_request_is_not_looked_through_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full collection of a model's and its compiler's objects holds everybody up for half a second."""
    left: list[int] = []

    async def run(*_: object, **__: object) -> bool:
        left.append(len(gc.get_objects()))
        return True

    monkeypatch.setattr("specgen.server.serve.serve", run)
    before = len(gc.get_objects())
    try:
        _run(cast(Engine, None), ServerConfig(), [])
    finally:
        gc.unfreeze()
    assert left[0] < before / 20
