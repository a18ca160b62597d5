"""A world whose servers share one PostgreSQL, and what tests of several servers wait for.

Leans on ``world``. Refuses to know what happens to the servers: each test does that.
"""

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import asyncpg  # type: ignore[import-untyped]  # ships no types
import httpx2

from tests.support.server_process import Server

from .world import World, script

LEASE_S = 2.0
TAKEOVER_S = LEASE_S + 5.0


@dataclass
class SharedWorld(World):
    """A world whose servers share one PostgreSQL database."""

    url: str = ""

    def join(self, **settings: str) -> Server:
        """One more server; ``lease_s="3"`` is ``AGENT_SERVER_LEASE_S=3``."""
        return self.nursery.start(self.environment(**settings), folder=self.folder)

    def environment(self, **settings: str) -> dict[str, str]:
        shared = {"database_url": self.url, "lease_s": str(LEASE_S), "log_format": "json"}
        return super().environment(**{**shared, **settings})

    async def look(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        connection = await asyncpg.connect(self.url, timeout=10)
        try:
            return [tuple(row) for row in await connection.fetch(_numbered(query), *values)]
        finally:
            await connection.close()

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with ThreadPoolExecutor(1) as threads:  # Beside the loop of the test.
            return threads.submit(lambda: asyncio.run(self.look(query, *values))).result(30)

    def run_id_of(self, run: str) -> str | None:
        rows = self.rows("SELECT id FROM runs WHERE name = ?", f"goal {run}")
        return rows[0][0] if rows else None


def _numbered(query: str) -> str:
    """``?`` as PostgreSQL's ``$1``, ``$2``, …"""
    count = iter(range(1, 100))
    return re.sub(r"\?", lambda _: f"${next(count)}", query)


def held_back(run: str, latency_s: float | None = None) -> list[dict[str, Any]]:
    """The script of ``run``, whose last model call takes ``latency_s``, or until ``release``."""
    rules = script(run)
    for rule in rules:
        if "gamma" in rule["match"]:
            rule["steps"][0] |= {"held": True} if latency_s is None else {"latency_s": latency_s}
    return rules


async def submit(server: Server, run: str) -> str:
    return await submit_to(server.url, run)


async def submit_to(url: str, run: str) -> str:
    """The id of a new run of the goal ``run``."""
    async with httpx2.AsyncClient(timeout=30) as client:
        answer = await client.post(f"{url}/api/v1/runs", json={"goal": f"goal {run}"})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


async def at_the_last_call(world: SharedWorld, server: Server, run_id: str, run: str) -> None:
    """Return when all but the last model call is stored, and the last one is under way."""
    async with httpx2.AsyncClient(timeout=30) as client:
        for _ in range(200):
            if any(
                f"gamma of {run}" in str(call.get("input", ""))[:200] for call in world.models.calls
            ):
                done = await world.look(
                    "SELECT count(*) FROM steps WHERE run_id = ? AND kind = 'model'"
                    " AND status = 'done'",
                    run_id,
                )
                if done == [(7,)]:
                    return
            await client.get(f"{server.url}/api/v1/runs/{run_id}?wait=0.1")
    tasks = await world.look(
        "SELECT path, status, owner, epoch FROM tasks WHERE run_id = ?", run_id
    )
    last = await world.look("SELECT data FROM events WHERE run_id = ? ORDER BY seq DESC", run_id)
    raise AssertionError((tasks, last[:3], server.log.read_text()[-4000:]))


async def readiness(server: Server, status: int) -> None:
    """Return when ``/readyz`` answers ``status``."""
    async with httpx2.AsyncClient(timeout=30) as client:
        for _ in range(600):
            if (await client.get(f"{server.url}/readyz")).status_code == status:
                return
            await asyncio.to_thread(server._nursery.ended, server.pid, 0.05)
    raise AssertionError(server.log.read_text()[-4000:])


async def attempts(world: SharedWorld, run_id: str) -> int:
    """How often any task of the run was taken up, at most."""
    return int((await world.look("SELECT max(attempts) FROM tasks WHERE run_id = ?", run_id))[0][0])
