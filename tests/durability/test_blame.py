"""A run that kills its worker each time is set aside, and one that was merely beside it is not."""

from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.support.model_server import ModelServer
from tests.support.server_process import Nursery, Server

from .world import World

AGENTS = '''
import asyncio
import os
import signal
from pathlib import Path

from agents import Agent, function_tool

GO = Path(os.environ["COUNT_FILE"])


@function_tool
async def deadly(after_s: float) -> str:
    """Kills the process."""
    await asyncio.sleep(after_s)
    os.kill(os.getpid(), signal.SIGKILL)
    return "never"


@function_tool
async def long() -> str:
    """Works until it is told that it has worked enough."""
    while not GO.read_text():
        await asyncio.sleep(0.02)
    return "done"


worker = Agent(name="worker", tools=[deadly, long])
'''
POLICY = '[tools.deadly]\neffect = "none"\n[tools.long]\neffect = "none"\n'
MOST, LEASE_S = 3, 1.0


def tool(name: str, **arguments: Any) -> dict[str, Any]:
    """The body of a run that calls one tool."""
    node = {"id": name, "type": "tool", "tool": name, "arguments": arguments}
    return {"workflow": {"name": name, "nodes": [node]}}


class Fragile:
    """A server that is started again each time it has died, and whoever calls it."""

    def __init__(self, world: World, **settings: str) -> None:
        (world.folder / "agents.py").write_text(AGENTS)
        (world.folder / "agent-server.toml").write_text(POLICY)
        self._world = world
        self._env = world.environment(max_attempts=str(MOST), lease_s=str(LEASE_S), **settings)
        self.server: Server | None = None
        self.deaths = 0

    async def call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        while True:
            if self.server is None:
                self.server = self._world.nursery.start(self._env, folder=self._world.folder)
            try:
                async with httpx2.AsyncClient(base_url=self.server.url, timeout=30) as client:
                    answer = await client.request(method, f"/api/v1/runs{path}", json=body)
                    assert answer.status_code < 300, answer.text
                    return dict(answer.json())
            except httpx2.TransportError:
                if await self.server.ended(0.02):
                    self.deaths += 1
                    self.server = None

    async def ended(self, run_id: str) -> dict[str, Any]:
        while True:
            run = await self.call("GET", f"/{run_id}?wait=5")
            if run["ended_at"] is not None:
                return run


@pytest.mark.timeout(120)
@pytest.mark.parametrize("database", ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
async def test_a_run_that_kills_its_only_worker_is_set_aside_and_those_beside_it_go_on(
    tmp_path: Path, nursery: Nursery, database: str, request: pytest.FixtureRequest
) -> None:
    """Each death takes all of them along, so that by counting alone all would be set aside."""
    async with ModelServer() as models:
        world = World(tmp_path, models, nursery)
        settings = {}
        if database == "postgresql":
            settings["database_url"] = request.getfixturevalue("postgres_url")
        server = Fragile(world, **settings)
        beside = [(await server.call("POST", "", tool("long")))["id"] for _ in range(2)]
        deadly = (await server.call("POST", "", tool("deadly", after_s=0.2)))["id"]
        run = await server.ended(deadly)
        assert run["status"] == "failed" and "its worker died each time" in str(run["error"])
        assert server.deaths == MOST
        world.count_file.write_text("go")
        for run_id in beside:
            run = await server.ended(run_id)
            assert (run["status"], run["output"]) == ("succeeded", "done"), run
        assert server.deaths == MOST
        assert server.server is not None
        await server.server.kill()
