"""From a body to a request struct: every way in which bytes can be wrong is an answer that says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from specgen.server.errors import ApiError, invalid

StructT = TypeVar("StructT", bound=msgspec.Struct)

WITHOUT_EFFECT = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",  # prefixes are found by themselves, `cache_salt` parts them
        "prompt_cache_retention",
        "priority",  # first come, first served
        "request_id",  # the header x-request-id is looked at
        "session_id",
    }
)
"""Fields that change no text, here or elsewhere: taken, whatever they hold."""

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "audio": (None,),
    "background": (None, False),
    "best_of": (None, 1),
    "chat_template": (None,),
    "documents": (None, []),
    "early_stopping": (None, False),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "include": (None, []),
    "length_penalty": (None, 1.0),
    "modalities": (None, ["text"]),
    "previous_response_id": (None,),
    "prompt_embeds": (None,),
    "prompt_logprobs": (None,),
    "reasoning": (None, {}),
    "reasoning_effort": (None, "none"),
    "spaces_between_special_tokens": (None, True),
    "suffix": (None, ""),
    "truncate_prompt_tokens": (None,),
    "truncation": (None, "disabled"),
    "use_beam_search": (None, False),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}
"""Fields of others that are not served: taken with the values that ask for nothing, refused by name with others."""


async def read(request: web.Request, kind: type[StructT]) -> StructT:
    """The body of a request. Raises ApiError naming the field, the value's fault and what is expected."""
    if request.content_type != "application/json":
        # A page elsewhere can make a browser send anything else unasked.
        raise ApiError(415, f"the content type is {request.content_type!r}; it must be 'application/json'")
    body = await request.read()
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid(f"the body is not JSON: {_reason(error)}", code="invalid_json") from None
    if not isinstance(found, dict):
        raise invalid(f"the body is {type(found).__name__}; it must be an object", code="invalid_json")
    return convert(_without_neutral(found, kind), kind)


def convert(found: Mapping[str, Any], kind: type[StructT]) -> StructT:
    """Fields as a struct. Raises ApiError naming the field."""
    try:
        return msgspec.convert(found, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        expected, _, place = _reason(error).partition(" - at `$")
        param = place.removesuffix("`").lstrip(".") or None
        raise invalid(f"{param}: {expected}" if param else expected, param) from None


def _without_neutral(found: Mapping[str, Any], kind: type[msgspec.Struct]) -> dict[str, Any]:
    kept = {}
    for name, value in found.items():
        if name in kind.__struct_fields__ or (name not in WITHOUT_EFFECT and name not in NEUTRAL):
            kept[name] = value
        elif name in NEUTRAL and not any(_alike(value, choice) for choice in NEUTRAL[name]):
            raise invalid(f"{name} is not supported; leave it out", name, "unsupported_parameter")
    return kept


def _alike(value: object, choice: object) -> bool:
    """Equal, and not a number for a flag."""
    return value == choice and isinstance(value, bool) == isinstance(choice, bool)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
