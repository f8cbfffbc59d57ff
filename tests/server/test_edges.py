"""The server's edges: bodies that are packed wrongly, fields by name, heads that are none, hosts that are others."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import subprocess
import sys
import zlib
from typing import Any

import pytest
from structlog.testing import capture_logs

from specgen import Engine
from specgen.server.config import ServerConfig
from specgen.server.connections import Throttle, most_connections, told_by_loop
from specgen.server.logs import FromLogging
from tests.support.servers import HELLO, World, serving, until

pytestmark = pytest.mark.usefixtures("one_thread")

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
OK = json.dumps({"messages": HELLO, "max_tokens": 2}).encode()


async def send(world: World, body: bytes, path: str = CHAT, **headers: str) -> tuple[int, dict[str, Any]]:
    kinds = {"Content-Type": "application/json", **headers}
    async with world.http.post(f"{world.url}{path}", data=body, headers=kinds) as answer:
        return answer.status, json.loads(await answer.read()).get("error", {})


# Bodies that are packed.


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", b"\x1f\x8bjunk"),
        ("gzip", b"no gzip at all"),
        ("GZip", gzip.compress(OK, mtime=0)[:-30]),
        ("deflate", b"\xff\xff"),
        ("deflate", zlib.compress(OK)[:20]),
    ],
)
async def test_a_body_that_cannot_be_unpacked_is_refused(world: World, path: str, coding: str, body: bytes) -> None:
    status, error = await send(world, body, path, **{"Content-Encoding": coding})
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert error["code"] in ("invalid_encoding", "invalid_json")


@pytest.mark.parametrize("coding", ["foo", "gzip, foo", "compress", "*", "gzip, gzip"])
async def test_an_encoding_that_nobody_unpacks_is_refused_by_name(world: World, coding: str) -> None:
    status, error = await send(world, OK, **{"Content-Encoding": coding})
    assert (status, error["code"]) == (415, "unsupported_encoding")
    assert repr(coding) in error["message"]
    assert "gzip" in error["message"].partition("choices")[2]


@pytest.mark.parametrize(
    ("coding", "body"),
    [("gzip", gzip.compress(OK, mtime=0)), ("Deflate", zlib.compress(OK)), ("identity", OK), ("", OK)],
)
async def test_what_is_packed_well_is_read(world: World, coding: str, body: bytes) -> None:
    assert (await send(world, body, **{"Content-Encoding": coding}))[0] == 200


# Fields by name.


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"nothing": 1}, "nothing"),
        (COMPLETIONS, {"prompt": "a", "nothing": [[]]}, "nothing"),
        (RESPONSES, {"input": "a", "nothing": None}, "nothing"),
        ("/tokenize", {"prompt": "a", "nothing": 1}, "nothing"),
        (CHAT, {"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        (CHAT, {"messages": [{"content": "x"}]}, "messages[0].role"),
        (CHAT, {"tools": [{"type": "function"}]}, "tools[0].function"),
        (RESPONSES, {}, "input"),
        (CHAT, {"n": "x"}, "n"),
        (CHAT, {"x" * 5000: 1}, "x" * 256),
        (CHAT, {"priority": 1}, "priority"),
        (COMPLETIONS, {"prompt": "a", "priority": -5}, "priority"),
        (CHAT, {"include_reasoning": False}, "include_reasoning"),
    ],
)
async def test_the_field_that_is_wrong_is_named(world: World, path: str, fields: dict[str, Any], param: str) -> None:
    body = {"messages": HELLO, **fields} if path == CHAT else fields
    status, error = await send(world, json.dumps(body).encode(), path)
    assert (status, error["param"]) == (400, param)


@pytest.mark.parametrize("fields", [{"priority": 0}, {"priority": None}, {"include_reasoning": True}])
async def test_what_asks_for_nothing_is_taken(world: World, fields: dict[str, Any]) -> None:
    assert (await send(world, json.dumps({**json.loads(OK), **fields}).encode()))[0] == 200


# Heads that are none.

SECRET = "sk-canary"


def head(first: str, *fields: str, body: str = "") -> bytes:
    return "\r\n".join([first, "Host: x", *fields, "", body]).encode()


POST, LENGTH = f"POST {CHAT} HTTP/1.1", "Content-Length: 2"
HEADS: dict[str, bytes] = {
    "a control character in a key": head(POST, f"Authorization: Bearer {SECRET}\x01"),
    "a long header": head("GET /health HTTP/1.1", f"X-Key: {SECRET * 9000}"),
    "a long path": head(f"GET /{SECRET * 9000} HTTP/1.1"),
    "two lengths": head(POST, "Content-Length: 4", LENGTH, body="abcd"),
    "a length and chunks": head(POST, LENGTH, "Transfer-Encoding: chunked", body="0\r\n\r\n"),
    "a bad length": head(POST, f"Content-Length: {SECRET}"),
    "no method": head(f"{SECRET}\x1b[31m / HTTP/1.1"),
    "another protocol": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + SECRET.encode() * 9,
    "no version": b"GET /health\r\n\r\n",
    "an old version": head("GET /health HTTP/0.9"),
    "an unknown expectation": head(POST, f"Expect: {SECRET}", LENGTH, body="{}"),
    "an encoding that is not known": head(
        POST,
        "Content-Type: application/json",
        f"Content-Encoding: {SECRET[3:4]}",
        LENGTH,
        "Connection: close",
        body="{}",
    ),
}


async def raw(world: World, data: bytes) -> bytes:
    """What a connection answers until it is closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    writer.write(data)
    try:
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()


@pytest.mark.parametrize("name", HEADS)
async def test_a_head_that_is_none_is_an_answer_and_a_line(
    world: World, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """OpenAI's object, and of what was sent nothing in any log."""
    with capture_logs() as lines, caplog.at_level(logging.DEBUG):
        head, _, body = (await raw(world, HEADS[name])).partition(b"\r\n\r\n")
    status = int(head.split()[1])
    assert status == {"an unknown expectation": 417, "an encoding that is not known": 415}.get(name, 400)
    assert b"content-type: application/json" in head.lower()
    error = json.loads(body)["error"]
    assert (error["type"], bool(error["message"])) == ("invalid_request_error", True)
    written = f"{lines} {caplog.text} {[record.exc_info for record in caplog.records]}"
    assert "canary" not in written
    assert "Traceback" not in written
    assert lines
    if name not in ("no version", "an old version") and status != 415:
        assert lines[0]["event"] == "a request cannot be read"
        assert lines[0]["peer"] == "127.0.0.1"
        kind = lines[0]["error"]
        counted = f'specgen:http_unreadable_requests_total{{error="{kind}",model_name="tiny"}}'
        assert (await world.metrics())[counted] == 1


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nowhere", 404), ("DELETE", "/v1/models", 405), ("PATCH", CHAT, 405)]
)
async def test_what_is_not_there_is_an_answer(world: World, method: str, path: str, status: int) -> None:
    async with world.http.request(method, f"{world.url}{path}") as answer:
        assert answer.status == status
        assert (await answer.json())["error"]["message"]


async def test_what_libraries_log_is_a_line_without_what_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    library = logging.getLogger("some.library")
    monkeypatch.setattr(library, "handlers", [FromLogging()])
    monkeypatch.setattr(library, "propagate", False)
    with capture_logs() as lines:
        try:
            raise ValueError(SECRET)
        except ValueError:
            library.exception("it broke\nfuture: <Task exception=%r>", SECRET)
        library.warning("x" * 5000)
    assert [(line["event"][:300], line["log_level"], line["error"]) for line in lines] == [
        ("it broke", "error", "ValueError"),
        ("x" * 300, "warning", None),
    ]
    assert "canary" not in str(lines)
    assert len(lines[1]["event"]) == 300


def test_the_log_keeps_its_format_whoever_writes() -> None:
    """asyncio, transformers and Python's own warnings, in a process of their own: each line is JSON."""
    script = """
import logging, sys, warnings
from transformers.utils import logging as theirs
from specgen.server.config import ServerConfig
from specgen.server.logs import configure
configure(ServerConfig(log_format="json"))
print("BEGIN", file=sys.stderr)
logging.getLogger("asyncio").error("socket.accept() out of system resource", exc_info=OSError("x"))
theirs.get_logger("transformers.x").warning("Token indices sequence length is longer")
warnings.warn("odd", UserWarning, stacklevel=1)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    events = [json.loads(line) for line in done.stderr.partition("BEGIN\n")[2].splitlines()]
    assert [event["library"] for event in events] == ["asyncio", "transformers.x", "py.warnings"]


# Connections.


async def test_connections_have_an_end(shared_engine: Engine) -> None:
    """One more is answered and closed; when one of them leaves there is room again."""
    async with serving(shared_engine, max_connections=2) as world:
        held = [await asyncio.open_connection("127.0.0.1", world.port) for _ in range(2)]
        for _, writer in held:
            writer.write(b"GET /ready HTTP/1.1\r\nHost: x\r\n\r\n")
        for reader, _ in held:
            assert b"200 OK" in await reader.readuntil(b"\r\n")
        with capture_logs() as lines:
            for _ in range(3):
                head, _, body = (await raw(world, b"")).partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 503")
                assert b"Retry-After: 1" in head
                assert json.loads(body)["error"]["code"] == "too_many_connections"
        assert [line["event"] for line in lines] == ["connections are refused"]
        for _, writer in held:
            writer.close()
        await until(lambda: world.runner.server is not None and not world.runner.server.connections)
        assert (await world.metrics())['specgen:http_refused_connections_total{model_name="tiny"}'] == 3


def test_there_are_no_more_connections_than_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (300, 300))
    assert 4 <= most_connections(ServerConfig()) < 300 - 32
    assert most_connections(ServerConfig(max_connections=5)) == 5
    monkeypatch.setattr("resource.getrlimit", lambda _: (20, 20))
    assert most_connections(ServerConfig()) == 4


def test_what_the_loop_repeats_is_told_once_in_a_while() -> None:
    now = 0.0
    handle = told_by_loop(Throttle(lambda: now))
    context = {"message": "socket.accept() out of system resource", "exception": OSError(SECRET)}
    with capture_logs() as lines:
        for _ in range(128):
            handle(None, context)  # type: ignore[arg-type]
        now = 11.0
        handle(None, context)  # type: ignore[arg-type]
    assert [(line["event"], line["times"], line["error"]) for line in lines] == [
        ("socket.accept() out of system resource", 1, "OSError"),
        ("socket.accept() out of system resource", 128, "OSError"),
    ]


# Hosts.

LOCAL = [
    "localhost",
    "localhost:8000",
    "127.0.0.1",
    "127.9.9.9:1",
    "[::1]:80",
    "app.localhost",
    "x",
    "192.168.1.7:8000",
]
EVIL = ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "EVIL.example."]


async def asked(world: World, path: str = "/v1/models", **headers: str) -> int:
    async with world.http.get(f"{world.url}{path}", headers=headers) as answer:
        found = await answer.read()
        assert answer.status == 200 or json.loads(found)["error"]["code"] == "forbidden_host"
        return answer.status


async def test_without_keys_only_local_names_are_served(world: World) -> None:
    """Else a page elsewhere could have its own name resolve to this machine."""
    assert {host: await asked(world, Host=host) for host in LOCAL} == dict.fromkeys(LOCAL, 200)
    assert {host: await asked(world, Host=host) for host in EVIL} == dict.fromkeys(EVIL, 403)
    for path in ("/", "/health", "/metrics"):
        assert await asked(world, path, Host="evil.example") == 403
    status, error = await send(world, OK, Host="evil.example")
    assert (status, error["type"]) == (403, "permission_error")
    assert "allowed_hosts" in error["message"]


async def test_pages_of_other_hosts_are_refused(world: World) -> None:
    for origin in ("http://evil", "https://evil.example", "http://evil.example:8000", "http://[bad"):
        assert await asked(world, Origin=origin) == 403, origin
    own = (f"http://127.0.0.1:{world.port}", "http://localhost:3000", "null", "vscode-webview://abc", "file://")
    for origin in own:
        assert await asked(world, Origin=origin) == 200, origin


@pytest.mark.parametrize(
    ("settings", "host", "status"),
    [
        ({"api_keys": ("k",)}, "evil.example", 200),
        ({"host": "0.0.0.0"}, "evil.example", 200),
        ({"allowed_hosts": ("*",)}, "evil.example", 200),
        ({"allowed_hosts": ("llm.example",)}, "LLM.example:8000", 200),
        ({"allowed_hosts": ("llm.example",)}, "evil.example", 403),
        ({"allowed_hosts": ("llm.example",)}, "x", 403),
        ({"allowed_hosts": ("llm.example",), "api_keys": ("k",)}, "evil.example", 403),
        ({"host": "localhost"}, "evil.example", 403),
    ],
)
async def test_which_hosts_are_served_is_set(
    shared_engine: Engine, settings: dict[str, Any], host: str, status: int
) -> None:
    async with serving(shared_engine, **settings) as world:
        assert await asked(world, Host=host, Authorization="Bearer k") == status
