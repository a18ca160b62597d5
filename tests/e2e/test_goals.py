"""Goals, sessions and runs that leave no trace, over HTTP on one real server."""

import json
import sqlite3
from collections.abc import Iterator

import pytest

from tests.durability.world import task
from tests.support.model_thread import ModelThread, calling, rule
from tests.support.server_process import Nursery

from .kit import RUNS, Api, House, check_totals, parse_sse, problem, types

GOAL = "Compare SQLite, PostgreSQL or Redis for chat history and recommend one"


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery, models: ModelThread) -> House:
    return House(tmp_path_factory.mktemp("goals"), nursery, models)


@pytest.fixture(scope="module")
def api(house: House) -> Iterator[Api]:
    api = house.start()
    yield api
    api.http.close()


def test_a_goal_is_planned_worked_off_side_by_side_and_answered_by_the_demo_model(
    api: Api,
) -> None:
    run = api.carry_out(goal=GOAL, model="demo")
    assert run["status"] == "succeeded" and "[demo model]" in run["output"]
    check_totals(api, run)
    place = f"{RUNS}/{run['id']}"
    plan, tasks = api.get(f"{place}/plan"), api.listed(f"{place}/tasks")
    assert len(plan["tasks"]) >= 3
    nodes = {one["node"]: one for one in tasks}
    assert {one["id"] for one in plan["tasks"]} <= set(nodes)
    for planned in plan["tasks"]:
        assert planned["status"] == nodes[planned["id"]]["status"] == "succeeded"
        assert planned["output"] == nodes[planned["id"]]["output"]
    free = [one["id"] for one in plan["tasks"] if not one["depends_on"]]
    assert len(free) >= 2, "nothing could run side by side"
    events = api.events(run["id"])
    started = {e["node"]: e["at"] for e in events if e["type"] == "task.started"}
    completed = {e["node"]: e["at"] for e in events if e["type"] == "task.completed"}
    assert set(started) == set(completed) == set(nodes)
    assert max(started[name] for name in free) < min(completed[name] for name in free)
    for planned in plan["tasks"]:
        for before in planned["depends_on"]:
            assert completed[before] < started[planned["id"]]
    steps = api.steps(run["id"])
    assert any(step["kind"] == "tool" and step["status"] == "done" for step in steps)
    assert types(events)[-1] == "run.succeeded" and events[-1]["output"] == run["output"]
    assert types(events).count("plan.created") == 1


def test_tasks_and_steps_come_in_pages_without_a_gap_or_a_repeat(api: Api) -> None:
    run = api.carry_out(goal=GOAL, model="demo")
    for what in ("tasks", "steps", "events"):
        place, pages, cursor = f"{RUNS}/{run['id']}/{what}", [], None
        while True:
            more = {} if cursor is None else {"cursor": cursor}
            page = api.get(place, limit=2, **more)
            pages += page["data"]
            assert len(page["data"]) <= 2
            if (cursor := page["next_cursor"]) is None:
                break
        assert pages == api.listed(place) and len(pages) > 2


def test_a_plan_of_the_users_agents_hands_each_result_to_those_that_need_it(
    api: Api, models: ModelThread
) -> None:
    tasks = [task("a", "alpha"), task("b", "beta"), task("c", "gamma", ["a", "b"])]
    plan = {"tasks": [{**one, "agent": "talker"} for one in tasks], "actions": []}
    models.script(
        rule(r"\Aalpha", calling(("add", {"a": 1, "b": 2})), {"text": "alpha is 3"}),
        rule(r"\Abeta", {"text": "beta is 4"}),
        rule(r"\Agamma.*alpha is 3.*beta is 4", {"text": "gamma is 7"}),
        rule("find gamma", {"text": json.dumps(plan)}),
    )
    run = api.carry_out(goal="find gamma")
    assert (run["status"], run["output"]) == ("succeeded", "gamma is 7"), run["error"]
    assert run["usage"] == {**run["usage"], "model_calls": 5, "tool_calls": 1}
    check_totals(api, run)


def test_three_turns_of_a_session_remember_the_earlier_ones(api: Api, models: ModelThread) -> None:
    models.script(
        rule("my name", {"text": "Hello Ada."}),
        rule("add", calling(("add", {"a": 2, "b": 2})), {"text": "It is 4."}),
        rule("who", {"text": "You are Ada."}),
    )
    for said in ("my name is Ada", "please add 2 and 2", "who am I"):
        run = api.carry_out(agent="talker", input=said, session_id="ada")
        assert run["status"] == "succeeded" and run["session_id"] == "ada"
    last = json.dumps(models.calls[-1])
    places = [last.index(said) for said in ("my name is Ada", "Hello Ada.", "It is 4.", "who am I")]
    assert places == sorted(places)
    assert last.count("my name is Ada") == 1
    models.script(rule("who", {"text": "Nobody."}))
    api.carry_out(agent="talker", input="who am I", session_id="other")
    assert "Ada" not in json.dumps(models.calls[-1])


def test_two_requests_on_one_session_at_once_go_one_after_the_other(
    api: Api, models: ModelThread
) -> None:
    models.script(rule("first", {"text": "one", "latency_s": 0.3}), rule("second", {"text": "two"}))
    first = api.submit(agent="talker", input="first", session_id="lane")
    second = api.submit(agent="talker", input="second", session_id="lane")
    assert api.ended(second)["output"] == "two" and api.ended(first)["output"] == "one"
    runs = [api.get(f"{RUNS}/{run_id}") for run_id in (first, second)]
    assert runs[0]["ended_at"] <= runs[1]["started_at"]
    said = json.dumps(models.calls[-1])
    assert said.index("first") < said.index("one") < said.index("second")


def test_a_run_that_is_not_stored_leaves_no_row(
    api: Api, house: House, models: ModelThread
) -> None:
    models.script(
        rule("sum", calling(("add", {"a": 2, "b": 3})), {"text": "It is 5."}),
        rule("boom", {"status": 401, "error": {"message": "bad key"}}),
    )
    before = rows(house)
    asked = {"agent": "talker", "input": "the sum", "store": False}
    answer = api.post(asked, wait=20)
    run = answer.json()
    assert (answer.status_code, run["status"], run["output"]) == (200, "succeeded", "It is 5.")
    assert run["usage"]["model_calls"] == 2 and run["usage"]["tool_calls"] == 1
    events = parse_sse(api.post({**asked, "stream": True}).text)
    assert types(events)[:2] == ["run.created", "run.started"]
    assert types(events)[-1] == "run.succeeded" and events[-1]["output"] == "It is 5."
    assert "message.delta" in types(events)
    failed = api.post({**asked, "input": "boom"}, wait=20).json()
    assert failed["status"] == "failed" and failed["error"]["code"] == "model_unauthorized"
    problem(api.http.get(f"{RUNS}/{run['id']}"), 404, "not_found")
    assert rows(house) == before


def rows(house: House) -> dict[str, int]:
    """How many rows each table holds."""
    path = house.folder / "data" / "agent-server.db"
    tables = ("runs", "tasks", "steps", "events", "sessions", "session_items", "idempotency_keys")
    with sqlite3.connect(path) as connection:
        counted = {
            name: connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0]
            for name in tables
        }
    return counted
