"""How an engine is set up. One frozen struct, the same for Python, the command line and files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from specgen.errors import InvalidRequest, UnknownName
from specgen.types import Speculation

_LEAST = {"max_context": 1, "kv_tokens": 1, "max_running": 1, "max_prompt_rows": 1}


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of an engine.

    drafters: name -> options, in order of preference. Names are what the plugins offer.
    context: the stages that turn a prompt into ids, in order; a name, or a pair of a name and its options.
    speculation: what requests do that do not say it themselves.
    max_context: most tokens of one sequence; `None` takes what the model's positions allow.
    kv_tokens: tokens that the KV pool holds; `None` takes a quarter of the free memory, at most 16 full contexts.
    max_running: sequences in one forward. max_prompt_rows: prompt tokens in one forward.

    Raises InvalidRequest naming the field.
    """

    drafters: Mapping[str, Mapping[str, Any]] = msgspec.field(
        default_factory=lambda: {"prediction": {}, "prompt-lookup": {}}
    )
    context: tuple[Any, ...] = ("chat-template",)
    speculation: Speculation = Speculation()
    max_context: int | None = None
    kv_tokens: int | None = None
    max_running: int = 16
    max_prompt_rows: int = 512

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> EngineConfig:
        """Build from keywords as users write them: drafters as a list of names or a mapping, `draft_model` as a
        shorthand for the drafter of that name."""
        values = dict(options)
        drafters = values.pop("drafters", None)
        draft_model = values.pop("draft_model", None)
        for name in values:
            if name not in cls.__struct_fields__:
                raise UnknownName("engine option", name, (*cls.__struct_fields__, "draft_model"), param=name)
        if isinstance(drafters, str):
            drafters = [drafters]
        if drafters is not None:
            values["drafters"] = dict(drafters) if isinstance(drafters, Mapping) else {name: {} for name in drafters}
        if draft_model is not None:
            chosen = values.get("drafters") or cls().drafters
            values["drafters"] = {**chosen, "draft-model": {**chosen.get("draft-model", {}), "model": draft_model}}
        if "speculation" in values:
            values["speculation"] = Speculation.of(values["speculation"])
        if "context" in values:
            context = values["context"]
            values["context"] = (context,) if isinstance(context, str) else tuple(context)
        return cls(**values)

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise InvalidRequest(f"{name} is {value!r}; it must be a whole number, at least {least}", param=name)
