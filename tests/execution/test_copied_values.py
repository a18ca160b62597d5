"""`agent-server db copy` and `db check` where large values lie in a folder or a bucket."""

import shutil
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from agent_server.cli.database import check_database, copy_database
from agent_server.domain.errors import InternalError
from agent_server.domain.ids import DEFAULT_TENANT
from agent_server.execution.ports import TaskContext
from agent_server.storage.blobs import BlobStore, blob_store

from .kit import finished, running, submit

BIG = "é" * 60_000


async def large(ctx: TaskContext) -> Any:
    return f"{ctx.run.request.input} {BIG}"


@pytest.fixture(params=["folder", "bucket"])
async def place(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    if request.param == "folder":
        yield f"file://{tmp_path}/blobs"
    else:
        yield request.getfixturevalue("s3")


def kept(place: str) -> BlobStore:
    return blob_store(place, None, 30)  # type: ignore[arg-type]  # it needs no database


@pytest.mark.parametrize("also", [False, True], ids=["set", "named as the place before"])
async def test_a_copy_reads_what_stays_outside_and_deletes_it_with_its_run(
    sqlite_url: str,
    postgres_url: str,
    place: str,
    also: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with running(sqlite_url, {"agent": large}) as runs:
        inside = await finished(runs, await submit(runs, agent="a", input="inside"))
    async with running(sqlite_url, {"agent": large}, blobs=place) as runs:
        outside = await finished(runs, await submit(runs, agent="a", input="outside"))
    settings = {"blobs": "database", "blobs_also": place} if also else {"blobs": place}
    for name, value in settings.items():
        monkeypatch.setenv(f"AGENT_SERVER_{name.upper()}", value)
    await copy_database(sqlite_url, postgres_url, False)
    assert "1 large values are not in the database" in capsys.readouterr().out
    async with running(postgres_url, {"agent": large}, **settings) as runs:
        for run in (inside, outside):
            assert await runs.get(DEFAULT_TENANT, run.id) == run
        again = await finished(runs, await submit(runs, agent="a", input="outside"))
        assert again.output == outside.output
        for run in (again, outside):
            await runs.delete(DEFAULT_TENANT, run.id)
        assert [path async for path in kept(place).old(timedelta(0))] == []
        assert (await runs.get(DEFAULT_TENANT, inside.id)).output == inside.output


async def test_a_copy_whose_large_values_cannot_be_found_says_what_to_set(
    sqlite_url: str,
    postgres_url: str,
    place: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with running(sqlite_url, {"agent": large}, blobs=place) as runs:
        run = await finished(runs, await submit(runs, agent="a", input="x"))
    with pytest.raises(InternalError, match="1 of them are in none of the places") as said:
        await copy_database(sqlite_url, postgres_url, False)
    assert "AGENT_SERVER_BLOBS" in str(said.value.hint)
    monkeypatch.setenv("AGENT_SERVER_BLOBS", place)
    await copy_database(sqlite_url, postgres_url, True)
    assert "1 large values" in capsys.readouterr().out
    async with running(postgres_url, {"agent": large}, blobs=place) as runs:
        assert await runs.get(DEFAULT_TENANT, run.id) == run


async def test_the_check_names_large_values_that_are_lost(
    sqlite_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = f"file://{tmp_path}/blobs"
    async with running(sqlite_url, {"agent": large}, blobs=place) as runs:
        await finished(runs, await submit(runs, agent="a", input="x"))
    monkeypatch.setenv("AGENT_SERVER_DATABASE_URL", sqlite_url)
    monkeypatch.setenv("AGENT_SERVER_BLOBS", place)
    await check_database()
    assert "Every stored value can be read." in capsys.readouterr().out
    shutil.rmtree(tmp_path / "blobs")
    with pytest.raises(InternalError, match="1 stored values cannot be read"):
        await check_database()
    assert "is not in the folder" in capsys.readouterr().out
