"""Registries on real files in a temporary folder. Leans on ``Registry`` alone."""

import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from agent_server.registry.registry import Registry
from agent_server.settings import Settings

Write = Callable[[str, str], Path]
MakeRegistry = Callable[..., Registry]

ECHO_SERVER = Path(__file__).parents[1] / "support" / "mcp_echo_server.py"


def _filled(text: str) -> str:
    """``{PYTHON}`` and ``{ECHO}`` become this interpreter and the echo server, as literals."""
    return text.replace("{PYTHON}", repr(sys.executable)).replace("{ECHO}", repr(str(ECHO_SERVER)))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_filled(textwrap.dedent(text)), encoding="utf-8")
        return path

    return write


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[MakeRegistry]:
    made: list[Registry] = []

    def make(agents: str | None = None, **settings: Any) -> Registry:
        registry = Registry(Settings(agents=agents, **settings), cwd=tmp_path)
        made.append(registry)
        return registry

    yield make
    for registry in made:
        await registry.close()
