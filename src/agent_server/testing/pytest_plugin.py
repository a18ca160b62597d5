"""The pytest plugin: a file ``*.run.json`` of ``agent-server test add`` is a test.

Leans on pytest; everything else is imported when there is such a file, so that other suites pay
nothing. Refuses to configure: the agents are those of AGENT_SERVER_AGENTS, as for the server.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SUFFIX = ".run.json"


class ReplayFailed(Exception):
    """The replay of a recorded run differs, or one of its checks fails."""


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> "RunFile | None":
    if file_path.name.endswith(SUFFIX):
        return RunFile.from_parent(parent, path=file_path)
    return None


class RunFile(pytest.File):
    """One recorded run."""

    def collect(self) -> Iterator["RunItem"]:
        yield RunItem.from_parent(self, name="replay")


class RunItem(pytest.Item):
    """The replay of one recorded run."""

    def runtest(self) -> None:
        # Here, since pytest loads this file in every project that has the package.
        import anyio

        from agent_server.settings import load_settings
        from agent_server.testing.replay import read_export, replayer

        async def replayed() -> Any:
            async with replayer(load_settings()) as present:
                return await present.replay(read_export(self.path))

        report = anyio.run(replayed)
        if not report.ok:
            said = [report.difference, *report.failures]
            raise ReplayFailed("\n".join(text for text in said if text))

    def repr_failure(self, excinfo: Any, style: Any = None) -> Any:
        if isinstance(excinfo.value, ReplayFailed):
            return f"{self.path.name}: {excinfo.value}"
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, f"replay of {self.path.name}"
