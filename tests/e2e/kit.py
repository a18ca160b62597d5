"""A folder with agents, the servers on it, and the few calls that the tests make of them."""

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.durability.world import ready
from tests.support.model_thread import ModelThread
from tests.support.server_process import Command, Nursery, Server

BUREAU = Path(__file__).parents[1] / "support" / "agents_files" / "bureau.py"
RUNS = "/api/v1/runs"
Json = dict[str, Any]


def moment(text: str) -> datetime:
    """An RFC 3339 time as a moment: Python 3.10 does not read the ``Z``."""
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


class House:
    """Starts servers and commands in ``folder``, on the same data, with the same models."""

    def __init__(self, folder: Path, nursery: Nursery, models: ModelThread, **env: str) -> None:
        self.folder = folder
        self.models = models
        self._nursery = nursery
        folder.mkdir(exist_ok=True)
        self.env = {
            "AGENT_SERVER_DATA_DIR": str(folder / "data"),
            "AGENT_SERVER_AGENTS": str(BUREAU),
            "AGENT_SERVER_MODEL": "test-model",
            "AGENT_SERVER_ACCESS_LOG": "false",
            "AGENT_SERVER_SHUTDOWN_GRACE_S": "1",
            "OPENAI_API_KEY": "test-key",
            "OPENAI_BASE_URL": models.base_url,
            **env,
        }

    def start(self, crash_at: str = "", port: int = 0, **env: str) -> "Api":
        """A server, ready to answer; one that is to die somewhere may be dead already."""
        server = self._nursery.start(
            self.env | env, folder=self.folder, crash_at=crash_at, port=port
        )
        if not crash_at:
            asyncio.run(ready(server))
        return Api(server.url, server)

    def ended(self, api: "Api", timeout_s: float = 15) -> bool:
        """Whether that server's process has ended, waiting up to ``timeout_s`` for it."""
        assert api.server is not None
        return self._nursery.ended(api.server.pid, timeout_s)

    def run(self, *argv: str, log: str = "cli.log", **env: str) -> Command:
        """``agent-server argv…``"""
        (self.folder / log).unlink(missing_ok=True)
        return self._nursery.run(*argv, env=self.env | env, folder=self.folder, log=log)


class Api:
    """A server's API, for a client that waits."""

    def __init__(self, url: str, server: Server | None = None) -> None:
        self.url = url
        self.server = server
        # No certificates: servers here speak HTTP, and loading them takes longer than most calls.
        self.http = httpx2.Client(base_url=url, timeout=30, verify=False)

    def post(self, body: Json, **query: Any) -> httpx2.Response:
        return self.http.post(RUNS, json=body, params=query)

    def submit(self, **body: Any) -> str:
        """The id of the run, which was accepted."""
        answer = self.post(body)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def carry_out(self, **body: Any) -> Json:
        """The run at its end."""
        return self.ended(self.submit(**body))

    def ended(self, run_id: str) -> Json:
        """The run when it has ended or waits for somebody."""
        for _ in range(60):
            run: Json = self.http.get(f"{RUNS}/{run_id}", params={"wait": 0.5}).json()
            if run["status"] not in ("queued", "running"):
                return run
        raise AssertionError(run)

    def get(self, path: str, **query: Any) -> Any:
        answer = self.http.get(path, params=query, headers={"accept": "application/json"})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def listed(self, path: str, **query: Any) -> list[Json]:
        """Every page of a list."""
        found: list[Json] = []
        cursor: Json = {}
        while True:
            page = self.get(path, limit=200, **query, **cursor)
            found += page["data"]
            if page["next_cursor"] is None:
                return found
            cursor = {"cursor": page["next_cursor"]}

    def events(self, run_id: str) -> list[Json]:
        return self.listed(f"{RUNS}/{run_id}/events")

    def steps(self, run_id: str) -> list[Json]:
        return self.listed(f"{RUNS}/{run_id}/steps")

    def unended(self) -> list[Json]:
        """Runs that are said to be carried out or to be about to."""
        return self.listed(RUNS, status="running") + self.listed(RUNS, status="queued")


def problem(answer: httpx2.Response, status: int, code: str) -> Json:
    """The problem document that ``answer`` is."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: Json = answer.json()
    assert body["code"] == code and body["detail"] and body["request_id"], body
    return body


def curl(*argv: str, timeout_s: float = 30) -> str:
    """What ``curl`` prints."""
    path = shutil.which("curl")
    if path is None:
        pytest.skip("curl is not installed")
    command = [path, "-sS", "-N", *argv]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def parse_sse(text: str) -> list[Json]:
    """The events in a stream's text: their data, with ``_id`` and ``_event`` of their frame."""
    return list(_frames(text))


def _frames(text: str) -> Iterator[Json]:
    for frame in text.split("\n\n"):
        fields = [line.partition(": ") for line in frame.split("\n") if not line.startswith(":")]
        said = {name: value for name, _, value in fields if name}
        if "data" in said:
            number = said.get("id")
            yield {
                **json.loads(said["data"]),
                "_id": None if number is None else int(number),
                "_event": said["event"],
            }


def types(events: list[Json]) -> list[str]:
    return [event["type"] for event in events]


def check_totals(api: Api, run: Json) -> None:
    """I3 and I5: numbers without a gap, totals that equal the steps, ids that agree."""
    events, steps = api.events(run["id"]), api.steps(run["id"])
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert {event["run_id"] for event in events} == {run["id"]}
    for name in ("model_calls", "tool_calls", "input_tokens", "output_tokens"):
        assert run["usage"][name] == sum(step["usage"][name] for step in steps), name
    told = {e["step"] for e in events if e["type"] in ("step.completed", "step.failed")}
    ended = {s["key"] for s in steps if s["kind"] != "value" and s["status"] != "started"}
    assert told == ended
    tasks = {task["id"] for task in api.listed(f"{RUNS}/{run['id']}/tasks")}
    assert {e["task_id"] for e in events if e["type"].startswith("task.")} <= tasks
    assert {s["task_id"] for s in steps if s["task_id"]} <= tasks
    assert events[-1]["usage"] == run["usage"]
