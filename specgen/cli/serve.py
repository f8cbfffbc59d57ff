"""`specgen serve`: an OpenAI-compatible server around a model."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Annotated

import typer

from specgen.cli import options
from specgen.cli.loading import engine_of, needing
from specgen.cli.terminal import note, quiet_libraries

if TYPE_CHECKING:
    from collections.abc import Sequence
    from socket import socket

    from specgen.api.engine import Engine
    from specgen.server.config import ServerConfig


Config = Annotated[str | None, typer.Option(metavar="FILE", help="Settings as TOML or JSON.")]
Host = Annotated[str | None, typer.Option(metavar="NAME", help="Where to listen. Default: 127.0.0.1.")]
Port = Annotated[int | None, typer.Option(metavar="N", help="Default: 8000; 0 takes a free one.")]
ServedName = Annotated[
    str | None, typer.Option(metavar="NAME", help="What requests call it. Default: the last part of its path.")
]
AllowedHost = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help="A name it may be called by; '*' is any. Default: local ones.")
]
ApiKey = Annotated[list[str] | None, typer.Option(metavar="KEY", help="Who may ask. May be given several times.")]
AdminKey = Annotated[str | None, typer.Option(metavar="KEY", help="Who may load adapters.")]
LoraRoot = Annotated[str | None, typer.Option(metavar="FOLDER", help="Where adapters may be loaded from.")]
MaxQueued = Annotated[
    int | None, typer.Option(metavar="N", help="Sequences that may wait; more are answered 429. Default: 256.")
]
MaxWaiting = Annotated[
    float | None, typer.Option(metavar="S", help="How long a request may wait for its turn. Default: no limit.")
]
ShutdownTimeout = Annotated[
    float | None, typer.Option(metavar="S", help="How long requests may go on after SIGTERM. Default: 30.")
]
MetricsCompat = Annotated[
    str | None, typer.Option(metavar="none|vllm", help="Export the metrics under vLLM's prefix too.")
]
PluginRoutes = Annotated[list[str] | None, typer.Option(metavar="PLUGIN", help="A plugin that may add routes.")]
LogFormat = Annotated[str | None, typer.Option(metavar="console|json", help="How log lines look.")]
Speculation = Annotated[
    str | None, typer.Option(metavar="auto|off|JSON", help="How to draft; the text stays the same.")
]
MaxNumSeqs = Annotated[int | None, typer.Option(metavar="N", help="Sequences that run at once. Default: 16.")]


def serve(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Model folder or name. Default: the demo model.")
    ] = None,
    config: Config = None,
    host: Host = None,
    port: Port = None,
    served_model_name: ServedName = None,
    allowed_host: AllowedHost = None,
    api_key: ApiKey = None,
    admin_key: AdminKey = None,
    lora_root: LoraRoot = None,
    max_queued: MaxQueued = None,
    max_waiting: MaxWaiting = None,
    shutdown_timeout: ShutdownTimeout = None,
    metrics_compat: MetricsCompat = None,
    plugin_routes: PluginRoutes = None,
    log_format: LogFormat = None,
    speculation: Speculation = None,
    draft_model: options.DraftModel = None,
    drafters: options.Drafters = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    max_context: options.MaxContext = None,
    kv_tokens: options.KVTokens = None,
    kv_format: options.KVFormatName = None,
    max_num_seqs: MaxNumSeqs = None,
    gguf_file: options.GgufFile = None,
) -> None:
    """Serve a model to OpenAI's clients.

    Every setting can also come from a file (--config) or the environment (SPECGEN_SERVER_PORT=8080); flags win.
    """
    flags: dict[str, object] = {
        "host": host,
        "port": port,
        "served_model_name": served_model_name,
        "allowed_hosts": allowed_host,
        "api_keys": api_key,
        "admin_key": admin_key,
        "max_queued": max_queued,
        "max_waiting_seconds": max_waiting,
        "shutdown_seconds": shutdown_timeout,
        "metrics_compat": metrics_compat,
        "plugin_routes": plugin_routes,
        "log_format": log_format,
    }
    sizes = {"max_context": max_context, "kv_tokens": kv_tokens, "kv_format": kv_format, "max_num_seqs": max_num_seqs}
    chosen = {**sizes, "draft_model": draft_model, **_engine_flags(lora_root, drafters, speculation)}
    flags["engine"] = {name: value for name, value in chosen.items() if value is not None}
    _serve(_settings(config, flags), model, dtype=dtype, device=device, gguf_file=gguf_file)


def _engine_flags(lora_root: str | None, drafters: str | None, speculation: str | None) -> dict[str, object]:
    """Flags that an engine calls otherwise."""
    return {
        "adapters": None if lora_root is None else {"root": lora_root},
        "drafters": options.drafter_list(drafters),
        "speculation": None if speculation is None else options.read_speculation(speculation),
    }


def _serve(settings: ServerConfig, model: str | None, *, dtype: str, device: str | None, gguf_file: str | None) -> None:
    quiet_libraries()
    with needing("server"):
        from specgen.server.admission import AdmissionControl
        from specgen.server.logs import configure
        from specgen.server.plugin_routes import check_plugin_routes
        from specgen.server.serve import bound

    configure(settings)
    # What is wrong with a setting, or a port that is taken, is told before a model is loaded for minutes.
    AdmissionControl(settings, 1)
    check_plugin_routes(settings)
    with (
        bound(settings) as sockets,
        engine_of(model, settings.engine, dtype=dtype, device=device, gguf_file=gguf_file) as engine,
    ):
        _run(engine, settings, sockets)


def _settings(file: str | None, flags: dict[str, object]) -> ServerConfig:
    from specgen.server.config import ServerConfig

    return ServerConfig.load(file, flags=flags)


def _run(engine: Engine, settings: ServerConfig, sockets: Sequence[socket]) -> None:
    import asyncio

    from specgen.server.serve import serve as run

    # What a model and its compiler have built stays. Python would look through all of it now and then, and everybody
    # would wait for half a second.
    gc.collect()
    gc.freeze()
    if not asyncio.run(run(engine, settings, sockets, lambda address: note(f"serving at {address}"))):
        raise typer.Exit(1)
