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


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).format_map(_Known()), encoding="utf-8")
        return path

    return write


class _Known(dict[str, str]):
    """Fills ``{PYTHON}`` and ``{ECHO}`` and leaves other braces as they are."""

    def __init__(self) -> None:
        super().__init__(PYTHON=repr(sys.executable), ECHO=repr(str(ECHO_SERVER)))

    def __missing__(self, key: str) -> str:
        return "{" + key + "}"


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
