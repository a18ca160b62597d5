"""Thousands of event streams in which nothing happens: what they cost, and that others do not pay."""

import asyncio
import resource
import time
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest

from tests.support.model_server import ModelServer
from tests.support.server_process import Nursery, Server

from .world import World, ready, settled

WAITS = {"name": "waits", "nodes": [{"id": "w", "type": "wait", "signal": "go"}]}
RUNS = 10
AT_ONCE = 100
KB_EACH, KB_ANYWAY = 20, 8_000
"""200 MB for ten thousand; and what a fresh process takes up by being used at all."""


def memory_kb(server: Server) -> int:
    for line in Path(f"/proc/{server.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError("it has ended")


async def calls(client: httpx2.AsyncClient, path: str) -> float:
    """The 95th percentile of 200 calls, in seconds."""
    taken = []
    for _ in range(200):
        started = time.perf_counter()
        assert (await client.get(path)).status_code == 200
        taken.append(time.perf_counter() - started)
    return sorted(taken)[190]


async def stream(server: Server, run_id: str) -> tuple[asyncio.StreamReader, Any]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=4096)
    writer.write(
        f"GET /api/v1/runs/{run_id}/events HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        "Accept: text/event-stream\r\n\r\n".encode()
    )
    assert b" 200 " in await reader.readline()
    await reader.readuntil(b"event: run.waiting")
    return reader, writer


@pytest.mark.timeout(600)
@pytest.mark.parametrize("count", [1_000, pytest.param(9_990, marks=pytest.mark.slow)])
async def test_idle_streams_cost_little_and_all_of_them_hear_the_end(
    tmp_path: Path, nursery: Nursery, count: int
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < count + 200:
        pytest.skip(f"only {hard} files may be open")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count + 200), hard))
    async with ModelServer() as models:
        world = World(tmp_path, models, nursery)
        server = world.start()
        await ready(server)
        streams: list[tuple[asyncio.StreamReader, Any]] = []
        async with httpx2.AsyncClient(base_url=server.url, timeout=60) as client:
            ids = []
            for _ in range(RUNS):
                made = (await client.post("/api/v1/runs", json={"workflow": WAITS})).json()
                ids.append(made["id"])
                assert (await settled(server, made["id"]))["status"] == "waiting"
            path = f"/api/v1/runs/{ids[0]}"
            before, alone = memory_kb(server), await calls(client, path)
            while len(streams) < count:
                part = range(len(streams), min(count, len(streams) + AT_ONCE))
                streams += await asyncio.gather(*(stream(server, ids[n % RUNS]) for n in part))
            beside, more = await calls(client, path), memory_kb(server) - before
            print(f"{count:,} streams: {more / count:.1f} KB each, p95 {beside / alone:.2f} times")
            assert more <= KB_EACH * count + (KB_ANYWAY if count < 9_000 else 0)
            if count > 9_000:  # As the fault matrix has it; a time is too coarse for every commit.
                assert beside < 2 * alone, (beside, alone)
            for run_id in ids:
                await client.post(f"/api/v1/runs/{run_id}/signals/go", json={})
            with anyio.fail_after(120):
                for reader, _ in streams:
                    await reader.readuntil(b"event: run.succeeded")
        for _, writer in streams:
            writer.close()
        await server.kill()
