"""What the server promises as a whole: texts are the engine's, the description is true, the figures add up."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openapi_spec_validator import validate

from specgen import Chat, Engine
from tests.support.adapters import save_adapter
from tests.support.broken_adapters import cut, pickled
from tests.support.servers import HELLO, SCHEMA, World, engine, model, serving

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ("one two three, one two three", "hello", "the same the same the same", "a,b,a,b,a,b,a,")


@pytest.fixture(scope="module")
def grammar_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """With grammars, and an adapter "mine"."""
    with engine() as own:
        own.adapters.load("mine", save_adapter(model(), tmp_path_factory.mktemp("adapter")))
        yield own


def mixed(number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of request `number`, and the engine's own options for the same."""
    options: dict[str, Any] = {"max_tokens": 8 + number % 13, "temperature": 0.0}
    if number % 3:
        options |= {"temperature": 0.5 + number % 4 / 4, "seed": number, "top_k": (0, 20, 90)[number % 3]}
    if number % 5 == 1:
        options |= {"repetition_penalty": 1.2, "presence_penalty": 0.5}
    if number % 7 == 2:
        options |= {"stop": ["a", "w"], "logit_bias": {70: 2.0}}
    fields = {**options, "logit_bias": {"70": 2.0}} if "logit_bias" in options else dict(options)
    if number % 4 == 3:
        fields["speculation"] = {"adaptive": False, "max_nodes": 1 + number % 20}
    if number % 6 == 4:
        fields["prediction"] = {"type": "content", "content": TEXTS[number % 4] * 2}
    if number % 11 == 5:
        fields["n"] = options["n"] = 3
    if number % 10 == 6:
        fields["model"] = options["adapter"] = "mine"
    if number % 9 == 7:
        fields["structured_outputs"] = {"json": SCHEMA}
        options["constraint"] = {"json_schema": SCHEMA}
        fields["max_tokens"] = options["max_tokens"] = 60
    return fields, options


async def ask(world: World, number: int) -> list[str]:
    """Send it one way or another; the texts by choice."""
    fields, _ = mixed(number)
    path, key = ("chat/completions", "message") if number % 2 else ("completions", "text")
    text = f"{TEXTS[number % 4]} {number % 10}"
    prompt = {"messages": [{"role": "user", "content": text}]} if number % 2 else {"prompt": text}
    body = {"model": "tiny", **prompt, **fields, "stream": number % 5 > 2}
    async with world.http.post(f"{world.url}/v1/{path}", json=body) as answer:
        raw = await answer.text()
    assert answer.status == 200, raw
    if not body["stream"]:
        choices = json.loads(raw)["choices"]
        return [choice[key]["content"] if key == "message" else choice[key] for choice in choices]
    texts = [""] * fields.get("n", 1)
    for frame in raw.split("\n\n")[:-2]:
        for choice in json.loads(frame.removeprefix("data: "))["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "") if number % 2 else choice["text"]
    return texts


@pytest.mark.parametrize("requests", [50, pytest.param(200, marks=pytest.mark.slow)])
async def test_mixed_requests_at_once_say_what_the_engine_says(grammar_engine: Engine, requests: int) -> None:
    """Greedy, seeded, chats, texts, whole, streamed, with stops, predictions, schemas, adapters, n, drafted or not."""
    own = grammar_engine

    def expected(number: int) -> list[str]:
        text = f"{TEXTS[number % 4]} {number % 10}"
        prompt: Any = Chat([{"role": "user", "content": text}]) if number % 2 else text
        found = own.generate(prompt, speculation="off", **mixed(number)[1])
        return [result.text for result in (found if isinstance(found, list) else [found])]

    alone = [await asyncio.to_thread(expected, number) for number in range(requests)]
    async with serving(own) as world:
        assert await asyncio.gather(*(ask(world, number) for number in range(requests))) == alone


async def test_the_engines_own_speculation_is_what_requests_get_that_say_nothing() -> None:
    with engine(speculation="off") as own:
        async with serving(own) as world:
            asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 30, "temperature": 0}
            silent: Any = await world.client().chat.completions.create(**asked)
            eager: Any = await world.client().chat.completions.create(
                **asked, extra_body={"speculation": {"adaptive": False}}
            )
    assert silent.metrics["speculative_decoding"]["num_draft_tokens"] == 0
    assert eager.metrics["speculative_decoding"]["num_draft_tokens"] > 0


async def test_adapters_are_models_loaded_from_below_their_root_alone(tmp_path: Path) -> None:
    """And an adapted text is the engine's own."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "good", outside):
        save_adapter(model(), folder)
    (root / "link").symlink_to(outside)
    for fault in (pickled, cut):
        fault(save_adapter(model(), root / fault.__name__))
    with engine(adapters={"root": root}) as own:
        async with serving(own, admin_key="boss") as world:

            async def post(verb: str, **body: Any) -> int:
                headers = {"Authorization": "Bearer boss"}
                url = f"{world.url}/v1/{verb}_lora_adapter"
                async with world.http.post(url, json={"lora_name": "mine", **body}, headers=headers) as answer:
                    assert str(root) not in await answer.text()
                    return answer.status

            for path in ("../outside", str(outside), "link", ".", "good/../..", "~", "missing", "pickled", "cut"):
                assert await post("load", lora_path=path) == 400, path
            assert not (root / "pickled" / "trace").exists()
            assert await post("load", lora_path="good", lora_name="tiny") == 400
            assert await post("unload") == 400
            assert await post("load", lora_path="good") == 200
            assert await post("load", lora_path="good") == 400
            assert await post("load", lora_path="good", load_inplace=True) == 200
            client = world.client("boss")
            listed = {card.id: card.parent for card in (await client.models.list()).data}  # type: ignore[attr-defined]
            assert listed == {"tiny": None, "mine": "tiny"}
            options: dict[str, Any] = {"max_tokens": 20, "temperature": 0.0}
            texts = {}
            for name in listed:
                answer = await client.chat.completions.create(model=name, messages=HELLO, **options)
                assert answer.model == name
                texts[name] = answer.choices[0].message.content
            assert texts["mine"] == own.generate(Chat(HELLO), adapter="mine", **options).text
            assert texts["mine"] != texts["tiny"] == own.generate(Chat(HELLO), **options).text
            assert await post("unload") == 200
            with pytest.raises(openai.NotFoundError):
                await client.chat.completions.create(model="mine", messages=HELLO)


@pytest.mark.parametrize("prompts", [8, pytest.param(100, marks=pytest.mark.slow)])
async def test_texts_keep_to_their_schema_drafted_or_not(grammar_engine: Engine, prompts: int) -> None:
    """Chats, whole and streamed."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    async with serving(grammar_engine) as world:
        client = world.client()

        async def ask(number: int, speculation: Any) -> str:
            messages: Any = [{"role": "user", "content": f"{number}"}]
            asked: dict[str, Any] = {"model": "tiny", "max_tokens": 200, "temperature": 1.0, "seed": number}
            asked |= {"response_format": form, "extra_body": {"speculation": speculation}, "messages": messages}
            if number % 2:
                return (await client.chat.completions.create(**asked)).choices[0].message.content or ""
            stream = await client.chat.completions.create(**asked, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        plain = await asyncio.gather(*(ask(number, "off") for number in range(prompts)))
        assert await asyncio.gather(*(ask(number, {"adaptive": False}) for number in range(prompts))) == plain
        for text in plain:
            found = json.loads(text)
            assert found["kind"] in ("a", "b")
            assert 0 <= found["count"] <= 999


async def test_the_metrics_count_what_was_served(shared_engine: Any) -> None:
    async with serving(shared_engine, metrics_compat="vllm", request_metrics="detailed") as world:
        client = world.client()
        extra = {"speculation": {"adaptive": False}}
        answers = [
            await client.chat.completions.create(
                model="tiny", messages=HELLO, max_tokens=20 + n, temperature=0, extra_body=extra
            )
            for n in range(3)
        ]
        for n in range(2):
            async with world.http.post(f"{world.url}/v1/chat/completions", json={"n": n - 1}) as answer:
                assert answer.status == 400
        found = await world.metrics()
    label = '{model_name="tiny"}'
    stats = [answer.metrics["speculative_decoding"] for answer in answers]  # type: ignore[attr-defined]
    assert found[f"specgen:generation_tokens_total{label}"] == 63
    assert found[f"specgen:prompt_tokens_total{label}"] == sum(a.usage.prompt_tokens for a in answers if a.usage)
    assert found['specgen:request_success_total{finished_reason="length",model_name="tiny"}'] == 3
    assert found[f"specgen:e2e_request_latency_seconds_count{label}"] == 3
    assert found[f"specgen:time_to_first_token_seconds_count{label}"] == 3
    assert found[f"specgen:num_requests_running{label}"] == 0
    for name, key in (("draft_tokens", "num_draft_tokens"), ("accepted_tokens", "num_accepted_draft_tokens")):
        assert found[f"specgen:spec_decode_num_{name}_total{label}"] == sum(each[key] for each in stats)
    drafts = sum(1 for each in stats for drafted in each["per_step_drafted"] if drafted)
    assert found[f"specgen:spec_decode_num_drafts_total{label}"] == drafts
    per_position = [
        value for name, value in found.items() if "specgen:spec_decode_num_accepted_tokens_per_pos_total" in name
    ]
    assert sum(per_position) == sum(each["num_accepted_draft_tokens"] for each in stats)
    assert found['specgen:http_requests_total{model_name="tiny",route="/v1/chat/completions",status="400"}'] == 2
    ours = {name for name in found if name.startswith("specgen:")}
    assert {name.replace("specgen:", "vllm:") for name in ours} == {name for name in found if name.startswith("vllm:")}


async def test_per_request_metrics_hold_together(shared_engine: Any) -> None:
    async with serving(shared_engine, request_metrics="detailed") as world:
        extra = {"speculation": {"adaptive": False}}
        asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 30, "temperature": 0}
        answer: Any = await world.client().chat.completions.create(**asked, extra_body=extra)
        found = answer.metrics["speculative_decoding"]
        assert sum(found["per_step_accepted"]) == found["num_accepted_draft_tokens"]
        assert sum(found["per_step_drafted"]) == found["num_draft_tokens"]
        assert found["num_spec_steps"] + found["num_accepted_draft_tokens"] == 30
        assert sum(found["acceptance_histogram"]) == found["num_spec_steps"]
        several: Any = await world.client().chat.completions.create(**asked, n=2, extra_body=extra)
        assert several.metrics["speculative_decoding"] is None


async def test_padded_chunks_tell_little_by_their_size(world: World) -> None:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 20, "temperature": 0, "stream": True}
    async with world.http.post(
        f"{world.url}/v1/chat/completions", json={**body, "stream_options": {"include_obfuscation": True}}
    ) as answer:
        frames = (await answer.text()).split("\n\n")[:-2]
    sizes = {len(frame.encode()) for frame in frames}
    assert len(sizes) <= 2
    assert len(frames) > 5


async def test_the_description_is_valid_and_lists_every_route(world: World) -> None:
    async with world.http.get(f"{world.url}/openapi.json") as answer:
        document = await answer.json()
    validate(document)
    served = {
        route.resource.canonical
        for route in world.routes()
        if route.resource and not route.resource.canonical.startswith("/page") and route.resource.canonical != "/"
    }
    assert set(document["paths"]) == served
    (named,) = document["paths"]["/v1/models/{model}"]["get"]["parameters"]
    assert (named["name"], named["in"]) == ("model", "path")
    # An adapter that does not fit is a 400 too.
    assert not any("422" in kind["responses"] for path in document["paths"].values() for kind in path.values())
    chat = document["components"]["schemas"]["ChatRequest"]
    assert {"messages", "prediction", "speculation"} <= set(chat["properties"])
    assert chat["required"] == ["messages"]


@pytest.mark.slow
async def test_the_description_withstands_fuzzing(tmp_path: Path) -> None:
    """schemathesis: no 5xx and no undocumented answer for whatever it makes up; the engine lives and holds nothing."""
    with engine(max_context=64, kv_tokens=1024, adapters={"root": tmp_path}) as own:
        async with serving(own, max_n=2, request_seconds=5) as world:
            command = [sys.executable, "-m", "schemathesis.cli", "run", f"{world.url}/openapi.json"]
            options = ["--max-examples", "12", "--seed", "1", "--phases", "examples,fuzzing", "--no-color"]
            checks = [
                "--checks",
                "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
            ]
            done = await asyncio.to_thread(
                subprocess.run,
                [*command, *options, *checks],
                capture_output=True,
                text=True,
                check=False,
                timeout=300,
                cwd=tmp_path,
            )
            assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
            assert "passed" in done.stdout
            assert await ask(world, 0)
