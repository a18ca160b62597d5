"""Workflows with every type of node over HTTP: killed in the middle of each, and gone on from there."""

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

from tests.durability.world import task
from tests.support.model_thread import ModelThread, calling, rule
from tests.support.server_process import Nursery

from .kit import RUNS, Api, House, Json

AGENTS = '''
import asyncio
import os
from pathlib import Path

from agents import Agent, function_tool

FOLDER = Path(os.environ["GATE_FOLDER"])


def write(line):
    with (FOLDER / "calls.txt").open("a") as file:
        file.write(line + "\\n")


@function_tool
async def gate(name: str) -> str:
    """Waits until the gate is open."""
    write(f"at {name}")
    while not (FOLDER / "open").exists():
        await asyncio.sleep(0.02)
    return "held"


@function_tool
async def pay(name: str) -> str:
    """Pays, for good."""
    write(f"paid {name}")
    return "paid"


worker = Agent(name="worker", instructions="You work.", tools=[gate])
'''


def tool(name: str, id: str = "g", tool: str = "gate") -> Json:
    return {"id": id, "type": "tool", "tool": tool, "arguments": {"name": name}}


def nodes(kind: str) -> list[Json]:
    """A payment, then a node of this type that stands at the gate."""
    inside: dict[str, Json] = {
        "tool": tool(kind),
        "action": {
            "type": "action",
            "action": "tool",
            "parameters": {"name": "gate", "arguments": {"name": kind}},
        },
        "agent": {"type": "agent", "agent": "worker", "input": "gate agent"},
        "approach": {
            "type": "approach",
            "approach": "react",
            "agent": "worker",
            "input": "gate approach",
        },
        "plan": {"type": "plan", "goal": "goal planned", "agents": ["worker"]},
        "parallel": {"type": "parallel", "branches": [[tool(kind)], [tool(kind, "p", "pay")]]},
        "branch": {
            "type": "branch",
            "cases": [{"when": "inputs == inputs", "nodes": [tool(kind)]}],
        },
        "map": {"type": "map", "over": [1, 2], "nodes": [tool(kind)]},
        "loop": {
            "type": "loop",
            "until": "iteration > 0",
            "max_iterations": 2,
            "nodes": [tool(kind)],
        },
        "workflow": {"type": "workflow", "workflow": {"name": "in", "nodes": [tool(kind)]}},
        "wait": {"type": "wait", "signal": "go"},
        "approval": {"type": "approval", "subject": "May it?"},
    }
    if kind == "set":
        return [
            tool(f"{kind}-before", "b", "pay"),
            tool(kind),
            {"id": "n", "type": "set", "variables": {"x": 1}},
        ]
    return [tool(f"{kind}-before", "b", "pay"), {**inside[kind], "id": "n"}]


KINDS = (
    *("tool", "action", "agent", "approach", "plan", "parallel", "branch", "map", "loop"),
    *("workflow", "set", "wait", "approval"),
)
STANDING = ("wait", "approval")


def test_a_killed_run_goes_on_in_the_middle_of_every_type_of_node_and_repeats_nothing(
    nursery: Nursery, models: ModelThread, tmp_path: Path
) -> None:
    (tmp_path / "agents.py").write_text(AGENTS)
    (tmp_path / "agent-server.toml").write_text('[tools.gate]\neffect = "none"\n')
    plan = {"tasks": [{**task("a", "gate plan"), "agent": "worker"}], "actions": []}
    models.script(
        *(
            rule(rf"\Agate {kind}", calling(("gate", {"name": kind})), {"text": "held"})
            for kind in ("agent", "approach", "plan")
        ),
        rule("goal planned", {"text": json.dumps(plan)}),
    )
    house = House(
        tmp_path / "house",
        nursery,
        models,
        AGENT_SERVER_AGENTS=str(tmp_path / "agents.py"),
        GATE_FOLDER=str(tmp_path),
    )
    api = house.start()
    runs = {k: api.submit(workflow={"name": k, "nodes": nodes(k)}) for k in KINDS}
    for kind, run_id in runs.items():
        reached(api, run_id, kind, tmp_path)
    assert api.server is not None
    api.server.signal(signal.SIGKILL)
    assert house.ended(api)
    (tmp_path / "open").touch()

    again = house.start()
    answer = again.http.post(f"{RUNS}/{runs['wait']}/signals/go", json={"go": 1})
    assert answer.status_code < 300, answer.text
    (asked,) = again.get("/api/v1/approvals", run_id=runs["approval"])["data"]
    answer = again.http.post(f"/api/v1/approvals/{asked['id']}", json={"decision": "approve"})
    assert answer.status_code < 300, answer.text
    for kind, run_id in runs.items():
        run = ended(again, run_id)
        assert run["status"] == "succeeded", (kind, run)
    paid = Counter(line for line in lines(tmp_path) if line.startswith("paid "))
    assert set(paid.values()) == {1} and len(paid) == len(KINDS) + 1


def lines(folder: Path) -> list[str]:
    path = folder / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []


def reached(api: Api, run_id: str, kind: str, folder: Path) -> None:
    """Return when the run stands at the gate, or still."""
    for _ in range(200):
        run: dict[str, Any] = api.get(f"{RUNS}/{run_id}", wait=0.1)
        assert run["status"] in ("queued", "running", "waiting"), (kind, run["error"])
        if run["status"] == "waiting" if kind in STANDING else f"at {kind}" in lines(folder):
            return
    raise AssertionError(kind)


def ended(api: Api, run_id: str) -> dict[str, Any]:
    for _ in range(200):
        run: dict[str, Any] = api.get(f"{RUNS}/{run_id}", wait=0.2)
        if run["ended_at"] is not None:
            return run
    return run
