"""The server as a process: started, called and stopped as its operator does."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx2
import pytest

Start = Callable[..., subprocess.Popen[str]]
ROOT = Path(__file__).resolve().parent.parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a process in an empty folder, with nothing of ours in its environment."""
    started: list[subprocess.Popen[str]] = []
    ours = ("AGENT_SERVER_", "OPENAI_", "PYTHONDONTWRITEBYTECODE")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(ours)}

    def start(*argv: str, **environ: str) -> subprocess.Popen[str]:
        log = (tmp_path / f"log{len(started)}").open("w+")
        process = subprocess.Popen(
            [sys.executable, *argv],
            cwd=tmp_path,
            env=clean | {"PYTHONUNBUFFERED": "1"} | environ,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait(10)


def wait_until(said: Callable[[], bool], process: subprocess.Popen[str], what: str) -> None:
    """Return when ``said`` is true; fail when the process ends or it takes 60 seconds."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(httpx2.HTTPError):
            if said():
                return
        # A moment's wait for the end that must not come.
        with suppress(subprocess.TimeoutExpired):
            raise AssertionError(f"it ended with {process.wait(0.1)}")
    raise AssertionError(f"it was not {what} within 60 seconds")


def wait_ready(url: str, process: subprocess.Popen[str]) -> None:
    """Return when the server at ``url`` is ready."""
    wait_until(lambda: httpx2.get(f"{url}/readyz", timeout=2).status_code == 200, process, "ready")


def titles_at(url: str) -> list[str]:
    answer = httpx2.get(f"{url}/api/v1/agents", timeout=5).raise_for_status()
    return [agent["title"] for agent in answer.json()["data"]]


def log_of(tmp_path: Path, number: int = 0) -> str:
    return (tmp_path / f"log{number}").read_text()


def test_a_server_with_a_generated_key_answers_its_holder_and_ends_in_order(
    start: Start, tmp_path: Path
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    argv = ["-m", "agent_server", "serve", "--port", str(port), "--generate-key"]
    process = start(*argv, AGENT_SERVER_ENV="production")
    wait_ready(url, process)
    assert httpx2.get(f"{url}/api/v1/agents").status_code == 401
    found = re.search(r"as-[\w-]{40,}", log_of(tmp_path))
    assert found
    key = {"Authorization": f"Bearer {found.group()}"}
    assert httpx2.get(f"{url}/api/v1/agents", headers=key).status_code == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 0
    # Told once and in the curl line, and in no line of the log.
    assert log_of(tmp_path).count(found.group()) == 2
    assert "Traceback" not in log_of(tmp_path)


def test_production_without_a_key_refuses_to_start(start: Start, tmp_path: Path) -> None:
    argv = ["-m", "agent_server", "serve", "--port", "0"]
    process = start(*argv, AGENT_SERVER_ENV="production")
    assert process.wait(60) == 1
    log = log_of(tmp_path)
    assert "Error: Production needs a key" in log and "Hint: " in log
    assert "Traceback" not in log


def test_a_second_server_on_the_same_port_or_the_same_folder_says_what_is_wrong(
    start: Start, tmp_path: Path
) -> None:
    port = free_port()
    first = start("-m", "agent_server", "serve", "--port", str(port))
    wait_ready(f"http://127.0.0.1:{port}", first)
    second = start("-m", "agent_server", "serve", "--port", str(port))
    assert second.wait(60) == 1
    assert f"Error: Something listens already on port {port}" in log_of(tmp_path, 1)
    third = start("-m", "agent_server", "serve", "--port", "0")
    assert third.wait(60) == 1
    log = log_of(tmp_path, 2)
    assert "Error: " in log and "Hint: " in log and "Traceback" not in log
    assert first.poll() is None


def test_the_development_server_serves_the_agents_beside_it_and_reloads_them(
    start: Start, tmp_path: Path
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    shutil.copy(ROOT / "main.py", tmp_path)
    agents = tmp_path / "agents.py"  # where Python looks first, and named as the SDK is
    agents.write_text("from agents import Agent\n\nclerk = Agent(name='Clerk')\n")
    process = start("main.py", AGENT_SERVER_PORT=str(port))
    wait_ready(url, process)
    assert "reloader process" in log_of(tmp_path)
    assert f"http://localhost:{port}" in log_of(tmp_path)  # said of 0.0.0.0
    assert titles_at(url) == ["Clerk"]
    agents.write_text("from agents import Agent\n\nclerk = Agent(name='Head Clerk')\n")
    wait_until(lambda: titles_at(url) == ["Head Clerk"], process, "reloaded")
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) in (0, -signal.SIGTERM)


def test_a_goal_runs_in_an_empty_folder_without_a_key_or_a_server(
    start: Start, tmp_path: Path
) -> None:
    goal = "Compare three ways to store chat history and recommend one"
    assert start("-m", "agent_server", "run", goal).wait(90) == 0
    log = log_of(tmp_path)
    assert "plan: " in log and "tool calculator(" in log and "\nAnswer:\n" in log
    assert start("-m", "agent_server", "runs", "list").wait(60) == 0
    assert "succeeded" in log_of(tmp_path, 1)
