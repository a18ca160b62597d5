"""Over HTTP: a plan that a person reviews, runs that are paused, sessions that are busy."""

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.durability.world import task
from tests.support.model_thread import ModelThread, calling, rule
from tests.support.server_process import Nursery

from .kit import RUNS, Api, House, Json, check_totals, problem, types

PLAN = {"tasks": [{**task("a", "alpha"), "agent": "talker"}], "actions": []}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery, models: ModelThread) -> House:
    return House(tmp_path_factory.mktemp("steering"), nursery, models)


@pytest.fixture(scope="module")
def api(house: House) -> Iterator[Api]:
    api = house.start()
    yield api
    api.http.close()


def held_back(models: ModelThread, api: Api, **body: object) -> Json:
    """A run of the talker whose model does not answer yet."""
    before = len(models.server.raw_calls)
    run_id = api.submit(agent="talker", input="hold", **body)
    models.wait(lambda server: len(server.raw_calls) > before)
    found: Json = api.get(f"{RUNS}/{run_id}")
    return found


def test_a_plan_is_reviewed_edited_and_carried_out_as_edited_over_a_restart(
    house: House, models: ModelThread
) -> None:
    models.script(
        rule("go", {"text": json.dumps(PLAN)}),
        rule(r"\Aalpha", {"text": "alpha done"}),
        rule(r"\Abeta", {"text": "beta done"}),
    )
    api = house.start(AGENT_SERVER_DATA_DIR=str(house.folder / "review"))
    run_id = api.submit(goal="go", review="plan")
    run = api.ended(run_id)
    assert (run["status"], run["waiting_for"]["kind"]) == ("waiting", "review")
    place = f"{RUNS}/{run_id}/plan"
    first = api.http.get(place)
    assert first.headers["etag"] == '"1"'
    wanted = {"tasks": [*PLAN["tasks"], {"id": "b", "description": "beta", "agent": "talker"}]}
    wrong = {"tasks": [{"id": "b", "description": "beta", "agent": "talkr"}]}
    refused = problem(api.http.put(place, json=wrong), 422, "invalid_request")
    assert "talker" in json.dumps(refused["errors"])
    tags = {"If-Match": '"7"'}
    problem(api.http.put(place, json=wanted, headers=tags), 412, "precondition_failed")
    answer = api.http.put(place, json=wanted, headers={"If-Match": '"1"'})
    assert answer.status_code == 200 and answer.headers["etag"] == '"2"'
    assert (answer.json()["added"], answer.json()["removed"]) == (["b"], [])
    assert api.server is not None
    asyncio.run(api.server.kill())
    api = house.start(AGENT_SERVER_DATA_DIR=str(house.folder / "review"))
    assert api.get(f"{RUNS}/{run_id}")["status"] == "waiting"
    assert [one["id"] for one in api.get(place)["tasks"]] == ["a", "b"]
    assert api.http.post(f"{RUNS}/{run_id}/resume").status_code == 200
    ended = api.http.get(f"{RUNS}/{run_id}", params={"wait": 20}).json()
    assert ended["status"] == "succeeded", ended
    check_totals(api, ended)
    events = api.events(run_id)
    assert types(events).count("plan.revised") == 1
    assert {e["node"] for e in events if e["type"] == "task.completed"} >= {"a", "b"}
    problem(api.http.put(place, json=wanted), 409, "run_ended")


def test_a_review_needs_a_goal_and_only_a_reviewed_plan_is_edited(
    api: Api, models: ModelThread
) -> None:
    answer = api.post({"agent": "talker", "input": "x", "review": "plan"})
    assert "goal" in problem(answer, 422, "invalid_request")["detail"]
    models.script(rule("hold", {"latency_s": 60, "text": "done"}))
    run = held_back(models, api)
    body = {"tasks": [{"id": "b", "description": "beta"}]}
    problem(api.http.put(f"{RUNS}/{run['id']}/plan", json=body), 409, "conflict")
    problem(api.http.post(f"{RUNS}/{run['id']}/resume"), 409, "conflict")
    assert api.http.post(f"{RUNS}/{run['id']}/pause").json()["status"] == "waiting"
    assert api.http.post(f"{RUNS}/{run['id']}/resume").status_code == 200
    many = api.http.post(f"{RUNS}/cancel", json={"agent": "talker"}).json()
    assert [one["id"] for one in many["data"]] == [run["id"]]
    problem(api.http.post(f"{RUNS}/cancel", json={}), 422, "invalid_request")
    problem(api.http.post(f"{RUNS}/{run['id']}/pause"), 409, "run_ended")
    problem(api.http.post(f"{RUNS}/{run['id']}/tasks/task_x/cancel"), 404, "not_found")


def test_a_busy_session_queues_refuses_or_interrupts_as_the_request_says(
    api: Api, models: ModelThread
) -> None:
    models.script(
        rule("hold", {"latency_s": 60, "text": "late"}), rule("next", {"text": "the next one"})
    )
    first = held_back(models, api, session_id="s")
    waits = api.submit(agent="talker", input="next", session_id="s")
    assert api.get(f"{RUNS}/{waits}")["status"] == "queued"
    body = {"agent": "talker", "input": "next", "session_id": "s"}
    with ThreadPoolExecutor(2) as pool:
        for answer in pool.map(lambda _: api.post({**body, "on_busy": "reject"}), range(2)):
            problem(answer, 409, "session_busy")
    problem(
        api.post({"agent": "talker", "input": "x", "on_busy": "reject"}), 422, "invalid_request"
    )
    pushed = api.submit(**body, on_busy="interrupt")
    assert api.ended(pushed)["status"] == "succeeded"
    assert api.ended(first["id"])["status"] == api.ended(waits)["status"] == "cancelled"
    assert api.carry_out(**body, on_busy="reject")["output"] == "the next one"


def test_a_run_steered_from_the_command_line_tells_it_and_replays_as_it_went(
    house: House, api: Api, models: ModelThread
) -> None:
    models.script(
        rule(r"\Apay", calling(("wire_money", {"amount": 5}))),
        rule("euros", {"text": "paid in euros"}),
    )
    run = api.submit(agent="cashier", input="pay", session_id="till")
    assert api.ended(run)["waiting_for"]["kind"] == "approval"
    (asked,) = api.listed("/api/v1/approvals", run_id=run)
    server = ("--server", api.url)
    command = ("run", "--agent", "cashier", "in euros", "--session", "till", *server)
    refused = house.run(*command, "--on-busy", "reject")
    assert refused.exit_code() == 1 and "under way" in refused.output, refused.output
    wrong = house.run(*command, "--on-busy", "shout")
    assert wrong.exit_code() == 1 and "steer" in wrong.output, wrong.output
    said = house.run(*command, "--on-busy", "steer")
    assert said.exit_code() == 3 and run in said.output, said.output
    yes = {"decision": "approve"}
    assert api.http.post(f"/api/v1/approvals/{asked['id']}", json=yes).status_code == 200
    told = house.run("runs", "follow", run, *server)
    assert told.exit_code() == 0, told.output
    assert "anonymous said into the run: in euros" in told.output
    assert "paid in euros" in told.output and len(models.calls) == 2
    assert types(api.events(run)).count("run.steered") == 1

    export = api.get(f"{RUNS}/{run}/export")
    for changed, code in ((False, 0), (True, 1)):
        text = json.dumps(export)
        file = house.folder / f"steered-{code}.json"
        if changed:
            for step in export["steps"]:
                if step["kind"] == "value" and "in euros" in json.dumps(step["output"]):
                    step["output"] = json.loads(json.dumps(step["output"]).replace("eur", "p"))
            assert json.dumps(export) != text
        file.write_text(json.dumps(export))
        offline = {"OPENAI_BASE_URL": "http://127.0.0.1:1/v1"}
        again = house.run("replay", str(file), **offline)
        assert again.exit_code() == code, again.output
    assert len(models.calls) == 2
