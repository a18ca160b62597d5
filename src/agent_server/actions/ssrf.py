"""HTTP to the outside world for requests that somebody else wrote: the address is checked first.

Leans on httpx2 and the resolver. Refuses to know why a request is made, and refuses every
address that is not public unless the operator allows private ones.

The threat (server-side request forgery): a plan, a webhook or a page makes the server fetch
``http://169.254.169.254/`` or a neighbour behind the firewall. Checking the *name* is not enough,
because a name may resolve to a public address when it is checked and to a private one when it is
used. So the name is resolved once, every answer is checked, and the connection goes to one of the
checked **addresses**; the ``Host`` header and TLS keep the name. A redirect is a new request and
goes through the same gate.
"""

import ipaddress
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import anyio
import httpx2

from agent_server.domain.addresses import IPAddress, is_public, literal
from agent_server.domain.errors import ToolError

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
"""A host name and a port to the addresses that it has now."""

MAX_REDIRECTS = 5
MAX_BODY_BYTES = 64 * 1024
MAX_ADDRESSES = 4
"""Addresses of one host that are tried before the connection counts as failed."""

_KEPT_ACROSS_ORIGINS = frozenset({"accept", "accept-language", "user-agent"})


class AddressRefused(ToolError):
    """The address is not one that the server may talk to."""


class AddressUnreachable(ToolError):
    """No connection came about: nothing was sent."""


class AnswerTimeout(ToolError):
    """The time was up. The request may have been carried out."""


@dataclass(frozen=True)
class HttpAnswer:
    """What the other side said. ``body`` holds at most the allowed bytes."""

    url: str
    status: int
    headers: Mapping[str, str]
    body: bytes
    truncated: bool


async def resolve(host: str, port: int) -> list[str]:
    """The system's answer, in its order of preference."""
    found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


@dataclass(frozen=True)
class Gate:
    """Decides where a request may go: the addresses of its host, all of them checked."""

    allow_private: bool = False
    resolver: Resolver = resolve

    async def addresses(self, url: httpx2.URL) -> list[IPAddress]:
        """Raises ``AddressRefused`` unless every address of ``url``'s host may be reached."""
        if url.scheme not in ("http", "https"):
            raise AddressRefused(
                f"{url.scheme!r} addresses cannot be requested.",
                hint="Use an http:// or https:// address.",
            )
        if url.userinfo:
            raise AddressRefused(
                "The address carries a user name or a password.",
                hint="Send credentials in a header, not in the address.",
            )
        host = url.host
        if not host or "%" in host:
            raise AddressRefused(f"The address {str(url)!r} names no host that can be reached.")
        port = url.port or (443 if url.scheme == "https" else 80)
        found = await self._lookup(host, port)
        for address in found:
            if not self.allow_private and not is_public(address):
                raise AddressRefused(
                    f"{host!r} is {address}, which is not a public address.",
                    hint="AGENT_SERVER_HTTP_ALLOW_PRIVATE=true lets actions reach private "
                    "addresses, for every plan of this server.",
                )
        return found

    async def _lookup(self, host: str, port: int) -> list[IPAddress]:
        try:
            spelled = literal(host)
        except ValueError as error:
            raise AddressRefused(f"The host {host!r} is neither a name nor an address.") from error
        if spelled is not None:
            return [spelled]
        try:
            answers = await self.resolver(host, port)
        except (OSError, UnicodeError) as error:
            raise AddressUnreachable(
                f"The host {host!r} cannot be found: {error}.", hint="Check its spelling."
            ) from error
        try:
            found: list[IPAddress] = [ipaddress.ip_address(a.partition("%")[0]) for a in answers]
        except ValueError as error:
            raise AddressRefused(f"The resolver's answer for {host!r} is no address.") from error
        if not found:
            raise AddressUnreachable(f"The host {host!r} has no address.")
        return found


class PinnedTransport(httpx2.AsyncBaseTransport):
    """Connects to the checked addresses, while ``Host`` and TLS go on naming the host."""

    def __init__(self, gate: Gate, inner: httpx2.AsyncBaseTransport | None = None) -> None:
        self._gate = gate
        # No connection is kept: one that was opened for another name has its certificate.
        self._inner = inner or httpx2.AsyncHTTPTransport(
            trust_env=False, limits=httpx2.Limits(max_keepalive_connections=0)
        )

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        addresses = await self._gate.addresses(request.url)
        extensions = dict(request.extensions)
        if request.url.scheme == "https":
            extensions["sni_hostname"] = request.url.raw_host.decode("ascii")
        failure: Exception | None = None
        for address in addresses[:MAX_ADDRESSES]:
            pinned = httpx2.Request(
                request.method,
                request.url.copy_with(host=str(address)),
                headers=request.headers,
                stream=request.stream,
                extensions=extensions,
            )
            try:
                return await self._inner.handle_async_request(pinned)
            except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
                failure = error
        raise AddressUnreachable(
            f"{request.url.host!r} cannot be reached: {failure}.",
            hint="Check that the service is up and its port is right.",
        ) from failure

    async def aclose(self) -> None:
        await self._inner.aclose()


class GuardedHttp:
    """Makes one request at a time, within bounds of address, time, size and redirects."""

    def __init__(
        self,
        *,
        allow_private: bool = False,
        timeout_s: float = 30.0,
        max_body_bytes: int = MAX_BODY_BYTES,
        resolver: Resolver = resolve,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._gate = Gate(allow_private, resolver)
        self._timeout_s = timeout_s
        self._max_body_bytes = max_body_bytes
        self._transport = transport

    async def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
        timeout_s: float | None = None,
    ) -> HttpAnswer:
        """The answer to ``method url``, whatever its status.

        Redirects are followed for GET and HEAD, at most five; across origins only harmless
        headers go along. Raises ``AddressRefused``, ``AddressUnreachable`` (both: nothing was
        sent), ``AnswerTimeout`` or ``ToolError``. ``timeout_s`` bounds the whole, and never
        lifts the server's own bound.
        """
        limit = min(timeout_s or self._timeout_s, self._timeout_s)
        try:
            with anyio.fail_after(limit):
                return await self._follow(method.upper(), url, dict(headers or {}), content)
        except (TimeoutError, httpx2.TimeoutException) as error:
            raise AnswerTimeout(
                f"{method.upper()} {shown(url)} gave no whole answer within {limit:g} s."
            ) from error
        except httpx2.InvalidURL as error:
            raise AddressRefused(f"{url!r} is not an address: {error}.") from error
        except httpx2.HTTPError as error:
            raise ToolError(
                f"{method.upper()} {shown(url)} broke off: {type(error).__name__}: {error}"
            ) from error

    async def _follow(
        self, method: str, url: str, headers: dict[str, str], content: bytes | None
    ) -> HttpAnswer:
        target = httpx2.URL(url)
        headers = {"Accept-Encoding": "identity", **headers}
        transport = PinnedTransport(self._gate, self._transport)
        async with httpx2.AsyncClient(
            transport=transport, trust_env=False, follow_redirects=False, timeout=self._timeout_s
        ) as client:
            for _ in range(MAX_REDIRECTS + 1):
                async with client.stream(
                    method, target, headers=headers, content=content
                ) as response:
                    location = response.headers.get("location")
                    if not response.has_redirect_location or method not in ("GET", "HEAD"):
                        return await self._read(response)
                following = target.join(location)
                if _origin(following) != _origin(target):
                    headers = {
                        k: v for k, v in headers.items() if k.lower() in _KEPT_ACROSS_ORIGINS
                    }
                    headers["Accept-Encoding"] = "identity"
                target = following
        raise ToolError(
            f"{shown(url)} redirects more than {MAX_REDIRECTS} times.",
            hint="Request the final address.",
        )

    async def _read(self, response: httpx2.Response) -> HttpAnswer:
        body = bytearray()
        truncated = False
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > self._max_body_bytes:
                truncated = True
                break
        return HttpAnswer(
            url=str(response.request.url),
            status=response.status_code,
            headers={k.lower(): v for k, v in response.headers.items()},
            body=bytes(body[: self._max_body_bytes]),
            truncated=truncated,
        )


def _origin(url: httpx2.URL) -> tuple[str, str, int]:
    return url.scheme, url.host, url.port or (443 if url.scheme == "https" else 80)


def shown(url: str) -> str:
    """``url`` for an error message, without what may be secret in its query or its user."""
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        return repr(url)
    return repr(str(parsed.copy_with(query=None, userinfo=b"", fragment=None)))
