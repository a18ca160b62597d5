"""The database's promises: one schema, one process per file, grouped commits, pragmas."""

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import anyio
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, select, text

from agent_server.domain.errors import ConfigurationError, DatabaseUnavailable, DataDirLocked
from agent_server.storage import revisions
from agent_server.storage.database import database_at
from agent_server.storage.migrate import current_revision, head_revision, upgrade
from agent_server.storage.tables import metadata, nodes


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a database in which nothing was made yet."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/data/server.db"
    found: str = request.getfixturevalue("postgres_url")
    return found


@pytest.mark.parametrize("way", ["revisions", "tables"])
async def test_revisions_and_tables_give_exactly_the_same_schema(url: str, way: str) -> None:
    database = database_at(url)
    await database.open()

    def differences(connection: Connection) -> Any:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return compare_metadata(context, metadata)

    try:
        if way == "revisions":
            await database.write(lambda c: revisions.run(c, None))
        else:
            assert await database.write(upgrade) is True
        assert await database.write(upgrade) is False
        assert await database.read(current_revision) == head_revision() == revisions.newest()
        assert await database.read(differences) == []
    finally:
        await database.close()


async def test_a_database_of_a_newer_program_is_refused(url: str) -> None:
    database = database_at(url)
    await database.open()
    try:
        await database.write(upgrade)
        await database.write(
            lambda c: c.execute(text("UPDATE alembic_version SET version_num = '9999-9999'"))
        )
        with pytest.raises(ConfigurationError, match="9999-9999"):
            await database.write(upgrade)
    finally:
        await database.close()


async def test_a_failed_transaction_leaves_its_neighbours_in_the_batch_alone(url: str) -> None:
    database = database_at(url)
    await database.open()
    await database.write(upgrade)

    def add(name: str, fail: bool) -> Any:
        def transaction(connection: Connection) -> None:
            values = {"id": name, "role": "all", "started_at": 0, "beat_at": 0}
            connection.execute(
                text("INSERT INTO nodes VALUES (:id, :role, :started_at, :beat_at)"), values
            )
            if fail:
                raise ValueError(name)

        return database.write(transaction)

    try:
        results = await asyncio.gather(
            *[add(f"n{i}", i % 3 == 0) for i in range(30)], return_exceptions=True
        )
        stored = await database.read(lambda c: set(c.execute(select(nodes.c.id)).scalars()))
    finally:
        await database.close()
    assert [isinstance(r, ValueError) for r in results] == [i % 3 == 0 for i in range(30)]
    assert stored == {f"n{i}" for i in range(30) if i % 3}


async def test_the_sqlite_file_is_in_wal_with_full_sync_and_belongs_to_one_process(
    sqlite_url: str, tmp_path: Path
) -> None:
    first = database_at(sqlite_url)
    await first.open()
    try:
        mode, sync = await first.write(
            lambda c: (
                c.exec_driver_sql("PRAGMA journal_mode").scalar(),
                c.exec_driver_sql("PRAGMA synchronous").scalar(),
            )
        )
        assert (mode, sync) == ("wal", 2)
        second = database_at(sqlite_url)
        with pytest.raises(DataDirLocked, match="Another Agent Server"):
            await second.open()
    finally:
        await first.close()
    again = database_at(sqlite_url)
    await again.open()
    await again.close()


async def test_a_file_that_is_no_database_is_refused_with_its_name(
    sqlite_url: str, tmp_path: Path
) -> None:
    path = tmp_path / "data" / "server.db"
    path.parent.mkdir()
    path.write_bytes(b"this is not a database at all" * 100)
    with pytest.raises(DatabaseUnavailable, match="server.db"):
        await database_at(sqlite_url).open()


async def test_what_was_acknowledged_is_on_disk_for_another_reader(
    sqlite_url: str, tmp_path: Path
) -> None:
    database = database_at(sqlite_url)
    await database.open()
    await database.write(upgrade)
    await database.write(lambda c: c.execute(text("INSERT INTO nodes VALUES ('x', 'all', 0, 0)")))
    with sqlite3.connect(tmp_path / "data" / "server.db") as other:
        assert other.execute("SELECT id FROM nodes").fetchall() == [("x",)]
    await database.close()


@pytest.mark.parametrize("url", ["mysql://x/y", "sqlite://", "not a url"])
def test_other_databases_are_refused_with_what_to_write(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        database_at(url)
    assert caught.value.hint is not None and "sqlite:///" in caught.value.hint


@pytest.mark.parametrize("how", ["task", "scope"])
async def test_reads_that_are_cancelled_at_any_point_leave_no_connection_behind(
    postgres_url: str, how: str
) -> None:
    database = database_at(postgres_url)  # Ten connections.
    await database.open()

    def slow(connection: Connection) -> None:
        for _ in range(3):
            connection.execute(text("SELECT pg_sleep(0.002)"))

    def own(connection: Connection) -> int:
        connection.execute(text("SELECT pg_sleep(0.05)"))  # So that they need all of them at once.
        return int(connection.execute(text("SELECT pg_backend_pid()")).scalar_one())

    async def cancelled_after(steps: int) -> bool:
        """Whether it was cancelled before it was done."""
        if how == "scope":
            with anyio.CancelScope() as scope:
                asyncio.get_running_loop().call_later(steps / 2000, scope.cancel)
                await database.read(slow)
            return scope.cancelled_caught
        task = asyncio.create_task(database.read(slow))
        await asyncio.wait([task], timeout=steps / 2000)
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    try:
        ends = await asyncio.gather(*(cancelled_after(n % 20) for n in range(60)))
        assert any(ends)
        reads = (database.read(own) for _ in range(10))
        assert len(set(await asyncio.wait_for(asyncio.gather(*reads), 20))) == 10
    finally:
        await database.close()
