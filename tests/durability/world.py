"""A goal that takes parallel tasks, tools that count their calls in a file, and its invariants."""

import asyncio
import json
import sqlite3
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from tests.support.model_server import ModelServer
from tests.support.server_process import Nursery, Server

AGENTS = '''
import asyncio
import os
from pathlib import Path

from agents import Agent, function_tool

LEDGER = Path(os.environ["COUNT_FILE"])


def count(line):
    with LEDGER.open("a") as file:
        file.write(line + "\\n")
        file.flush()


@function_tool
async def look_up(key: str) -> str:
    """Read a value."""
    count(f"begin look_up {key}")
    await asyncio.sleep(0.01)
    count(f"end look_up {key}")
    return f"value of {key}"


@function_tool
async def pay(bill: str) -> str:
    """Pay a bill, for good."""
    count(f"begin pay {bill}")
    await asyncio.sleep(0.01)
    count(f"end pay {bill}")
    return f"paid {bill}"


worker = Agent(name="worker", instructions="You work.", tools=[look_up, pay])
'''
POLICY = '[tools.look_up]\neffect = "none"\n'


def script(run: str) -> list[dict[str, Any]]:
    """The model's part in the run named ``run``: a plan, two parallel tasks, then a third."""

    def call(tool: str, **arguments: str) -> dict[str, Any]:
        return {"name": tool, "arguments": arguments}

    plan = {
        "tasks": [
            task("a", f"alpha of {run}"),
            task("b", f"beta of {run}"),
            task("c", f"gamma of {run}", ["a", "b"]),
        ],
        "actions": [],
    }
    return [
        {
            "match": rf"\Aalpha of {run}\b",
            "steps": [
                {
                    "tool_calls": [
                        call("look_up", key=f"{run}-a1"),
                        call("look_up", key=f"{run}-a2"),
                    ]
                },
                {"tool_calls": [call("pay", bill=f"{run}-a")]},
                {"text": "alpha done"},
            ],
        },
        {
            "match": rf"\Abeta of {run}\b",
            "steps": [
                {"tool_calls": [call("pay", bill=f"{run}-b")]},
                {"tool_calls": [call("look_up", key=f"{run}-b1")]},
                {"text": "beta done"},
            ],
        },
        {"match": rf"\Agamma of {run}\b", "steps": [{"text": f"all of {run} done"}]},
        {"match": rf"goal {run}\b", "steps": [{"text": json.dumps(plan)}]},
    ]


def task(identity: str, description: str, after: list[str] | None = None) -> dict[str, Any]:
    return {
        "id": identity,
        "description": description,
        "agent": "worker",
        "tools": [],
        "expected_output": None,
        "depends_on": after or [],
        "when": None,
        "on_failure": "fail",
    }


@dataclass
class AtDeath:
    """What was finished when the process died."""

    done: set[str]
    models_done: int
    models_called: int
    begun: Counter[str]


@dataclass
class World:
    """A folder with agents, a model server, and one server after another on the same data."""

    folder: Path
    models: ModelServer
    nursery: Nursery
    deaths: dict[str, AtDeath] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        (self.folder / "agents.py").write_text(AGENTS)
        (self.folder / "agent-server.toml").write_text(POLICY)
        self.count_file = self.folder / "calls.txt"
        self.count_file.touch()

    def start(self, crash_at: str = "") -> Server:
        return self.nursery.start(self.environment(), folder=self.folder, crash_at=crash_at)

    def environment(self, **settings: str) -> dict[str, str]:
        """What a process needs, with ``settings``: ``lease_s="3"`` is ``AGENT_SERVER_LEASE_S=3``."""
        env = {
            "AGENT_SERVER_DATA_DIR": str(self.folder / "data"),
            "AGENT_SERVER_MODEL": "test-model",
            "AGENT_SERVER_AGENTS": str(self.folder / "agents.py"),
            "AGENT_SERVER_LOG_LEVEL": "WARNING",
            "OPENAI_API_KEY": "test",
            "OPENAI_BASE_URL": self.models.base_url,
            "COUNT_FILE": str(self.count_file),
        }
        return env | {f"AGENT_SERVER_{name.upper()}": value for name, value in settings.items()}

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        path = self.folder / "data" / "agent-server.db"
        with sqlite3.connect(path) as connection:
            return connection.execute(query, values).fetchall()

    def begun(self) -> Counter[str]:
        lines = self.count_file.read_text().splitlines()
        return Counter(line[6:] for line in lines if line.startswith("begin "))

    def calls_of(self, run: str) -> int:
        return sum(1 for call in self.models.calls if f"{run}" in json.dumps(call))

    def note_death(self, run: str, run_id: str | None) -> None:
        """Remember what the ledger held when the process died."""
        done: set[str] = set()
        models_done = 0
        if run_id is not None:
            for kind, name, given in self.rows(
                "SELECT kind, name, input FROM steps WHERE run_id = ? AND status = 'done'", run_id
            ):
                if kind == "model":
                    models_done += 1
                elif kind == "tool":
                    done.add(f"{name} {next(iter(json.loads(given).values()))}")
        self.deaths[run] = AtDeath(done, models_done, self.calls_of(run), self.begun())

    def run_id_of(self, run: str) -> str | None:
        if not (self.folder / "data" / "agent-server.db").exists():
            return None
        rows = self.rows("SELECT id FROM runs WHERE name = ?", f"goal {run}")
        assert len(rows) <= 1, rows
        return rows[0][0] if rows else None

    def check(self, run: str, run_id: str, answer: dict[str, Any]) -> str:
        """Every invariant of a run that ended, or waits; returns its status."""
        seqs = [r[0] for r in self.rows("SELECT seq FROM events WHERE run_id = ?", run_id)]
        assert sorted(seqs) == list(range(1, len(seqs) + 1)), "event numbers have a gap"
        begun, death = self.begun(), self.deaths.get(run)
        for name in begun:
            if name.startswith("pay ") and f" {run}-" in name:
                assert begun[name] == 1, f"{name} happened {begun[name]} times"
        if death is not None:
            for name in death.done:
                assert begun[name] == death.begun[name], f"{name} was finished and ran again"
        if answer["status"] == "waiting":
            assert answer["waiting_for"]["kind"] == "reconciliation", answer
            assert self.rows("SELECT 1 FROM steps WHERE run_id = ? AND status = 'in_doubt'", run_id)
            return "waiting"
        assert answer["status"] == "succeeded", answer
        assert answer["output"] == f"all of {run} done"
        assert {f"pay {run}-a", f"pay {run}-b"} <= set(begun)
        models = self.rows("SELECT count(*) FROM steps WHERE run_id = ? AND kind = 'model'", run_id)
        assert answer["usage"]["model_calls"] == models[0][0] == 8
        assert answer["usage"]["tool_calls"] == 5
        if death is not None:
            fresh = models[0][0] - death.models_done
            again = self.calls_of(run) - death.models_called
            assert again == fresh, f"{again} model calls after the restart for {fresh} open steps"
        types = [r[0] for r in self.rows("SELECT type FROM events WHERE run_id = ?", run_id)]
        once = ("run.created", "plan.created", "run.succeeded")
        assert all(types.count(kind) == 1 for kind in once), types
        assert types.count("task.completed") == 3
        assert not self.rows("SELECT 1 FROM tasks WHERE run_id = ? AND status = 'running'", run_id)
        return "succeeded"


async def ready(server: Server) -> None:
    """Return when the server is ready."""
    async with httpx2.AsyncClient() as client:
        for _ in range(3000):
            try:
                if (await client.get(f"{server.url}/readyz")).status_code == 200:
                    return
            except httpx2.TransportError:
                assert not await server.ended(0.01), server.log.read_text()[-4000:]
    raise AssertionError(server.log.read_text()[-4000:])


async def ready_at(url: str, within_s: float = 60.0) -> None:
    """Return when whatever serves at ``url`` is ready."""
    until = time.monotonic() + within_s
    async with httpx2.AsyncClient() as client:
        while time.monotonic() < until:
            with suppress(httpx2.TransportError):
                if (await client.get(f"{url}/readyz")).status_code == 200:
                    return
            await asyncio.to_thread(time.sleep, 0.02)
    raise AssertionError(f"{url} was not ready within {within_s:g} s")


async def settled(server: Server, run_id: str) -> dict[str, Any]:
    """The run when it has ended or waits for somebody."""
    async with httpx2.AsyncClient(timeout=30) as client:
        for _ in range(200):
            answer = (await client.get(f"{server.url}/api/v1/runs/{run_id}?wait=0.5")).json()
            if answer["status"] not in ("queued", "running"):
                return dict(answer)
    raise AssertionError(answer)
