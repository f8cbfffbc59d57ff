"""Who asks: keys compared in constant time, and what follows from a key."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from aiohttp import hdrs, web

from specgen.server.protocol.errors import ApiError


@dataclass(frozen=True, slots=True)
class Caller:
    """name: for logs and limits, never the key itself. tenant: what parts the caches of keys; "" without keys."""

    name: str = "anyone"
    tenant: str = ""
    is_admin: bool = False

    def cache_salt(self, asked: str) -> str:
        """The salt of this caller's requests. No two pairs of tenant and wish make the same one."""
        return f"{len(self.tenant)}:{self.tenant}{asked}" if self.tenant or asked else ""


CALLER = web.RequestKey("caller", Caller)
"""Set for every request that was let in."""


class Keys:
    """The keys of one server."""

    def __init__(self, api_keys: Sequence[str], admin_key: str | None) -> None:
        callers = [(key, f"key-{number}", False) for number, key in enumerate(api_keys, start=1)]
        if admin_key is not None:
            callers.append((admin_key, "admin", True))
        self._open = not api_keys
        self.has_admin = admin_key is not None
        self._callers = [
            (_digest(key), Caller(name, hashlib.sha256(b"tenant " + key.encode()).hexdigest()[:32], is_admin))
            for key, name, is_admin in callers
        ]

    def caller(self, request: web.Request) -> Caller:
        """Who sent a request. Raises ApiError 401 for a wrong key, and for none where one is asked for."""
        scheme, _, given = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
        digest = _digest(given.strip()) if scheme.lower() == "bearer" else b""
        # All of them, so that the time tells nothing about which one it was.
        matches = [caller for known, caller in self._callers if hmac.compare_digest(known, digest)]
        if matches:
            return matches[-1]
        if self._open:
            # OpenAI's clients always send some key.
            return Caller()
        raise ApiError(401, "send a valid key: Authorization: Bearer ...", code="invalid_api_key")

    def check_admin(self, caller: Caller) -> None:
        """Raise ApiError 403 unless the caller may change the server."""
        if not self.has_admin:
            raise ApiError(403, "this is off: the server was started without an admin key", code="admin_only")
        if not caller.is_admin:
            raise ApiError(403, "this needs the admin key", code="admin_only")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
