"""Retry, fork, compare and export of the runs of one real server."""

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


@pytest.fixture(scope="module")
def api(
    tmp_path_factory: pytest.TempPathFactory, nursery: Nursery, models: ModelThread
) -> Iterator[Api]:
    # What other runs taught would be told to the models, and make equal runs differ.
    forgetful = {"AGENT_SERVER_MEMORY_EXPERIENCE": "false"}
    api = House(tmp_path_factory.mktemp("history"), nursery, models, **forgetful).start()
    yield api
    api.http.close()


def goal_rules(gamma: Json) -> list[Json]:
    return [
        rule(r"\Aalpha", calling(("add", {"a": 1, "b": 2})), {"text": "alpha done"}),
        rule(r"\Abeta", {"text": "beta done"}),
        rule(r"\Agamma", gamma),
        rule("work it off", {"text": json.dumps(PLAN)}),
    ]


def made(api: Api, run_id: str, what: str, body: Json | None = None) -> Json:
    answer = api.http.post(f"{RUNS}/{run_id}/{what}", json=body or {})
    assert answer.status_code == 202, answer.text
    new: Json = answer.json()
    assert answer.headers["location"] == f"{RUNS}/{new['id']}" and new["forked_from"] == run_id
    return new


def test_a_failed_goal_is_retried_from_its_failed_task_alone(api: Api, models: ModelThread) -> None:
    models.script(*goal_rules({"status": 401, "error": {"message": "no key"}}))
    failed = api.carry_out(goal="work it off")
    assert failed["status"] == "failed", failed
    before = len(models.calls)
    models.script(*goal_rules({"text": "gamma done"}))
    new = made(api, failed["id"], "retry")
    run = api.ended(new["id"])
    assert (run["status"], run["output"]) == ("succeeded", "gamma done"), run["error"]
    assert len(models.calls) - before <= 1 or len(models.calls) == 1
    assert run["usage"]["model_calls"] == 1 and run["usage"]["tool_calls"] == 0
    assert {one["node"] for one in api.listed(f"{RUNS}/{run['id']}/tasks") if one["shared"]} == {
        "a",
        "b",
    }
    check_totals(api, run)
    events = types(api.events(run["id"]))
    assert events[0] == "run.created" and events.count("plan.created") == 1
    assert api.get(f"{RUNS}/{run['id']}/plan")["tasks"][0]["status"] == "succeeded"
    again = api.http.post(f"{RUNS}/{failed['id']}/retry")
    assert again.json()["id"] == run["id"] and again.headers["idempotency-replayed"] == "true"
    other = api.http.post(f"{RUNS}/{failed['id']}/retry", json={"budget": {"max_tokens": 9}})
    problem(other, 409, "conflict")
    problem(api.http.post(f"{RUNS}/{run['id']}/retry"), 409, "conflict")


def test_an_agent_whose_model_failed_goes_on_behind_its_tools(
    api: Api, models: ModelThread
) -> None:
    steps = [calling(("add", {"a": 1, "b": 2})), {"status": 401, "error": {"message": "no key"}}]
    models.script(rule("the sum", *steps))
    failed = api.carry_out(agent="talker", input="the sum", session_id="talk")
    assert failed["status"] == "failed"
    models.script(default={"text": "it is three"})
    run = api.ended(made(api, failed["id"], "retry")["id"])
    assert run["output"] == "it is three" and run["session_id"] == "talk"
    assert len(models.calls) == 1 and run["usage"]["model_calls"] == 1
    assert run["usage"]["tool_calls"] == 0
    check_totals(api, run)


def test_a_run_stopped_by_its_budget_goes_on_with_a_larger_one(
    api: Api, models: ModelThread
) -> None:
    models.script(*goal_rules({"text": "gamma done"}))
    stopped = api.carry_out(goal="work it off", budget={"max_model_calls": 3})
    assert stopped["status"] == "budget_exceeded" and stopped["output"]["partial"] is True
    models.script(*goal_rules({"text": "gamma done"}))
    new = made(api, stopped["id"], "retry", {"budget": {"max_model_calls": 30}})
    run = api.ended(new["id"])
    assert (run["status"], run["output"]) == ("succeeded", "gamma done"), run["error"]
    total = stopped["usage"]["model_calls"] + run["usage"]["model_calls"]
    assert total <= 6, "nothing that finished was done again"
    check_totals(api, run)


def test_a_fork_from_a_task_shares_what_came_before_and_says_what_may_happen_again(
    api: Api, models: ModelThread
) -> None:
    models.script(*goal_rules({"text": "gamma done"}))
    first = api.carry_out(goal="work it off")
    assert first["status"] == "succeeded"
    tasks = {one["node"]: one for one in api.listed(f"{RUNS}/{first['id']}/tasks")}
    models.script(rule("gamma ray", {"text": "another gamma"}), *goal_rules({"text": "gamma done"}))
    change = {"from": tasks["c"]["id"], "input": "gamma ray", "model": "other-model"}
    new = made(api, first["id"], "fork", change)
    assert (new["shared_tasks"], new["will_repeat"]) == (2, [])
    run = api.ended(new["id"])
    assert run["output"] == "another gamma" and len(models.calls) == 1
    assert models.calls[0]["model"] == "other-model"
    check_totals(api, run)
    models.script(*goal_rules({"text": "gamma done"}))
    new = made(api, first["id"], "fork", {"from": tasks["a"]["path"]})
    assert [(one["name"], one["arguments"]) for one in new["will_repeat"]] == [
        ("add", {"a": 1, "b": 2})
    ]
    run = api.ended(new["id"])
    assert run["output"] == "gamma done" and len(models.calls) in (3, 4)
    compared = api.get(f"{RUNS}/{first['id']}/compare", **{"with": run["id"]})
    assert compared["same"] and compared["steps_same"] == 6 and compared["a"]["steps"] == 6
    whole = api.ended(made(api, first["id"], "fork")["id"])
    assert whole["usage"]["model_calls"] == first["usage"]["model_calls"]


def test_a_fork_from_a_step_changes_the_arguments_of_the_call_or_what_follows(
    api: Api, models: ModelThread
) -> None:
    models.script(rule("the sum", calling(("add", {"a": 1, "b": 2})), {"text": "three"}))
    first = api.carry_out(agent="talker", input="the sum", session_id="branching")
    steps = api.steps(first["id"])
    tool = next(one for one in steps if one["kind"] == "tool")
    models.script(default={"text": "thirty"})
    run = api.ended(
        made(api, first["id"], "fork", {"from": tool["key"], "input": {"a": 10, "b": 20}})["id"]
    )
    assert run["output"] == "thirty" and len(models.calls) == 1
    (called,) = [one for one in api.steps(run["id"]) if one["kind"] == "tool"]
    assert called["input"] == {"a": 10, "b": 20} and "30" in str(called["output"])
    assert run["session_id"] != "branching", "the original's session is not written twice"
    items = api.listed(f"/api/v1/sessions/{run['session_id']}/items")
    assert len(items) == 4, "a branch begins as the session was before the run"
    check_totals(api, run)
    models.script(default={"text": "in verse"})
    last = [one for one in steps if one["kind"] == "model"][-1]["key"]
    run = api.ended(made(api, first["id"], "fork", {"from": last, "instructions": "Rhyme."})["id"])
    assert run["output"] == "in verse" and run["usage"]["tool_calls"] == 0
    assert "Rhyme." in json.dumps(models.calls[0])
    compared = api.get(f"{RUNS}/{first['id']}/compare", **{"with": run["id"]})
    assert not compared["same"] and "model/2" in compared["first_difference"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"from": "9.9"}, "no task and no step"),
        ({"from": "task_" + "0" * 32}, "no task and no step"),
        ({"from": "model/1", "approach": "react"}, "approach"),
        ({"input": 7}, "input"),
        ({"approach": "guesswork"}, "guesswork"),
        ({"budget": {"max_tokens": -1}}, "max_tokens"),
        ({"form": "model/1"}, "form"),
    ],
)
def test_a_fork_that_makes_no_sense_is_refused(
    api: Api, models: ModelThread, body: Json, says: str
) -> None:
    models.script(default={"text": "hi"})
    run = api.carry_out(agent="talker", input="hello")
    answer = api.http.post(f"{RUNS}/{run['id']}/fork", json=body)
    assert answer.status_code == 422 and says in answer.text
    problem(api.http.post(f"{RUNS}/run_{'0' * 32}/fork", json={}), 404, "not_found")


def test_an_export_is_the_whole_run_and_can_be_redacted(api: Api, models: ModelThread) -> None:
    models.script(rule("the sum", calling(("add", {"a": 1, "b": 2})), {"text": "a secret three"}))
    run = api.carry_out(agent="talker", input="the sum with sk-abcdefgh12345678")
    export = api.get(f"{RUNS}/{run['id']}/export")
    assert (export["format"], export["version"], export["run"]) == ("agent-server.run", 1, run)
    assert len(export["steps"]) == 3 and len(export["events"]) == len(api.events(run["id"]))
    secrets = json.dumps(api.get(f"{RUNS}/{run['id']}/export", redact="secrets"))
    assert "sk-abcdefgh" not in secrets and "a secret three" in secrets
    content = json.dumps(api.get(f"{RUNS}/{run['id']}/export", redact="content"))
    assert "secret" not in content and '"model_calls": 2' in content
    problem(api.http.get(f"{RUNS}/{run['id']}/export?redact=all"), 422, "invalid_request")


WORKFLOW = {
    "name": "chain",
    "nodes": [
        {"id": "one", "type": "tool", "tool": "add", "arguments": {"a": 1, "b": 2}},
        {"id": "ask", "type": "agent", "agent": "talker", "input": "say {{ nodes.one.output }}"},
        {
            "id": "each",
            "type": "map",
            "over": "[1, 2]",
            "as": "n",
            "nodes": [
                {
                    "id": "plus",
                    "type": "tool",
                    "tool": "add",
                    "arguments": {"a": "{{ n }}", "b": 10},
                }
            ],
        },
        {"id": "end", "type": "agent", "agent": "talker", "input": "end {{ nodes.each.output }}"},
    ],
}


def test_a_workflow_is_retried_and_forked_from_its_nodes(api: Api, models: ModelThread) -> None:
    no_key = {"status": 401, "error": {"message": "no key"}}
    models.script(rule("say", {"text": "said"}), rule("end", no_key))
    failed = api.carry_out(workflow=WORKFLOW)
    assert failed["status"] == "failed", failed
    models.script(rule("say", {"text": "said"}), rule("end", {"text": "the end"}))
    new = made(api, failed["id"], "retry")
    run = api.ended(new["id"])
    assert (run["status"], run["output"]) == ("succeeded", "the end"), run["error"]
    assert len(models.calls) == 1 and run["usage"]["tool_calls"] == 0 and not new["will_repeat"]
    check_totals(api, run)
    tasks = {one["path"]: one for one in api.listed(f"{RUNS}/{run['id']}/tasks")}
    inner = next(one for one in tasks.values() if one["node"] == "plus" and one["path"] == "3.2.1")
    new = made(api, run["id"], "fork", {"from": inner["id"], "input": {"a": 5, "b": 10}})
    models.script(rule("end", {"text": "another end"}))
    fork = api.ended(new["id"])
    assert (fork["status"], fork["output"]) == ("succeeded", "another end"), fork["error"]
    assert "end [11.0, 15.0]" in json.dumps(models.calls[0]), "the map goes on with the new result"
    check_totals(api, fork)
    answer = api.http.post(
        f"{RUNS}/{run['id']}/fork", json={"from": inner["path"], "model": "other"}
    )
    assert answer.status_code == 422 and "'model' cannot be changed" in answer.text
