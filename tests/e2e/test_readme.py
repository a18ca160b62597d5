"""The README, done as it is written: its agents file, its curl line, its Python program."""

import asyncio
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.durability.world import ready
from tests.support.server_process import Nursery

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
AGENTS, PROGRAM = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("readme")
    (folder / "agents.py").write_text(AGENTS, encoding="utf-8")
    server = nursery.start({"AGENT_SERVER_MODEL": "demo"}, folder=folder)
    asyncio.run(ready(server))
    yield server.url


def test_its_curl_line_follows_a_run_to_its_end(url: str, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    (line,) = re.findall(r"```sh\n(curl -N .*?)```", README, re.DOTALL)
    said = out_of(["sh", "-c", line.replace("http://localhost:8000", url)], tmp_path)
    assert "event: run.created\n" in said and "event: run.succeeded\n" in said


def test_its_program_prints_the_events_and_the_answer(url: str, tmp_path: Path) -> None:
    program = PROGRAM.replace("http://localhost:8000", url)
    *events, answer = out_of([sys.executable, "-c", program], tmp_path).splitlines()
    assert "run.created" in events and "run.succeeded" in "\n".join(events)
    assert answer and answer != "None"


def out_of(argv: list[str], folder: Path) -> str:
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout
