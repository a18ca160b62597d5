"""A PostgreSQL with few connections, or another clock: whoever starts on it says what is wrong."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import asyncpg  # type: ignore[import-untyped]  # ships no types
import pytest
from structlog.testing import capture_logs

from agent_server.cli import database as commands
from agent_server.cli.doctor import check_database
from agent_server.domain.base import utcnow
from agent_server.domain.errors import DatabaseUnavailable
from agent_server.execution import heartbeat
from agent_server.settings import Settings
from agent_server.storage.database import database_at
from agent_server.storage.migrate import upgrade
from tests.support.postgres import PostgresServer
from tests.support.until import until

from .kit import running

MOST = 6


@pytest.fixture(scope="module")
def small_server() -> Iterator[PostgresServer]:
    with PostgresServer(max_connections=str(MOST), max_wal_senders="0") as server:
        yield server


@asynccontextmanager
async def taken(url: str, left: int) -> AsyncIterator[None]:
    """Somebody else has all connections but ``left``."""
    others = list[Any]()

    async def takes() -> bool:  # Those that were closed just now are still counted for a moment.
        try:
            others.append(await asyncpg.connect(url))
        except asyncpg.TooManyConnectionsError:
            return False
        return len(others) == MOST

    await until(takes)
    for _ in range(left):
        await others.pop().close()
    try:
        yield
    finally:
        for other in others:
            await other.close()


async def test_doctor_says_that_few_connections_are_left(small_server: PostgresServer) -> None:
    url = small_server.fresh_database()
    database = database_at(url)
    await database.open()
    await database.write(upgrade)
    await database.close()
    found = await asyncio.to_thread(check_database, Settings(database_url=url))
    assert found.state == "warning" and "connections left" in found.detail
    async with taken(url, 0):
        found = await asyncio.to_thread(check_database, Settings(database_url=url))
    assert found.state == "failed" and "no connection left" in found.detail


async def test_a_server_that_could_not_say_that_it_lives_does_not_start(
    small_server: PostgresServer,
) -> None:
    url = small_server.fresh_database()
    async with taken(url, 1):
        with pytest.raises(DatabaseUnavailable, match="no connection left") as refused:
            async with running(url, {}):
                raise AssertionError("it started")
    assert "AGENT_SERVER_DATABASE_POOL_SIZE" in refused.value.hint


async def test_a_clock_that_is_an_hour_off_is_said_once_by_its_server_and_by_doctor(
    upgraded_postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = upgraded_postgres_url
    monkeypatch.setattr(heartbeat, "utcnow", lambda: utcnow() + timedelta(hours=1))
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.05)
    monkeypatch.setattr(commands, "utcnow", lambda: utcnow() - timedelta(hours=1))
    with capture_logs() as logs:
        async with running(url, {}, lease_s=2.0):
            pass
    said = [entry for entry in logs if "clock" in entry["event"]]
    assert len(said) == 1 and said[0]["off_s"] == 3600 and said[0]["log_level"] == "error"
    found = await asyncio.to_thread(check_database, Settings(database_url=url))
    assert found.state == "failed" and "3,600 s apart" in found.detail
