"""Rows that are not what was written: each is set aside with a reason, and all the rest is served."""

import asyncio
import json
import re
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg  # type: ignore[import-untyped]  # ships no types
import httpx2
import pytest

from tests.support.model_server import ModelServer
from tests.support.server_process import Nursery

from .shared import SharedWorld
from .world import World, ready, settled

CUT = '{"type":"task.star'
TWO = {
    "name": "two",
    "nodes": [
        {"id": "a", "type": "tool", "tool": "look_up", "arguments": {"key": "k"}},
        {"id": "w", "type": "wait", "signal": "go"},
        {"id": "b", "type": "tool", "tool": "look_up", "arguments": {"key": "l"}},
    ],
    "output": "{{ nodes.a.output }} and {{ nodes.b.output }}",
}


@pytest.fixture(params=["sqlite", "postgresql"])
async def world(
    request: pytest.FixtureRequest, tmp_path: Path, nursery: Nursery
) -> AsyncIterator[World]:
    async with ModelServer() as models:
        if request.param == "sqlite":
            yield World(tmp_path, models, nursery)
        else:
            url = request.getfixturevalue("postgres_url")
            yield SharedWorld(tmp_path, models, nursery, url=url)


async def spoil(world: World, *statements: str) -> None:
    """What no program of ours does."""
    if isinstance(world, SharedWorld):
        connection = await asyncpg.connect(world.url)
        for statement in statements:
            await connection.execute(statement)
        await connection.close()
    else:
        with sqlite3.connect(world.folder / "data" / "agent-server.db") as file:
            for statement in statements:
                file.execute(statement)


async def begun(client: httpx2.AsyncClient, **more: Any) -> str:
    answer = await client.post("/api/v1/runs", json={"workflow": TWO, **more})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


@pytest.mark.timeout(90)
async def test_what_cannot_be_read_is_set_aside_and_the_rest_is_served(world: World) -> None:
    server = world.start()
    await ready(server)
    async with httpx2.AsyncClient(base_url=server.url, timeout=30) as client:
        ended, request, payload, step = [await begun(client) for _ in range(4)]
        for run_id in (ended, request, payload, step):
            assert (await settled(server, run_id))["status"] == "waiting"
        await client.post(f"/api/v1/runs/{ended}/signals/go", json={})
        assert (await settled(server, ended))["status"] == "succeeded"
    await server.kill()
    await spoil(
        world,
        f"UPDATE events SET data = '{CUT}' WHERE run_id = '{ended}' AND seq IN (3, 4)",
        f"UPDATE events SET data = '[]' WHERE run_id = '{ended}' AND type = 'run.succeeded'",
        f"UPDATE runs SET request = '{CUT}' WHERE id = '{request}'",
        f"UPDATE tasks SET payload = '{CUT}' WHERE run_id = '{payload}'",
        f"UPDATE steps SET output = '{CUT}' WHERE run_id = '{step}'",
        f"UPDATE tasks SET output = '{CUT}' WHERE run_id = '{step}' AND status = 'succeeded'",
        "UPDATE tasks SET status = 'queued', owner = NULL, wake_at = NULL, waiting_for = NULL"
        f" WHERE run_id IN ('{request}', '{payload}', '{step}') AND path = ''",
        f"UPDATE runs SET status = 'queued' WHERE id IN ('{request}', '{payload}', '{step}')",
    )
    check = world.nursery.run("db", "check", env=world.environment(), folder=world.folder)
    assert await asyncio.to_thread(check.exit_code) == 1
    for place in (f"events {ended}/3: data", f"runs {request}: request", f"tasks {payload}/"):
        assert place in check.output, check.output
    server = world.start()
    await ready(server)
    async with httpx2.AsyncClient(base_url=server.url, timeout=30) as client:
        path = f"/api/v1/runs/{ended}/events"
        listed = (await client.get(path, headers={"Accept": "application/json"})).json()["data"]
        stream = (await client.get(path, headers={"Accept": "text/event-stream"})).text
        streamed = [json.loads(data) for data in re.findall(r"^data: (.*)$", stream, re.MULTILINE)]
        assert streamed == listed
        assert [event["seq"] for event in listed] == list(range(1, len(listed) + 1))
        lost = [event for event in listed if event["type"] == "event.unreadable"]
        assert [event["seq"] for event in lost] == [3, 4, len(listed)]
        assert lost[-1]["was"] == "run.succeeded" and "not JSON" in lost[0]["reason"]
        # Nobody who stands in the queue is held up by them, and each fails with its reason.
        fresh = await begun(client)
        assert (await settled(server, fresh))["status"] == "waiting"
        await client.post(f"/api/v1/runs/{fresh}/signals/go", json={})
        assert (await settled(server, fresh))["status"] == "succeeded"
        for run_id in (request, payload, step):
            run = await settled(server, run_id)
            assert run["status"] == "failed" and "cannot be read" in str(run["error"]), run
        runs = (await client.get("/api/v1/runs")).json()["data"]
        assert {run["id"] for run in runs} == {ended, request, payload, step, fresh}
        assert (await client.get(f"/api/v1/runs/{step}/steps")).status_code == 200
        assert (await client.get(f"/api/v1/runs/{ended}/export")).status_code == 200
    assert "a stored event cannot be read" in server.log.read_text()
    await server.kill()
