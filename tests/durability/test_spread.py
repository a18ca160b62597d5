"""Three idle workers on one PostgreSQL: the tasks of one run are carried out by all of them."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from tests.support.model_server import ModelServer
from tests.support.server_process import Nursery

from .shared import SharedWorld
from .world import ready

AGENTS = """
import asyncio
import os

from agents import Agent, function_tool


@function_tool
async def who(n: int) -> int:
    \"\"\"The process that carries this out.\"\"\"
    await asyncio.sleep(0.2)
    return os.getpid()


worker = Agent(name="worker", tools=[who])
"""
SIDE_BY_SIDE = {
    "name": "spread",
    "nodes": [
        {
            "id": "each",
            "type": "map",
            "over": "[1, 2, 3, 4, 5, 6, 7, 8, 9]",
            "as": "n",
            "nodes": [{"id": "w", "type": "tool", "tool": "who", "arguments": {"n": "{{ n }}"}}],
        }
    ],
    "output": "{{ nodes.each.output }}",
}
ROUNDS = 10


@pytest.fixture
async def world(tmp_path: Path, nursery: Nursery, postgres_url: str) -> AsyncIterator[SharedWorld]:
    async with ModelServer() as models:
        world = SharedWorld(tmp_path, models, nursery, url=postgres_url)
        (tmp_path / "agents.py").write_text(AGENTS)
        yield world


@pytest.mark.timeout(90)
async def test_the_tasks_of_one_run_go_to_every_worker_that_is_idle(world: SharedWorld) -> None:
    """Each has a hundred free slots, so that any of them could have taken them all."""
    api = world.join(role="api")
    workers = [world.join(role="worker") for _ in range(3)]
    await asyncio.gather(*(ready(server) for server in (api, *workers)))
    seen: list[set[int]] = []
    async with httpx2.AsyncClient(base_url=api.url, timeout=60) as client:
        for _ in range(ROUNDS):  # The first may come before they know of one another.
            body = {"workflow": SIDE_BY_SIDE}
            run = (await client.post("/api/v1/runs?wait=30", json=body)).json()
            assert run["status"] == "succeeded" and len(run["output"]) == 9, run
            seen.append(set(run["output"]))
            if len(seen[-1]) == len(workers):
                break
    assert seen[-1] == {worker.pid for worker in workers}, seen
    for server in (api, *workers):
        await server.kill()
