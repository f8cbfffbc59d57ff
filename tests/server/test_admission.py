"""Work before admission: what is prepared counts as waiting, small requests overtake large ones, and waiting ends."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from specgen import Engine, InvalidRequest, hookimpl
from specgen.plugins.manager import load_plugins
from specgen.server.admission import AdmissionControl
from specgen.server.auth import Caller
from specgen.server.config import ServerConfig
from specgen.server.pace import Pace
from specgen.server.preparing import SMALL_BYTES
from specgen.server.protocol.errors import ApiError
from tests.support.servers import HELLO, SLOW, World, engine, serving, until

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT: dict[str, Any] = {"messages": HELLO, "max_tokens": 2, "temperature": 0}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
WAITING = 'specgen:num_requests_waiting{model_name="tiny"}'
ROOM = 16
"""`max_num_seqs` by default."""


async def post(world: World, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, str]]:
    async with world.http.post(f"{world.url}{path}", json=body) as answer:
        return answer.status, json.loads(await answer.read()), dict(answer.headers)


@contextmanager
def held(shared_engine: Engine, least: int = 0) -> Iterator[threading.Event]:
    """Preparing a text of at least so many characters takes until the event is set."""
    go, prepare, encode = threading.Event(), shared_engine.prepare, shared_engine.tokenizer.encode

    def slowly(prompt: Any, *arguments: Any, **options: Any) -> Any:
        if len(str(getattr(prompt, "messages", prompt))) >= least:
            go.wait(30)
        return prepare(prompt, *arguments, **options)

    def encoding(text: str, *arguments: Any, **options: Any) -> Any:
        if len(text) >= max(2, least):
            go.wait(30)
        return encode(text, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_engine, "prepare", slowly)
        patch.setattr(shared_engine.tokenizer, "encode", encoding)
        try:
            yield go
        finally:
            go.set()


@asynccontextmanager
async def asking(world: World, path: str, body: dict[str, Any], times: int = 1) -> AsyncIterator[list[Any]]:
    """Requests under way; their answers at the end."""
    tasks = [asyncio.create_task(post(world, path, body)) for _ in range(times)]
    yield tasks
    await asyncio.gather(*tasks)


LARGE = "a b " * (SMALL_BYTES // 4)
BODIES = {
    CHAT: ({"messages": [{"role": "user", "content": LARGE}]}, "messages"),
    COMPLETIONS: ({"prompt": LARGE}, "prompt"),
    "/v1/responses": ({"input": LARGE}, "input"),
}
PREDICTED = {"prompt": "a", "prediction": {"type": "content", "content": LARGE}}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [*((path, *rest) for path, rest in BODIES.items()), (COMPLETIONS, {"prompt": ["a", LARGE]}, "prompt"),
     (COMPLETIONS, PREDICTED, "prediction"), ("/tokenize", BODIES[CHAT][0], "messages")],
)  # fmt: skip
async def test_what_cannot_fit_is_refused_untokenised(
    world: World, path: str, body: dict[str, Any], param: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = PreTrainedTokenizerFast._encode_plus

    def short(self: Any, text: Any, *arguments: Any, **options: Any) -> Any:
        assert len(text) < 1000
        return encode(self, text, *arguments, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "_encode_plus", short)
    status, answer, _ = await post(world, path, body)
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "context_length_exceeded", param)
    assert "bytes, at least" in answer["error"]["message"]
    assert f"at most {512 if param == 'prediction' else 511} fit" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "sequences"),
    [(CHAT, {**SHORT, "n": 3}, 3), (COMPLETIONS, {"prompt": ["abc", "abd"], "max_tokens": 2}, 2),
     ("/tokenize", {"prompt": "abc"}, 1), ("/tokenize", {"prompt": LARGE}, 1)],
)  # fmt: skip
async def test_what_is_prepared_waits(shared_engine: Engine, path: str, body: dict[str, Any], sequences: int) -> None:
    """In the metrics, and in the queue's limit."""
    async with serving(shared_engine, max_queued=0) as world:
        with held(shared_engine) as go:
            async with asking(world, path, body) as asked:
                await until(lambda: world.service.generations.gate.preparing == sequences)
                assert (await world.metrics())[WAITING] == sequences
                refused = await post(world, CHAT, {**SHORT, "n": ROOM + 1 - sequences})
                assert (refused[0], refused[1]["error"]["code"]) == (429, "queue_full")
                go.set()
            assert asked[0].result()[0] == 200
        assert (await world.metrics())[WAITING] == 0


async def test_small_requests_overtake_large_ones(shared_engine: Engine) -> None:
    async with serving(shared_engine) as world:
        with held(shared_engine, least=SMALL_BYTES) as go:
            async with asking(world, "/tokenize", {"prompt": LARGE}, times=6) as tasks:
                await until(lambda: world.service.generations.gate.preparing == 6)
                assert (await post(world, CHAT, SHORT))[0] == 200
                assert (await post(world, "/tokenize", {"prompt": "a"}))[0] == 200
                assert not any(task.done() for task in tasks)
                go.set()


async def test_the_texts_of_one_key_have_a_share_of_their_own(shared_engine: Engine) -> None:
    async with serving(shared_engine, key_sequences=1) as world:
        with held(shared_engine) as go:
            async with asking(world, "/tokenize", {"prompt": "abc"}):
                await until(lambda: world.service.generations.gate.preparing)
                status, answer, _ = await post(world, "/tokenize", {"prompt": "abc"})
                assert (status, answer["error"]["code"]) == (429, "too_many_sequences")
                assert answer["error"]["message"] == "2 texts at once with this key; at most 1"
                async with asking(world, CHAT, SHORT) as chats:
                    await until(lambda: world.service.generations.gate.preparing == 2)
                    go.set()
                assert chats[0].result()[0] == 200


class Hanging:
    """A kind of constraint whose compilation hangs until it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def _compile(self, setup: Any, value: Any) -> Any:
        self.go.wait(30)
        raise InvalidRequest("too late")

    @hookimpl
    def constraints(self) -> dict[str, Any]:
        return {"regex": self._compile}


async def test_what_is_compiled_without_end_holds_up_only_its_like() -> None:
    """They are told the limit, or that there is no room; others are served meanwhile."""
    hanging, found = Hanging(), load_plugins(only=[])
    found.register(hanging, "hanging")
    with engine(plugins=found, constraint_seconds=0.3) as own:
        async with serving(own) as world:
            try:
                async with asking(world, CHAT, {**SHORT, "guided_regex": "a"}, times=12) as tasks:
                    await until(lambda: world.service.generations.gate.preparing == 12)
                    assert (await post(world, CHAT, SHORT))[0] == 200
                answers = [task.result() for task in tasks]
            finally:
                hanging.go.set()
    codes = [(status, answer["error"]["code"]) for status, answer, _ in answers]
    assert set(codes) == {(400, 400), (503, "overloaded")}
    late = [answer["error"] for status, answer, _ in answers if status == 400]
    assert len(late) == own._builder.constraints._threads.places
    assert all("not compiled after 0.3 seconds, the limit" in error["message"] for error in late)
    assert all(error["param"] == "guided_regex" for error in late)
    assert all(headers["Retry-After"] for status, _, headers in answers if status == 503)


# An end to waiting.


async def test_waiting_has_an_end_and_running_is_not_waiting() -> None:
    long = {**SHORT, "max_tokens": 150, **SLOW}
    with engine(max_num_seqs=1) as own:
        async with serving(own, max_waiting_seconds=0.4) as world:
            async with asking(world, CHAT, long) as first:
                await until(lambda: own.load.running)
                for stream in (False, True):
                    status, answer, headers = await post(world, CHAT, {**SHORT, "stream": stream})
                    assert (status, answer["error"]["code"]) == (429, "waited_too_long")
                    assert "did not begin within 0.4 seconds" in answer["error"]["message"]
                    assert int(headers["Retry-After"]) >= 1
            assert first[0].result()[0] == 200
            assert (await post(world, CHAT, SHORT))[0] == 200


async def test_being_prepared_is_waiting_too(shared_engine: Engine) -> None:
    async with serving(shared_engine, max_waiting_seconds=0.1) as world:
        with held(shared_engine):
            status, answer, _ = await post(world, CHAT, SHORT)
    assert (status, answer["error"]["code"]) == (429, "waited_too_long")


# The pace of the queue.


class Clock:
    """Told what time it is."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_pace_is_that_of_a_queue_and_not_of_idle_hours() -> None:
    clock = Clock()
    pace = Pace(2, clock)
    pace.changed(2)
    clock.now += 3600
    pace.changed(1, 1, 1000.0)
    assert pace.wait(10) == 0
    pace.changed(6)
    for left in (5, 4, 3):
        clock.now += 4
        pace.changed(left, 1, clock.now - 12)
    assert pace.wait(3) == 4
    assert pace.wait(2) == 0
    assert pace.wait(34) == 32 * 4


async def test_who_is_sent_away_is_told_when_the_queue_is_through() -> None:
    """And no more than ten minutes."""
    clock = Clock()
    gate = AdmissionControl(ServerConfig(max_queued=4, max_waiting_seconds=100), 2, clock)
    caller = Caller()
    places = [gate.place(caller, 1) for _ in range(6)]
    held = [place.__enter__() for place in places]
    with pytest.raises(ApiError, match="no room for 1 more") as caught:
        gate.place(caller, 1).__enter__()
    assert caught.value.headers["Retry-After"] == "1"
    for place, one in zip(places[:2], held, strict=False):
        clock.now += 30
        one.was_served = True
        place.__exit__(None, None, None)
    with pytest.raises(ApiError, match="no room for 3 more") as caught:
        gate.place(caller, 3).__enter__()
    assert caught.value.headers["Retry-After"] == str(5 * 30)
    with pytest.raises(ApiError, match=r"the queue takes about 120 seconds; at most 100 may be waited"):
        gate.place(caller, 2).__enter__()
    clock.now += 3000
    held[2].was_served = True
    places[2].__exit__(None, None, None)
    with pytest.raises(ApiError) as caught:
        gate.place(caller, 4).__enter__()
    assert caught.value.headers["Retry-After"] == "600"


async def test_bodies_that_wait_to_be_read_are_bounded_in_bytes() -> None:
    gate = AdmissionControl(ServerConfig(body_bytes=1000), 2)
    with gate.place(Caller(), 1, 15_000) as place:
        with pytest.raises(ApiError, match="15000 bytes of other requests"), gate.place(Caller(), 1, 1001):
            pass
        with gate.place(Caller(), 1, 1000):
            pass
        place.started()
        with gate.place(Caller(), 1, 16_000):
            pass
    assert gate.sequences == gate.preparing == gate.bytes == 0
