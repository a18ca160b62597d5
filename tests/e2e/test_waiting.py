"""Runs that stand still: for a person, for a moment, for their session, for a terminal that left."""

import json
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone

import pytest

from tests.durability.world import task
from tests.support.model_thread import ModelThread, calling, rule
from tests.support.server_process import Nursery

from .kit import RUNS, Api, House, check_totals, moment, problem, types


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery, models: ModelThread) -> House:
    return House(tmp_path_factory.mktemp("waiting"), nursery, models)


@pytest.fixture(scope="module")
def api(house: House) -> Iterator[Api]:
    api = house.start()
    yield api
    api.http.close()


def test_a_task_of_a_goal_that_needs_approval_stops_only_what_needs_it_and_outlives_a_restart(
    nursery: Nursery, models: ModelThread, tmp_path_factory: pytest.TempPathFactory
) -> None:
    plan = {
        "tasks": [
            {**task("a", "alpha"), "agent": "cashier"},
            {**task("b", "beta"), "agent": "talker"},
            {**task("c", "gamma", ["a"]), "agent": "talker"},
            {**task("d", "delta", ["b"]), "agent": "talker"},
        ],
        "actions": [],
    }
    models.script(
        rule(r"\Aalpha", calling(("wire_money", {"amount": 3}))),
        rule(r"\Adelta", {"text": "delta done"}),
        rule(r"\Abeta", {"text": "beta done"}),
        rule("go", {"text": json.dumps(plan)}),
    )
    house = House(tmp_path_factory.mktemp("goal"), nursery, models)
    api = house.start()
    run_id = api.submit(goal="go")
    models.wait(lambda server: len(server.raw_calls) == 4)
    run = api.ended(run_id)
    assert run["status"] == "waiting" and run["waiting_for"]["kind"] == "approval"

    def statuses(of: Api) -> dict[str, str]:
        return {t["id"]: t["status"] for t in of.get(f"{RUNS}/{run_id}/plan")["tasks"]}

    for _ in range(50):
        if statuses(api)["d"] == "succeeded":
            break
        assert api.get(f"{RUNS}/{run_id}", wait=0.2)["status"] == "waiting"
    standing = {"a": "waiting", "b": "succeeded", "c": "pending", "d": "succeeded"}
    assert statuses(api) == standing
    (waiting,) = [t for t in api.listed(f"{RUNS}/{run_id}/tasks") if t["status"] == "waiting"]
    assert run["waiting_for"]["task_id"] == waiting["id"]
    assert api.server is not None
    api.server.stop()
    assert house.ended(api)

    again = house.start()
    # A run that comes later is through: whatever the start took up again has been taken up.
    assert again.carry_out(agent="talker", input="hello")["status"] == "succeeded"
    after = again.get(f"{RUNS}/{run_id}", wait=1)
    assert (after["status"], after["waiting_for"]) == ("waiting", run["waiting_for"])
    assert statuses(again) == standing
    events = again.events(run_id)
    assert types(events).count("approval.requested") == 1
    assert types(events).count("task.completed") == 2
    cancelled = again.http.post(f"{RUNS}/{run_id}/cancel").json()
    assert cancelled["status"] == "cancelled" and cancelled["waiting_for"] is None
    assert statuses(again)["a"] == "cancelled"
    check_totals(again, cancelled)
    assert len(models.calls) == 5


def test_a_run_for_later_is_not_begun_before_its_moment(api: Api, models: ModelThread) -> None:
    models.script()
    later = datetime.now(timezone.utc) + timedelta(seconds=0.5)
    run = api.carry_out(agent="talker", input="hello", start_after=later.isoformat())
    assert run["status"] == "succeeded"
    assert moment(run["started_at"]) >= later
    never = api.submit(agent="talker", input="hello", start_after="2999-01-01T00:00:00Z")
    assert api.get(f"{RUNS}/{never}")["status"] == "queued"
    place, key = f"{RUNS}/{never}/signals/go", {"Idempotency-Key": "sig"}
    first, again = (api.http.post(place, json={"n": 1}, headers=key) for _ in range(2))
    assert (first.status_code, again.status_code) == (202, 202) and first.json() == again.json()
    assert again.headers["idempotency-replayed"] == "true"
    assert "idempotency-replayed" not in first.headers
    problem(api.http.post(place, json={"n": 2}, headers=key), 422, "idempotency_mismatch")
    assert api.http.post(place, headers={"Idempotency-Key": "empty"}).status_code == 202
    assert api.http.post(f"{RUNS}/{never}/cancel").json()["status"] == "cancelled"


def test_the_turns_of_a_session_go_on_when_one_of_them_is_cancelled(
    api: Api, models: ModelThread
) -> None:
    models.script(rule("slow", {"text": "s", "latency_s": 60}))
    slow, queued, last = (
        api.submit(agent="talker", input=said, session_id="s") for said in ("slow", "no", "yes")
    )
    models.wait(lambda server: server.unanswered == 1)
    assert api.get(f"{RUNS}/{queued}")["status"] == "queued"
    assert api.http.post(f"{RUNS}/{queued}/cancel").json()["status"] == "cancelled"
    assert api.http.post(f"{RUNS}/{slow}/cancel").json()["status"] == "cancelled"
    assert api.ended(last)["status"] == "succeeded"
    # Neither of the cancelled turns has become a part of the conversation.
    assert "slow" not in json.dumps(models.calls[-1]) and len(models.calls) == 2


def test_many_equal_requests_at_once_are_one_run(api: Api, models: ModelThread) -> None:
    models.script()

    def ask(number: int) -> tuple[int, str]:
        key = {"Idempotency-Key": "one"}
        answer = api.http.post(RUNS, json={"agent": "talker", "input": "hi"}, headers=key)
        return answer.status_code, answer.json()["id"]

    with ThreadPoolExecutor(20) as pool:
        answers = set(pool.map(ask, range(100)))
    assert len(answers) == 1
    ((status, run_id),) = answers
    assert status == 202 and api.ended(run_id)["status"] == "succeeded"
    assert len(models.calls) == 1


def test_leaving_the_terminal_loses_nothing_and_says_how_to_come_back(
    house: House, models: ModelThread
) -> None:
    models.script(rule("hello", calling(("add", {"a": 1, "b": 2})), {"latency_s": 60, "text": "x"}))
    own = {"AGENT_SERVER_DATA_DIR": str(house.folder / "own")}
    watched = house.run("run", "--agent", "talker", "hello", log="left.log", **own)
    models.wait(lambda server: server.unanswered == 1 and len(server.raw_calls) == 2)
    watched.signal(signal.SIGINT)
    assert watched.exit_code() == 130
    assert "Traceback" not in watched.output
    command = re.search(r"agent-server (runs follow run_\w+)", watched.output)
    assert command, watched.output
    models.script(rule("hello", calling(("add", {"a": 1, "b": 2})), {"text": "here again"}))
    back = house.run(*command.group(1).split(), "--quiet", log="back.log", **own)
    assert back.exit_code() == 0
    assert back.output.strip() == "here again" and len(models.calls) == 1
