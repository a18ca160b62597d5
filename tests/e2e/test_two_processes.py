"""One process that answers and others that work, on one PostgreSQL: a run is the same run."""

import asyncio
import json
from collections.abc import Iterator

import pytest

from tests.durability.world import task
from tests.support.model_thread import ModelThread, calling, rule
from tests.support.postgres import PostgresServer
from tests.support.server_process import Nursery

from .kit import RUNS, Api, House, check_totals, curl, parse_sse, types

PLAN = {
    "tasks": [
        {**task("a", "alpha"), "agent": "talker"},
        {**task("b", "beta"), "agent": "talker"},
        {**task("c", "gamma", ["a", "b"]), "agent": "talker"},
    ],
    "actions": [],
}
WORK = [
    rule(r"\Aalpha", calling(("add", {"a": 1, "b": 2})), {"text": "alpha done"}),
    rule(r"\Abeta", calling(("add", {"a": 3, "b": 4})), {"text": "beta done"}),
    rule(r"\Agamma", {"text": "gamma done"}),
    rule("work it off", {"text": json.dumps(PLAN)}),
]


@pytest.fixture(scope="module")
def house(
    tmp_path_factory: pytest.TempPathFactory,
    nursery: Nursery,
    models: ModelThread,
    postgres_server: PostgresServer,
) -> Iterator[House]:
    url = postgres_server.fresh_database()
    env = {"AGENT_SERVER_DATABASE_URL": url, "AGENT_SERVER_LEASE_S": "2"}
    yield House(tmp_path_factory.mktemp("two"), nursery, models, **env)


@pytest.fixture(scope="module")
def api(house: House) -> Iterator[Api]:
    """Answers calls and carries nothing out."""
    api = house.start(AGENT_SERVER_ROLE="api")
    yield api
    api.http.close()


@pytest.fixture(scope="module")
def worker(house: House, api: Api) -> Api:
    return house.start(AGENT_SERVER_ROLE="worker")


def test_a_run_waits_where_nobody_works(api: Api) -> None:
    run_id = api.submit(agent="talker", input="hello")
    assert api.get(f"{RUNS}/{run_id}")["status"] == "queued"
    answer = api.http.post(f"{RUNS}/{run_id}/cancel").json()
    assert answer["status"] == "cancelled"
    assert types(api.events(run_id)) == ["run.created", "run.cancelled"]


def test_a_message_into_a_run_outlives_the_worker_that_took_it(
    house: House, api: Api, models: ModelThread
) -> None:
    # Before there is a worker of the module: the one that is killed here is the only one.
    models.script(rule("first", {"latency_s": 0.5, "text": "one"}), rule("more", {"latency_s": 60}))
    worker = house.start(AGENT_SERVER_ROLE="worker")
    run_id = api.submit(agent="talker", input="first", session_id="steered")
    models.wait(lambda server: server.unanswered == 1)
    body = {"agent": "talker", "input": "more", "session_id": "steered", "on_busy": "steer"}
    for replayed in (None, "true"):
        answer = api.http.post(RUNS, json=body, headers={"Idempotency-Key": "more"})
        assert (answer.status_code, answer.json()["id"]) == (202, run_id)
        assert answer.headers["run-steered"] == "true"
        assert answer.headers.get("idempotency-replayed") == replayed
    models.wait(lambda server: len(server.raw_calls) == 2)  # it was taken
    assert worker.server is not None
    asyncio.run(worker.server.kill())
    models.script(rule("more", {"text": "two"}), rule("still", {"text": "three"}))
    other = house.start(AGENT_SERVER_ROLE="worker")
    with api.http.stream("POST", RUNS, json={**body, "input": "still", "stream": True}) as answer:
        heard = parse_sse("".join(answer.iter_text()))
    assert {event["run_id"] for event in heard} == {run_id} and heard[0]["_id"] > 1
    run = api.ended(run_id)
    assert (run["status"], run["output"]) == ("succeeded", "three"), run["error"]
    check_totals(api, run)
    told = [item["item"] for item in api.listed("/api/v1/sessions/steered/items")]
    assert [i["content"] for i in told if i["role"] == "user"] == ["first", "more", "still"]
    assert types(api.events(run_id)).count("run.steered") == 2
    assert other.server is not None
    other.server.stop()
    assert house.ended(other, 10)


def test_a_goal_is_streamed_by_one_process_while_another_carries_it_out(
    api: Api, worker: Api, models: ModelThread
) -> None:
    models.script(*WORK)
    body = json.dumps({"goal": "work it off", "stream": True})
    heard = parse_sse(curl("-H", "content-type: application/json", "-d", body, f"{api.url}{RUNS}"))
    facts = [event for event in heard if event["_id"] is not None]
    run = api.ended(heard[0]["run_id"])
    assert (run["status"], run["output"]) == ("succeeded", "gamma done")
    assert [e["type"] for e in facts] == types(api.events(run["id"]))
    assert worker.get(f"{RUNS}/{run['id']}") == run
    check_totals(api, run)


def test_cancelling_at_one_process_stops_the_model_call_of_another(
    api: Api, worker: Api, models: ModelThread
) -> None:
    models.script(default={"text": "late", "latency_s": 60})
    run_id = api.submit(agent="talker", input="hello")
    models.wait(lambda server: server.unanswered == 1)
    answer = api.http.post(f"{RUNS}/{run_id}/cancel", json={"reason": "enough"}).json()
    assert answer["status"] == "cancelled", answer
    models.wait(lambda server: server.unanswered == 0)
    assert types(api.events(run_id))[-1] == "run.cancelled"


def test_turns_of_a_session_keep_their_order_across_processes(
    api: Api, worker: Api, models: ModelThread
) -> None:
    models.script(rule("first", {"text": "one", "latency_s": 0.3}), rule("second", {"text": "two"}))
    runs = [
        where.submit(agent="talker", input=said, session_id="lane")
        for where, said in ((api, "first"), (worker, "second"))
    ]
    assert [api.ended(run_id)["output"] for run_id in runs] == ["one", "two"]
    said = json.dumps(models.calls[-1])
    assert said.index("first") < said.index("one") < said.index("second")


def test_an_orderly_stop_of_a_worker_hands_its_run_to_the_next(
    house: House, api: Api, worker: Api, models: ModelThread
) -> None:
    models.script(rule("hello", calling(("add", {"a": 1, "b": 2})), {"latency_s": 60, "text": "x"}))
    run_id = api.submit(agent="talker", input="hello")
    models.wait(lambda server: len(server.raw_calls) == 2)
    assert worker.server is not None
    worker.server.stop()
    assert house.ended(worker, 10)
    models.script(rule("hello", calling(("add", {"a": 1, "b": 2})), {"text": "done"}))
    other = house.start(AGENT_SERVER_ROLE="worker")
    run = api.ended(run_id)
    assert (run["status"], run["output"]) == ("succeeded", "done"), run["error"]
    assert len(models.calls) == 1 and run["usage"]["tool_calls"] == 1
    check_totals(other, run)
    assert not api.unended()
