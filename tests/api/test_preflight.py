"""What is wrong with an option is told before a model's weights are read, in Python and on the command line."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

import specgen
from specgen import Engine, InvalidRequest, UnknownName
from specgen import demo_model as demo
from specgen.cli.app import app
from specgen.plugins.manager import Plugins, load_plugins
from tests.support.tiny import build


class WeightsRead(Exception):
    """It came that far."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    build("llama").save_pretrained(place)
    return place


@pytest.fixture(autouse=True)
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Models that were read; none is."""
    seen: list[Any] = []

    def from_pretrained(source: Any, **options: Any) -> PreTrainedModel:
        seen.append(source)
        raise WeightsRead

    for owner in (AutoModelForCausalLM, PreTrainedModel):
        monkeypatch.setattr(owner, "from_pretrained", from_pretrained)
    monkeypatch.setattr(demo, "demo_model", lambda **options: seen.append("demo"))
    return seen


def test_the_trap_catches(folder: Path, loads: list[Any]) -> None:
    with pytest.raises(WeightsRead):
        Engine.from_pretrained(folder)
    assert loads == [folder]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown option": ({"kvformat": "int8"}, "unknown engine option 'kvformat'; .*did you mean 'kv_format'"),
    "dashes for underscores": ({"max-context": 5}, "did you mean 'max_context'"),
    "torch_dtype": ({"torch_dtype": "float16"}, "'torch_dtype'.*; use dtype of Engine.from_pretrained"),
    "device_map": ({"device_map": "auto"}, "'device_map'.*use device, or .*model_options"),
    "attn_implementation": ({"attn_implementation": "eager"}, "attends by a function of its own; leave it out"),
    "load_in_8bit": ({"load_in_8bit": True}, "use quantization_config"),
    "max_model_len": ({"max_model_len": 64}, "use max_context"),
    "gpu_memory_utilization": ({"gpu_memory_utilization": 0.9}, "use kv_tokens"),
    "max_new_tokens": ({"max_new_tokens": 9}, "it belongs to a request"),
    "fp16": ({"dtype": "fp16"}, "dtype is 'fp16'; choices: auto, .*did you mean 'float16'"),
    "a dtype of whole numbers": ({"dtype": torch.int8}, "dtype is torch.int8; choices: auto, float32"),
    "a device that there is not": ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
    "a device that is none": ({"device": "gpu"}, "device 'gpu' cannot be used"),
    "a KV format": ({"kv_format": "int3"}, "unknown KV format 'int3'; choices: .*k8v4"),
    "a drafter": ({"drafters": ["promptlookup"]}, "unknown drafter 'promptlookup'.*did you mean 'prompt-lookup'"),
    "a drafter's option": ({"drafters": {"recycling": {"memroy": 3}}}, "option of drafter 'recycling'.*mean 'memory'"),
    "a drafter's range": ({"drafters": {"prompt-lookup": {"branches": 99}}}, "drafter 'prompt-lookup': branches is 99"),
    "a drafter's type": ({"drafters": {"prompt-lookup": {"branches": "3"}}}, "branches is '3'"),
    "a draft model's option": ({"drafters": {"draft-model": {"model": "x", "depth": 0}}}, "depth is 0"),
    "no draft model": ({"drafters": ["draft-model"]}, "needs the option model"),
    "a draft model nowhere": ({"draft_model": "/nowhere/at/all"}, "model '/nowhere/at/all' cannot be loaded"),
    "a draft model that is no path": ({"draft_model": 5}, "model is 5; it must be a path or a name"),
    "a GGUF draft model nowhere": ({"draft_model": "/nowhere/x.gguf"}, "there is no such file"),
    "speculation with nobody": ({"speculation": {"drafters": ["suffix"]}}, "unknown drafter 'suffix'"),
    "a stage": ({"context": ["chat_template"]}, "unknown context stage 'chat_template'.*mean 'chat-template'"),
    "a stage's option": (
        {"context": ["chat-template", ("truncate", {"most": 3})]},
        "option of context stage 'truncate'",
    ),
    "a stage's range": ({"context": [("truncate", {"max_tokens": 0})]}, "max_tokens is 0"),
    "model options that are none": ({"model_options": "auto"}, "model_options is 'auto'; it must be a mapping"),
    "a dtype twice": ({"model_options": {"torch_dtype": "float16"}}, "'torch_dtype', which has an argument of its own"),
    "an adapter root nowhere": ({"adapters": {"root": "/nowhere"}}, "adapters.root is '/nowhere', which is no folder"),
    "a disk cache on a file": ({"disk_cache": f"{__file__}/pages"}, "it is, or lies below, a file"),
    "caches beyond memory": (
        {"host_cache_bytes": 1 << 50, "response_cache_bytes": 1 << 20},
        "host_cache_bytes is 1125899906842624 and response_cache_bytes is 1048576, and [0-9]+ bytes",
    ),
    "seconds": ({"inter_token_seconds": 0}, "inter_token_seconds is 0; it must be a finite number above 0"),
    "a GGUF file that is not there": ({"gguf_file": "none.gguf"}, "has no file 'none.gguf'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_option_is_told_before_weights_are_read(folder: Path, loads: list[Any], name: str) -> None:
    options, message = WRONG[name]
    with pytest.raises(InvalidRequest, match=f"(?s){message}"):
        Engine.from_pretrained(folder, **options)
    assert loads == []


def test_options_that_plugins_declare_are_checked_too(folder: Path, loads: list[Any], tmp_path: Path) -> None:
    for drafters, message in (
        ({"echo": {"hit_rat": 1}}, "option of drafter 'echo'"),
        ({"suffix": {"memory": -1}}, "drafter 'suffix': memory is -1"),
        ({"eagle": {}}, "needs the option path"),
        ({"eagle": {"path": str(tmp_path)}}, "holds no head: there is no config.json"),
    ):
        (name,) = drafters
        plugins: Plugins = load_plugins(only=[])
        plugins.register(__import__(f"specgen_{name}"), name)
        with pytest.raises(InvalidRequest, match=message):
            Engine.from_pretrained(folder, drafters=drafters, plugins=plugins)
    assert loads == []


def test_a_model_that_is_loaded_is_to_be_wrapped(loads: list[Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"give it to specgen\.wrap"):
        Engine.from_pretrained(build("llama"))  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="model is None; it must be a path or a name"):
        Engine.from_pretrained(None)  # type: ignore[arg-type]


def test_an_engine_calls_what_loads_its_model_when_all_is_checked() -> None:
    calls: list[None] = []

    def load() -> PreTrainedModel:
        calls.append(None)
        return build("llama")

    with pytest.raises(UnknownName):
        Engine(load, drafters=["magic"])
    assert calls == []
    with Engine(load, drafters=[], kv_tokens=64) as engine:
        assert engine.model.config.model_type == "llama"
    assert len(calls) == 1


def test_a_stage_is_built_once(folder: Path, loads: list[Any]) -> None:
    built: list[Any] = []

    class Stages:
        @specgen.hookimpl
        def context_stages(self) -> dict[str, Any]:
            return {"mine": lambda tokenizer, options: built.append(options) or (lambda context: context)}

    plugins = load_plugins()
    plugins.register(Stages(), "mine")
    with Engine(lambda: build("llama"), context=["mine"], kv_tokens=64, plugins=plugins):
        assert built == [{}]


def test_what_a_factory_refuses_in_pythons_own_words_is_a_wrong_option() -> None:
    """A keyword that it does not have is the user's mistake; what else it raises is the plugin's."""

    def dividing(width: int = 2) -> Any:
        return width // 0

    class Plain:
        @specgen.hookimpl
        def drafters(self) -> dict[str, Any]:
            return {"plain": lambda setup: dividing(**setup.options)}

        @specgen.hookimpl
        def context_stages(self) -> dict[str, Any]:
            return {"plain": lambda tokenizer, options: dividing(**options)}

    plugins = load_plugins()
    plugins.register(Plain(), "plain")
    own: dict[str, Any] = {"kv_tokens": 64, "plugins": plugins}
    with pytest.raises(InvalidRequest, match=r"drafter 'plain' refuses {'widht': 3}: .*widht") as caught:
        Engine(build("llama"), drafters={"plain": {"widht": 3}}, **own)
    assert caught.value.param == "drafters"
    with pytest.raises(InvalidRequest, match=r"context stage 'plain' refuses {'widht': 3}: .*widht") as caught:
        Engine(build("llama"), context=[("plain", {"widht": 3})], **own)
    assert caught.value.param == "context"
    with pytest.raises(specgen.PluginError, match=r"drafter 'plain' cannot be made of {}: ZeroDivisionError"):
        Engine(build("llama"), drafters=["plain"], **own)


def test_a_home_folder_is_the_users(folder: Path, loads: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    with pytest.raises(WeightsRead):
        Engine.from_pretrained(f"~/{folder.name}")
    assert loads == [folder]
    with pytest.raises(InvalidRequest, match=r"'\./nowhere' cannot be loaded: there is no such folder"):
        Engine.from_pretrained("./nowhere")


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setenv("SPECGEN_PLUGINS", "")
    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening.getsockname()[1]


GENERATE: dict[str, tuple[tuple[str, ...], str]] = {
    "context": (("--max-context", "0"), "max_context is 0"),
    "KV": (("--kv-tokens", "-1"), "kv_tokens is -1"),
    "drafters": (("--drafters", "prompt_lookup"), "did you mean 'prompt-lookup'"),
    "a request's drafters": (("--speculation", '{"drafters": ["magic"]}'), "unknown drafter 'magic'"),
    "dtype": (("--dtype", "fp32"), "did you mean 'float32'"),
    "device": (("--device", "tpu"), "device 'tpu' cannot be used"),
    "draft model": (("--draft-model", "/nowhere"), "'/nowhere' cannot be loaded"),
}


@pytest.mark.parametrize("name", GENERATE)
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_the_command_line_checks_before_it_loads(
    invoke: Callable[..., Any], loads: list[Any], command: str, name: str
) -> None:
    """Without --model too, where the demo model would be fetched."""
    options, message = GENERATE[name]
    result = invoke(command, *(["w1"] if command == "generate" else []), *options)
    assert (result.exit_code, loads) == (2, [])
    assert message in result.stderr


def test_an_adapter_that_is_not_there(invoke: Callable[..., Any], loads: list[Any], tmp_path: Path) -> None:
    for path, message in (("/nowhere", "is no folder"), (tmp_path, "holds no adapter_config.json")):
        result = invoke("generate", "w1", "--adapter", path)
        assert (result.exit_code, loads) == (2, [])
        assert message in result.stderr


def test_the_server_checks_before_it_loads(invoke: Callable[..., Any], loads: list[Any], taken: int) -> None:
    for options, message in (
        (("--port", taken), f"port {taken} of host '127.0.0.1' is already in use"),
        (("--port", 0, "--plugin-routes", "other"), "unknown plugin with routes 'other'"),
        (("--port", 0, "--lora-root", "/nowhere"), "adapters.root is '/nowhere', which is no folder"),
        (("--port", 0, "--kv-format", "int9"), "unknown KV format 'int9'"),
        (("--port", 0, "--max-context", 8, "--kv-tokens", 0), "kv_tokens is 0"),
        (("--port", 0, "--max-num-seqs", 0), "max_num_seqs is 0"),
        (("--port", 0, "--drafters", "magic"), "unknown drafter 'magic'"),
    ):
        result = invoke("serve", *options)
        assert (result.exit_code, loads, message in result.stderr) == (2, [], True), result.stderr


def test_a_rate_that_is_none(invoke: Callable[..., Any], loads: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECGEN_SERVER_KEY_RATE", "often")
    result = invoke("serve", "--port", 0)
    assert (result.exit_code, loads) == (2, [])
    assert "key_rate is 'often'; it must be like '100/minute'" in result.stderr


def test_an_extra_that_is_missing_is_named(
    invoke: Callable[..., Any], loads: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    for module in [name for name in sys.modules if name.startswith("specgen.server.")]:
        monkeypatch.delitem(sys.modules, module)
    for package in ("aiohttp", "limits", "prometheus_client"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            result = invoke("serve", "--port", 0)
        assert (result.exit_code, loads) == (2, [])
        assert "pip install 'specgen-llm[server]'" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--url", "localhost:8000"), "url is 'localhost:8000'; it must begin with http://"),
        (("--requests", "0"), "requests is 0"),
        (("--concurrency", "0"), "concurrency is 0"),
        (("--rate", "0"), "rate is 0.0"),
        (("--rate", "2", "--concurrency", "2"), "give one"),
        (("--json", "/nowhere/x.json"), "whose folder is not there"),
    ],
)
def test_a_measurement_that_cannot_be_is_not_begun(
    invoke: Callable[..., Any], options: tuple[str, ...], message: str
) -> None:
    result = invoke("bench", "serve", *options)
    assert result.exit_code == 2
    assert message in result.stderr
