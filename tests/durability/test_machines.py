"""What machines do to servers: a network split, cut connections, a full disk, clocks that differ."""

import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import httpx2
import pytest

from tests.support.model_server import ModelServer
from tests.support.partition import Partition
from tests.support.server_process import Nursery

from .shared import SharedWorld, at_the_last_call, attempts, held_back, readiness, submit
from .world import World, ready, script, settled


@pytest.fixture
async def world(tmp_path: Path, nursery: Nursery, postgres_url: str) -> AsyncIterator[SharedWorld]:
    async with ModelServer() as models:
        yield SharedWorld(tmp_path, models, nursery, url=postgres_url)


@pytest.mark.timeout(90)
async def test_a_server_cut_off_from_the_database_loses_its_run_once_and_writes_nothing_after(
    world: SharedWorld,
) -> None:
    parts = urlsplit(world.url)
    async with Partition(parts.port or 5432) as split:
        beside = urlunsplit(parts._replace(netloc=f"{parts.username}@127.0.0.1:{split.port}"))
        world.models.script({"rules": held_back("n")})
        cut, other = world.join(database_url=beside), world.join()
        await ready(cut), await ready(other)
        run_id = await submit(cut, "n")
        await at_the_last_call(world, other, run_id, "n")
        world.note_death("n", run_id)
        split.begin()
        await readiness(cut, 503)
        world.models.release()
        assert world.check("n", run_id, await settled(other, run_id)) == "succeeded"
        assert await attempts(world, run_id) == 2
        before = await world.look("SELECT seq, type, data FROM events WHERE run_id = ?", run_id)
        split.end()
        await readiness(cut, 200)
        assert world.check("n", run_id, await settled(cut, run_id)) == "succeeded"
        world.models.script({"rules": script("m")})
        again = await submit(cut, "m")
        assert world.check("m", again, await settled(other, again)) == "succeeded"
        after = await world.look("SELECT seq, type, data FROM events WHERE run_id = ?", run_id)
        assert after == before
        await cut.kill(), await other.kill()


@pytest.mark.timeout(60)
async def test_connections_killed_again_and_again_lose_nothing_and_nobody_is_taken_for_dead(
    world: SharedWorld,
) -> None:
    world.models.script({"rules": held_back("t", 2)})
    first, second = world.join(), world.join()
    await ready(first), await ready(second)
    run_id = await submit(first, "t")
    for _ in range(5):
        await world.look(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        async with httpx2.AsyncClient(timeout=30) as client:
            for _ in range(20):
                await client.get(f"{second.url}/livez")
    assert world.check("t", run_id, await settled(second, run_id)) == "succeeded"
    # Its own server may let go of the task and take it again, since it could not write.
    for server in (first, second):
        assert "took tasks from dead nodes" not in server.log.read_text()
    await first.kill(), await second.kill()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("hours", [1, pytest.param(-1, marks=pytest.mark.slow)])
async def test_clocks_an_hour_apart_hand_runs_over_once_and_take_nothing_from_the_living(
    world: SharedWorld, hours: int
) -> None:
    world.models.script({"rules": held_back("h", 3)})
    right = world.join()
    wrong = world.nursery.start(
        world.environment() | {"TEST_CLOCK_SHIFT_S": str(3600 * hours)}, folder=world.folder
    )
    await ready(right), await ready(wrong)
    run_id = await submit(wrong, "h")
    await at_the_last_call(world, right, run_id, "h")
    # More than a lease passes while both live: whoever compared clocks would take it now.
    assert world.check("h", run_id, await settled(right, run_id)) == "succeeded"
    assert await attempts(world, run_id) == 1
    world.models.script({"rules": held_back("i", 60)})
    run_id = await submit(wrong, "i")
    await at_the_last_call(world, right, run_id, "i")
    world.note_death("i", run_id)
    world.models.script({"rules": script("i")})
    await wrong.kill()
    assert world.check("i", run_id, await settled(right, run_id)) == "succeeded"
    assert await attempts(world, run_id) == 2
    await right.kill()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("a small disk can only be mounted by root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.timeout(90)
async def test_a_full_disk_is_a_clear_507_and_everything_goes_on_when_there_is_room(
    tmp_path: Path, nursery: Nursery, small_disk: Path
) -> None:
    async with ModelServer(rules=script("d")) as models:
        world = World(tmp_path, models, nursery)
        (tmp_path / "data").symlink_to(small_disk)
        server = world.start()
        await ready(server)
        run_id = None
        async with httpx2.AsyncClient(base_url=server.url, timeout=30) as client:
            filler = small_disk / "filler"
            with filler.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(b"x" * 4096)
                except OSError:
                    pass
            answers = []
            for number in range(200):
                body = {"agent": "worker", "input": f"{number} " + "y" * 20_000}
                answers.append(await client.post("/api/v1/runs", json=body))
                if answers[-1].status_code == 507:
                    break
            problem = answers[-1]
            assert problem.status_code == 507, problem.text
            assert problem.json()["code"] == "storage_full" and problem.json()["hint"]
            assert (await client.get("/livez")).status_code == 200
            filler.unlink()
            for _ in range(100):
                answer = await client.post("/api/v1/runs", json={"goal": "goal d"})
                if answer.status_code == 202:
                    run_id = answer.json()["id"]
                    break
            assert run_id is not None, answer.text
            assert world.check("d", run_id, await settled(server, run_id)) == "succeeded"
            for answered in answers[:-1]:
                if answered.status_code == 202:
                    ended = await settled(server, answered.json()["id"])
                    assert ended["status"] == "succeeded", ended
        await server.kill()
        assert world.rows("PRAGMA integrity_check") == [("ok",)]
