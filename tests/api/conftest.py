"""Quiet logs: what the doors log is not what these tests look at."""

from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture(autouse=True)
def no_log_output() -> Iterator[None]:
    before = structlog.get_config()
    structlog.configure(processors=[_drop])
    yield
    structlog.configure(**before)


def _drop(*_: object) -> dict[str, object]:
    raise structlog.DropEvent
