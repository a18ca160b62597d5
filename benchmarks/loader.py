"""The client: sends requests from a process of its own, so that its CPU is not counted.

Leans on raw asyncio. Refuses to understand an answer beyond its status, its end, and how often a
marker is in it.

Reads one job a line from standard input (``Job`` as JSON), writes one report a line.
"""

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

READ_S = 180.0


@dataclass
class Job:
    """What to send: every one of ``bodies`` (repeated up to ``count``) to ``path``.

    ``marker`` is counted in the answer and its first arrival timed; ``expect`` must be in it.
    ``follow`` posts first, and then waits by ``GET …?wait=60`` for the run named in ``Location``.
    ``new_connections`` opens one for each request, as streaming browsers do.
    """

    port: int
    path: str
    bodies: list[dict[str, Any]]
    count: int
    concurrency: int
    expect: str = "succeeded"
    marker: str = ""
    follow: bool = False
    new_connections: bool = False


@dataclass
class Report:
    """What came back. Times in seconds, one for each request, in the order they ended."""

    wall_s: float = 0.0
    errors: list[str] = field(default_factory=list)
    latency_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    markers: int = 0


class Connection(asyncio.Protocol):
    """One keep-alive connection, one answer at a time."""

    def __init__(self) -> None:
        self.closed = False
        self.done: asyncio.Future[None] | None = None

    @classmethod
    async def open(cls, port: int) -> "Connection":
        loop = asyncio.get_running_loop()
        _, made = await loop.create_connection(cls, "127.0.0.1", port)
        return made

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self.done is not None and not self.done.done():
            self.done.set_exception(ConnectionError(f"closed in mid-answer ({exc})"))

    async def ask(self, head: bytes, marker: bytes) -> None:
        """Send, and return when the whole answer is here."""
        self.head = b""
        self.body = bytearray()
        self.size: int | None = None
        self.marker = marker
        self.first = 0.0
        self.done = asyncio.get_running_loop().create_future()
        self.transport.write(head)
        await asyncio.wait_for(self.done, READ_S)

    def data_received(self, data: bytes) -> None:
        if self.done is None or self.done.done():
            return
        self.body += data
        if not self.head:
            end = self.body.find(b"\r\n\r\n")
            if end < 0:
                return
            self.head = bytes(self.body[: end + 4])
            del self.body[: end + 4]
            lowered = self.head.lower()
            at = lowered.find(b"content-length:")
            if at >= 0:
                self.size = int(lowered[at + 15 :].split(b"\r\n", 1)[0])
        if self.marker and not self.first and self.marker in self.body:
            self.first = time.perf_counter()
        if self.size is None:
            ended = self.body.endswith(b"0\r\n\r\n")
        else:
            ended = len(self.body) >= self.size
        if ended:
            self.done.set_result(None)


def request(method: str, path: str, body: dict[str, Any] | None) -> bytes:
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: */*\r\n"
    if body is not None:
        head += f"content-type: application/json\r\ncontent-length: {len(data)}\r\n"
    return head.encode() + b"\r\n" + data


def location(head: bytes) -> str:
    at = head.lower().find(b"location:")
    return head[at + 9 :].split(b"\r\n", 1)[0].strip().decode()


async def run(job: Job) -> Report:
    report = Report()
    left = iter([job.bodies[n % len(job.bodies)] for n in range(job.count)])
    marker = job.marker.encode()
    expect = job.expect.encode()

    async def one(connection: Connection, body: dict[str, Any]) -> None:
        started = time.perf_counter()
        await connection.ask(request("POST", job.path, body), marker)
        status = int(connection.head.split(b" ", 2)[1])
        if job.follow and status == 202:
            path = location(connection.head) + "?wait=60"
            await connection.ask(request("GET", path, None), marker)
            status = int(connection.head.split(b" ", 2)[1])
        ended = time.perf_counter()
        report.latency_s.append(ended - started)
        if connection.first:
            report.first_s.append(connection.first - started)
        report.markers += connection.body.count(marker) if marker else 0
        if status != 200 or expect not in connection.body:
            report.errors.append(f"{status}: {bytes(connection.body[-300:])!r}")

    async def client() -> None:
        connection: Connection | None = None
        for body in left:
            try:
                if connection is None or connection.closed or job.new_connections:
                    if connection is not None:
                        connection.transport.close()
                    connection = await Connection.open(job.port)
                await one(connection, body)
            except (OSError, asyncio.TimeoutError) as error:
                report.errors.append(f"{type(error).__name__}: {error}")
                connection = None
        if connection is not None:
            connection.transport.close()

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(job.concurrency)))
    report.wall_s = time.perf_counter() - started
    return report


def main() -> None:
    for line in sys.stdin:
        report = asyncio.run(run(Job(**json.loads(line))))
        print(json.dumps(asdict(report)), flush=True)


if __name__ == "__main__":
    main()
