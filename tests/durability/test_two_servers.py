"""Two servers on one PostgreSQL: one dies, freezes or leaves, or the database itself goes away."""

import asyncio
import re
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx2
import pytest

from tests.conftest import postgresql
from tests.support.model_server import ModelServer
from tests.support.postgres import PostgresServer
from tests.support.server_process import Nursery

from .shared import (
    TAKEOVER_S,
    SharedWorld,
    at_the_last_call,
    attempts,
    held_back,
    readiness,
    submit,
)
from .world import ready, script, settled


@pytest.fixture(scope="module")
def postgres_server() -> Iterator[PostgresServer]:
    """One that these tests may stop: what it has committed is on the disk."""
    with postgresql(fsync="on", full_page_writes="on") as server:
        yield server


@pytest.fixture
async def world(tmp_path: Path, nursery: Nursery, postgres_url: str) -> AsyncIterator[SharedWorld]:
    async with ModelServer() as models:
        yield SharedWorld(tmp_path, models, nursery, url=postgres_url)


@pytest.mark.timeout(60)
async def test_a_killed_server_s_run_is_taken_over_within_the_lease_and_nothing_is_repeated(
    world: SharedWorld,
) -> None:
    world.models.script({"rules": held_back("k", 60)})
    first, second = world.join(), world.join()
    await ready(first), await ready(second)
    run_id = await submit(first, "k")
    await at_the_last_call(world, second, run_id, "k")
    world.note_death("k", run_id)
    world.models.script({"rules": script("k")})
    killed_at = time.monotonic()
    await first.kill()
    answer = await settled(second, run_id)
    assert time.monotonic() - killed_at < TAKEOVER_S
    assert world.check("k", run_id, answer) == "succeeded"
    assert await attempts(world, run_id) == 2
    await second.kill()


@pytest.mark.timeout(60)
async def test_a_frozen_server_that_wakes_after_the_takeover_writes_nothing_and_lives_on(
    world: SharedWorld,
) -> None:
    world.models.script({"rules": held_back("f", 1)})
    first, second = world.join(), world.join()
    await ready(first), await ready(second)
    run_id = await submit(first, "f")
    await at_the_last_call(world, second, run_id, "f")
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
    again = await submit(first, "g")
    assert world.check("g", again, await settled(first, again)) == "succeeded"
    await first.kill(), await second.kill()


@pytest.mark.timeout(90)
async def test_postgresql_restarts_in_the_middle_of_a_run_and_nothing_is_lost_or_taken_over(
    world: SharedWorld, postgres_server: PostgresServer
) -> None:
    if postgres_server.pid is None:
        pytest.skip("the PostgreSQL server is not ours to restart")
    world.models.script({"rules": held_back("p", 1)})
    first, second = world.join(), world.join()
    await ready(first), await ready(second)
    run_id = await submit(first, "p")
    await at_the_last_call(world, second, run_id, "p")
    # From this thread: the server dies with the thread that started it.
    postgres_server.stop(immediately=True)
    try:
        await readiness(first, 503)
        await readiness(second, 503)
    finally:
        postgres_server.start()
    await readiness(first, 200)
    await readiness(second, 200)
    answer = await settled(second, run_id)
    assert world.check("p", run_id, answer) == "succeeded"
    assert await attempts(world, run_id) == 1, "it was taken from a server that lived"
    await first.kill(), await second.kill()


@pytest.mark.timeout(60)
async def test_a_server_that_is_stopped_under_load_hands_its_runs_over_at_once(
    world: SharedWorld,
) -> None:
    names = [f"s{number}" for number in range(5)]
    held = [rule for name in names for rule in held_back(name, 60)]
    world.models.script({"rules": held})
    # A lease that would take longer than the test: the hand-over must not need it.
    first = world.join(shutdown_grace_s="0.5", lease_s="600")
    await ready(first)
    run_ids = [await submit(first, name) for name in names]
    second = world.join(lease_s="600")
    await ready(second)
    for name, run_id in zip(names, run_ids, strict=True):
        await at_the_last_call(world, second, run_id, name)
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
    world.models.script({"rules": [*script("d"), *held_back("e", 60)]})
    api, worker = world.join(role="api"), world.join(role="worker")
    await ready(api), await ready(worker)
    followed = await submit(api, "d")
    async with httpx2.AsyncClient(timeout=30) as client:
        answer = await client.get(
            f"{api.url}/api/v1/runs/{followed}/events", headers={"Accept": "text/event-stream"}
        )
    ids = [int(found) for found in re.findall(r"^id: ?(\d+)", answer.text, re.MULTILINE)]
    assert ids == list(range(1, len(ids) + 1)) and "run.succeeded" in answer.text
    assert world.check("d", followed, await settled(api, followed)) == "succeeded"
    cancelled = await submit(api, "e")
    await at_the_last_call(world, api, cancelled, "e")
    async with httpx2.AsyncClient(timeout=30) as client:
        answer = await client.post(f"{api.url}/api/v1/runs/{cancelled}/cancel", json={})
    assert answer.json()["status"] == "cancelled", answer.text
    await api.kill(), await worker.kill()
