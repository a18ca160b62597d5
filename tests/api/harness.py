"""The application over fake runs, called as ASGI or over a real socket."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from agent_server.api.app import build_app
from agent_server.api.deps import ApiDeps
from agent_server.api.sse import Streams
from agent_server.auth.gate import Gate
from agent_server.settings import Settings
from tests.api.fake_runs import FakeCatalog, FakeRuns, NoWorkflows

KEY = "correct-horse-battery"
LOOPBACK = ("127.0.0.1", 40000)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def settings(**values: Any) -> Settings:
    return Settings(_env_file=None, **values)  # type: ignore[call-arg]  # pydantic-settings' own


@dataclass
class Server:
    """A composed application, and how to call it."""

    settings: Settings
    runs: FakeRuns = field(default_factory=FakeRuns)
    checks: dict[str, Any] = field(default_factory=dict)
    seen: list[tuple[str, str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.streams = Streams(limit=self.settings.max_streams, ping_s=self.settings.stream_ping_s)
        self.app = build_app(
            ApiDeps(
                settings=self.settings,
                runs=self.runs,
                catalog=FakeCatalog(),
                workflows=NoWorkflows(),
                gate=Gate(self.settings),
                streams=self.streams,
                checks=self.checks,
                observe=lambda method, route, status, s: self.seen.append((method, route, status)),
            )
        )

    async def call(
        self,
        method: str,
        path: str,
        body: bytes | dict[str, Any] | list[bytes] = b"",
        headers: dict[str, str] | None = None,
        peer: tuple[str, int] | None = LOOPBACK,
    ) -> Answer:
        """One call by plain ASGI. A list is a body that comes in chunks."""
        path, _, query = path.partition("?")
        raw = json.dumps(body).encode() if isinstance(body, dict) else body
        sent = {"host": "127.0.0.1:8000"} | {k.lower(): v for k, v in (headers or {}).items()}
        if isinstance(body, dict):
            sent.setdefault("content-type", "application/json")
        if isinstance(raw, list):
            sent["transfer-encoding"] = "chunked"
        elif raw:
            sent["content-length"] = str(len(raw))
        chunks = raw if isinstance(raw, list) else [raw]
        inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        for n, chunk in enumerate(chunks, 1):
            more = n < len(chunks)
            inbox.put_nowait({"type": "http.request", "body": chunk, "more_body": more})
        answer = Answer(0, {}, b"")

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            else:
                answer.body += message.get("body", b"")

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(k.encode(), v.encode("latin-1")) for k, v in sent.items()],
            "client": peer,
            "server": ("127.0.0.1", 8000),
            "state": {},
        }
        async with asyncio.timeout(10) if hasattr(asyncio, "timeout") else _no_timeout():
            await self.app(scope, inbox.get, send)
        return answer


@asynccontextmanager
async def _no_timeout() -> AsyncIterator[None]:
    yield


@asynccontextmanager
async def listening(app: Any) -> AsyncIterator[int]:
    """Serve ``app`` on a free loopback port."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="warning", lifespan="on", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    ready = asyncio.Event()
    startup = server.startup

    async def announced(sockets: Any = None) -> None:
        await startup(sockets)
        ready.set()

    server.startup = announced  # type: ignore[method-assign]
    task = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        await asyncio.wait_for(ready.wait(), 10)
        yield sock.getsockname()[1]
    finally:
        server.should_exit = True
        await asyncio.wait_for(task, 10)


@dataclass
class Stream:
    """An event stream over a bare socket: blocks as they come."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    head: str
    _rest: bytes = b""

    async def write(self) -> bytes:
        """The next chunk of the answer, which is one write of the server; empty at the end."""
        size = int(await asyncio.wait_for(self.reader.readline(), 5), 16)
        chunk = await asyncio.wait_for(self.reader.readexactly(size + 2), 5)
        return chunk[:-2]

    async def writes(self) -> list[bytes]:
        """All that is still to come."""
        found = []
        while chunk := await self.write():
            found.append(chunk)
        return found

    async def close(self) -> None:
        self.writer.close()
        await self.writer.wait_closed()


@asynccontextmanager
async def stream(
    port: int, path: str, headers: dict[str, str] | None = None, body: bytes | None = None
) -> AsyncIterator[Stream]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    sent = {"Host": f"127.0.0.1:{port}", "Accept": "text/event-stream"} | (headers or {})
    if body is not None:
        sent |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    method = "GET" if body is None else "POST"
    lines = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in sent.items()), "", ""]
    writer.write("\r\n".join(lines).encode() + (body or b""))
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    opened = Stream(reader, writer, head.decode())
    try:
        yield opened
    finally:
        await opened.close()
