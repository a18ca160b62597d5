"""What every test may ask for: a fresh PostgreSQL database, the nursery of servers, and the long
tests by ``--slow``; and the order of modules, the long ones first.

Leans on ``tests.support``. Refuses to set anything up for tests that do not ask.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from agent_server.storage.database import database_at
from agent_server.storage.migrate import upgrade
from tests.support.postgres import PostgresMissing, PostgresServer, apart
from tests.support.server_process import Nursery

LONG = ("durability", "e2e", "memory", "execution", "workflow", "clients", "deploy")
"""Folders whose modules take long: a worker that began one of them last would work on alone."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow", action="store_true", help="also run the long crash loops and load tests"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=_turn)
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="long; run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


def _turn(item: pytest.Item) -> int:
    folder = item.path.parent.name
    return LONG.index(folder) if folder in LONG else len(LONG)


@contextmanager
def postgresql(**settings: str) -> Iterator[PostgresServer]:
    """A server with these settings; the test is skipped where there is none to start."""
    try:
        server = PostgresServer(**settings).__enter__()
    except PostgresMissing as missing:
        pytest.skip(str(missing))
    try:
        yield server
    finally:
        server.__exit__(None, None, None)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """The session's PostgreSQL. Nobody stops it, so it need not wait for the disk: to drop a
    database took longer than many a test. Modules that do stop one have their own."""
    with postgresql(fsync="off", full_page_writes="off") as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of an empty PostgreSQL database of this test's own."""
    url = postgres_server.fresh_database()
    yield url
    postgres_server.drop_database(url)


@pytest.fixture(scope="session")
def postgres_schema(postgres_server: PostgresServer) -> str:
    """The URL of a database with the newest schema and nothing in it, to be copied."""

    async def upgraded() -> None:
        database = database_at(url)
        await database.open()
        await database.write(upgrade)
        await database.close()

    url = postgres_server.fresh_database()
    apart(lambda: asyncio.run(upgraded()))
    return url


@pytest.fixture
def upgraded_postgres_url(postgres_server: PostgresServer, postgres_schema: str) -> Iterator[str]:
    """The URL of a PostgreSQL database of this test's own, as a server's first start leaves it."""
    url = postgres_server.fresh_database(like=postgres_schema)
    yield url
    postgres_server.drop_database(url)


@pytest.fixture(scope="session")
def whole_nursery() -> Iterator[Nursery]:
    """Where server processes are forked from; it imports the server once for all of them."""
    with Nursery() as nursery:
        yield nursery


@pytest.fixture(scope="module")
def nursery(whole_nursery: Nursery) -> Iterator[Nursery]:
    """``whole_nursery`` for one module: what it starts ends with it."""
    with whole_nursery.brood() as brood:
        yield brood
