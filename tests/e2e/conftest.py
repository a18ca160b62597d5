"""One model server for each module, and for those that ask for no other server, one whose agents
pay, on each database."""

from collections.abc import Iterator

import pytest

from tests.support.model_thread import ModelThread
from tests.support.postgres import PostgresServer
from tests.support.server_process import Nursery

from .kit import Api
from .till import Till


@pytest.fixture(scope="module")
def models() -> Iterator[ModelThread]:
    with ModelThread() as models:
        yield models


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def till(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    nursery: Nursery,
    models: ModelThread,
) -> Iterator[Till]:
    env: dict[str, str] = {}
    if request.param == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres_server")
        env = {"AGENT_SERVER_DATABASE_URL": server.fresh_database(), "AGENT_SERVER_LEASE_S": "2"}
    yield Till(tmp_path_factory.mktemp("till") / "house", nursery, models, **env)


@pytest.fixture(scope="module")
def api(till: Till) -> Iterator[Api]:
    api = till.start()
    yield api
    api.http.close()
    assert api.server is not None
    api.server.stop()
    assert till.ended(api)
