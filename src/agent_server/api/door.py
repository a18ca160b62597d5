"""The one middleware: every HTTP call passes it once, and every error leaves through it.

It gives the call a request id, asks the gate who calls, holds the limits of the body, renders
errors as problems, and tells log and metrics how the call went. Leans on ASGI, on ``auth`` and on
``problems``; refuses to know any route but the open ones.
"""

import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from os import urandom
from time import perf_counter
from typing import Final, NamedTuple, Protocol

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agent_server.api import problems
from agent_server.api.ports import Observe
from agent_server.auth.gate import Gate
from agent_server.auth.hosts import READING
from agent_server.auth.principal import Principal
from agent_server.domain.errors import (
    AgentServerError,
    BodyTooLarge,
    MethodNotAllowed,
    NotFound,
    RequestTimeout,
    UnsupportedMediaType,
)
from agent_server.settings import Settings

if sys.version_info >= (3, 11):
    from asyncio import timeout
else:
    from contextlib import asynccontextmanager

    from anyio import fail_after

    @asynccontextmanager
    async def timeout(delay: float) -> AsyncIterator[None]:
        """What Python 3.11 has built in, which is much the quicker of the two."""
        with fail_after(delay):
            yield


CALL: Final = "agent_server.call"
"""Where the scope holds the ``Call``."""
LATER: Final = "agent_server.later"
"""Where the scope takes an answer (``Serve``) that is to begin when the framework has unwound."""
YAML: Final = frozenset({b"application/yaml", b"application/x-yaml", b"text/yaml", b"text/x-yaml"})
"""Like JSON's, no form can send these: another site's page has to ask before it does."""
YAML_UNDER: Final = "/api/v1/workflows"
PROBES: Final = frozenset({"/livez", "/readyz"})
"""Open to everybody: they say nothing but whether the server is up."""
DOCUMENTS: Final = "/api/v1/memories"
"""Where a body may be as large as a document."""
MIB: Final = 1 << 20
REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
CORS_HEADERS = (
    "Authorization, Content-Type, Idempotency-Key, If-Match, If-None-Match, Last-Event-ID, "
    "X-API-Key, X-Request-ID"
)
CORS_EXPOSED = b"ETag, Idempotency-Replayed, Location, X-Request-ID"

Serve = Callable[[Receive, Send, Send], Awaitable[None]]
"""Answers by itself: headers go to the first ``send``, what follows to the second."""

log = structlog.get_logger("agent_server.http")


class Rendered(NamedTuple):
    """An error as an answer."""

    status: int
    media_type: str
    body: bytes


class Manners(Protocol):
    """What another standard's door does its own way below its prefix."""

    def render(self, error: AgentServerError, request_id: str) -> Rendered:
        """``error`` in the form that the standard's clients read."""

    def upload_bytes(self, path: str) -> int | None:
        """The size of a multipart form at ``path``; None where forms are not read."""


class Call(NamedTuple):
    """What the door found out about a call."""

    principal: Principal
    request_id: str


class Door:
    """ASGI middleware around the whole application."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        gate: Gate,
        settings: Settings,
        observe: Observe,
        manners: Mapping[str, Manners],
    ) -> None:
        self._app = app
        self._gate = gate
        self._observe = observe
        self._manners = manners
        self._max_body = settings.max_body_bytes
        self._max_document = max(settings.max_document_bytes, settings.max_body_bytes)
        self._body_timeout_s = settings.body_timeout_s
        self._access_log = settings.access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = perf_counter()
        headers: Mapping[bytes, bytes] = dict(scope["headers"])
        given = headers.get(b"x-request-id")
        if given is None or not REQUEST_ID.fullmatch(given):
            given = b"req_" + urandom(12).hex().encode()
        request_id = given.decode()
        status = 0
        extra: list[tuple[bytes, bytes]] = [
            (b"x-request-id", given),
            (b"x-content-type-options", b"nosniff"),
        ]

        headed = scope["method"] == "HEAD"
        if headed:
            # Answered by the handlers of GET; a copy, for the server below looks at its own.
            scope = {**scope, "method": "GET"}
            send = _without_body(send)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                route = getattr(scope.get("route"), "path", "unmatched")
                self._observe(scope["method"], route, status, perf_counter() - started)
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        later: list[Serve] = []
        scope[LATER] = later
        error: AgentServerError | None = None
        try:
            origin = self._gate.hosts.allowed_origin(headers)
            if origin is not None:
                extra += [
                    (b"access-control-allow-origin", origin.encode("latin-1")),
                    (b"access-control-expose-headers", CORS_EXPOSED),
                    (b"vary", b"Origin"),
                ]
                if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
                    await _preflight(answer)
                    return
            if scope["path"] in PROBES:
                principal = None
            else:
                principal = self._admit(scope, scope["method"], headers)
                scope[CALL] = Call(principal, request_id)
            if "\0" in scope["path"]:
                # No name that is stored has one, and not every database takes the question.
                raise NotFound("A path with a NUL character leads nowhere.")
            if scope["method"] not in READING:
                receive = self._limited(headers, receive, scope["path"])
            await self._app(scope, receive, answer)
            if later and headed:
                raise MethodNotAllowed("HEAD is not allowed for an event stream.", hint="Use GET.")
            if later:
                for key in [key for key in scope if key.startswith("fastapi")]:
                    del scope[key]  # exit stacks, empty by now, that would live as long as we do
                await later.pop()(receive, answer, send)
        except AgentServerError as refused:
            error = refused
        except Exception:
            log.exception("unexpected error", request_id=request_id, path=scope["path"])
            error = problems.unexpected(request_id)
        finally:
            if error is not None and status == 0:
                await self._refuse(error, scope["path"], request_id, answer)
            if self._access_log:
                tell = log.debug if scope["path"] in PROBES else log.info
                tell(
                    "call",
                    method=scope["method"],
                    path=scope["path"],
                    status=status,
                    duration_ms=round((perf_counter() - started) * 1000, 1),
                    request_id=request_id,
                )

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a connection in as a call that writes is: a browser's tells its page's origin."""
        headers: Mapping[bytes, bytes] = dict(scope["headers"])
        request_id = "req_" + urandom(12).hex()
        try:
            principal = self._admit(scope, "POST", headers)
        except AgentServerError as error:
            if "websocket.http.response" not in scope.get("extensions", {}):
                await send({"type": "websocket.close", "code": 1008})
                return

            async def answer(message: Message) -> None:
                await send({**message, "type": "websocket." + message["type"]})

            await self._refuse(error, scope["path"], request_id, answer)
            return
        scope[CALL] = Call(principal, request_id)
        await self._app(scope, receive, send)

    def _admit(self, scope: Scope, method: str, headers: Mapping[bytes, bytes]) -> Principal:
        """Let the caller in, or raise. Who calls comes first: strangers learn nothing else."""
        client = scope.get("client")
        principal = self._gate.authenticate(headers, client[0] if client else None)
        self._gate.hosts.check_host(headers)
        self._gate.hosts.check_origin(method, headers)
        return principal

    def _limited(self, headers: Mapping[bytes, bytes], receive: Receive, path: str) -> Receive:
        """``receive`` that holds the body to its size, its type and its time."""
        own = self._manners_at(path)
        form = own.upload_bytes(path) if own is not None else None
        read = FORMS if form else JSON_OR_YAML if path.startswith(YAML_UNDER) else JSON
        knob, most = "MAX_BODY_BYTES", self._max_body
        if form:
            knob, most = "MAX_FILE_BYTES", form
        elif path == DOCUMENTS:
            knob, most = "MAX_DOCUMENT_BYTES", self._max_document
        length = headers.get(b"content-length")
        if length == b"0" or (length is None and b"transfer-encoding" not in headers):
            expected = 0
        else:
            expected = most if length is None else int(length)
            _check_type(headers, read)
        if headers.get(b"content-type") and expected == 0:
            _check_type(headers, read)
        if expected > most:
            raise _too_large(f"of {expected:,} bytes ", most, knob)
        taken = 0
        complete = False
        begun = perf_counter()

        async def limited() -> Message:
            nonlocal taken, complete
            if complete:
                return await receive()
            # Of the whole, however it drips; what is large gets its time as it comes.
            most_s = self._body_timeout_s * (1 + taken // MIB)
            try:
                async with timeout(max(0.0, begun + most_s - perf_counter())):
                    message = await receive()
            except TimeoutError as error:
                raise RequestTimeout(
                    f"The body did not arrive within {most_s:g} s.",
                    hint="Send it faster, or raise AGENT_SERVER_BODY_TIMEOUT_S.",
                    headers={"Connection": "close"},
                ) from error
            taken += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if taken > most:
                raise _too_large("", most, knob)
            return message

        return limited

    def _manners_at(self, path: str) -> Manners | None:
        return self._manners.get(path.split("/", 2)[1]) if self._manners else None

    async def _refuse(
        self, error: AgentServerError, path: str, request_id: str, send: Send
    ) -> None:
        own = self._manners_at(path)
        if own is not None:
            rendered = own.render(error, request_id)
        else:
            body = problems.render(error, instance=path, request_id=request_id)
            rendered = Rendered(error.status, problems.MEDIA_TYPE, body)
        await _send(rendered, error.headers, send)


class Reading(NamedTuple):
    """What bodies are read somewhere."""

    noun: str
    media: frozenset[bytes]
    ending: bytes | None = None
    accept: str = "application/json"


JSON: Final = Reading("JSON", frozenset({b"application/json"}), b"+json")
JSON_OR_YAML: Final = JSON._replace(media=JSON.media | YAML)
FORMS: Final = Reading("a form", frozenset({b"multipart/form-data"}), accept="multipart/form-data")


def _too_large(size: str, most: int, knob: str) -> BodyTooLarge:
    return BodyTooLarge(
        f"The body {size}is larger than {most:,} bytes.",
        hint=f"Send less, or raise AGENT_SERVER_{knob}.",
        headers={"Connection": "close"},
    )


def _check_type(headers: Mapping[bytes, bytes], read: Reading) -> None:
    """Raise unless the body says that it is what is read there: JSON nearly everywhere, since a
    form of another site's page never says so; such a form is kept out by its origin as well."""
    raw = headers.get(b"content-type", b"")
    media = raw.partition(b";")[0].strip().lower()
    if media in read.media:
        return
    if read.ending and media.startswith(b"application/") and media.endswith(read.ending):
        return
    given = f"says it is {raw.decode('latin-1')!r}" if raw else "does not say what it is"
    raise UnsupportedMediaType(
        f"The body {given}; {read.noun} is read here.",
        hint=f"Send `Content-Type: {read.accept}`.",
        headers={"Accept": read.accept},
    )


async def _send(rendered: Rendered, more: Mapping[str, str], send: Send) -> None:
    headers = [
        (b"content-type", rendered.media_type.encode()),
        (b"content-length", b"%d" % len(rendered.body)),
        (b"cache-control", b"no-store"),
    ]
    headers += [(k.lower().encode(), v.encode("latin-1")) for k, v in more.items()]
    await send({"type": "http.response.start", "status": rendered.status, "headers": headers})
    await send({"type": "http.response.body", "body": rendered.body})


def _without_body(send: Send) -> Send:
    async def headers_only(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return headers_only


async def _preflight(send: Send) -> None:
    headers = [
        (b"access-control-allow-methods", b"GET, POST, PUT, PATCH, DELETE"),
        (b"access-control-allow-headers", CORS_HEADERS.encode()),
        (b"access-control-max-age", b"600"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
