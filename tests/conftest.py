"""What every test may ask for: a fresh PostgreSQL database, the nursery of servers, and the long
tests by ``--slow``.

Leans on ``tests.support``. Refuses to set anything up for tests that do not ask.
"""

from collections.abc import Iterator

import pytest

from tests.support.postgres import PostgresMissing, PostgresServer
from tests.support.server_process import Nursery


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow", action="store_true", help="also run the long crash loops and load tests"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="long; run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """The session's PostgreSQL; a test that stops it must start it again."""
    try:
        server = PostgresServer().__enter__()
    except PostgresMissing as missing:
        pytest.skip(str(missing))
    try:
        yield server
    finally:
        server.__exit__(None, None, None)


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of an empty PostgreSQL database of this test's own."""
    url = postgres_server.fresh_database()
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
