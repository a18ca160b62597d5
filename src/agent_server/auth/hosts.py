"""Which names and addresses are this machine, and which Host and Origin headers are believed.

Leans on ``ipaddress`` and the settings. Refuses to know what a request wants.
"""

import ipaddress
from collections.abc import Mapping
from functools import lru_cache
from urllib.parse import urlsplit

from agent_server.domain.errors import Forbidden
from agent_server.settings import Settings

Headers = Mapping[bytes, bytes]
"""Header names in lower case, as ASGI gives them."""

WILDCARDS = frozenset({"", "*", "0.0.0.0", "::"})
READING = frozenset({"GET", "HEAD", "OPTIONS"})
DEFAULT_PORTS = ("", "80", "443")


@lru_cache(maxsize=1024)
def is_loopback(address: str) -> bool:
    """True for an address of this machine alone; an IPv4 address mapped into IPv6 counts."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    return bool((mapped or parsed).is_loopback)


@lru_cache(maxsize=1024)
def split_host(value: str) -> tuple[str, str] | None:
    """Name and port of a Host header or of an origin's authority; None where it is neither."""
    try:
        parts = urlsplit(f"//{value}")
        port = parts.port
    except ValueError:
        return None
    if not parts.hostname or parts.netloc != value or "@" in value or parts.path:
        return None
    return parts.hostname.lower().removesuffix("."), "" if port is None else str(port)


def _names(value: str) -> frozenset[str]:
    return frozenset(part.strip().lower() for part in value.split(",") if part.strip())


class Hosts:
    """The Host and Origin headers that this server answers to."""

    def __init__(self, settings: Settings) -> None:
        allowed = _names(settings.allowed_hosts)
        self._any = "*" in allowed
        self._hosts = {name.strip("[]") for name in allowed}
        if settings.host.lower() not in WILDCARDS:
            self._hosts.add(settings.host.lower().strip("[]"))
        self._origins = frozenset(name.rstrip("/") for name in _names(settings.allowed_origins))
        self._development = settings.env == "development"
        self._enforced = self._development or bool(allowed)

    def is_ours(self, headers: Headers) -> bool:
        """True when the Host header names this machine or a host the operator allowed.

        A page whose name was rebound to 127.0.0.1 sends its own name here, and fails.
        """
        parts = split_host(headers.get(b"host", b"").decode("latin-1"))
        if parts is None:
            return False
        name = parts[0]
        return (
            self._any
            or name in self._hosts
            or name == "localhost"
            or name.endswith(".localhost")
            or is_loopback(name)
        )

    def check_host(self, headers: Headers) -> None:
        """Raise ``Forbidden`` for a Host that is not ours, where hosts are enforced.

        A caller with a key may use any address of the machine (only *names* can be rebound)
        in development; in production every Host is answered until ALLOWED_HOSTS names some.
        """
        if not self._enforced or self.is_ours(headers):
            return
        host = headers.get(b"host", b"").decode("latin-1")
        parts = split_host(host)
        if self._development and parts is not None and _is_address(parts[0]):
            return
        raise Forbidden(
            f"The Host header names {host!r}, which this server does not answer to.",
            hint="Add the name to AGENT_SERVER_ALLOWED_HOSTS.",
        )

    def allowed_origin(self, headers: Headers) -> str | None:
        """The request's Origin, if the operator lets pages of it call."""
        origin = headers.get(b"origin", b"").decode("latin-1")
        return origin if origin and origin.lower() in self._origins else None

    def check_origin(self, method: str, headers: Headers) -> None:
        """Raise ``Forbidden`` for a call that a page of another site makes a browser send."""
        raw = headers.get(b"origin")
        if raw is not None:
            origin = raw.decode("latin-1")
            if origin.lower() in self._origins or _same_origin(origin, headers):
                return
            raise Forbidden(
                f"A page of {origin!r} may not call this server.",
                hint="Add the origin to AGENT_SERVER_ALLOWED_ORIGINS if its pages may call.",
            )
        if headers.get(b"sec-fetch-site") == b"cross-site" and not (
            method in READING and headers.get(b"sec-fetch-mode") == b"navigate"
        ):
            raise Forbidden(
                "A page of another site may not call this server.",
                hint="Call from this server's own pages, or without a browser.",
            )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _same_origin(origin: str, headers: Headers) -> bool:
    """True when ``origin`` is the server that the Host header names, behind TLS or not."""
    scheme, separator, authority = origin.partition("://")
    if not separator or scheme not in ("http", "https"):
        return False
    theirs = split_host(authority)
    ours = split_host(headers.get(b"host", b"").decode("latin-1"))
    if theirs is None or ours is None or theirs[0] != ours[0]:
        return False
    return theirs[1] == ours[1] or (theirs[1] in DEFAULT_PORTS and ours[1] in DEFAULT_PORTS)
