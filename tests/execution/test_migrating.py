"""The schema changes under servers that work: nobody is held up for long, nothing is cut short."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg  # type: ignore[import-untyped]  # ships no types
import pytest
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, select

from agent_server.cli.database import check_database, move_blobs, vacuum_database
from agent_server.domain.base import utcnow
from agent_server.domain.errors import ConfigurationError, DatabaseUnavailable
from agent_server.storage import database as storage
from agent_server.storage import migrate as migrating
from agent_server.storage import revisions
from agent_server.storage.database import Database, database_at
from agent_server.storage.migrate import (
    ADVISORY_LOCK,
    current_revision,
    head_revision,
    migrate,
    upgrade,
)
from agent_server.storage.tables import metadata, runs
from tests.support.until import until


@asynccontextmanager
async def at_the_revision_before(url: str, to: str = "-1") -> AsyncIterator[Database]:
    database = database_at(url)
    await database.open()

    def back(connection: Connection) -> None:
        config = revisions._config()
        script = ScriptDirectory.from_config(config)
        config.attributes["connection"] = connection
        with EnvironmentContext(
            config, script, fn=lambda revision, _: script._downgrade_revs(to, revision)
        ):
            script.run_env()

    try:
        await database.write(back)
        assert await database.read(current_revision) != head_revision()
        yield database
    finally:
        await database.close()


@asynccontextmanager
async def holding(url: str, statement: str) -> AsyncIterator[Any]:
    """Somebody whose transaction has done that and stays open."""
    somebody = await asyncpg.connect(url)
    transaction = somebody.transaction()
    await transaction.start()
    await somebody.execute(statement)
    try:
        yield transaction
    finally:
        await somebody.close()


LOCK_ALL = f"LOCK TABLE {', '.join(metadata.tables)} IN ACCESS EXCLUSIVE MODE"


async def test_a_migration_steps_back_from_a_table_that_somebody_holds_and_says_so(
    upgraded_postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrating, "LOCK_S", 0.1)
    monkeypatch.setattr(migrating, "PAUSE_S", 0.01)
    monkeypatch.setattr(migrating, "TRIES", 2)
    url = upgraded_postgres_url
    async with at_the_revision_before(url) as database:
        async with holding(url, LOCK_ALL):
            with pytest.raises(DatabaseUnavailable, match="holds a table") as refused:
                await migrate(database)
            assert "pg_stat_activity" in refused.value.hint
        assert await migrate(database) is True
        assert await migrate(database) is False
        assert await database.read(current_revision) == head_revision()


async def test_a_migration_goes_on_when_the_table_is_let_go_of(
    upgraded_postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrating, "LOCK_S", 0.1)
    monkeypatch.setattr(migrating, "PAUSE_S", 0.01)
    monkeypatch.setattr(migrating, "TRIES", 1_000)
    url = upgraded_postgres_url
    async with at_the_revision_before(url) as database:
        async with holding(url, LOCK_ALL) as transaction:
            done = asyncio.ensure_future(migrate(database))
            await waited_for(url)
            await transaction.rollback()
            assert await done is True


async def test_a_migration_may_take_longer_than_any_other_statement(
    upgraded_postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here it waits for another one; an index of a large table takes its time, too."""
    monkeypatch.setattr(storage, "COMMAND_S", 0.2)
    url = upgraded_postgres_url
    async with at_the_revision_before(url) as database:
        lock = f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})"
        async with holding(url, lock) as transaction:
            done = asyncio.ensure_future(migrate(database))
            await waited_for(url)
            with pytest.raises(DatabaseUnavailable):  # An ordinary statement is given up.
                await database.read(lambda c: c.exec_driver_sql("SELECT pg_sleep(5)"))
            assert not done.done()
            await transaction.rollback()
            assert await done is True


async def waited_for(url: str) -> None:
    """Return when somebody waits for a lock."""
    looking = await asyncpg.connect(url)

    async def seen() -> Any:
        return await looking.fetchval(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )

    try:
        await until(seen)
    finally:
        await looking.close()


@pytest.mark.parametrize(
    "command", [check_database, move_blobs, partial(vacuum_database, 1, 1, 1, True)]
)
async def test_commands_on_a_database_without_our_tables_say_what_to_run(
    url: str, postgres_url: str, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = url if url.startswith("sqlite") else postgres_url
    monkeypatch.setenv("AGENT_SERVER_DATABASE_URL", empty)
    with pytest.raises(ConfigurationError, match="at revision none") as refused:
        await command()
    assert "db upgrade" in refused.value.hint


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_what_runs_continue_is_filled_in_from_their_requests(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = f"sqlite:///{tmp_path}/data/server.db"
    if kind == "postgresql":
        url = request.getfixturevalue("upgraded_postgres_url")
    asked = {
        "follows": {"agent": "a", "input": "x", "options": {"previous": "first"}},
        "first": {"agent": "a", "input": 'says "previous"', "options": {}},
        "bare": {"agent": "a", "input": {"previous": "first"}},
    }
    database = database_at(url)
    await database.open()
    await database.write(upgrade)
    await database.close()
    async with at_the_revision_before(url, "0016") as older:
        for run, given in asked.items():
            row = {"id": run, "tenant": "t", "kind": "agent", "status": "succeeded", "name": "a"}
            row |= {"request": given, "principal": "p", "last_seq": 0, "created_at": utcnow()}
            await older.write(lambda c, r=row: c.execute(runs.insert().values(r)))
        await migrate(older)
        found = await older.read(
            lambda c: c.execute(select(runs.c.id).where(runs.c.continues == "first"))
            .scalars()
            .all()
        )
    assert found == ["follows"]
