"""One ``agent-server serve`` for all clients, and the model server behind it."""

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.durability.test_drain import free_port
from tests.durability.world import ready_at
from tests.e2e.kit import House
from tests.support.model_thread import ModelThread
from tests.support.server_process import Nursery

KEY = "key-of-the-clients"
MODEL = "agent/clerk"
EMBEDDER = "text-embedding-3-small"


@pytest.fixture(scope="session")
def models() -> Iterator[ModelThread]:
    with ModelThread() as models:
        yield models


@pytest.fixture(scope="session")
def base_url(
    tmp_path_factory: pytest.TempPathFactory, whole_nursery: Nursery, models: ModelThread
) -> Iterator[str]:
    """The address that a client is given, of a server that was started by its command."""
    port = free_port()
    house = House(
        tmp_path_factory.mktemp("clients"),
        whole_nursery,
        models,
        AGENT_SERVER_AGENTS=str(Path(__file__).parent / "served.py"),
        AGENT_SERVER_API_KEY=KEY,
        AGENT_SERVER_LOG_LEVEL="WARNING",
        AGENT_SERVER_EMBEDDER="openai",
        AGENT_SERVER_EMBEDDER_BASE_URL=models.base_url,
    )
    serving = house.run("serve", "--host", "127.0.0.1", "--port", str(port))
    asyncio.run(ready_at(f"http://127.0.0.1:{port}"))
    yield f"http://127.0.0.1:{port}/v1"
    serving.signal(signal.SIGTERM)
    assert serving.exit_code() == 0, serving.output
    assert "Traceback" not in serving.output, serving.output


@pytest.fixture(scope="session")
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key=KEY, max_retries=0, timeout=30) as client:
        yield client
