"""One served process, for the whole session, for all that speaks OpenAI's API to it. Tests look at
what they made themselves: others were there before."""

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.e2e.kit import Api, House
from tests.support.model_thread import ModelThread
from tests.support.server_process import Nursery

ACMES_KEY = "key-of-another-tenant"
AGENTS = Path(__file__).parent / "agents_served.py"


@pytest.fixture(scope="session")
def models() -> Iterator[ModelThread]:
    with ModelThread() as models:
        yield models


@pytest.fixture(scope="session")
def house(
    tmp_path_factory: pytest.TempPathFactory, whole_nursery: Nursery, models: ModelThread
) -> House:
    return House(
        tmp_path_factory.mktemp("openai"),
        whole_nursery,
        models,
        AGENT_SERVER_AGENTS=str(AGENTS),
        AGENT_SERVER_API_KEY="key-of-the-tests",
        AGENT_SERVER_TENANT_KEYS=json.dumps({"acme": {"tenant": "acme", "key": ACMES_KEY}}),
        AGENT_SERVER_MAX_FILE_BYTES="1048576",
    )


@pytest.fixture(scope="session")
def api(house: House) -> Iterator[Api]:
    api = house.start()
    api.http.headers["authorization"] = "Bearer key-of-the-tests"
    yield api
    api.http.close()


@pytest.fixture(scope="session")
def client(api: Api) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=api.url + "/v1", api_key="key-of-the-tests", max_retries=0, timeout=30
    ) as client:
        yield client
