"""One OpenAI-compatible provider on the wire: a JSON body out, JSON or an event stream in.

Leans on ``http1`` for bytes and on ``models`` for what a failure means. Refuses to know the
two APIs: which path, which fields and which events are theirs is said in their own modules.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from enum import Enum
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit
from urllib.request import getproxies, proxy_bypass

from agents import ModelSettings, UserError
from agents.version import __version__ as sdk_version
from openai import Omit
from pydantic import BaseModel
from pydantic_core import from_json

from agent_server.domain.errors import (
    ConfigurationError,
    ModelMalformed,
    ModelTimeout,
    ModelUnauthorized,
)
from agent_server.domain.secrets import MASK
from agent_server.inference.http1 import (
    Broken,
    DirectServer,
    Exchange,
    HttpServer,
    ProxiedServer,
    Silence,
)
from agent_server.inference.models import cut_off, status_error, unreachable

OFFICIAL_URL = "https://api.openai.com/v1"
MAX_ERROR_BYTES = 64 * 1024
MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""Of a whole answer, and of one event of a stream."""
AT_ONCE = 50
"""Events of a burst that are handed on before others get their turn."""


class Wire:
    """One provider: its address, its key, its open connections.

    Raises ``ConfigurationError`` for an address that is none.
    """

    def __init__(
        self, base_url: str | None = None, api_key: str | None = None, *, timeout_s: float = 120.0
    ) -> None:
        self.base_url = (base_url or OFFICIAL_URL).rstrip("/")
        url = _address(self.base_url)
        self.host = url.hostname or ""
        self.official = url.scheme == "https" and url.hostname == "api.openai.com"
        self._keyless = api_key is None and self.official
        self._timeout_s = timeout_s
        self._path = url.path.rstrip("/")
        self._query = parse_qsl(url.query)
        self._server: HttpServer = (
            ProxiedServer(url) if _proxied(url.scheme, self.host) else DirectServer(url)
        )
        self._headers = {
            "content-type": "application/json",
            "user-agent": f"Agents/Python {sdk_version}",
        }
        if api_key is not None:
            self._headers["authorization"] = f"Bearer {api_key}"

    async def post(self, path: str, body: dict[str, Any], settings: ModelSettings) -> "Reply":
        """Send ``body`` and wait for the answer's head. Raises ``ModelError``.

        A field ``timeout`` of ``body`` (by ``extra_args``) is the seconds of silence allowed.
        """
        if self._keyless:
            raise ModelUnauthorized(
                "There is no key for api.openai.com.",
                hint="Set OPENAI_API_KEY, or OPENAI_BASE_URL for another OpenAI-compatible "
                "server, or AGENT_SERVER_MODEL=demo to try the server without a model.",
            )
        timeout = body.pop("timeout", None)
        silence_s = float(timeout) if isinstance(timeout, (int, float)) else self._timeout_s
        if settings.extra_body:
            extra = dict(settings.extra_body) if isinstance(settings.extra_body, Mapping) else {}
            body = {**body, **extra}
        target = self._path + path
        if settings.extra_query or self._query:
            target += "?" + urlencode(_query(self._query, settings.extra_query), doseq=True)
        streamed = body.get("stream") is True
        headers = {**self._headers, "accept": "text/event-stream" if streamed else _JSON}
        for name, value in (settings.extra_headers or {}).items():
            if isinstance(value, Omit):
                headers.pop(name.lower(), None)
            else:
                headers[name.lower()] = value
        lines = list(headers.items())
        if any("\n" in text or "\r" in text for pair in lines for text in pair):
            raise UserError("A header of the model call (or the key) contains a line break.")
        try:
            exchange = await self._server.post(target, lines, encode(body), silence_s)
        except (Broken, Silence) as error:
            raise _failure(error, silence_s) from error
        reply = Reply(exchange, silence_s)
        if exchange.status != 200:
            try:
                raise await reply.refusal(headers.get("authorization", ""))
            finally:
                await exchange.aclose()
        return reply

    async def aclose(self) -> None:
        """Close idle connections; a call in flight keeps its own."""
        await self._server.aclose()


_JSON = "application/json"
LEAST_KEY = 4
"""Characters of a key worth hiding: a shorter one would take words apart."""


@dataclass
class Reply:
    """An answer with status 200 (or, inside this module, one that is about to be refused)."""

    exchange: Exchange
    silence_s: float
    done: bool = False
    """True once the stream has said ``[DONE]``."""

    @property
    def request_id(self) -> str | None:
        return self.exchange.headers.get("x-request-id")

    @property
    def streams(self) -> bool:
        """False where a server ignored ``stream`` and answered in one piece."""
        return not self.exchange.headers.get("content-type", "").startswith(_JSON)

    async def json(self) -> dict[str, Any]:
        """The whole body, an object. Raises ``ModelError``."""
        body = await self._body(MAX_ANSWER_BYTES)
        if len(body) > MAX_ANSWER_BYTES:
            raise _too_large()
        if not body.strip():
            raise ModelMalformed("The model's answer is empty.", retryable=True)
        try:
            value = decode(body)
        except ValueError as error:
            raise ModelMalformed(
                f"The model's answer is not JSON: {error}", retryable=True
            ) from error
        if not isinstance(value, dict):
            raise ModelMalformed("The model's answer is not a JSON object.", retryable=True)
        return value

    async def batches(self) -> AsyncIterator[list[Any]]:
        """The stream's events, decoded, as many at once as have come. ``[DONE]`` is left out.

        Between the parts of a burst the run's readers get their turn: what they have not taken
        yet is bounded, and a reader that is as fast as any is not to be cut off as too slow.

        Ends where the stream ends; whether that was its proper end, the caller knows.
        """
        events = EventStream()
        try:
            while chunk := await self.exchange.chunk():
                batch = events.feed(chunk)
                self.done = events.done
                for start in range(0, len(batch), AT_ONCE):
                    if start:
                        await asyncio.sleep(0)
                    yield batch[start : start + AT_ONCE]
            batch = events.end()
            self.done = events.done
        except (Broken, Silence) as error:
            raise _failure(error, self.silence_s) from error
        if batch:
            yield batch

    async def refusal(self, authorization: str = "") -> Exception:
        """What an answer with an error status means, without the key of ``authorization``."""
        text = (await self._body(MAX_ERROR_BYTES)).decode("utf-8", "replace")
        key = authorization.rpartition(" ")[2]
        if len(key) >= LEAST_KEY:
            text = text.replace(key, MASK)
        body: Any = text
        try:
            body = decode(text.encode())
        except ValueError:
            pass
        return status_error(self.exchange.status, body, self.exchange.headers)

    async def _body(self, limit: int) -> bytes:
        pieces: list[bytes] = []
        size = 0
        try:
            while chunk := await self.exchange.chunk():
                pieces.append(chunk)
                size += len(chunk)
                if size > limit:
                    break
        except (Broken, Silence) as error:
            raise _failure(error, self.silence_s) from error
        return b"".join(pieces)

    async def aclose(self) -> None:
        await self.exchange.aclose()


class EventStream:
    """Reads server-sent events whose data is JSON (WHATWG HTML, 9.2), without their names."""

    def __init__(self) -> None:
        self.done = False
        self._tail = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[Any]:
        """The events that are complete now. Raises ``ModelMalformed``."""
        lines = (self._tail + chunk if self._tail else chunk).split(b"\n")
        self._tail = lines.pop()
        if len(self._tail) > MAX_ANSWER_BYTES:
            raise _too_large()
        found: list[Any] = []
        data = self._data
        for line in lines:
            if line.startswith(b"data:"):
                data.append(line[5:])
            elif data and (not line or line == b"\r"):
                self._take(found)
        return found

    def end(self) -> list[Any]:
        """The last event, where a server leaves out the blank line after it."""
        if self._tail.startswith(b"data:"):
            self._data.append(self._tail[5:])
        found: list[Any] = []
        if self._data:
            try:
                self._take(found)
            except ModelMalformed as error:
                raise cut_off() from error
        return found

    def _take(self, found: list[Any]) -> None:
        data = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
        self._data.clear()
        data = data.strip()
        if not data or data == b"[DONE]":
            self.done = self.done or bool(data)
            return
        try:
            found.append(decode(data))
        except ValueError as error:
            raise ModelMalformed(
                f"An event of the model's answer is not JSON: {error}", retryable=True
            ) from error


def _too_large() -> ModelMalformed:
    return ModelMalformed(f"The model's answer has more than {MAX_ANSWER_BYTES:,} bytes.")


def encode(body: Any) -> bytes:
    """``body`` as JSON; iterables, models, enums and dataclasses in it become plain values."""
    try:
        return json.dumps(
            body, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=_plain
        ).encode()
    except UnicodeEncodeError:  # a lone surrogate: only its escape can travel
        return json.dumps(body, separators=(",", ":"), allow_nan=False, default=_plain).encode()


def decode(data: bytes) -> Any:
    """The JSON value of ``data``. Raises ``ValueError``."""
    try:
        return from_json(data)
    except ValueError:
        return json.loads(data)  # takes lone surrogates, which the fast parser refuses


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True, by_alias=True)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Iterable) and not isinstance(value, (bytes, bytearray)):
        return list(value)
    raise TypeError(f"{type(value).__name__} {value!r:.80} cannot be sent to a model as JSON.")


def _query(own: list[tuple[str, str]], extra: Any) -> list[tuple[str, Any]]:
    given: list[tuple[str, Any]] = list(own)
    for name, value in (extra or {}).items():
        if isinstance(value, bool):
            value = "true" if value else "false"
        if value is not None and not isinstance(value, Omit):
            given.append((name, value))
    return given


def _failure(error: Exception, silence_s: float) -> Exception:
    if isinstance(error, Silence):
        return ModelTimeout(
            f"The model sent nothing for {silence_s:g} seconds.",
            hint="AGENT_SERVER_MODEL_TIMEOUT_S sets how many seconds without a byte are borne.",
            retryable=True,
        )
    return unreachable(error)


def _address(base_url: str) -> SplitResult:
    """``base_url``, which has a scheme, a host and a port that may be. Raises otherwise."""
    try:
        url = urlsplit(base_url)
        if url.scheme in ("http", "https") and url.hostname and url.port != 0:
            return url
    except ValueError:
        pass
    raise ConfigurationError(
        f"OPENAI_BASE_URL is {base_url!r}, which is no address of a server.",
        hint="It begins with http:// or https:// and a host, and often ends with /v1.",
    )


def _proxied(scheme: str, host: str) -> bool:
    proxies = getproxies()
    return bool(proxies.get(scheme) or proxies.get("all")) and not proxy_bypass(host)
