"""A tiny model with a tokenizer of bytes and a chat template, and a server around it that listens on a real port."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from aiohttp import ClientSession, web
from openai import AsyncOpenAI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from specgen import Engine, hookimpl
from specgen.plugins.manager import Plugins, load_plugins
from specgen.server.app import build_app
from specgen.server.config import ServerConfig
from specgen.server.connections import Runner
from specgen.server.service import SERVICE, Service

CONTEXT = 512
SPECIAL = ["<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}{% endfor %}<tool_call><|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HELLO: list[Any] = [{"role": "user", "content": "hello there"}]
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["a", "b"]}, "count": {"type": "integer", "minimum": 0, "maximum": 999}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}
SECONDS = 30


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and ChatML's two."""
    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, extra_special_tokens=SPECIAL, eos_token=SPECIAL[1], chat_template=TEMPLATE
    )


@cache
def model() -> LlamaForCausalLM:
    """Two layers of noise that never end by themselves."""
    torch.manual_seed(1)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer()), max_position_embeddings=CONTEXT, **shape)
    found = LlamaForCausalLM(config).eval()
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    found.generation_config.eos_token_id = None
    return found


class Speaking:
    """A processor that makes the model say a text, each time from its beginning; then the end token."""

    def __init__(self, text: str, *, wait: float = 0.0) -> None:
        self._ids = [*tokenizer().encode(text, add_special_tokens=False), tokenizer().eos_token_id]
        self._wait = wait
        self._said = 0

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        time.sleep(self._wait)
        logits[:, self._ids[min(self._said, len(self._ids) - 1)]] = 1e9
        self._said += 1
        return logits


def slow(tokenizer: Any, *, seconds: float = 0.01) -> Callable[[Tensor, Tensor], Tensor]:
    """A processor that takes its time."""

    def process(ids: Tensor, logits: Tensor) -> Tensor:
        time.sleep(seconds)
        return logits

    return process


def broken(tokenizer: Any, *, after: int = 0, message: str = "a bug") -> Callable[[Tensor, Tensor], Tensor]:
    """A processor that raises after some calls."""
    calls = 0

    def process(ids: Tensor, logits: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > after:
            raise ZeroDivisionError(message)
        return logits

    return process


class Helpers:
    """What tests ask for by name."""

    @hookimpl
    def logits_processors(self) -> dict[str, Any]:
        """Slow, broken, and one that says what it is told."""
        say = lambda tokenizer, *, text, wait=0.0: Speaking(text, wait=wait)
        return {"slow": slow, "broken": broken, "say": say}


SLOW = {"plugin_processors": {"slow": {"seconds": 0.01}}}


def say(text: str, **options: Any) -> dict[str, Any]:
    """For `extra_body`: the model says this."""
    return {"plugin_processors": {"say": {"text": text, **options}}, "ignore_eos": False, "temperature": 0}


def plugins() -> Plugins:
    """The built-ins, what keeps to forms, and the helpers."""
    found = load_plugins(only=["specgen-grammar"])
    found.register(Helpers(), "helpers")
    return found


def engine(**options: Any) -> Engine:
    """An engine of its own for a test."""
    return Engine(model(), tokenizer(), **{"plugins": plugins(), "kv_tokens": 8192, **options})


@dataclass(frozen=True, slots=True)
class World:
    """A running server."""

    engine: Engine
    service: Service
    url: str
    http: ClientSession
    app: web.Application
    runner: Runner
    clients: list[AsyncOpenAI] = field(default_factory=list)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rsplit(":", 1)[1])

    def client(self, key: str = "any", **options: Any) -> AsyncOpenAI:
        """OpenAI's own client, which does not try again."""
        options = {"max_retries": 0, "timeout": SECONDS, **options}
        self.clients.append(AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, **options))
        return self.clients[-1]

    def routes(self) -> list[web.AbstractRoute]:
        """All that the app serves, those of sub-applications too."""
        return list(self.app.router.routes())

    async def statuses(self, key: str | None) -> dict[str, int]:
        """What each route, found by asking the app, answers to this key and no body. A path that is none counts."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        names = [f"{route.method} {getattr(route.resource, 'canonical', '')}" for route in self.routes()]
        found = {}
        for name in [*names, "GET /nowhere"]:
            method, path = name.replace("{model}", "tiny").split(" ")
            async with self.http.request(method, f"{self.url}{path}", headers=headers) as answer:
                found[name] = answer.status
        return found

    async def metrics(self) -> dict[str, float]:
        """Sample with its labels -> value."""
        async with self.http.get(f"{self.url}/metrics") as answer:
            lines = (await answer.text()).splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}

    async def idle(self) -> None:
        """Wait until nothing runs; then nothing may be held."""
        await until(lambda: not (self.service.generations.gate.sequences or self.engine._core.busy))
        await asyncio.to_thread(self.engine.check)


@asynccontextmanager
async def serving(own: Engine | None = None, *, name: str = "tiny", **settings: Any) -> AsyncIterator[World]:
    """A server on a free port, with everything given back at the end."""
    found = own or engine()
    app = build_app(found, ServerConfig(served_model_name=name, **settings))
    runner = Runner(app, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    async with ClientSession() as http:
        world = World(found, app[SERVICE], f"http://127.0.0.1:{runner.addresses[0][1]}", http, app, runner)
        try:
            yield world
            if found.failure is None:
                await world.idle()
        finally:
            for client in world.clients:
                await client.close()
            await runner.cleanup()
            if own is None:
                await asyncio.to_thread(found.close)


async def until(condition: Callable[[], object], seconds: float = SECONDS) -> None:
    """Wait for what is about to happen."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("it never happened")
        await asyncio.sleep(0.005)


async def doors(own: Engine | None = None) -> dict[str, list[str]]:
    """The routes of a server with keys, by who is let in: everybody, and the admin alone."""
    async with serving(own, api_keys=("onekey",), admin_key="admin") as world:
        nobody, user, admin = [await world.statuses(key) for key in (None, "onekey", "admin")]
    return {
        "open": sorted(name for name, status in nobody.items() if status != 401),
        "admin": sorted(name for name, status in user.items() if status == 403),
        "shut": sorted(name for name in admin if 401 in (user[name], admin[name]) or admin[name] == 403),
    }


def answered_by_curl(command: str, path: Path) -> str:
    """What a shell command with curl prints, against a server around the model in `path` instead of port 8000."""

    async def run() -> str:
        own = Engine.from_pretrained(path, kv_tokens=1024, max_context=512)
        async with serving(own) as world:
            here = command.replace("http://127.0.0.1:8000", world.url).replace("curl", "curl -sS", 1)
            process = await asyncio.create_subprocess_shell(here, stdout=asyncio.subprocess.PIPE)
            out, _ = await process.communicate()
        own.close()
        return out.decode()

    return asyncio.run(run())
