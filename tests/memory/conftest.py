"""Each test of long-term memory runs on a SQLite file and on PostgreSQL."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent_server.memory.recall import Recall
from agent_server.memory.store import MemoryStore
from agent_server.storage.database import Database, database_at
from agent_server.storage.migrate import upgrade


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/data/server.db"
    found: str = request.getfixturevalue("upgraded_postgres_url")
    return found


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    opened = database_at(url)
    await opened.open()
    await opened.write(upgrade)
    yield opened
    await opened.close()


@pytest.fixture
async def store(database: Database) -> MemoryStore:
    opened = MemoryStore(database)
    await opened.open()
    Recall(opened)
    return opened


@pytest.fixture
async def sqlite_store(tmp_path: Path) -> AsyncIterator[MemoryStore]:
    opened = database_at(f"sqlite:///{tmp_path}/data/server.db")
    await opened.open()
    await opened.write(upgrade)
    made = MemoryStore(opened)
    await made.open()
    Recall(made)
    yield made
    await opened.close()
