"""How an engine is set up. One frozen struct, the same for Python, the command line and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypedDict

import msgspec
from msgspec import Meta

from specgen._base.option_names import ENGINE
from specgen._base.ranges import check_ranges
from specgen.errors import InvalidRequest, UnknownName
from specgen.lora.adapter import AdapterOptions
from specgen.types import Speculation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DISK_BYTES = 10 << 30
_RESPONSE_SECONDS = 600.0
_NEEDS = (
    ("disk_cache_bytes", _DISK_BYTES, "disk_cache"),
    ("response_cache_seconds", _RESPONSE_SECONDS, "response_cache_bytes"),
)
"""What says nothing unless another option is set, its default, and that option."""

_INTER_TOKEN_SECONDS = 0.2
_Positive: TypeAlias = Annotated[int, Meta(ge=1)]
_Bytes: TypeAlias = Annotated[int, Meta(ge=0)]
_Seconds: TypeAlias = Annotated[float, Meta(gt=0)]


class EngineOptions(TypedDict, total=False):
    """The keywords of `Engine` and `wrap`, as users write them: the fields of `EngineConfig`, and `draft_model`."""

    drafters: Sequence[str] | Mapping[str, Mapping[str, object]]
    draft_model: str | Path | PreTrainedModel
    context: Sequence[str | tuple[str, Mapping[str, object]]]
    speculation: Literal["auto", "off"] | Mapping[str, object] | Speculation
    max_context: int | None
    kv_tokens: int | None
    kv_format: str
    prefix_cache: bool
    prefix_cache_bytes: int | None
    host_cache_bytes: int
    disk_cache: str | Path | None
    disk_cache_bytes: int
    response_cache_bytes: int
    response_cache_seconds: float
    batch_invariant: bool | None
    compile: bool | Literal["background"]
    cpu_kernels: bool
    gpu_kernels: bool | None
    gpu_graphs: bool
    constraint_seconds: float
    max_num_seqs: int
    max_prefill_tokens: int
    inter_token_seconds: float | None
    adapters: AdapterOptions | Mapping[str, object]


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of an engine.

    drafters: name -> options. Names are what the plugins offer. What they guess is merged into one tree of the guesses
    that survive most often: the order decides exact ties alone.
    context: the stages that turn a prompt into ids, in order; a name, or a pair of a name and its options.
    speculation: what requests do that do not say it themselves.
    max_context: most tokens of one sequence; `None` takes what the model's positions and the KV pool allow, and warns
    where the pool is the shorter; a number that memory has no room for is refused.
    kv_tokens: tokens that the KV pool holds; `None` takes a quarter of the available memory, at most 16 full contexts.
    kv_format: how the pool keeps keys and values; a name that a plugin offers ("native", "int8", "k8v4", "int4",
    "fp8"). prefix_cache: keep the KV of finished text for prompts that begin alike.
    prefix_cache_bytes: most bytes of the pool for it; `None` takes what nobody needs. host_cache_bytes: host memory
    for pages that the pool has no room for; 0 is off. disk_cache: a folder for pages that memory has no room for,
    found again by the next engine of the same model; disk_cache_bytes: most bytes there.
    response_cache_bytes: host memory for whole answers; 0 is off. A request that is greedy or has a seed, and brings no
    code of its own, is answered by what an identical one of the same cache_salt was answered within
    response_cache_seconds, or shares the run of one that is there already. `speculation` and `prediction` may differ,
    for they change no token. The result is the same under its own request_id: all its prompt counts as cached, and
    its `stats` are empty, since no step was taken for it.
    batch_invariant: compute each row so that its bits do not depend on the rows beside it. Then drafting, batch-mates
    and chunks change nothing in any dtype, at the price of slower steps and prompts. `None` turns it on where it is
    cheap, with the CPU kernels, and where exactness needs it: with a KV format that rounds, for which the last bit of a
    sum may be a step of the code, unless the model computes in float64. False forbids it: texts may then differ by what
    is drafted. With True a model that cannot do it is refused by name.
    compile: compile the model's forward: True while the engine is built, "background" while it serves already, which
    cannot be had with batch_invariant=True, since the compiled forward rounds differently. What was compiled is kept in
    the cache folder. A forward that cannot be compiled runs as it is, with a line in the log.
    cpu_kernels: False computes in plain torch what specgen's kernels for CPUs do.
    gpu_kernels: likewise for GPUs; None takes them where there is one and triton, True refuses to run without.
    gpu_graphs: False launches every kernel of a step through them by itself; by default a GPU replays steps as graphs.
    constraint_seconds: how long the constraint of a request may be compiled; then the request is refused.
    max_num_seqs: sequences in one forward. max_prefill_tokens: prompt tokens in one forward.
    inter_token_seconds: while others decode, a step reads no more of a prompt than it is expected to be through with in
    so long, so that streams go on; a few tokens at least. None: max_prefill_tokens alone.
    adapters: where LoRA adapters may lie and how many bytes they may take; see `AdapterOptions`.

    Raises InvalidRequest naming the field.
    """

    drafters: Mapping[str, Mapping[str, object]] = msgspec.field(
        default_factory=lambda: {"grammar": {}, "prediction": {}, "prompt-lookup": {}, "recycling": {}}
    )
    context: tuple[str | tuple[str, Mapping[str, object]], ...] = ("chat-template",)
    speculation: Speculation = Speculation()
    max_context: _Positive | None = None
    kv_tokens: _Positive | None = None
    kv_format: str = "native"
    prefix_cache: bool = True
    prefix_cache_bytes: _Bytes | None = None
    host_cache_bytes: _Bytes = 0
    disk_cache: str | Path | None = None
    disk_cache_bytes: _Bytes = _DISK_BYTES
    response_cache_bytes: _Bytes = 0
    response_cache_seconds: _Seconds = _RESPONSE_SECONDS
    batch_invariant: bool | None = None
    compile: bool | Literal["background"] = False
    cpu_kernels: bool = True
    gpu_kernels: bool | None = None
    gpu_graphs: bool = True
    constraint_seconds: _Seconds = 5.0
    max_num_seqs: _Positive = 16
    max_prefill_tokens: _Positive = 512
    inter_token_seconds: _Seconds | None = _INTER_TOKEN_SECONDS
    adapters: AdapterOptions = AdapterOptions()

    @classmethod
    def of(cls, options: Mapping[str, object]) -> EngineConfig:
        """Build from keywords as users write them: drafters as a list of names or a mapping, `draft_model` as a
        shorthand for the drafter of that name."""
        values: dict[str, Any] = dict(options)
        drafters = values.pop("drafters", None)
        draft_model = values.pop("draft_model", None)
        for name in values:
            if name not in cls.__struct_fields__:
                known = (*cls.__struct_fields__, "draft_model")
                raise UnknownName("engine option", name, known, param=name, hint=ENGINE.get(name))
        if drafters is not None:
            values["drafters"] = _with_options(drafters)
        if draft_model is not None:
            chosen = values["drafters"] if "drafters" in values else cls().drafters
            values["drafters"] = {**chosen, "draft-model": {**chosen.get("draft-model", {}), "model": draft_model}}
        if "speculation" in values:
            values["speculation"] = Speculation.of(values["speculation"])
        if "adapters" in values:
            values["adapters"] = AdapterOptions.of(values["adapters"])
        return cls(**values)

    @classmethod
    def chosen(cls, config: EngineConfig | None, options: Mapping[str, object]) -> EngineConfig:
        """The config of an engine: `config`, or keywords as `of` reads them. Both at once is an error."""
        if config is None:
            return cls.of(options)
        if options:
            raise InvalidRequest(f"give config or keywords, not both: {', '.join(options)}", param="config")
        if not isinstance(config, EngineConfig):
            raise InvalidRequest(f"config is {config!r}; it must be EngineConfig, or keywords", param="config")
        return config

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "drafters", _with_options(self.drafters))
        msgspec.structs.force_setattr(self, "context", _listed("context", self.context, "a stage, or a list of stages"))
        check_ranges(self)
        if self.compile == "background" and self.batch_invariant:
            message = (
                "compile is 'background' and batch_invariant is True: bits would change when the compiled forward comes"
            )
            raise InvalidRequest(f"{message}; take compile=True", param="compile")
        self._check_caches()
        for name, default, needed in _NEEDS:
            if getattr(self, name) != default and not getattr(self, needed):
                message = f"{name} is {getattr(self, name)!r}, but {needed} is {getattr(self, needed)!r}; set it too"
                raise InvalidRequest(message, param=name)

    def _check_caches(self) -> None:
        if not isinstance(self.disk_cache, str | Path | None) or self.disk_cache == "":
            raise InvalidRequest(f"disk_cache is {self.disk_cache!r}; it must be a folder", param="disk_cache")
        for name in ("prefix_cache_bytes", "host_cache_bytes", "disk_cache"):
            if getattr(self, name) and not self.prefix_cache:
                message = f"{name} is {getattr(self, name)!r}, but prefix_cache is off; set prefix_cache=True"
                raise InvalidRequest(message, param=name)


def _listed(name: str, value: object, wanted: str) -> tuple[Any, ...]:
    """What a user may write for several: one of them as text, or a list."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, Mapping) or not isinstance(value, Sequence | Set):
        raise InvalidRequest(f"{name} is {value!r}; it must be {wanted}", param=name)
    return tuple(value)


def _with_options(drafters: object) -> Mapping[str, Mapping[str, object]]:
    """Drafters as a user may write them: names, or a mapping of names and options."""
    wanted = "names, or a mapping of names and options"
    names = tuple(drafters) if isinstance(drafters, Mapping) else _listed("drafters", drafters, wanted)
    if not all(isinstance(name, str) for name in names):
        raise InvalidRequest(f"drafters is {drafters!r}; it must be {wanted}", param="drafters")
    named = {name: drafters[name] if isinstance(drafters, Mapping) else {} for name in names}
    for name, options in named.items():
        if not isinstance(options, Mapping):
            message = f"drafters: the options of {name!r} must be a mapping, not {options!r}"
            raise InvalidRequest(message, param="drafters")
    return named
