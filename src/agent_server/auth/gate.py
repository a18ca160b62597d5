"""Who is let in: whoever holds a key, or in development a caller on this machine.

Leans on the settings and on ``hosts``. Refuses to know routes and HTTP answers: it raises
``Unauthorized`` or ``Forbidden``, and whoever stands at the door renders them.
"""

import hashlib

from agent_server.auth.hosts import Headers, Hosts, is_loopback
from agent_server.auth.principal import ANONYMOUS, KEY_HOLDER, TENANT_SCOPES, Principal
from agent_server.domain.errors import ConfigurationError, Unauthorized
from agent_server.settings import Settings

FORWARDING = frozenset(
    {
        b"forwarded",
        b"via",
        b"x-real-ip",
        b"x-client-ip",
        b"x-cluster-client-ip",
        b"x-original-forwarded-for",
        b"x-original-host",
        b"x-envoy-external-address",
        b"true-client-ip",
        b"cf-connecting-ip",
        b"fastly-client-ip",
    }
)
"""Headers that a proxy leaves: behind one, the peer's address says nothing about the caller."""

CHALLENGE = {"WWW-Authenticate": 'Bearer realm="agent-server"'}
KEY_HINT = "Send a key of this server as `Authorization: Bearer <key>` or as `X-API-Key: <key>`."
SET_KEY_HINT = (
    "Set AGENT_SERVER_API_KEY and send it as `Authorization: Bearer <key>`; without a key the "
    "server answers only callers on its own machine, in development."
)


def require_safe(settings: Settings) -> None:
    """Raise ``ConfigurationError`` when this configuration would let strangers in."""
    if settings.env == "production" and not settings.has_key:
        raise ConfigurationError(
            "Production needs a key: AGENT_SERVER_ENV is 'production' and AGENT_SERVER_API_KEY "
            "is not set.",
            hint="Make one with `python -c 'import secrets; print(secrets.token_urlsafe(32))'` "
            "and set AGENT_SERVER_API_KEY, or name a file that holds it by "
            "AGENT_SERVER_API_KEY_FILE.",
        )


class Gate:
    """Decides for each request who calls. Holds the keys' hashes, never a key."""

    def __init__(self, settings: Settings) -> None:
        self.hosts = Hosts(settings)
        # Looked up by digest: how long that takes tells of digests, which nobody can choose.
        self._holders: dict[bytes, Principal] = {}
        if settings.api_key is not None:
            self._holders[_digest(settings.api_key.get_secret_value().encode())] = KEY_HOLDER
        for name, held in settings.tenant_keys.items():
            holder = Principal(tenant=held.tenant, name=name, scopes=TENANT_SCOPES)
            self._holders[_digest(held.key.get_secret_value().encode())] = holder
        self._development = settings.env == "development"

    def authenticate(self, headers: Headers, peer: str | None) -> Principal:
        """The caller behind ``headers`` and the peer's address.

        Raises ``Unauthorized`` unless a key fits, or, where no key is set, all of this holds:
        development, a loopback peer, a Host of this machine, no trace of a proxy.
        """
        if self._holders:
            given = _presented(headers)
            if given is None:
                raise Unauthorized("This call needs a key.", hint=KEY_HINT, headers=CHALLENGE)
            holder = self._holders.get(_digest(given))
            if holder is None:
                raise Unauthorized(
                    "The key does not fit this server.", hint=KEY_HINT, headers=CHALLENGE
                )
            return holder
        refused = self._why_not_anonymous(headers, peer)
        if refused is None:
            return ANONYMOUS
        raise Unauthorized(refused, hint=SET_KEY_HINT, headers=CHALLENGE)

    def _why_not_anonymous(self, headers: Headers, peer: str | None) -> str | None:
        if not self._development:
            return "This server has no key, and production answers nobody without one."
        if peer is None or not is_loopback(peer):
            return f"The call comes from {peer!r}, another machine, without a key."
        if not self.hosts.is_ours(headers):
            host = headers.get(b"host", b"").decode("latin-1")
            return f"The Host header names {host!r}, which is not this machine."
        for name in headers:
            if name in FORWARDING or name.startswith(b"x-forwarded"):
                return f"The call came through a proxy ({name.decode('latin-1')}), without a key."
        return None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _presented(headers: Headers) -> bytes | None:
    authorization = headers.get(b"authorization")
    if authorization is not None:
        scheme, _, credentials = authorization.partition(b" ")
        if scheme.lower() == b"bearer" and credentials.strip():
            return credentials.strip()
    return headers.get(b"x-api-key")
