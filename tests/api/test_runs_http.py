"""The main job through the real server, over a real socket, with the demo model."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI

from agent_server.domain.events import EVENT
from agent_server.server import create_app
from tests.api import gates
from tests.api.harness import listening, settings, stream

RUNS = "/api/v1/runs"
AGENTS = '''
from agents import Agent, function_tool

from tests.api import gates


@function_tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@function_tool
async def hold() -> str:
    """Wait for the test."""
    return await gates.current[-1].hold()


clerk = Agent(name="Clerk", instructions="You help.", tools=[add])
'''
HOLD = {"workflow": {"name": "holding", "nodes": [{"id": "h", "type": "tool", "tool": "hold"}]}}
HELLO = {"agent": "clerk", "input": "Hello there"}


@dataclass
class Real:
    app: FastAPI
    port: int
    http: httpx2.AsyncClient
    gate: gates.Gate

    async def start(self, body: dict[str, Any], **query: Any) -> dict[str, Any]:
        answer = await self.http.post(RUNS, json=body, params=query)
        assert answer.status_code in (200, 202), answer.text
        return dict(answer.json())

    async def held(self) -> str:
        """A run that stands in the middle of a tool call."""
        run = await self.start(HOLD)
        await asyncio.wait_for(self.gate.reached.wait(), 10)
        return str(run["id"])

    async def events(self, run_id: str, **query: Any) -> list[dict[str, Any]]:
        answer = await self.http.get(
            f"{RUNS}/{run_id}/events", params=query, headers={"accept": "application/json"}
        )
        return list(answer.json()["data"])


@pytest.fixture
async def real(tmp_path: Path) -> AsyncIterator[Real]:
    (tmp_path / "agents.py").write_text(AGENTS)
    app = create_app(
        settings(
            data_dir=tmp_path / "data",
            agents=str(tmp_path / "agents.py"),
            model="demo",
            shutdown_grace_s=0.5,
            access_log=False,
        )
    )
    gate = gates.Gate()
    gates.current.append(gate)
    try:
        async with listening(app) as port:
            async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
                yield Real(app, port, http, gate)
    finally:
        gates.current.pop()


def fields(block: bytes) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in block.decode().strip().split("\n"))


async def test_the_server_is_ready_and_lists_what_the_file_holds(real: Real) -> None:
    assert (await real.http.get("/readyz")).status_code == 200
    agents = (await real.http.get("/api/v1/agents")).json()["data"]
    assert [agent["name"] for agent in agents] == ["clerk"]
    tools = {tool["name"] for tool in (await real.http.get("/api/v1/tools")).json()["data"]}
    assert {"add", "hold"} <= tools
    assert "agent_server_" in (await real.http.get("/metrics")).text


async def test_an_agent_answers_within_the_wait(real: Real) -> None:
    run = await real.start(HELLO, wait=20)
    assert run["status"] == "succeeded"
    assert "Hello there" in run["output"]
    assert run["usage"]["model_calls"] == 1


async def test_a_goal_is_planned_and_its_plan_tasks_and_steps_are_read(real: Real) -> None:
    goal = "Compare three ways to store chat history and recommend one"
    run = await real.start({"goal": goal}, wait=30)
    assert run["status"] == "succeeded", run["error"]
    place = f"{RUNS}/{run['id']}"
    plan = (await real.http.get(f"{place}/plan")).json()
    assert len(plan["tasks"]) >= 3
    assert {task["status"] for task in plan["tasks"]} == {"succeeded"}
    tasks = (await real.http.get(f"{place}/tasks")).json()["data"]
    assert {task["id"] for task in plan["tasks"]} <= {task["node"] for task in tasks}
    seen: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        page = (await real.http.get(f"{place}/steps", params={"limit": 2} | cursor)).json()
        seen += [step["key"] for step in page["data"]]
        if page["next_cursor"] is None:
            break
        cursor = {"cursor": page["next_cursor"]}
    assert len(seen) == len(set(seen)) >= 4
    assert len(seen) == run["usage"]["model_calls"] + run["usage"]["tool_calls"]


async def test_a_streamed_run_tells_all_its_events_without_a_gap(real: Real) -> None:
    body = json.dumps(HELLO | {"stream": True}).encode()
    async with stream(real.port, RUNS, body=body) as live:
        blocks = [fields(block) for block in await live.writes()]
    stored = [json.loads(block["data"]) for block in blocks if "id" in block]
    assert [event["seq"] for event in stored] == list(range(1, len(stored) + 1))
    assert [block["id"] for block in blocks if "id" in block] == [str(e["seq"]) for e in stored]
    assert stored[0]["type"] == "run.created"
    assert stored[-1]["type"] == "run.succeeded"
    deltas = [json.loads(b["data"])["text"] for b in blocks if b["event"] == "message.delta"]
    message = next(event for event in stored if event["type"] == "message.completed")
    assert "".join(deltas) == message["text"]
    for event in stored:
        EVENT.validate_python(event)
    assert await real.events(stored[0]["run_id"]) == stored


async def test_a_stream_cut_anywhere_resumes_exactly(real: Real) -> None:
    run = await real.start(HELLO, wait=20)
    whole = [event["seq"] for event in await real.events(run["id"])]
    for last in whole[:-1]:
        path, header = f"{RUNS}/{run['id']}/events", {"Last-Event-ID": str(last)}
        async with stream(real.port, path, header) as live:
            rest = [int(fields(block)["id"]) for block in await live.writes()]
        assert rest == whole[last:]
    after = await real.http.get(
        f"{RUNS}/{run['id']}/events", headers={"Last-Event-ID": str(whole[-1])}
    )
    assert after.status_code == 204


async def test_a_reader_that_joins_late_sees_the_past_and_then_the_present(real: Real) -> None:
    run_id = await real.held()
    async with stream(real.port, f"{RUNS}/{run_id}/events") as live:
        first = fields(await live.write())
        assert first["event"] == "run.created"
        real.gate.open.set()
        blocks = [fields(block) for block in await live.writes()]
    assert blocks[-1]["event"] == "run.succeeded"
    numbers = [int(first["id"]), *(int(b["id"]) for b in blocks if "id" in b)]
    assert numbers == list(range(1, len(numbers) + 1))


async def test_a_reader_that_leaves_does_not_end_the_run(real: Real) -> None:
    run_id = await real.held()
    async with stream(real.port, f"{RUNS}/{run_id}/events") as live:
        await live.write()
    real.gate.open.set()
    run = (await real.http.get(f"{RUNS}/{run_id}", params={"wait": 20})).json()
    assert run["status"] == "succeeded"


async def test_cancelling_stops_the_tool_in_flight(real: Real) -> None:
    run_id = await real.held()
    answer = await real.http.post(f"{RUNS}/{run_id}/cancel", json={"reason": "enough"})
    assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    await asyncio.wait_for(real.gate.cancelled.wait(), 5)
    last = (await real.events(run_id))[-1]
    assert (last["type"], last["reason"]) == ("run.cancelled", "enough")
    again = await real.http.post(f"{RUNS}/{run_id}/cancel")
    assert (again.status_code, again.json()["code"]) == (409, "run_ended")


async def test_many_equal_requests_at_once_are_one_run(real: Real) -> None:
    key = {"Idempotency-Key": "once"}
    answers = await asyncio.gather(
        *(real.http.post(RUNS, json=HELLO, headers=key) for _ in range(20))
    )
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    replayed = [answer.headers.get("idempotency-replayed") for answer in answers]
    assert sorted(map(str, replayed)) == ["None"] + ["true"] * 19
    assert len((await real.http.get(RUNS)).json()["data"]) == 1
    other = await real.http.post(RUNS, json=HELLO | {"input": "other"}, headers=key)
    assert other.json()["code"] == "idempotency_mismatch"


async def test_the_list_is_paged_newest_first_and_filtered(real: Real) -> None:
    made = [(await real.start(HELLO, wait=20))["id"] for _ in range(5)]
    seen: list[str] = []
    query: dict[str, Any] = {"limit": 2, "agent": "clerk", "status": "succeeded"}
    while True:
        page = (await real.http.get(RUNS, params=query)).json()
        seen += [run["id"] for run in page["data"]]
        if page["next_cursor"] is None:
            break
        query["cursor"] = page["next_cursor"]
    assert seen == made[::-1]
    assert (await real.http.get(RUNS, params={"agent": "other"})).json()["data"] == []
    for cursor in ("x", "bm9uc2Vuc2U", "W10", "W1tdLFtdXQ"):
        bad = await real.http.get(RUNS, params={"cursor": cursor})
        assert (bad.status_code, bad.json()["code"]) == (422, "invalid_cursor")


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ({"agent": "clark", "input": "x"}, "unknown_agent", "clerk"),
        ({"goal": "g", "tools": ["ad"]}, "unknown_tool", "add"),
        (HELLO | {"approach": "raect"}, "unknown_approach", "react"),
        ({"workflow": {"name": "w", "nodes": [{"id": "a", "type": "x"}]}}, "invalid_workflow", ""),
        (HELLO | {"agnt": "x"}, "invalid_request", "agent"),
    ],
)
async def test_names_that_do_not_exist_are_refused_and_nothing_is_stored(
    real: Real, body: dict[str, Any], code: str, said: str
) -> None:
    answer = await real.http.post(RUNS, json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, code)
    assert said in json.dumps(answer.json())
    assert (await real.http.get(RUNS)).json()["data"] == []


async def test_a_run_that_is_not_stored_leaves_nothing(real: Real) -> None:
    run = await real.start(HELLO | {"store": False}, wait=20)
    assert run["status"] == "succeeded"
    body = json.dumps(HELLO | {"store": False, "stream": True}).encode()
    async with stream(real.port, RUNS, body=body) as live:
        kinds = [fields(block)["event"] for block in await live.writes()]
    assert kinds[0] == "run.created"
    assert "message.delta" in kinds
    assert kinds[-1] == "run.succeeded"
    assert (await real.http.get(RUNS)).json()["data"] == []
    assert (await real.http.get(f"{RUNS}/{run['id']}")).status_code == 404


async def test_draining_ends_streams_and_long_polls_and_the_run_is_not_lost(real: Real) -> None:
    run_id = await real.held()
    poll = asyncio.create_task(real.http.get(f"{RUNS}/{run_id}", params={"wait": 60}))
    async with stream(real.port, f"{RUNS}/{run_id}/events") as live:
        await live.write()
        asyncio.get_running_loop().call_soon(real.app.state.drain)
        last = fields((await live.writes())[-1])
        assert last["event"] == "server.draining"
    assert (await asyncio.wait_for(poll, 5)).json()["status"] == "running"
    assert (await real.http.get("/readyz")).status_code == 503
    real.gate.open.set()
    run = (await real.http.get(f"{RUNS}/{run_id}")).json()
    assert run["status"] in ("running", "succeeded")
