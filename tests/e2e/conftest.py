"""One nursery of servers for all tests here, and one model server for each module."""

from collections.abc import Iterator

import pytest

from tests.support.model_thread import ModelThread
from tests.support.server_process import Nursery


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@pytest.fixture(scope="module")
def models() -> Iterator[ModelThread]:
    with ModelThread() as models:
        yield models
