"""Which names a server may be called by. Where nobody needs a key, a page elsewhere could have its own name resolve to
this machine (DNS rebinding) and read what the browser is answered."""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import urlsplit

from aiohttp import hdrs, web

from specgen.server.config import ServerConfig
from specgen.server.protocol.errors import ApiError

_ANY = "*"


class Hosts:
    """The hosts of one server: those that the config names; else, without keys at a loopback address, local ones.

    Local are names without a dot and addresses: no page can have them resolve to another place.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._named = {_bare(name) for name in config.allowed_hosts}
        is_local = _is_loopback(_bare(config.host)) and not config.api_keys
        self._checks = _ANY not in self._named and (is_local or bool(self._named))

    def check(self, request: web.Request) -> None:
        """Raise ApiError 403 for a request to another host, and for one that a page of another host sent."""
        if not self._checks:
            return
        host = _bare(request.headers.get(hdrs.HOST, ""))
        if not (host in self._named or _is_loopback(host) or (not self._named and _is_unresolved(host))):
            raise _refused("host", host)
        scheme, origin = _origin(request.headers.get(hdrs.ORIGIN, ""))
        # Editors and desktop programs have schemes of their own.
        if scheme in ("http", "https") and not (origin in self._named or origin == host or _is_loopback(origin)):
            raise _refused("origin", origin)


def _origin(value: str) -> tuple[str, str]:
    try:
        parts = urlsplit(value.strip().lower())
        return parts.scheme, _bare(parts.netloc)
    except ValueError:
        return "http", value


def _bare(host: str) -> str:
    """A host as headers and configs write it, without port, brackets and the dot of the root."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].rstrip(".") if host.count(":") == 1 else host.rstrip(".")


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _is_unresolved(host: str) -> bool:
    """Whether a host is an address, or a name that only this machine or its network can know."""
    try:
        return bool(ip_address(host))
    except ValueError:
        return "." not in host


def _refused(what: str, name: str) -> ApiError:
    message = f"the {what} {name[:256]!r} is not one of this server's; list it in allowed_hosts, or set api_keys"
    return ApiError(403, message, code="forbidden_host")
