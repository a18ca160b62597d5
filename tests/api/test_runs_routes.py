"""The routes of runs, over fakes: what is read, refused and answered."""

import asyncio

import pytest

from tests.api.harness import Server, settings
from tests.support.until import until

RUNS = "/api/v1/runs"
AGENT = {"agent": "clerk", "input": "hello"}


@pytest.fixture
def server() -> Server:
    return Server(settings())


async def test_a_run_is_accepted_with_its_place(server: Server) -> None:
    answer = await server.call("POST", RUNS, AGENT)
    assert answer.status == 202
    run = answer.json()
    assert answer.headers["location"] == f"{RUNS}/{run['id']}"
    assert run["status"] == "running"
    assert server.runs.principals == [("default", "anonymous")]
    again = await server.call("GET", answer.headers["location"])
    assert again.json()["id"] == run["id"]


@pytest.mark.parametrize(
    "body", [{"goal": "g"}, AGENT, {"workflow": {"name": "w", "nodes": []}, "variables": {}}]
)
async def test_all_three_kinds_are_accepted(server: Server, body: dict[str, object]) -> None:
    assert (await server.call("POST", RUNS, body)).status == 202


async def test_waiting_for_the_end_answers_200_with_the_output(server: Server) -> None:
    answer = await server.call("POST", f"{RUNS}?wait=5", AGENT | {"metadata": {"end_at_once": 1}})
    assert answer.status == 200
    assert answer.json()["output"] == "done"


async def test_a_wait_that_sees_no_end_answers_202(server: Server) -> None:
    answer = await server.call("POST", f"{RUNS}?wait=0.01", AGENT)
    assert answer.status == 202
    assert answer.json()["status"] == "running"


async def test_a_long_poll_answers_as_soon_as_the_run_ends(server: Server) -> None:
    run_id = (await server.call("POST", RUNS, AGENT)).json()["id"]
    poll = asyncio.create_task(server.call("GET", f"{RUNS}/{run_id}?wait=60"))
    server.runs.say(run_id, "run.succeeded", output=3)
    answer = await asyncio.wait_for(poll, 5)
    assert answer.json()["status"] == "succeeded"


async def test_draining_ends_a_long_poll_with_the_run_as_it_is(server: Server) -> None:
    run_id = (await server.call("POST", RUNS, AGENT)).json()["id"]
    poll = asyncio.create_task(server.call("GET", f"{RUNS}/{run_id}?wait=60"))
    await until(lambda: server.streams._polls)
    server.streams.drain()
    answer = await asyncio.wait_for(poll, 5)
    assert answer.json()["status"] == "running"


@pytest.mark.parametrize(
    ("body", "path", "hint"),
    [
        (AGENT | {"inptu": "x"}, "inptu", "Did you mean 'input'?"),
        ({"gaol": "x"}, "gaol", "Did you mean 'goal'?"),
        ({"goal": "x", "budget": {"max_tokenz": 1}}, "budget.max_tokenz", "'max_tokens'"),
    ],
)
async def test_an_unknown_field_is_refused_with_the_nearest_name(
    server: Server, body: dict[str, object], path: str, hint: str
) -> None:
    answer = await server.call("POST", RUNS, body)
    problem = answer.json()
    assert answer.status == 422
    assert problem["code"] == "invalid_request"
    assert path in [field["path"] for field in problem["errors"]]
    assert hint in problem["hint"]


@pytest.mark.parametrize(
    "body",
    [
        {"goal": "g", "agent": "clerk", "input": "x"},
        {},
        {"agent": "clerk"},
        {"goal": "g", "input": "x"},
        {"goal": "g", "budget": {"max_tokens": -1}},
        {"goal": ""},
        {"goal": "a\0b"},
        {"goal": "g", "session_id": "\0"},
        {"goal": "g", "tools": ["\0"]},
        {"workflow": {"name": "w", "nodes": [{"id": "\0"}]}},
        {"goal": "g", "start_after": "2020-01-01T00:00:00"},
        {"goal": "g", "budget": {"deadline_s": 1e300}},
        {"goal": "g", "budget": {"max_cost_usd": "1e1000000"}},
    ],
)
async def test_a_body_that_does_not_fit_is_422(server: Server, body: dict[str, object]) -> None:
    answer = await server.call("POST", RUNS, body)
    assert answer.status == 422
    assert answer.json()["code"] == "invalid_request"
    assert not server.runs.runs


async def test_errors_of_the_floors_below_keep_their_code_and_hint(server: Server) -> None:
    answer = await server.call("POST", RUNS, {"agent": "nobody", "input": "x"})
    assert (answer.status, answer.json()["code"]) == (422, "unknown_agent")
    assert answer.json()["hint"] == "Did you mean 'clerk'?"


@pytest.mark.parametrize(
    "query", ["?wait=61", "?wait=-1", "?wait=x", "?wait=nan", "?wiat=1", "?wait=1&wait=2"]
)
async def test_a_query_that_does_not_fit_is_refused(server: Server, query: str) -> None:
    answer = await server.call("POST", RUNS + query, AGENT)
    assert answer.status == 422
    assert not server.runs.runs


async def test_an_unknown_parameter_is_refused_with_the_nearest_name(server: Server) -> None:
    answer = await server.call("GET", f"{RUNS}?statsu=queued")
    assert answer.status == 422
    assert answer.json()["hint"] == "Did you mean 'status'?"


async def test_the_list_takes_filters_a_limit_and_an_opaque_cursor(server: Server) -> None:
    for _ in range(3):
        await server.call("POST", RUNS, AGENT)
    page = (await server.call("GET", f"{RUNS}?status=running&limit=2")).json()
    assert len(page["data"]) == 2
    assert page["next_cursor"] == "bmV4dA"
    assert (await server.call("GET", f"{RUNS}?status=failed")).json()["data"] == []
    assert (await server.call("GET", f"{RUNS}?limit=201")).status == 422
    assert (await server.call("GET", f"{RUNS}?status=done")).status == 422
    assert (await server.call("GET", f"{RUNS}?q=%00")).status == 422
    assert (await server.call("GET", f"{RUNS}?created_after=2020-01-01")).status == 422
    assert (await server.call("GET", f"{RUNS}?created_after=2020-01-01T00:00:00Z")).status == 200
    bad = await server.call("GET", f"{RUNS}?cursor=nonsense")
    assert bad.json()["code"] == "invalid_cursor"


@pytest.mark.parametrize("rest", ["", "/events", "/plan", "/tasks", "/steps"])
@pytest.mark.parametrize("run_id", ["run_" + "0" * 32, "nonsense", "run_%00"])
async def test_an_unknown_run_is_404_everywhere(server: Server, rest: str, run_id: str) -> None:
    for accept in ("application/json", "text/event-stream"):
        path = f"{RUNS}/{run_id}{rest}".replace("%00", "\0")
        answer = await server.call("GET", path, headers={"accept": accept})
        assert (answer.status, answer.json()["code"]) == (404, "not_found")


async def test_cancel_takes_an_optional_reason_and_refuses_an_ended_run(server: Server) -> None:
    run_id = (await server.call("POST", RUNS, AGENT)).json()["id"]
    answer = await server.call("POST", f"{RUNS}/{run_id}/cancel", {"reason": "enough"})
    assert (answer.status, answer.json()["status"]) == (200, "cancelled")
    assert b'"reason": "enough"' in server.runs.log[run_id][-1].data
    again = await server.call("POST", f"{RUNS}/{run_id}/cancel")
    assert (again.status, again.json()["code"]) == (409, "run_ended")
    bad = await server.call("POST", f"{RUNS}/{run_id}/cancel", {"raeson": "x"})
    assert bad.json()["hint"] == "Did you mean 'reason'?"


async def test_plan_tasks_and_steps_are_read(server: Server) -> None:
    run_id = (await server.call("POST", RUNS, AGENT)).json()["id"]
    assert (await server.call("GET", f"{RUNS}/{run_id}/plan")).json()["revision"] == 1
    empty = {"data": [], "next_cursor": None}
    assert (await server.call("GET", f"{RUNS}/{run_id}/tasks")).json() == empty
    assert (await server.call("GET", f"{RUNS}/{run_id}/steps")).json() == empty


async def test_events_as_json_come_in_pages(server: Server) -> None:
    run_id = (await server.call("POST", RUNS, AGENT)).json()["id"]
    for n in range(4):
        server.runs.say(run_id, "run.resumed", reason=str(n))
    path, accept = f"{RUNS}/{run_id}/events", {"accept": "application/json"}
    seen: list[int] = []
    cursor = ""
    while True:
        page = (await server.call("GET", f"{path}?limit=2{cursor}", headers=accept)).json()
        seen += [event["seq"] for event in page["data"]]
        if page["next_cursor"] is None:
            break
        cursor = f"&cursor={page['next_cursor']}"
    assert seen == [1, 2, 3, 4, 5]
    after = (await server.call("GET", f"{path}?after=3", headers=accept)).json()
    assert [event["seq"] for event in after["data"]] == [4, 5]
    bad = await server.call("GET", f"{path}?cursor=WzFd_x", headers=accept)
    assert bad.json()["code"] == "invalid_cursor"


# Idempotency


async def test_the_same_key_and_body_give_the_same_run(server: Server) -> None:
    key = {"Idempotency-Key": "k-1"}
    first = await server.call("POST", RUNS, b'{"agent":"clerk","input":"x"}', JSON | key)
    second = await server.call("POST", RUNS, b'{"input": "x", "agent": "clerk"}', JSON | key)
    assert first.json()["id"] == second.json()["id"]
    assert "idempotency-replayed" not in first.headers
    assert second.headers["idempotency-replayed"] == "true"
    other = await server.call("POST", RUNS, b'{"agent":"clerk","input":"y"}', JSON | key)
    assert (other.status, other.json()["code"]) == (422, "idempotency_mismatch")


@pytest.mark.parametrize("key", ["", " ", "a b", "x" * 256, "é"])
async def test_a_bad_idempotency_key_is_refused(server: Server, key: str) -> None:
    answer = await server.call("POST", RUNS, AGENT, {"Idempotency-Key": key})
    assert answer.status == 422
    assert answer.json()["errors"][0]["path"] == "Idempotency-Key"


JSON = {"content-type": "application/json"}


# Runs that are not stored


async def test_a_run_that_is_not_stored_is_waited_for(server: Server) -> None:
    answer = await server.call("POST", f"{RUNS}?wait=5", AGENT | {"store": False})
    assert (answer.status, answer.json()["status"]) == (200, "succeeded")
    assert not server.runs.runs


async def test_a_run_that_is_not_stored_and_not_waited_for_is_refused(server: Server) -> None:
    for query, body in [
        ("", AGENT | {"store": False}),
        ("?wait=5", {"goal": "g", "store": False}),
    ]:
        assert (await server.call("POST", RUNS + query, body)).status == 422
    keyed = await server.call(
        "POST", f"{RUNS}?wait=5", AGENT | {"store": False}, {"Idempotency-Key": "k"}
    )
    assert keyed.status == 422


async def test_a_run_that_is_not_stored_is_given_up_when_the_wait_is_over(server: Server) -> None:
    body = AGENT | {"store": False, "metadata": {"wait": True}}
    answer = await server.call("POST", f"{RUNS}?wait=0.01", body)
    assert (answer.status, answer.json()["code"]) == (504, "timed_out")
    assert server.runs.ephemeral_cancelled.is_set()


# The catalogue


async def test_the_catalogue_is_listed(server: Server) -> None:
    agents = (await server.call("GET", "/api/v1/agents")).json()
    assert agents["data"][0]["name"] == "clerk"
    assert agents["load_errors"][0]["source"] == "bad.py"
    assert (await server.call("GET", "/api/v1/agents/clerk")).json()["title"] == "Clerk"
    missing = await server.call("GET", "/api/v1/agents/clark")
    assert (missing.status, missing.json()["hint"]) == (404, "Did you mean 'clerk'?")
    for path, name in [("tools", "add"), ("approaches", "react"), ("models", "demo")]:
        page = (await server.call("GET", f"/api/v1/{path}")).json()
        assert page["data"][0]["name"] == name
        assert page["next_cursor"] is None
    info = (await server.call("GET", "/api/v1/server")).json()
    assert (info["name"], info["model"], info["demo"]) == ("agent-server", "demo", True)
