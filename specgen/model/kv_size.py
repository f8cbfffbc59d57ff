"""How many tokens a KV pool holds and how long one sequence may become, given the memory that is available."""

from __future__ import annotations

from dataclasses import dataclass

from specgen._base.log import Log
from specgen.errors import InvalidRequest
from specgen.kv.pool import PAGE_SIZE

log = Log("specgen.model")

_FULL_CONTEXTS = 16
_SHARE = 4
_LONGEST_CONTEXT = 1 << 20


@dataclass(frozen=True, slots=True)
class KVSize:
    """tokens: of the pool, in whole pages. context: most tokens of one sequence."""

    tokens: int
    context: int


def kv_size(
    *, limit: int | None, max_context: int | None, kv_tokens: int | None, token_bytes: int, available: int
) -> KVSize:
    """The sizes of a pool whose tokens take `token_bytes` each, where `available` bytes are.

    limit: the longest text of the model; `None` where positions have no end. By itself the pool takes a quarter of
    what is available, at most 16 full contexts; for a `max_context` that was asked for it takes more where it must.
    A context that became shorter than the model's, or than was asked for because the model's is, is a warning.
    Raises InvalidRequest where `max_context` or `kv_tokens` cannot be had.
    """
    for name, asked in (("kv_tokens", kv_tokens), ("max_context", max_context)):
        if asked is not None and asked < 1:
            raise InvalidRequest(f"{name} is {asked}; it must be at least 1", param=name)
    longest = context_of(_LONGEST_CONTEXT, limit=limit, max_context=None)
    if max_context is not None and max_context > longest:
        log.warning("max_context is beyond the model's positions", max_context=max_context, context=longest)
        max_context = longest
    if max_context is not None and kv_tokens is not None and kv_tokens < max_context:
        message = f"kv_tokens is {kv_tokens} and max_context is {max_context}, which does not fit in"
        raise InvalidRequest(f"{message}; raise kv_tokens or lower max_context", param="kv_tokens")
    for name, asked in (("kv_tokens", kv_tokens), ("max_context", max_context)):
        if asked is not None and asked * token_bytes > available:
            raise _too_large(name, asked, token_bytes, available)
    context = max_context or longest
    wanted = kv_tokens or max(min(_FULL_CONTEXTS * context, available // _SHARE // token_bytes), max_context or 0)
    size = _in_pages(wanted, context)
    if size.context < context:
        _warn(size, context, kv_tokens, token_bytes, available)
    return size


def context_of(tokens: int, *, limit: int | None, max_context: int | None) -> int:
    """Most tokens of one sequence in a pool of `tokens`; `limit` and `max_context` as in `kv_size`."""
    return min(n for n in (tokens, limit, max_context, _LONGEST_CONTEXT) if n is not None)


def _in_pages(tokens: int, context: int) -> KVSize:
    """At least two pages, whatever there is."""
    whole = max(2, -(-tokens // PAGE_SIZE)) * PAGE_SIZE
    return KVSize(whole, min(context, whole))


def _too_large(name: str, asked: int, token_bytes: int, available: int) -> InvalidRequest:
    needed = f"{asked} tokens of KV take {_mib(asked * token_bytes)}, and {_mib(available)} of memory are available"
    instead = f"take {name}={available // token_bytes} at most, or a kv_format of fewer bytes"
    return InvalidRequest(f"{name} is {asked}: {needed}; {instead}", param=name)


def _warn(size: KVSize, context: int, kv_tokens: int | None, token_bytes: int, available: int) -> None:
    reason, instead = f"kv_tokens is {kv_tokens}", f"raise kv_tokens to {context}"
    if kv_tokens is None:
        reason = f"{context} tokens take {_mib(context * token_bytes)}; the KV pool has a quarter of {_mib(available)}"
        instead = "set kv_tokens or max_context for more than a quarter, or a kv_format of fewer bytes, or free memory"
    log.warning(
        "the context is shorter than the model's",
        context=size.context,
        model_context=context,
        reason=reason,
        instead=instead,
    )


def _mib(count: int) -> str:
    return f"{count / (1 << 20):,.0f} MiB"
