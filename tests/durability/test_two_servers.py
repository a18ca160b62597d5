"""Two servers on one PostgreSQL: one dies, freezes or leaves, or the database itself goes away."""

import asyncio
import re
import signal
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg  # type: ignore[import-untyped]  # ships no types
import httpx2
import pytest

from tests.support.model_server import ModelServer
from tests.support.postgres import PostgresServer
from tests.support.server_process import Nursery, Server

from .world import World, ready, script, settled

LEASE_S = 2.0
TAKEOVER_S = LEASE_S + 5.0


@dataclass
class SharedWorld(World):
    """A world whose servers share one PostgreSQL database."""

    url: str = ""

    def join(self, **settings: str) -> Server:
        """One more server; ``lease_s="3"`` is ``AGENT_SERVER_LEASE_S=3``."""
        env = {
            **{"database_url": self.url, "lease_s": str(LEASE_S), "model": "test-model"},
            **{"agents": str(self.folder / "agents.py"), "log_level": "WARNING"},
            **{"log_format": "json", "data_dir": str(self.folder / "data")},
            **settings,
        }
        variables = {f"AGENT_SERVER_{name.upper()}": value for name, value in env.items()}
        variables |= {
            "OPENAI_API_KEY": "test",
            "OPENAI_BASE_URL": self.models.base_url,
            "COUNT_FILE": str(self.count_file),
        }
        return self.nursery.start(variables, folder=self.folder)

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


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@pytest.fixture
async def world(tmp_path: Path, nursery: Nursery, postgres_url: str) -> AsyncIterator[SharedWorld]:
    async with ModelServer() as models:
        yield SharedWorld(tmp_path, models, nursery, url=postgres_url)


def _held_back(run: str, latency_s: float) -> list[dict[str, Any]]:
    """The script of ``run``, whose last model call takes ``latency_s``."""
    rules = script(run)
    for rule in rules:
        if "gamma" in rule["match"]:
            rule["steps"][0]["latency_s"] = latency_s
    return rules


async def _submit(server: Server, run: str) -> str:
    async with httpx2.AsyncClient(timeout=30) as client:
        answer = await client.post(f"{server.url}/api/v1/runs", json={"goal": f"goal {run}"})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


async def _at_the_last_call(world: SharedWorld, server: Server, run_id: str, run: str) -> None:
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


async def _readiness(server: Server, status: int) -> None:
    """Return when ``/readyz`` answers ``status``."""
    async with httpx2.AsyncClient(timeout=30) as client:
        for _ in range(600):
            if (await client.get(f"{server.url}/readyz")).status_code == status:
                return
            await asyncio.to_thread(server._nursery.ended, server.pid, 0.05)
    raise AssertionError(server.log.read_text()[-4000:])


async def _attempts(world: SharedWorld, run_id: str) -> int:
    """How often any task of the run was taken up, at most."""
    return int((await world.look("SELECT max(attempts) FROM tasks WHERE run_id = ?", run_id))[0][0])


@pytest.mark.timeout(60)
async def test_a_killed_server_s_run_is_taken_over_within_the_lease_and_nothing_is_repeated(
    world: SharedWorld,
) -> None:
    world.models.script({"rules": _held_back("k", 60)})
    first, second = world.join(), world.join()
    await ready(first), await ready(second)
    run_id = await _submit(first, "k")
    await _at_the_last_call(world, second, run_id, "k")
    world.note_death("k", run_id)
    world.models.script({"rules": script("k")})
    killed_at = time.monotonic()
    await first.kill()
    answer = await settled(second, run_id)
    assert time.monotonic() - killed_at < TAKEOVER_S
    assert world.check("k", run_id, answer) == "succeeded"
    assert await _attempts(world, run_id) == 2
    await second.kill()


@pytest.mark.timeout(60)
async def test_a_frozen_server_that_wakes_after_the_takeover_writes_nothing_and_lives_on(
    world: SharedWorld,
) -> None:
    world.models.script({"rules": _held_back("f", 1)})
    first, second = world.join(), world.join()
    await ready(first), await ready(second)
    run_id = await _submit(first, "f")
    await _at_the_last_call(world, second, run_id, "f")
    world.note_death("f", run_id)
    world.models.script({"rules": script("f")})
    first.signal(signal.SIGSTOP)
    answer = await settled(second, run_id)
    assert world.check("f", run_id, answer) == "succeeded"
    before = await world.look("SELECT seq, type, data FROM events WHERE run_id = ?", run_id)
    first.signal(signal.SIGCONT)
    # What it was told while it was frozen reaches it now, and is refused.
    async with httpx2.AsyncClient(timeout=30) as client:
        for _ in range(200):
            if "task was taken over" in first.log.read_text():
                break
            await client.get(f"{first.url}/readyz")
            await asyncio.to_thread(first._nursery.ended, first.pid, 0.05)
    assert "task was taken over" in first.log.read_text()
    after = await world.look("SELECT seq, type, data FROM events WHERE run_id = ?", run_id)
    assert after == before
    assert world.check("f", run_id, await settled(first, run_id)) == "succeeded"
    world.models.script({"rules": script("g")})
    again = await _submit(first, "g")
    assert world.check("g", again, await settled(first, again)) == "succeeded"
    await first.kill(), await second.kill()


@pytest.mark.timeout(90)
async def test_postgresql_restarts_in_the_middle_of_a_run_and_nothing_is_lost_or_taken_over(
    world: SharedWorld, postgres_server: PostgresServer
) -> None:
    if postgres_server.pid is None:
        pytest.skip("the PostgreSQL server is not ours to restart")
    world.models.script({"rules": _held_back("p", 1)})
    first, second = world.join(), world.join()
    await ready(first), await ready(second)
    run_id = await _submit(first, "p")
    await _at_the_last_call(world, second, run_id, "p")
    # From this thread: the server dies with the thread that started it.
    postgres_server.stop(immediately=True)
    try:
        await _readiness(first, 503)
        await _readiness(second, 503)
    finally:
        postgres_server.start()
    await _readiness(first, 200)
    await _readiness(second, 200)
    answer = await settled(second, run_id)
    assert world.check("p", run_id, answer) == "succeeded"
    assert await _attempts(world, run_id) == 1, "it was taken from a server that lived"
    await first.kill(), await second.kill()


@pytest.mark.timeout(60)
async def test_a_server_that_is_stopped_under_load_hands_its_runs_over_at_once(
    world: SharedWorld,
) -> None:
    names = [f"s{number}" for number in range(5)]
    held = [rule for name in names for rule in _held_back(name, 60)]
    world.models.script({"rules": held})
    # A lease that would take longer than the test: the hand-over must not need it.
    first = world.join(shutdown_grace_s="0.5", lease_s="600")
    await ready(first)
    run_ids = [await _submit(first, name) for name in names]
    second = world.join(lease_s="600")
    await ready(second)
    for name, run_id in zip(names, run_ids, strict=True):
        await _at_the_last_call(world, second, run_id, name)
        world.note_death(name, run_id)
    world.models.script({"rules": [rule for name in names for rule in script(name)]})
    stopped_at = time.monotonic()
    first.stop()
    assert await first.ended(10)
    for name, run_id in zip(names, run_ids, strict=True):
        assert world.check(name, run_id, await settled(second, run_id)) == "succeeded"
    assert time.monotonic() - stopped_at < 15
    await second.kill()


@pytest.mark.timeout(60)
async def test_an_api_server_follows_and_cancels_what_a_worker_carries_out(
    world: SharedWorld,
) -> None:
    world.models.script({"rules": [*script("d"), *_held_back("e", 60)]})
    api, worker = world.join(role="api"), world.join(role="worker")
    await ready(api), await ready(worker)
    followed = await _submit(api, "d")
    async with httpx2.AsyncClient(timeout=30) as client:
        answer = await client.get(
            f"{api.url}/api/v1/runs/{followed}/events", headers={"Accept": "text/event-stream"}
        )
    ids = [int(found) for found in re.findall(r"^id: ?(\d+)", answer.text, re.MULTILINE)]
    assert ids == list(range(1, len(ids) + 1)) and "run.succeeded" in answer.text
    assert world.check("d", followed, await settled(api, followed)) == "succeeded"
    cancelled = await _submit(api, "e")
    await _at_the_last_call(world, api, cancelled, "e")
    async with httpx2.AsyncClient(timeout=30) as client:
        answer = await client.post(f"{api.url}/api/v1/runs/{cancelled}/cancel", json={})
    assert answer.json()["status"] == "cancelled", answer.text
    await api.kill(), await worker.kill()
