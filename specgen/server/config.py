"""How a server is set up: a file, then the environment over it, then the flags of the command line over both."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec

from specgen.errors import InvalidRequest, UnknownName

PREFIX: Final = "SPECGEN_SERVER_"
"""Environment variables: SPECGEN_SERVER_PORT=8080, SPECGEN_SERVER_API_KEYS='["one", "two"]'."""

_Count = Annotated[int, msgspec.Meta(ge=0)]
_Positive = Annotated[int, msgspec.Meta(ge=1)]
_Seconds = Annotated[float, msgspec.Meta(gt=0)]


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of a server; those of its engine stand in `engine`, as in `EngineConfig`.

    Place. host and port to listen on; port 0 takes a free one. served_model_name: what requests call the model; None
    takes the last part of its path.

    allowed_hosts: names that the server may be called by, "*" for any; none means that without keys at a loopback
    address only local names are served, and all of them elsewhere. max_connections: at once; more are answered 503.

    Keys. api_keys: who may ask; none means everybody. admin_key: who may load adapters; None means nobody.

    Limits. max_queued: sequences that may wait beside the `max_num_seqs` of the engine; more are answered 429, and each
    of a request's n counts. key_sequences: most sequences of one key at once. key_rate: requests of one key, such as
    "100/minute". body_bytes: largest body. max_n, max_prompts: sequences and prompts of one request.
    max_waiting_seconds: how long a request may wait before the engine begins with it; then, or where the queue is known
    to take longer, it is answered 429. None is no limit.
    request_seconds: how long a request may take from its arrival. write_seconds: how long a client may leave what it
    is sent unread. ping_seconds: a comment goes to a stream that was silent so long.
    shutdown_seconds: how long requests may go on after SIGTERM. stall_seconds: no step for so long means unhealthy.
    failed_steps: so many failed steps in a row mean unhealthy.

    Answers. request_metrics: acceptance of each request under vLLM's names. template_options: what requests may set
    in chat_template_kwargs. metrics_compat: "vllm" exports the metrics under vLLM's prefix too.
    page: serve the playground at "/". plugin_routes: plugins that may add routes, by distribution.
    log_format: how log lines look; log_level: the least that is written.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 8000
    served_model_name: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    max_connections: _Positive = 4096
    api_keys: tuple[str, ...] = ()
    admin_key: str | None = None
    max_queued: _Count = 256
    key_sequences: _Positive | None = None
    key_rate: str | None = None
    body_bytes: _Positive = 4 << 20
    max_n: Annotated[int, msgspec.Meta(ge=1, le=128)] = 16
    max_prompts: _Positive = 64
    max_waiting_seconds: _Seconds | None = None
    request_seconds: _Seconds = 600.0
    write_seconds: _Seconds = 30.0
    ping_seconds: _Seconds = 15.0
    shutdown_seconds: Annotated[float, msgspec.Meta(ge=0)] = 30.0
    stall_seconds: _Seconds = 120.0
    failed_steps: _Positive = 3
    request_metrics: Literal["none", "summary", "detailed"] = "summary"
    template_options: tuple[str, ...] = ("enable_thinking",)
    metrics_compat: Literal["none", "vllm"] = "none"
    page: bool = True
    plugin_routes: tuple[str, ...] = ()
    log_format: Literal["console", "json"] = "console"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    engine: Mapping[str, Any] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in (*self.api_keys, *([] if self.admin_key is None else [self.admin_key])):
            if len(key) < 1 or not key.isascii() or not key.isprintable() or " " in key:
                raise InvalidRequest("a key is empty or holds more than visible ASCII characters", param="api_keys")
        for host in self.allowed_hosts:
            if not host or any(letter in host for letter in "/@ ") or ("*" in host and host != "*"):
                message = f"allowed_hosts holds {host!r}; it must hold names such as 'llm.example', or '*' alone"
                raise InvalidRequest(message, param="allowed_hosts")

    @classmethod
    def load(
        cls,
        file: str | Path | None = None,
        environment: Mapping[str, str] = os.environ,
        flags: Mapping[str, object] | None = None,
    ) -> ServerConfig:
        """Read a TOML or JSON file, the environment and flags; what comes later wins, None as a flag says nothing.

        Raises InvalidRequest or UnknownName, naming the setting and where it was made.
        """
        values: dict[str, Any] = {}
        for source, found in (
            (f"file {file}", _file(Path(file)) if file else {}),
            ("the environment", _environment(environment)),
            ("the command line", {name: value for name, value in (flags or {}).items() if value is not None}),
        ):
            for name in found:
                if name not in cls.__struct_fields__:
                    raise UnknownName(f"server setting in {source}:", name, cls.__struct_fields__, param=name)
            chosen = found.get("engine", {})
            if not isinstance(chosen, Mapping):
                message = f"server setting engine in {source} is {chosen!r}; it must hold settings by name"
                raise InvalidRequest(message, param="engine")
            engine = {**values.get("engine", {}), **chosen}
            values |= {**found, "engine": engine}
        try:
            return msgspec.convert(values, cls, strict=False)
        except msgspec.ValidationError as error:
            raise InvalidRequest(f"server setting: {error}", param="config") from None


def _file(path: Path) -> dict[str, object]:
    try:
        text = path.read_text(encoding="utf-8")
        found: object = msgspec.json.decode(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"config file {path} cannot be read: {error}", param="config") from None
    if not isinstance(found, dict):
        raise InvalidRequest(f"config file {path} holds no settings", param="config")
    return found


def _environment(environment: Mapping[str, str]) -> dict[str, object]:
    """What begins with the prefix; lists and mappings are written as JSON."""
    found: dict[str, object] = {}
    for name, value in environment.items():
        if name.startswith(PREFIX):
            found[name.removeprefix(PREFIX).lower()] = _value(value)
    return found


def _value(text: str) -> object:
    if not text.startswith(("[", "{")):
        return text
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text
