"""Who sends headers or a body too slowly, or too much, is told so; raw sockets to every front."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import anyio
import httpx2
import pytest

from tests.deploy import client
from tests.deploy.test_every_front import free_port
from tests.durability.world import ready_at
from tests.support.server_process import Nursery

ROOT = Path(__file__).resolve().parents[2]
START = b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n"
POST = (
    b"POST /api/v1/runs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"Content-Length: 100000\r\n\r\n"
)
LIMITS = {
    "AGENT_SERVER_HEADER_TIMEOUT_S": "0.4",
    "AGENT_SERVER_BODY_TIMEOUT_S": "0.4",
    "AGENT_SERVER_LOG_LEVEL": "WARNING",
}


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@pytest.fixture(params=["serve", "gunicorn", "main.py"])
async def port(
    request: pytest.FixtureRequest, tmp_path: Path, nursery: Nursery
) -> AsyncIterator[int]:
    """Where a server with short limits listens, started in each of the three ways."""
    (tmp_path / "agents.py").write_text(client.AGENTS)
    port = free_port()
    env = LIMITS | {"AGENT_SERVER_PORT": str(port)}
    if request.param == "main.py":
        shutil.copy(ROOT / "main.py", tmp_path)
        clean = {k: v for k, v in os.environ.items() if not k.startswith("OPENAI_")}
        with (tmp_path / "main.log").open("w") as log:
            program = subprocess.Popen(
                [sys.executable, "main.py"],
                cwd=tmp_path,
                env=clean | env,  # With reload, as it comes.
                stdout=log,
                stderr=log,
            )
        await ready_at(f"http://127.0.0.1:{port}")
        yield port
        program.send_signal(signal.SIGTERM)
        assert program.wait(20) in (0, -signal.SIGTERM)
        return
    argv = ["serve"]
    if request.param == "gunicorn":
        argv = ["gunicorn", "-k", "agent_server.cli.gunicorn.Worker", "-w", "1"]
        argv += ["--chdir", str(tmp_path), "-b", f"127.0.0.1:{port}"]
        argv += ["agent_server.cli.serve:application()"]
    process = nursery.run(*argv, env=env, folder=tmp_path)
    await ready_at(f"http://127.0.0.1:{port}")
    yield port
    process.signal(signal.SIGTERM)
    assert process.exit_code(20) == 0
    assert "Traceback" not in process.output


async def said_to(port: int, first: bytes, drip: bytes = b"") -> bytes:
    """All that is answered to ``first`` and then ``drip`` again and again, until it hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(first)
    heard = b""
    try:
        with anyio.fail_after(20):
            while True:
                piece = None
                with anyio.move_on_after(0.02 if drip else 20):
                    piece = await reader.read(65536)
                if piece == b"":
                    return heard
                heard += piece or b""
                if piece is None:
                    writer.write(drip)
    except ConnectionError:
        return heard
    finally:
        writer.close()


def is_problem(answer: bytes, status: int, code: str) -> bool:
    head, _, body = answer.partition(b"\r\n\r\n")
    problem = json.loads(body)
    assert head.startswith(b"HTTP/1.1 %d " % status) and b"application/problem+json" in head
    assert problem["request_id"].encode() in head and problem["hint"]
    return bool(problem["status"] == status and problem["code"] == code)


@pytest.mark.timeout(90)
async def test_slow_headers_and_slow_bodies_are_408_and_nobody_else_notices(port: int) -> None:
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as beside:
        run = {"workflow": {"name": "w", "nodes": [{"id": "w", "type": "wait", "signal": "go"}]}}
        made = (await beside.post("/api/v1/runs", json=run)).json()["id"]
        path = f"/api/v1/runs/{made}/events"
        async with beside.stream("GET", path, headers={"Accept": "text/event-stream"}) as stream:
            answers = await asyncio.gather(
                said_to(port, START),
                said_to(port, START, b"X"),
                said_to(port, START + b"X-Long: ", b"y"),
                said_to(port, POST + b"{"),
                said_to(port, POST + b"{", b" "),
                said_to(port, START + b"\r\n" + START, b"Z"),
                said_to(port, b""),
                said_to(port, b"\r\n", b"\r\n"),
                said_to(port, START + b"X-Huge: " + b"y" * 60_000, b"y" * 6_000),
            )
            *slow, second, silent, empty, huge = answers
            assert all(is_problem(answer, 408, "request_timeout") for answer in slow)
            assert b"HEADER_TIMEOUT_S" in slow[0] and b"BODY_TIMEOUT_S" in slow[-1]
            first, _, rest = second.partition(b'{"status":"ok"}')
            assert first.startswith(b"HTTP/1.1 200 ") and is_problem(rest, 408, "request_timeout")
            assert (silent, empty) == (b"", b"")
            assert is_problem(huge, 431, "headers_too_large")
            # What was open all the while, longer than any of the limits, goes on.
            answer = await beside.post(f"/api/v1/runs/{made}/signals/go", json={})
            assert answer.status_code < 300, answer.text
            assert "run.succeeded" in (await stream.aread()).decode()
