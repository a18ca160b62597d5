"""Random workflows in real processes that are killed at random steps: the same result as undisturbed,
each branch the same way, and no finished call twice."""

import json
import random
import signal
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from agent_server.execution.crash import POINTS
from tests.support.model_thread import ModelThread
from tests.support.server_process import Nursery
from tests.workflow.branches import Branches, branches_of, in_order, same_branches, timeless, undone
from tests.workflow.drafts import Draft, seeded

from .kit import RUNS, Api, House, Json

TOOLS = '''
import asyncio
import json
import os
from pathlib import Path
from random import Random

from agents import FunctionTool

from agent_server.inference.durable_run import PLACE

CALLS = Path(os.environ["CALLS_FILE"])


def made(name):
    """A tool that writes down when it begins, and fails or says its ``value``."""

    async def invoke(context, text):
        given = json.loads(text)
        ctx = PLACE.get().run.ctx
        line = json.dumps({"name": name, "call": f"{ctx.run.id} {ctx.path}", "value": given.get("value")})
        with CALLS.open("a") as file:
            file.write(line + "\\n")
        await asyncio.sleep(Random(line).random() * 0.01)
        again = "@" in ctx.path.rpartition(".")[2]
        if name == "fail" or (name == "fail_until" and not again):
            raise ValueError(f"{ctx.path} failed")
        return given.get("value")

    schema = {"type": "object", "properties": {"value": {}, "attempt": {"type": "integer"}}}
    return FunctionTool(name, f"To {name}.", schema, invoke, strict_json_schema=False)


echo, pay = made("echo"), made("pay")
fail, fail_until = made("fail"), made("fail_until")
'''
POLICY = "".join(f'[tools.{name}]\neffect = "none"\n' for name in ("echo", "fail", "fail_until"))
BATCH = 5
"""Workflows under way when a process is killed."""
INNER = [point for point in POINTS if not point.startswith("submit")]

Told = tuple[Json, Branches]


class Trial:
    """One folder, its servers one after another, and what the tools wrote down."""

    def __init__(self, folder: Path, nursery: Nursery, models: ModelThread) -> None:
        (folder / "tools.py").write_text(TOOLS)
        (folder / "agent-server.toml").write_text(POLICY)
        self._calls = folder / "calls.txt"
        self._calls.touch()
        files = {"AGENT_SERVER_AGENTS": str(folder / "tools.py"), "CALLS_FILE": str(self._calls)}
        settings = {"AGENT_SERVER_MAX_ATTEMPTS": "1000"}
        self.house = House(folder, nursery, models, **files, **settings)
        self.finished: dict[str, int] = {}
        """How often each call had begun when the ledger was first seen to hold its end."""

    def calls(self, name: str = "") -> list[Json]:
        found = [json.loads(line) for line in self._calls.read_text().splitlines()]
        return [call for call in found if name in ("", call["name"])]

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        with sqlite3.connect(self.house.folder / "data" / "agent-server.db") as connection:
            return connection.execute(query).fetchall()

    def note_finished(self) -> None:
        """From now on what the ledger holds as ended must not begin again."""
        begun = Counter(call["call"] for call in self.calls())
        ended = self.rows(
            "SELECT run_id, task_path FROM steps WHERE kind = 'tool' AND status IN ('done', 'failed')"
        )
        for run_id, path in ended:
            self.finished.setdefault(f"{run_id} {path}", begun[f"{run_id} {path}"])

    def check(self) -> None:
        begun = Counter(call["call"] for call in self.calls())
        for call, number in self.finished.items():
            assert begun[call] == number, f"{call} had ended and began again"
        paid = Counter(call["call"] for call in self.calls("pay"))
        assert set(paid.values()) <= {1}, paid
        assert not self.rows("SELECT 1 FROM tasks WHERE status IN ('running', 'queued', 'waiting')")

    def settle(self, api: Api, run_id: str) -> Json:
        """The run at its end; calls in doubt are looked up where the tool wrote them down."""
        for _ in range(200):
            run: Json = api.get(f"{RUNS}/{run_id}", wait=0.2)
            if run["ended_at"] is not None:
                return run
            for step, path in self.rows(
                f"SELECT key, task_path FROM steps WHERE run_id = '{run_id}' AND status = 'in_doubt'"
            ):
                happened = [c for c in self.calls("pay") if c["call"] == f"{run_id} {path}"]
                said: Json = {"step": step, "outcome": "did_not_happen"}
                if happened:
                    said |= {"outcome": "happened", "result": happened[0]["value"]}
                answer = api.http.post(f"{RUNS}/{run_id}/reconcile", json=said)
                assert answer.status_code in (200, 409), answer.text
        raise AssertionError(run)

    def told(self, api: Api, run_id: str, draft: Draft) -> Told:
        """How the run ended, in which everything holds."""
        run = self.settle(api, run_id)
        events = api.events(run_id)
        in_order(events, draft)
        tasks = api.listed(f"{RUNS}/{run_id}/tasks")
        undone(events, tasks, run["status"], run["output"], draft)
        error = None if run["error"] is None else run["error"]["message"]
        result = {"status": run["status"], "output": timeless(run["output"]), "error": error}
        return result, branches_of(events)


def submit(api: Api, definitions: list[Json]) -> list[str]:
    return [api.submit(workflow=definition) for definition in definitions]


def kill_at_random(trial: Trial, choose: random.Random, kills: int) -> None:
    seeds = [choose.randrange(1_000_000) for _ in range(kills * BATCH)]
    drafts = [seeded(seed, calm=choose.random() < 0.4) for seed in seeds]
    api = trial.house.start()
    runs = submit(api, [definition for _, definition in drafts])
    undisturbed = [
        trial.told(api, run, draft) for run, (draft, _) in zip(runs, drafts, strict=True)
    ]
    for kill in range(kills):
        mine = range(kill * BATCH, (kill + 1) * BATCH)
        runs = submit(api, [drafts[number][1] for number in mine])
        api = fall(trial, api, choose)
        for number, run in zip(mine, runs, strict=True):
            draft = drafts[number][0]
            result, branches = trial.told(api, run, draft)
            assert result == undisturbed[number][0], f"seed {seeds[number]}"
            same_branches(branches, undisturbed[number][1], draft)
        trial.check()


def fall(trial: Trial, api: Api, choose: random.Random) -> Api:
    """Kill the server at a random moment, its successor at a random step of what is left, and
    begin a third."""
    assert api.server is not None
    if not trial.house.ended(api, choose.uniform(0.0, 0.4)):
        api.server.signal(signal.SIGKILL)
        assert trial.house.ended(api)
    trial.note_finished()
    place = f"{choose.choice(INNER)}:{choose.randint(1, 12)}"
    second = trial.house.start(crash_at=place)
    if not trial.house.ended(second, 1.0):  # There was less left to do than that.
        assert second.server is not None
        second.server.signal(signal.SIGKILL)
        assert trial.house.ended(second)
    trial.note_finished()
    return trial.house.start()


def test_random_workflows_that_are_killed_at_random_steps_end_as_if_nothing_had_happened(
    nursery: Nursery, models: ModelThread, tmp_path: Path
) -> None:
    seed = random.randrange(1_000_000)
    print("seed", seed)  # shown when the test fails
    kill_at_random(Trial(tmp_path, nursery, models), random.Random(seed), 2)


def cancel_at_random(trial: Trial, choose: random.Random, kills: int) -> None:
    """Kill the server under workflows, and cancel them when it is back."""
    for _ in range(kills):
        drafts = [seeded(choose.randrange(1_000_000)) for _ in range(BATCH)]
        api = trial.house.start()
        runs = submit(api, [definition for _, definition in drafts])
        api = fall(trial, api, choose)
        for run in runs:
            answer = api.http.post(f"{RUNS}/{run}/cancel", json={})
            assert answer.status_code in (200, 202, 409), answer.text
        for run, (draft, _) in zip(runs, drafts, strict=True):
            trial.told(api, run, draft)
        trial.check()
        assert api.server is not None
        api.server.signal(signal.SIGKILL)
        assert trial.house.ended(api)


def test_random_workflows_that_are_cancelled_after_a_kill_undo_all_that_had_happened(
    nursery: Nursery, models: ModelThread, tmp_path: Path
) -> None:
    seed = random.randrange(1_000_000)
    print("seed", seed)  # shown when the test fails
    cancel_at_random(Trial(tmp_path, nursery, models), random.Random(seed), 2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_random_workflows_that_are_cancelled_after_a_kill(
    nursery: Nursery, models: ModelThread, tmp_path: Path
) -> None:
    seed = random.randrange(1_000_000)
    print("seed", seed)  # shown when the test fails
    cancel_at_random(Trial(tmp_path, nursery, models), random.Random(seed), 20)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_hundred_random_workflows_that_are_killed_at_random_steps(
    nursery: Nursery, models: ModelThread, tmp_path: Path
) -> None:
    seed = random.randrange(1_000_000)
    print("seed", seed)  # shown when the test fails
    kill_at_random(Trial(tmp_path, nursery, models), random.Random(seed), 40)
