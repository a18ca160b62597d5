"""Every type of node over HTTP: a run, a failure, a kill and resume, a cancel and a timeout of each.

One table says what each cell must give, or why there is nothing to see; a type of node or a column
without its cell fails the tests.
"""

import json
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agent_server.domain.workflows import NODE_TYPES
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
    try:
        while not (FOLDER / f"open-{name}").exists():
            await asyncio.sleep(0.02)
    except asyncio.CancelledError:
        write(f"left {name}")
        raise
    return "held"


@function_tool
async def pay(name: str) -> str:
    """Pays, for good."""
    write(f"paid {name}")
    return "paid"


@function_tool(failure_error_function=None)
async def broken() -> str:
    """Never works."""
    raise ValueError("it is broken")


worker = Agent(name="worker", instructions="You work.", tools=[gate])
'''
POLICY = '[tools.gate]\neffect = "none"\n'
BROKEN = "it is broken"
REFUSED = "the model refuses"


@dataclass(frozen=True)
class Why:
    """Why there is nothing to see in a cell."""

    reason: str


@dataclass(frozen=True)
class Ends:
    """What the node is told to do, and how it ends: its ``output``, or words of its error."""

    node: Json
    shows: Any
    code: str = ""


def tool(name: str, id: str = "g", tool: str = "gate") -> Json:
    arguments = {} if tool == "broken" else {"name": name}
    return {"id": id, "type": "tool", "tool": tool, "arguments": arguments}


def around(kind: str, inner: Json, said: str) -> Json:
    """The node of this type with ``inner`` inside; a model is told ``said``."""
    called = {"name": inner["tool"], "arguments": inner["arguments"]}
    found: dict[str, Json] = {
        "tool": inner,
        "action": {"action": "tool", "parameters": called},
        "agent": {"agent": "worker", "input": said},
        "approach": {"approach": "react", "agent": "worker", "input": said},
        "plan": {"goal": f"goal {said}", "agents": ["worker"]},
        "parallel": {"branches": [[inner], [tool(said, "p", "pay")]]},
        "branch": {"cases": [{"when": "inputs == inputs", "nodes": [inner]}]},
        "map": {"over": [1], "nodes": [inner]},
        "loop": {"until": "iteration > 0", "max_iterations": 2, "nodes": [inner]},
        "workflow": {"workflow": {"name": "in", "nodes": [inner]}},
    }
    return {**found[kind], "type": kind}


def script(cell: str) -> list[Json]:
    """What the model says to the agents and to the planner of this cell."""
    plan = {"tasks": [{**task("a", f"gate {cell}"), "agent": "worker"}], "actions": []}
    return [
        rule(rf"\Abroken {cell}\b", {"status": 400, "error": {"message": REFUSED}}),
        rule(rf"\Agate {cell}\b", calling(("gate", {"name": cell})), {"text": "held"}),
        rule(rf"\AGoal:\s+goal broken {cell}\b", {"status": 400, "error": {"message": REFUSED}}),
        rule(rf"\AGoal:\s+goal gate {cell}\b", {"text": json.dumps(plan)}),
    ]


WAIT = {"type": "wait", "signal": "go"}
APPROVAL = {"type": "approval", "subject": "May it?"}
SET = {"type": "set", "variables": {"x": "{{ 1 + 1 }}"}}
GIVES = {"map": ["held"], "parallel": ["held", "paid"]}
INSIDE = ("tool", "action", "parallel", "branch", "map", "loop", "workflow")
BY_A_MODEL = ("agent", "approach", "plan")

COLUMNS = ("run", "failure", "kill", "cancel", "timeout")
Cell = Ends | Why


def cells() -> dict[str, dict[str, Cell]]:
    """The table: of each type of node a cell in each column."""
    table: dict[str, dict[str, Cell]] = {}
    for kind in (*INSIDE, *BY_A_MODEL):
        held = {c: around(kind, tool(f"{kind}-{c}"), f"gate {kind}-{c}") for c in COLUMNS}
        fails = around(kind, tool("", tool="broken"), f"broken {kind}-failure")
        gives = GIVES.get(kind, "held")
        table[kind] = {
            "run": Ends(held["run"], gives),
            "failure": Ends(fails, REFUSED if kind in BY_A_MODEL else BROKEN),
            "kill": Ends(held["kill"], gives),
            "cancel": Ends(held["cancel"], None),
            "timeout": Ends({**held["timeout"], "timeout_s": 0.3}, "after 0.3 s", "task_timeout"),
        }
    table["wait"] = {
        "run": Ends({"type": "wait", "until": "2020-01-31T09:00:00Z"}, "2020-01-31T09:00:00Z"),
        "failure": Ends({"type": "wait", "until": "{{ 'soon' }}"}, "'soon'", "expression_error"),
        "kill": Ends(WAIT, {"go": 1}),
        "cancel": Ends(WAIT, None),
        "timeout": Ends({**WAIT, "timeout_s": 0.3}, "after 0.3 s", "task_timeout"),
    }
    table["approval"] = {
        "run": Ends({**APPROVAL, "expires_s": 0.1, "on_expiry": "approve"}, {"approved": True}),
        "failure": Ends({**APPROVAL, "expires_s": 0.1}, "Nobody decided", "approval_rejected"),
        "kill": Ends(APPROVAL, {"approved": True}),
        "cancel": Ends(APPROVAL, None),
        "timeout": Ends({**APPROVAL, "timeout_s": 0.3}, "after 0.3 s", "task_timeout"),
    }
    at_once = Why("it is computed at once: nothing happens in its middle, only before it or after")
    table["set"] = {
        "run": Ends(SET, {"x": 2}),
        "failure": Ends({"type": "set", "variables": {"x": "{{ 1 / 0 }}"}}, "zero"),
        "kill": Ends(SET, {"x": 2}),
        "cancel": at_once,
        "timeout": at_once,
    }
    return table


TABLE = cells()
STANDING = ("wait", "approval")


def test_every_type_of_node_has_a_cell_in_every_column() -> None:
    assert TABLE.keys() == NODE_TYPES
    assert all(row.keys() == set(COLUMNS) for row in TABLE.values())
    assert all(cell.reason for row in TABLE.values() for cell in row.values() if is_why(cell))


def is_why(cell: Cell) -> bool:
    return isinstance(cell, Why)


def kinds(column: str) -> list[str]:
    return [kind for kind in sorted(TABLE) if not is_why(TABLE[kind][column])]


def ends(kind: str, column: str) -> Ends:
    found = TABLE[kind][column]
    assert isinstance(found, Ends)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("matrix")
    (folder / "agents.py").write_text(AGENTS)
    (folder / "agent-server.toml").write_text(POLICY)
    return folder


@pytest.fixture(scope="module")
def house(nursery: Nursery, models: ModelThread, folder: Path) -> House:
    said = [f"{kind}-{column}" for kind in BY_A_MODEL for column in COLUMNS]
    models.script(*(reply for cell in said for reply in script(cell)))
    files = {"AGENT_SERVER_AGENTS": str(folder / "agents.py"), "GATE_FOLDER": str(folder)}
    return House(folder / "house", nursery, models, **files)


@pytest.fixture(scope="module")
def api(house: House) -> Iterator[Api]:
    api = house.start()
    yield api
    assert api.server is not None
    api.server.signal(signal.SIGKILL)


def submit(api: Api, node: Json, *before: Json, **fields: Any) -> str:
    nodes = [*before, {**node, "id": "n", **fields}]
    return api.submit(workflow={"name": "w", "nodes": nodes})


@pytest.mark.parametrize("kind", kinds("run"))
def test_it_runs(kind: str, api: Api, folder: Path) -> None:
    (folder / f"open-{kind}-run").touch()
    cell = ends(kind, "run")
    run = ended(api, submit(api, cell.node))
    assert run["status"] == "succeeded", run["error"]
    assert_shows(run["output"], cell.shows)


@pytest.mark.parametrize("kind", kinds("failure"))
def test_it_fails_and_its_policy_is_applied(kind: str, api: Api) -> None:
    cell = ends(kind, "failure")
    run = ended(api, submit(api, cell.node))
    assert run["status"] == "failed" and cell.shows in run["error"]["message"], run
    assert outcome(api, cell.node) == {"status": "failed", "error": cell.code or ANY}


@pytest.mark.parametrize("kind", kinds("timeout"))
def test_its_time_is_up_and_nothing_of_it_goes_on(kind: str, api: Api) -> None:
    cell = ends(kind, "timeout")
    run = ended(api, submit(api, cell.node))
    assert run["status"] == "failed" and cell.shows in run["error"]["message"], run
    stopped(api, run["id"])
    assert outcome(api, cell.node) == {"status": "failed", "error": cell.code}


@pytest.mark.parametrize("kind", kinds("cancel"))
def test_it_is_cancelled_and_nothing_of_it_goes_on(kind: str, api: Api, folder: Path) -> None:
    run_id = submit(api, ends(kind, "cancel").node)
    reached(api, run_id, f"{kind}-cancel", folder, standing=kind in STANDING)
    answer = api.http.post(f"{RUNS}/{run_id}/cancel", json={"reason": "enough"})
    assert answer.status_code < 300, answer.text
    assert ended(api, run_id)["status"] == "cancelled"
    stopped(api, run_id)
    if kind not in STANDING:
        assert f"left {kind}-cancel" in lines(folder)


def test_a_killed_run_goes_on_in_the_middle_of_every_type_of_node_and_repeats_nothing(
    house: House, folder: Path
) -> None:
    other = House(folder / "killed", house._nursery, house.models, **house.env)
    other.env["AGENT_SERVER_DATA_DIR"] = str(folder / "killed" / "data")
    api = other.start()
    runs: dict[str, str] = {}
    for kind in kinds("kill"):
        before = [tool(f"{kind}-before", "b", "pay")]
        if kind == "set":
            before.append(tool("set-kill"))
        runs[kind] = submit(api, ends(kind, "kill").node, *before)
    for kind, run_id in runs.items():
        reached(api, run_id, f"{kind}-kill", folder, standing=kind in STANDING)
    assert api.server is not None
    api.server.signal(signal.SIGKILL)
    assert other.ended(api)
    for kind in runs:
        (folder / f"open-{kind}-kill").touch()

    again = other.start()
    answer = again.http.post(f"{RUNS}/{runs['wait']}/signals/go", json={"go": 1})
    assert answer.status_code < 300, answer.text
    (asked,) = again.get("/api/v1/approvals", run_id=runs["approval"])["data"]
    answer = again.http.post(f"/api/v1/approvals/{asked['id']}", json={"decision": "approve"})
    assert answer.status_code < 300, answer.text
    for kind, run_id in runs.items():
        run = ended(again, run_id)
        assert run["status"] == "succeeded", (kind, run)
        assert_shows(run["output"], ends(kind, "kill").shows)
    paid = Counter(line for line in lines(folder) if line.startswith("paid "))
    assert {paid[f"paid {kind}-before"] for kind in runs} == {1}
    assert paid["paid gate parallel-kill"] == 1
    assert again.server is not None
    again.server.signal(signal.SIGKILL)


class _Any:
    def __eq__(self, other: object) -> bool:
        return other is not None


ANY = _Any()


def assert_shows(output: Any, wanted: Any) -> None:
    """``output`` is ``wanted``; of an object, at least that."""
    if isinstance(wanted, dict):
        assert wanted.items() <= output.items(), output
    else:
        assert output == wanted


def outcome(api: Api, node: Json) -> Json:
    """How the node ended in a run that goes on behind it."""
    shown = {"status": "{{ nodes.n.status }}", "error": "{{ nodes.n.error.code }}"}
    after = {"id": "z", "type": "set", "variables": {"how": shown}}
    nodes = [{**node, "id": "n", "on_error": "continue"}, after]
    run = ended(api, api.submit(workflow={"name": "w", "nodes": nodes}))
    assert run["status"] == "succeeded", run
    return dict(run["output"]["how"])


def stopped(api: Api, run_id: str) -> None:
    live = {"running", "queued", "waiting"}
    assert not [t for t in api.listed(f"{RUNS}/{run_id}/tasks") if t["status"] in live]


def lines(folder: Path) -> list[str]:
    path = folder / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []


def reached(api: Api, run_id: str, name: str, folder: Path, *, standing: bool) -> None:
    """Return when the run stands at the gate, or still."""
    for _ in range(200):
        run: Json = api.get(f"{RUNS}/{run_id}", wait=0.1)
        assert run["status"] in ("queued", "running", "waiting"), (name, run["error"])
        if run["status"] == "waiting" if standing else f"at {name}" in lines(folder):
            return
    raise AssertionError(name)


def ended(api: Api, run_id: str) -> Json:
    for _ in range(200):
        run: Json = api.get(f"{RUNS}/{run_id}", wait=0.2)
        if run["ended_at"] is not None:
            return run
    return run
