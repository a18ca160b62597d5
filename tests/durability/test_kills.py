"""A server killed with SIGKILL: nothing is lost, nothing that had finished runs again."""

import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from agent_server.execution.crash import BLOB_POINTS, POINTS
from tests.support.model_server import ModelServer
from tests.support.server_process import Nursery, Server

from .world import World, ready, script, settled

RANDOM_KILLS = 30
PLACES = (
    "submit.before_commit",
    "submit.after_commit",
    "step.before_begin:1",
    "step.before_begin:2",
    "step.after_begin:1",
    "step.after_begin:2",
    "step.before_finish:1",
    "step.before_finish:2",
    "step.before_finish:3",
    "step.after_finish:1",
    "step.after_finish:3",
    "child.before_insert:1",
    "child.before_insert:3",
    "child.after_insert:1",
    "child.after_insert:2",
    "task.before_end:1",
    "task.before_end:3",
    "task.after_end:1",
    "task.after_end:2",
    "run.before_end",
    "run.after_end",
)
"""Points and how many times they are passed first; ``task.claimed`` is on a takeover's way."""


@pytest.fixture
async def world(tmp_path: Path, nursery: Nursery) -> AsyncIterator[World]:
    async with ModelServer() as models:
        yield World(tmp_path, models, nursery)


async def _submit(server: Server, run: str) -> None:
    """Ask for the run; the server may die before it answers."""
    try:
        async with httpx2.AsyncClient(timeout=30) as client:
            answer = await client.post(
                f"{server.url}/api/v1/runs",
                json={"goal": f"goal {run}"},
                headers={"Idempotency-Key": run},
            )
            assert answer.status_code == 202, answer.text
    except httpx2.TransportError:
        assert await server.ended(10)


async def _finish(world: World, server: Server, run: str) -> str:
    """Ask again with the same key, as a client does, and see the run through."""
    await _submit(server, run)
    run_id = world.run_id_of(run)
    assert run_id is not None
    answer = await settled(server, run_id)
    return world.check(run, run_id, answer)


async def _cancel(server: Server, run_id: str | None) -> None:
    """What waits is not taken up by the next server, where it would pass points of its own."""
    async with httpx2.AsyncClient(timeout=30) as client:
        answer = await client.post(f"{server.url}/api/v1/runs/{run_id}/cancel")
        assert answer.status_code in (200, 202), answer.text


@pytest.mark.timeout(300)
async def test_kill_at_every_named_point_loses_and_repeats_nothing(world: World) -> None:
    statuses: dict[str, str] = {}
    assert {place.partition(":")[0] for place in PLACES} | {"task.claimed"} == set(POINTS)
    for number, place in enumerate(PLACES):
        run = f"n{number}"
        world.models.script({"rules": script(run)})
        server = world.start(crash_at=place)
        await ready(server)
        await _submit(server, run)
        assert await server.ended(30), f"{place} was never reached"
        world.note_death(run, world.run_id_of(run))
        # The point task.claimed lies on the way of whoever takes the run over.
        if place in ("submit.after_commit", "step.before_begin:1", "child.after_insert:2"):
            again = world.start(crash_at="task.claimed")
            assert await again.ended(30), "the takeover did not reach task.claimed"
        server = world.start()
        await ready(server)
        statuses[place] = await _finish(world, server, run)
        if statuses[place] == "waiting":
            await _cancel(server, world.run_id_of(run))
        await server.kill()
    # Only a death between a payment's beginning and its end leaves it in doubt.
    surely_done = {place for place in PLACES if place.startswith(("submit", "child", "run"))}
    assert all(statuses[place] == "succeeded" for place in surely_done), statuses
    assert statuses["step.after_begin:1"] == "waiting", statuses


@pytest.mark.timeout(300)
async def test_kill_at_thirty_random_moments_loses_and_repeats_nothing(world: World) -> None:
    seed = random.randrange(1_000_000)
    print("seed", seed)  # shown when the test fails
    choose = random.Random(seed)
    statuses: list[str] = []
    for number in range(RANDOM_KILLS):
        run = f"r{number}"
        world.models.script({"rules": script(run)})
        server = world.start()
        await ready(server)
        await _submit(server, run)
        if not await server.ended(choose.uniform(0.0, 0.5)):
            await server.kill()
        world.note_death(run, world.run_id_of(run))
        server = world.start()
        await ready(server)
        statuses.append(await _finish(world, server, run))
        await server.kill()
    assert statuses.count("succeeded") >= RANDOM_KILLS // 3, statuses


@pytest.mark.parametrize("place", BLOB_POINTS)
async def test_kill_between_a_large_value_and_its_row_leaves_what_housekeeping_finds(
    world: World, place: str
) -> None:
    folder = world.folder / "blobs"
    env = world.environment(blobs=f"file://{folder}", retention_days="1")
    world.models.script({"rules": [{"match": "^hello", "steps": [{"text": "good day"}]}]})
    body = {"agent": "worker", "input": "hello " + "x" * 100_000}

    async def post(server: Server) -> httpx2.Response:
        async with httpx2.AsyncClient(timeout=30) as client:
            headers = {"Idempotency-Key": "one"}
            return await client.post(
                f"{server.url}/api/v1/runs?wait=30", json=body, headers=headers
            )

    def files() -> list[Path]:
        return [path for path in folder.rglob("*") if path.is_file()]

    server = world.nursery.start(env, folder=world.folder, crash_at=place)
    await ready(server)
    with pytest.raises(httpx2.TransportError):
        await post(server)
    assert await server.ended(20)
    assert world.rows("SELECT count(*) FROM runs") == [(0,)]
    (lost,) = files()
    server = world.nursery.start(env, folder=world.folder)
    await ready(server)
    answer = await post(server)
    assert answer.json()["status"] == "succeeded", answer.text
    assert answer.json()["input"] == body["input"]
    await server.kill()
    strays = len(files()) - 1
    assert strays == (place == "blob.after_put")

    def vacuum() -> str:
        process = world.nursery.run("db", "vacuum", env=env, folder=world.folder, log="vacuum.log")
        assert process.exit_code(60) == 0, process.output
        return process.output

    assert "0 deleted: large values" in vacuum()
    os.utime(lost, (1, 1))
    assert f"{strays} deleted: large values" in vacuum()
    (kept,) = files()
    assert kept.read_bytes() == f'"{body["input"]}"'.encode()
