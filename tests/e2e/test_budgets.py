"""Ceilings and cancellation over the whole tree of a goal's run, on one real server."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.durability.world import task
from tests.support.model_thread import ModelThread, calling, rule
from tests.support.server_process import Nursery

from .kit import RUNS, Api, House, check_totals, problem, types

Json = dict[str, Any]
PLAN = {
    "tasks": [
        {**task("a", "alpha"), "agent": "talker"},
        {**task("b", "beta"), "agent": "talker"},
        {**task("c", "gamma", ["a", "b"]), "agent": "talker"},
    ],
    "actions": [],
}


LIMITS = """
[limits.keys.anonymous]
default = {max_tool_calls = 400}
maximum = {max_tool_calls = 500}
[prices.priced]
input_per_mtok = 1000
output_per_mtok = 1000
"""


def work(**slow: float) -> list[Json]:
    """A goal of six model calls and four tool calls; ``slow`` is how its tasks first answer."""
    adding = calling(("add", {"a": 1, "b": 2}), ("add", {"a": 3, "b": 4}), **slow)
    return [
        rule(r"\Aalpha", adding, {"text": "alpha done"}),
        rule(r"\Abeta", adding, {"text": "beta done"}),
        rule(r"\Agamma", {"text": "gamma done"}),
        rule("work it off", {"text": json.dumps(PLAN)}),
    ]


@pytest.fixture(scope="module")
def api(
    tmp_path_factory: pytest.TempPathFactory, nursery: Nursery, models: ModelThread
) -> Iterator[Api]:
    house = House(tmp_path_factory.mktemp("budgets"), nursery, models)
    (house.folder / "agent-server.toml").write_text(LIMITS)
    api = house.start()
    yield api
    api.http.close()


def test_the_most_of_a_key_and_a_model_without_a_price_are_refused_by_name(
    api: Api, models: ModelThread
) -> None:
    body = {"agent": "talker", "input": "x"}
    said = problem(api.post({**body, "budget": {"max_tool_calls": 501}}), 422, "budget_refused")
    assert "500" in said["detail"] and "[limits.keys.anonymous]" in said["hint"]
    assert said["errors"] == [{"path": "/budget/max_tool_calls", "message": "at most 500"}]
    said = problem(api.post({**body, "budget": {"max_cost_usd": 1}}), 422, "budget_refused")
    assert "test-model" in said["detail"] and "[prices]" in said["hint"]
    models.script(default={"text": "ok"})
    priced = {**body, "model": "priced", "budget": {"max_cost_usd": 1}}
    run = api.carry_out(**priced)
    assert run["budget"]["max_tool_calls"] == 400 and float(run["usage"]["cost_usd"]) > 0, run


def exceeded(api: Api, limit: str, **budget: Any) -> Json:
    run = api.carry_out(goal="work it off", budget=budget)
    assert run["status"] == "budget_exceeded", run
    assert run["error"]["code"] == "budget_exceeded"
    assert limit.removesuffix("_s") in run["error"]["message"] and limit in run["error"]["hint"]
    events = api.events(run["id"])
    assert types(events)[-1] == "run.budget_exceeded"
    assert run["id"] not in {one["id"] for one in api.unended()}
    tasks = api.listed(f"{RUNS}/{run['id']}/tasks")
    assert not {"running", "queued", "waiting"} & {one["status"] for one in tasks}
    return run


@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_never_more_model_calls_than_the_budget_allows(
    api: Api, models: ModelThread, limit: int
) -> None:
    models.script(*work())
    run = exceeded(api, "max_model_calls", max_model_calls=limit)
    assert run["usage"]["model_calls"] <= limit and len(models.calls) <= limit
    check_totals(api, run)


@pytest.mark.parametrize("limit", [1, 3])
def test_never_more_tool_calls_than_the_budget_allows(
    api: Api, models: ModelThread, limit: int
) -> None:
    models.script(*work())
    run = exceeded(api, "max_tool_calls", max_tool_calls=limit)
    assert run["usage"]["tool_calls"] <= limit
    done = [s for s in api.steps(run["id"]) if s["kind"] == "tool"]
    assert len(done) <= limit
    check_totals(api, run)


def test_tokens_are_a_ceiling_too(api: Api, models: ModelThread) -> None:
    models.script(*work())
    run = exceeded(api, "max_tokens", max_tokens=15)
    assert run["usage"]["model_calls"] < 6
    check_totals(api, run)


def test_the_deadline_stops_a_goal_whose_model_is_slow(api: Api, models: ModelThread) -> None:
    models.script(*work(latency_s=20))
    run = exceeded(api, "deadline_s", deadline_s=0.7)
    assert run["usage"]["model_calls"] <= 3
    models.wait(lambda server: server.unanswered == 0)


def test_a_budget_that_suffices_ends_the_run_well(api: Api, models: ModelThread) -> None:
    models.script(*work())
    run = api.carry_out(goal="work it off", budget={"max_model_calls": 6, "max_tool_calls": 4})
    assert (run["status"], run["output"]) == ("succeeded", "gamma done")
    assert (run["usage"]["model_calls"], run["usage"]["tool_calls"]) == (6, 4)
    check_totals(api, run)


def test_a_run_that_is_not_stored_keeps_to_its_budget_too(api: Api, models: ModelThread) -> None:
    models.script(rule("sum", calling(("add", {"a": 1, "b": 2}), ("add", {"a": 3, "b": 4}))))
    asked = {"agent": "talker", "input": "the sum", "store": False}
    for what in ("tool_calls", "model_calls"):
        run = api.post({**asked, "budget": {f"max_{what}": 1}}, wait=20).json()
        assert run["status"] == "budget_exceeded"
        assert f"max_{what}" in run["error"]["message"]
        assert run["usage"][what] <= 1


def test_cancelling_a_goal_in_slow_model_calls_stops_at_once_and_hangs_up(
    api: Api, models: ModelThread
) -> None:
    models.script(*work(latency_s=60))
    run_id = api.submit(goal="work it off")
    models.wait(lambda server: server.unanswered == 2)
    answer = api.http.post(f"{RUNS}/{run_id}/cancel", json={"reason": "enough"}).json()
    assert answer["status"] == "cancelled"
    models.wait(lambda server: server.unanswered == 0)
    events = api.events(run_id)
    assert types(events)[-1] == "run.cancelled" and events[-1]["reason"] == "enough"
    tasks = api.listed(f"{RUNS}/{run_id}/tasks")
    assert {one["status"] for one in tasks} == {"cancelled"}
    assert not api.unended()
    again = api.http.post(f"{RUNS}/{run_id}/cancel")
    assert again.status_code == 409 and again.json()["code"] == "run_ended"
