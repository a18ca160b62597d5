"""A small HTTP/1.1 client for one server: a POST out, an answer in, connections kept alive.

Leans on asyncio and on httptools' C parser; a general client spends about a millisecond of CPU
on each call, more than everything else a model call costs here. Refuses to know JSON, models
and proxies: where a proxy is set, ``ProxiedServer`` hands the call to httpx2 instead.
"""

import asyncio
import ssl
from collections import deque
from typing import Protocol, cast
from urllib.parse import SplitResult

import httptools
import httpx2

CONNECT_TIMEOUT_S = 20.0
IDLE_S = 30.0
"""How long an unused connection is kept."""
IDLE_CONNECTIONS = 200
STALE_S = 1.0
"""A kept connection that ends within this time, without a byte, was closed before we wrote; the
request goes out once more on another."""
READ_AHEAD_BYTES = 1 << 20
"""How much of an answer may wait for its reader before the socket is left unread."""


class Silence(Exception):
    """Nothing came for the time allowed."""


class Broken(ConnectionError):
    """The connection could not be made, or ended before the answer did."""


class Exchange(Protocol):
    """An answer whose head has arrived."""

    status: int
    headers: dict[str, str]
    """Names in lower case; of a name that comes twice, the last."""

    async def chunk(self) -> bytes:
        """The next piece of the body, or ``b""`` at its end. Raises ``Broken``, ``Silence``."""

    async def aclose(self) -> None:
        """Let go. Before the end of the body this closes the connection."""


class HttpServer(Protocol):
    """Where requests go."""

    async def post(
        self, target: str, headers: list[tuple[str, str]], body: bytes, silence_s: float
    ) -> Exchange:
        """Send and wait for the head of the answer; ``silence_s`` bounds every wait for a byte."""

    async def aclose(self) -> None:
        """Close what is idle."""


class _Connection(asyncio.Protocol):
    """One socket, and the exchange that is on it."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.loop = asyncio.get_running_loop()
        self.closed = False
        self.idle_since = 0.0
        self.started = False
        """True once a byte of the present answer has come."""
        self.reset()

    def reset(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.status = 0
        self.headers: dict[str, str] = {}
        self.head_done = self.message_done = self.keep_alive = self.started = False
        self.pieces: deque[bytes] = deque()
        self.waiting_bytes = 0
        self.paused = False
        self.error: Exception | None = None
        self.waiter: asyncio.Future[None] | None = None

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # By contract, not by class: uvloop's transports do not inherit from asyncio's.
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self.message_done:  # more than was asked for: this connection cannot be trusted
            self.abort()
            return
        self.started = True
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.fail(Broken(f"the answer is not HTTP: {error}"))
            return
        self.wake()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self.message_done:
            return
        if self.head_done and not self.keep_alive and exc is None and self._until_close():
            self.message_done = True
            self.wake()
            return
        text = str(exc) if exc else "the server closed the connection"
        self.fail(Broken(text if not self.started else f"{text} in mid-answer"))

    def _until_close(self) -> bool:
        return "content-length" not in self.headers and "transfer-encoding" not in self.headers

    # the parser's side

    def on_message_begin(self) -> None:
        self.status, self.headers = 0, {}

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.status = self.parser.get_status_code()
        self.keep_alive = self.parser.should_keep_alive()
        self.head_done = self.status >= 200

    def on_body(self, body: bytes) -> None:
        self.pieces.append(body)
        self.waiting_bytes += len(body)
        if self.waiting_bytes > READ_AHEAD_BYTES and not self.paused and self.transport:
            self.paused = True
            self.transport.pause_reading()

    def on_message_complete(self) -> None:
        if self.head_done:
            self.message_done = True

    # the caller's side

    def fail(self, error: Exception) -> None:
        if self.error is None:
            self.error = error
        self.abort()
        self.wake()

    def abort(self) -> None:
        self.closed = True
        if self.transport is not None:
            self.transport.abort()

    def wake(self) -> None:
        waiter = self.waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def send(self, head: bytes, body: bytes) -> None:
        assert self.transport is not None
        self.transport.write(head + body if len(body) < 65536 else head)
        if len(body) >= 65536:
            self.transport.write(body)

    async def wait(self, silence_s: float) -> None:
        """Until something has come. Raises ``Silence``; cancellation passes."""
        self.waiter = self.loop.create_future()
        timer = self.loop.call_later(silence_s, self.fail, Silence())
        try:
            await self.waiter
        finally:
            timer.cancel()
            self.waiter = None


class _DirectExchange:
    def __init__(self, server: "DirectServer", connection: _Connection, silence_s: float) -> None:
        self._server = server
        self._connection: _Connection | None = connection
        self._silence_s = silence_s
        self.status = connection.status
        self.headers = connection.headers

    async def chunk(self) -> bytes:
        connection = self._connection
        if connection is None:
            return b""
        while True:
            if connection.pieces:
                pieces = connection.pieces
                data = pieces.popleft() if len(pieces) == 1 else b"".join(pieces)
                pieces.clear()
                connection.waiting_bytes = 0
                if connection.paused and connection.transport is not None:
                    connection.paused = False
                    connection.transport.resume_reading()
                return data
            if connection.message_done:
                return b""
            if connection.error is not None:
                raise connection.error
            await connection.wait(self._silence_s)

    async def aclose(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._server.release(connection)


class DirectServer:
    """The server at one address, spoken to without a proxy."""

    def __init__(self, url: SplitResult) -> None:
        self._tls = url.scheme == "https"
        self._host = url.hostname or "localhost"
        self._port = url.port or (443 if self._tls else 80)
        name = f"[{self._host}]" if ":" in self._host else self._host
        default = self._port == (443 if self._tls else 80)
        self._authority = name if default else f"{name}:{self._port}"
        self._context: ssl.SSLContext | None = None
        self._idle: list[_Connection] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    async def post(
        self, target: str, headers: list[tuple[str, str]], body: bytes, silence_s: float
    ) -> Exchange:
        lines = [f"POST {target} HTTP/1.1", f"host: {self._authority}"]
        lines += [f"{name}: {value}" for name, value in headers]
        lines.append(f"content-length: {len(body)}\r\n\r\n")
        head = "\r\n".join(lines).encode("latin-1")
        while True:
            connection, reused = await self._connection(silence_s)
            sent = connection.loop.time()
            try:
                connection.send(head, body)
                while not connection.head_done and connection.error is None:
                    await connection.wait(silence_s)
            except BaseException:
                connection.abort()
                raise
            if connection.error is None:
                return _DirectExchange(self, connection, silence_s)
            soon = connection.loop.time() - sent < STALE_S
            untouched = not connection.started and isinstance(connection.error, Broken)
            if not (reused and untouched and soon):
                raise connection.error

    async def _connection(self, silence_s: float) -> tuple[_Connection, bool]:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop, self._idle = loop, []
        now = loop.time()
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed and now - connection.idle_since < IDLE_S:
                connection.reset()
                return connection, True
            connection.abort()
        if self._tls and self._context is None:
            self._context = httpx2.create_ssl_context()
            self._context.set_alpn_protocols(["http/1.1"])
        try:
            _, made = await asyncio.wait_for(
                loop.create_connection(
                    _Connection,
                    self._host,
                    self._port,
                    ssl=self._context,
                    server_hostname=self._host if self._tls else None,
                ),
                min(CONNECT_TIMEOUT_S, silence_s),
            )
        except asyncio.TimeoutError as error:
            raise Silence from error
        except OSError as error:
            raise Broken(str(error) or type(error).__name__) from error
        return made, False

    def release(self, connection: _Connection) -> None:
        if not connection.message_done or not connection.keep_alive or connection.closed:
            connection.abort()
            return
        if len(self._idle) >= IDLE_CONNECTIONS:
            self._idle.pop(0).abort()
        connection.idle_since = connection.loop.time()
        self._idle.append(connection)

    async def aclose(self) -> None:
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.abort()


class _ProxiedExchange:
    def __init__(self, response: httpx2.Response) -> None:
        self._response = response
        self._body = response.aiter_bytes()
        self.status = response.status_code
        self.headers = {name.lower(): value for name, value in response.headers.items()}

    async def chunk(self) -> bytes:
        try:
            async for piece in self._body:
                if piece:
                    return piece
        except httpx2.TimeoutException as error:
            raise Silence from error
        except httpx2.TransportError as error:
            raise Broken(str(error)) from error
        return b""

    async def aclose(self) -> None:
        await self._response.aclose()


class ProxiedServer:
    """The server at one address, spoken to through the proxy that the environment names."""

    def __init__(self, url: SplitResult) -> None:
        self._origin = f"{url.scheme}://{url.netloc}"
        self._client: httpx2.AsyncClient | None = None

    async def post(
        self, target: str, headers: list[tuple[str, str]], body: bytes, silence_s: float
    ) -> Exchange:
        if self._client is None:
            self._client = httpx2.AsyncClient(
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=100)
            )
        request = self._client.build_request(
            "POST",
            self._origin + target,
            headers=headers,
            content=body,
            timeout=httpx2.Timeout(silence_s, connect=min(CONNECT_TIMEOUT_S, silence_s)),
        )
        try:
            return _ProxiedExchange(await self._client.send(request, stream=True))
        except httpx2.TimeoutException as error:
            raise Silence from error
        except httpx2.TransportError as error:
            raise Broken(str(error) or type(error).__name__) from error

    async def aclose(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()
