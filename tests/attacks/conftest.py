"""One server on each database, for all attacks that one worker makes."""

from collections.abc import Iterator

import pytest

from tests.support.model_thread import ModelThread
from tests.support.postgres import PostgresServer
from tests.support.server_process import Nursery

from .world import World


@pytest.fixture(scope="session")
def models() -> Iterator[ModelThread]:
    with ModelThread() as models:
        yield models


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def world(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    whole_nursery: Nursery,
    models: ModelThread,
) -> Iterator[World]:
    env: dict[str, str] = {}
    if request.param == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres_server")
        env = {"AGENT_SERVER_DATABASE_URL": server.fresh_database(), "AGENT_SERVER_LEASE_S": "2"}
    world = World(tmp_path_factory.mktemp("attacked") / "house", whole_nursery, models, **env)
    yield world
    world.close()
