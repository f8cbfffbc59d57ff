"""From a body to a request struct: every way in which bytes can be wrong is an answer that says so."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

import msgspec
from aiohttp import hdrs, web
from aiohttp.compression_utils import HAS_BROTLI, HAS_ZSTD

from specgen.server.deadlines import in_time
from specgen.server.metrics import TIMING
from specgen.server.middleware import whole
from specgen.server.protocol.errors import ApiError, invalid
from specgen.server.service import SERVICE

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
    "include_reasoning": (None, True),
    "length_penalty": (None, 1.0),
    "modalities": (None, ["text"]),
    "previous_response_id": (None,),
    "priority": (None, 0),
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

_LONG = frozenset(
    {"messages", "prompt", "input", "instructions", "tokens", "prediction", "allowed_token_ids", "banned_token_ids"}
)
"""Fields of a known form, which may fill a body; in others a value may hold anything, and a million empty lists take
seconds to build."""

_CODINGS = ("identity", "gzip", "deflate", *(["br"] if HAS_BROTLI else []), *(["zstd"] if HAS_ZSTD else []))
"""Content encodings that are unpacked."""

_FIELD = re.compile(r"(?:unknown|missing required) field `([^`]*)`")

_LONGEST_BYTES = 128 << 10


async def read(request: web.Request, kind: type[StructT]) -> StructT:
    """The body of a request. Raises ApiError naming the field, the value's fault and what is expected; 408 when the
    request's time is over before all of the body is there."""
    if request.content_type != "application/json":
        # A page elsewhere can make a browser send anything else unasked.
        raise ApiError(415, f"the content type is {request.content_type!r}; it must be 'application/json'")
    coding = request.headers.get(hdrs.CONTENT_ENCODING, "").strip().lower()
    if coding and coding not in _CODINGS:
        message = f"the content encoding is {coding[:64]!r}; choices: {', '.join(_CODINGS)}"
        raise ApiError(415, message, code="unsupported_encoding")
    async with in_time(request[TIMING].arrival, request.app[SERVICE].config.request_seconds):
        body = await whole(request)
    try:
        # Nothing is built of a value before it is known what it has to be.
        found = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        kept = {name: value for name, value in found.items() if _is_kept(name, value, kind)}
        return msgspec.json.decode(msgspec.json.encode(kept), type=kind)
    except msgspec.ValidationError as error:
        expected, _, place = str(error).partition(" - at `$")
        param = _named(expected, place.removesuffix("`").lstrip("."))
        raise invalid(f"{param}: {expected}" if param else expected, param) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid(f"the body is not JSON: {_reason(error)}", code="invalid_json") from None


def _is_kept(name: str, value: msgspec.Raw, kind: type[msgspec.Struct]) -> bool:
    """Whether a field counts. Raises ApiError for one that is too long, or asks for what there is not."""
    if name in WITHOUT_EFFECT and name not in kind.__struct_fields__:
        return False
    size = len(memoryview(value))
    if size > _LONGEST_BYTES and name not in _LONG:
        raise invalid(f"{name[:256]} has {size} bytes; at most {_LONGEST_BYTES}", name[:256])
    if name in kind.__struct_fields__ or name not in NEUTRAL:
        return True
    asked = msgspec.json.decode(value)
    if not any(_alike(asked, choice) for choice in NEUTRAL[name]):
        raise invalid(f"{name} is not supported; leave it out", name, "unsupported_parameter")
    return False


def _named(expected: str, place: str) -> str | None:
    """The wrong field: msgspec says where an object is, and in words which of its fields is unknown or missing."""
    found = _FIELD.search(expected)
    return ".".join(filter(None, (place, found[1][:256] if found else ""))) or None


def _alike(value: object, choice: object) -> bool:
    """Equal, and not a number for a flag."""
    return value == choice and isinstance(value, bool) == isinstance(choice, bool)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
