"""`agent-server db copy`: runs, sessions and keys move to another database and go on there."""

import json
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.support.model_server import ModelServer
from tests.support.server_process import Nursery, Server

from .shared import SharedWorld, held_back, submit
from .world import World, ready, script, settled


@pytest.fixture
async def worlds(
    tmp_path: Path, nursery: Nursery, postgres_url: str
) -> AsyncIterator[tuple[World, SharedWorld]]:
    async with ModelServer() as models:
        yield (
            World(tmp_path, models, nursery),
            SharedWorld(tmp_path, models, nursery, url=postgres_url),
        )


def copy(world: World, source: str, target: str, *more: str) -> tuple[int, str]:
    argv = ("db", "copy", "--from", source, "--to", target, *more)
    process = world.nursery.run(*argv, env={}, folder=world.folder, log="copy.log")
    code = process.exit_code(60)
    text = process.output
    (world.folder / "copy.log").unlink()
    return code, text


async def post(server: Server, body: dict[str, Any], key: str = "") -> httpx2.Response:
    async with httpx2.AsyncClient(timeout=30) as client:
        headers = {"Idempotency-Key": key} if key else {}
        return await client.post(f"{server.url}/api/v1/runs?wait=30", json=body, headers=headers)


async def everything(server: Server, run_ids: list[str]) -> list[Any]:
    """All that a caller sees of the runs, and of the session."""
    paths = ["/sessions/talk/items"]
    for run_id in run_ids:
        at = f"/runs/{run_id}"
        paths += [at, f"{at}/events", f"{at}/steps", f"{at}/tasks"]
    async with httpx2.AsyncClient(timeout=30, headers={"Accept": "application/json"}) as client:
        answers = [await client.get(f"{server.url}/api/v1{path}") for path in paths]
    assert [a.status_code for a in answers] == [200] * len(paths), [a.text for a in answers]
    return [answer.json() for answer in answers]


@pytest.mark.timeout(120)
async def test_a_copied_database_has_every_row_and_an_unfinished_run_goes_on_without_repeating(
    worlds: tuple[World, SharedWorld],
) -> None:
    small, shared = worlds
    at = f"sqlite:///{small.folder}/data/agent-server.db"
    talk = {"match": "^hello", "steps": [{"text": "good day ☃ \\u0000"}]}
    small.models.script({"rules": [talk, *script("e"), *held_back("c", 60)]})
    server = small.start()
    await ready(server)
    turn = {"agent": "worker", "input": "hello", "session_id": "talk"}
    first = await post(server, turn, key="one")
    assert first.json()["status"] == "succeeded", first.text
    large = await post(server, {"agent": "worker", "input": "hello " + "☃" * 40_000})
    assert large.json()["status"] == "succeeded", large.text
    ended = await submit(server, "e")
    assert small.check("e", ended, await settled(server, ended)) == "succeeded"
    held = await submit(server, "c")
    async with httpx2.AsyncClient(timeout=30) as client:
        for _ in range(300):
            steps = small.rows(
                "SELECT count(*) FROM steps WHERE run_id=? AND kind='model' AND status='done'", held
            )
            if steps == [(7,)]:
                break
            await client.get(f"{server.url}/api/v1/runs/{held}?wait=0.1")
    seen = [first.json()["id"], large.json()["id"], ended]
    before = await everything(server, seen)
    refused, said = copy(small, at, shared.url)
    assert refused == 1 and "Another Agent Server" in said  # It is in use.
    small.note_death("c", held)
    await server.kill()

    code, said = copy(small, at, shared.url)
    assert code == 0, said
    with sqlite3.connect(small.folder / "data" / "agent-server.db") as connection:
        names = [
            row[0]
            for row in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")
            if row[0] in said
        ]
        counts = {n: connection.execute(f'SELECT count(*) FROM "{n}"').fetchone()[0] for n in names}
    assert (
        counts["runs"] == 4
        and counts["blob_bytes"] >= 1
        and counts["steps"] > 20
        and counts["idempotency_keys"] == 1
    )
    for name, count in counts.items():
        assert await shared.look(f'SELECT count(*) FROM "{name}"') == [(count,)]

    shared.models.script({"rules": [talk, *script("c")]})
    shared.deaths = small.deaths
    moved = shared.join()
    await ready(moved)
    assert await everything(moved, seen) == before
    assert shared.check("c", held, await settled(moved, held)) == "succeeded"
    again = await post(moved, turn, key="one")
    assert again.headers["idempotency-replayed"] == "true"
    assert again.json()["id"] == first.json()["id"]
    more = await post(moved, turn)
    assert more.json()["status"] == "succeeded", more.text
    sent = shared.models.calls[-1]
    assert json.dumps(sent).count("good day") == 1, "the conversation did not move"

    refused, said = copy(small, at, shared.url)
    assert refused == 1 and "not empty" in said
    refused, said = copy(small, shared.url, f"sqlite:///{small.folder}/back.db")
    assert refused == 1 and "works on the source" in said
    moved.stop()
    assert await moved.ended(20)
    code, said = copy(small, shared.url, f"sqlite:///{small.folder}/back.db")
    assert code == 0, said
    code, said = copy(small, shared.url, f"sqlite:///{small.folder}/back.db", "--resume")
    assert code == 0, said
    with sqlite3.connect(small.folder / "back.db") as connection:
        assert connection.execute("SELECT count(*) FROM runs").fetchone()[0] == 5
        connection.execute("UPDATE runs SET name = 'forged' WHERE id = ?", (held,))
    refused, said = copy(small, shared.url, f"sqlite:///{small.folder}/back.db", "--resume")
    assert refused == 1 and "runs: 5 rows arrived of 5, or some differ" in said
