"""From a run to a regression test on the command line, and the same file under pytest."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from agent_server.cli.app import app

AGENTS = """
from agents import Agent

helper = Agent(name="helper", instructions="Help.")
"""


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name in [name for name in os.environ if name.startswith(("AGENT_SERVER_", "OPENAI_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AGENT_SERVER_MODEL", "demo")
    (tmp_path / "agents.py").write_text(AGENTS)
    yield tmp_path


def agent_server(*argv: str, leaves: int = 0) -> str:
    result = CliRunner().invoke(app, argv)
    assert result.exit_code == leaves, result.output
    return result.output


def made_of(output: str) -> str:
    return str(json.loads(output)["id"])


def test_a_run_becomes_a_test_that_fails_when_the_agents_change(house: Path) -> None:
    run = made_of(agent_server("run", "--agent", "helper", "Say hello", "--json"))
    agent_server("runs", "export", run, "--output", "run.json")
    assert "ok" in agent_server("replay", "run.json")
    path = agent_server("test", "add", run, "--name", "greets").strip()
    assert path == str(Path("tests") / "recorded" / "greets.run.json")
    agent_server("test", "add", run, "--name", "loose", "--max-model-calls", "3")
    assert "2 passed, 0 failed" in agent_server("test")
    (house / "agents.py").write_text(AGENTS.replace("Help.", "Do not help."))
    told = agent_server("test", leaves=1)
    assert "1 passed, 1 failed" in told and "the instructions of 'helper' differ" in told
    env = {**os.environ, "AGENT_SERVER_AGENTS": str(house / "agents.py")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    failed = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert failed.returncode == 1 and "1 failed, 1 passed" in failed.stdout
    assert "the instructions of 'helper' differ" in failed.stdout
    report = json.loads(agent_server("test", "run", "tests/recorded", "--json", leaves=1))
    assert [one["ok"] for one in report] == [False, True]


def test_a_run_is_forked_and_compared_on_the_command_line(house: Path) -> None:
    run = made_of(agent_server("run", "--agent", "helper", "Say hello", "--json"))
    fork = made_of(agent_server("runs", "fork", run, "--json"))
    assert "The same." in agent_server("runs", "compare", run, fork)
    other = made_of(agent_server("runs", "fork", run, "--input", "Say goodbye", "--json"))
    told = agent_server("runs", "compare", run, other, leaves=1)
    assert "First difference: model/1" in told
    result = CliRunner().invoke(app, ["runs", "retry", run])
    assert result.exit_code == 1 and "nothing to retry" in str(result.exception)
