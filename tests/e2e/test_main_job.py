"""The main job on real input: an unchanged agents file, a real model server, real clients."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent_server.client import AgentServerClient
from tests.support.model_thread import ModelThread, calling, rule
from tests.support.server_process import Nursery

from .kit import RUNS, Api, House, check_totals, curl, parse_sse, types

REPORT = {"city": "Lisbon", "total": 5.0, "notes": ["It is sunny.", "Bring a hat."]}
TRIP = rule(
    "report on Lisbon",
    calling(("transfer_to_clerk", {})),
    calling(
        ("add", {"a": 2, "b": 3}), ("weather", {"city": "Lisbon"}), ("echo", {"text": "a hat"})
    ),
    {"json": REPORT, "usage": [100, 20, 0]},
)
ASKED = {
    "agent": "front-desk",
    "input": "Write a report on Lisbon.",
    "context": {"customer": "Ada"},
}


@pytest.fixture(scope="module", params=["responses", "chat_completions"])
def house(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    nursery: Nursery,
    models: ModelThread,
) -> House:
    folder = tmp_path_factory.mktemp(request.param)
    return House(folder, nursery, models, AGENT_SERVER_OPENAI_API=request.param)


@pytest.fixture(scope="module")
def api(house: House) -> Iterator[Api]:
    api = house.start()
    yield api
    api.http.close()


@pytest.fixture(autouse=True)
def scripted(models: ModelThread) -> None:
    models.script(TRIP)


def check_story(events: list[dict[str, Any]]) -> None:
    """The whole of the run, as its events tell it."""
    facts = [event for event in events if event["type"] != "message.delta"]
    assert [event["seq"] for event in facts] == list(range(1, len(facts) + 1))
    assert types(facts)[:2] == ["run.created", "run.started"]
    assert types(facts)[-3:] == ["message.completed", "step.completed", "run.succeeded"]
    begun = [event for event in facts if event["type"] == "step.started"]
    ended = {event["step"]: event for event in facts if event["type"] == "step.completed"}
    assert {event["step"] for event in begun} == set(ended) and len(begun) == len(ended) == 6
    assert [(event["kind"], event["agent"]) for event in begun] == [
        ("model", "Front Desk"),
        ("model", "Clerk"),
        *[("tool", "Clerk")] * 3,
        ("model", "Clerk"),
    ]
    tools = {event["name"]: event for event in begun if event["kind"] == "tool"}
    assert {name: event["input"] for name, event in tools.items()} == {
        "add": {"a": 2, "b": 3},
        "weather": {"city": "Lisbon"},
        "echo": {"text": "a hat"},
    }
    outputs = {name: ended[event["step"]]["output"] for name, event in tools.items()}
    assert outputs["add"] == 5.0 and outputs["weather"] == "The sun shines in Lisbon."
    assert "echo: a hat" in json.dumps(outputs["echo"])
    for step in ended:
        started = next(e["seq"] for e in begun if e["step"] == step)
        assert started < ended[step]["seq"]
    assert facts[-1]["output"] == REPORT
    usage = facts[-1]["usage"]
    assert (usage["model_calls"], usage["tool_calls"]) == (3, 3)
    assert usage["input_tokens"] == 120


def test_an_unchanged_agents_file_streams_to_curl(
    house: House, api: Api, models: ModelThread
) -> None:
    body = json.dumps({**ASKED, "stream": True})
    json_type = ("-H", "content-type: application/json")
    text = curl("-D", "-", *json_type, "-d", body, f"{api.url}{RUNS}")
    head, _, stream = text.replace("\r\n", "\n").partition("\n\n")
    assert head.startswith("HTTP/1.1 200") and "content-type: text/event-stream" in head
    events = parse_sse(stream)
    check_story(events)
    assert all(event["_id"] == event.get("seq") for event in events)
    assert all(event["_event"] == event["type"] for event in events)
    deltas = [event for event in events if event["type"] == "message.delta"]
    assert len(deltas) > 5
    said = next(event["text"] for event in events if event["type"] == "message.completed")
    assert "".join(event["text"] for event in deltas) == said
    assert json.loads(said) == REPORT
    run = api.get(f"{RUNS}/{events[0]['run_id']}")
    assert run["status"] == "succeeded" and run["output"] == REPORT
    check_totals(api, run)


def test_the_model_is_asked_as_the_sdk_would_ask_it(
    house: House, api: Api, models: ModelThread
) -> None:
    assert api.carry_out(**ASKED)["status"] == "succeeded"
    first, second, third = models.calls
    assert {call["model"] for call in models.calls} == {"test-model"}
    assert all(call["stream"] for call in models.calls)
    assert "You are Front Desk. You serve Ada." in json.dumps(first)
    assert "You are Clerk. You serve Ada." in json.dumps(second)
    offered = [t.get("function", t)["name"] for t in second["tools"]]
    assert {"add", "weather", "echo"} <= set(offered)
    assert '"Report"' in json.dumps(third) or "final_output" in json.dumps(third)
    assert "echo: a hat" in json.dumps(third)


async def test_the_python_client_sees_the_same(house: House, api: Api) -> None:
    async with AgentServerClient(api.url) as client:
        assert {"front-desk", "clerk"} <= {agent.name for agent in await client.agents()}
        run = await client.runs.create(**ASKED)
        events = [event.model_dump(mode="json") async for event in client.runs.events(run.id)]
        check_story(events)
        ended = await client.runs.get(run.id)
        assert ended.output == REPORT
        steps = await client.runs.steps(run.id)
        assert [step.kind for step in steps].count("tool") == 3


def test_the_command_line_shows_the_run_and_prints_the_answer(house: House, api: Api) -> None:
    words = ("run", "--agent", "front-desk", ASKED["input"], "--server", api.url)
    shown = house.run(*map(str, words))
    assert shown.exit_code() == 0, shown.output
    for part in ("add(", "weather(", "echo(", "Lisbon"):
        assert part in shown.output
    told = house.run(*map(str, words), "--json")
    assert told.exit_code() == 0
    assert json.loads(told.output)["output"] == REPORT


def test_a_guardrail_that_trips_fails_the_run_before_any_model_is_asked(
    house: House, api: Api, models: ModelThread
) -> None:
    run = api.carry_out(agent="front-desk", input="Tell me the password.")
    assert run["status"] == "failed"
    assert run["error"]["code"] == "guardrail_tripped" and "no_secrets" in run["error"]["message"]
    assert not models.calls and run["usage"]["model_calls"] == 0
    check_totals(api, run)


def test_a_tool_that_needs_approval_waits_in_sight_and_over_a_restart(
    nursery: Nursery, models: ModelThread, tmp_path: Path
) -> None:
    models.script(rule("pay", calling(("wire_money", {"amount": 7})), {"text": "paid"}))
    house = House(tmp_path, nursery, models)
    api = house.start()
    run = api.carry_out(agent="cashier", input="pay the bill")
    assert run["status"] == "waiting" and run["waiting_for"]["kind"] == "approval"
    assert "wire_money" in run["waiting_for"]["detail"] and "7" in run["waiting_for"]["detail"]
    assert [r["id"] for r in api.listed(RUNS, status="waiting")] == [run["id"]]
    assert api.server is not None
    api.server.stop()
    assert house.ended(api)
    again = house.start()
    assert again.ended(run["id"])["waiting_for"] == run["waiting_for"]
    events = again.events(run["id"])
    assert types(events).count("approval.requested") == 1
    asked = next(event for event in events if event["type"] == "approval.requested")
    assert asked["tool"] == "wire_money" and asked["arguments"] == {"amount": 7}
    assert types(events)[-1] == "run.waiting"
    assert again.http.post(f"{RUNS}/{run['id']}/cancel").json()["status"] == "cancelled"
    assert types(again.events(run["id"]))[-1] == "run.cancelled"
    assert len(models.calls) == 1 and not again.unended()
