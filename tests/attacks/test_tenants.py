"""Row 4 of the attacks: another tenant's id, in a path or inside data, names nothing."""

import json
import re
from collections import defaultdict
from typing import Any

import pytest
from websockets.sync.client import connect

from tests.e2e.kit import Api, Json, problem
from tests.support.model_thread import calling, rule

from .statements import ELSEWISE, tables_in, unbound
from .world import (
    APPROVALS,
    KEYS,
    MEMORIES,
    ROUTES,
    RUNS,
    SECRET,
    WITH_IDS,
    WORKFLOWS,
    Planted,
    World,
    definition,
    made,
    plant,
)

OWN = {
    ("GET", "/api/v1/agents/{name}"): "agents are the server's, for all tenants",
    ("PUT", "/api/v1/workflows/{name}"): "makes a workflow of one's own; tested below",
    ("DELETE", "/api/v1/subjects/{subject:path}"): "erases what there is: nothing; tested below",
}
"""Routes that answer something else than 404, and why."""


FILTERS = {
    RUNS: ("agent", "session_id", "workflow", "q"),
    MEMORIES: ("namespace", "key", "session_id", "subject", "q", "part_of", "run_id"),
    f"{MEMORIES}/export": ("namespace", "session_id", "subject"),
    "/api/v1/sessions": ("q",),
    APPROVALS: ("run_id",),
    WORKFLOWS: ("q",),
}
"""Filters of lists by what a caller names."""


def body_for(planted: Planted, method: str, path: str) -> Json | None:
    """A body that the route takes, so that nothing but the id can be wrong."""
    if method in ("GET", "DELETE"):
        return None
    if path.startswith(WORKFLOWS):
        return definition(planted.ids["name"], "changed")
    for end, body in {
        "/plan": {"tasks": [{"id": "b", "description": "other"}]},
        "/reconcile": {"step": planted.step, "outcome": "did_not_happen"},
        "/conversations/{conversation_id}": {"metadata": {"a": "b"}},
        "/conversations/{conversation_id}/items": {
            "items": [{"type": "message", "role": "user", "content": "x"}]
        },
        "/memories/{memory_id}": {"content": "changed"},
        "/approvals/{approval_id}": {"decision": "reject"},
    }.items():
        if path.endswith(end):
            return body
    return {} if path.endswith(("/retry", "/fork", "/signals/{name}")) else None


def call(api: Api, planted: Planted, method: str, path: str) -> Any:
    query = f"?with={planted.ended}" if path.endswith("/compare") else ""
    body = body_for(planted, method, path)
    where = planted.path(path) + query
    headers = {"accept": "application/json"}
    return api.http.request(
        method, where, headers=headers, **({} if body is None else {"json": body})
    )


def snapshot(api: Api, planted: Planted) -> dict[str, Json | str]:
    """All that the routes which read say of what was planted."""
    found = {}
    for method, path in WITH_IDS:
        if method == "GET":
            answer = call(api, planted, method, path)
            if (method, path) not in OWN and not path.endswith("/export"):  # has its moment in it
                assert answer.status_code == 200, (path, answer.text)
                found[path] = answer.text
    return found


def test_the_walk_has_every_kind_of_id() -> None:
    assert len(WITH_IDS) > 50
    for kind in ("approvals", "memories", "sessions", "workflows", "runs", "subjects"):
        assert any(path.startswith(f"/api/v1/{kind}/") for _, path in WITH_IDS), kind
    for kind in ("responses", "conversations", "files"):
        assert any(path.startswith(f"/v1/{kind}/") for _, path in WITH_IDS), kind
    assert OWN.keys() <= set(WITH_IDS)


@pytest.mark.parametrize(("method", "path"), [one for one in WITH_IDS if one not in OWN])
def test_an_id_in_a_path_is_404_for_another_tenant(world: World, method: str, path: str) -> None:
    answer = call(world.bob, world.planted, method, path)
    assert answer.status_code == 404, answer.text
    told = answer.json()
    told = told["error"] if path.startswith("/v1") else told
    assert told["code"] in ("not_found", "model_not_found"), told
    assert "flower" not in answer.text


def test_what_another_tenant_reaches_for_stays_as_it_was_and_its_owner_finds_it(
    world: World,
) -> None:
    planted = plant(world, "taken")
    before = snapshot(world.ann, planted)
    assert sum(SECRET in text for text in before.values()) > 10
    for method, path in WITH_IDS:
        if (method, path) not in OWN:
            call(world.bob, planted, method, path)
    assert snapshot(world.ann, planted) == before
    # The same calls by the owner: none says 404, so that the 404s above were about the tenant.
    writing = [one for one in WITH_IDS if one[0] != "GET" and one not in OWN]
    # Parts go before what they are part of, and a session last: its memories go with it.
    late = ("DELETE", "/api/v1/sessions/{session_id:path}")
    order = sorted(writing, key=lambda one: (one == late, one[0] == "DELETE", -len(one[1])))
    for method, path in order:
        answer = call(world.ann, planted, method, path)
        found = answer.is_success or answer.status_code == 409 or "has ended" in answer.text
        assert found, (method, path, answer.text)


def test_a_stream_a_listed_page_and_a_socket_are_closed_to_another_tenant(world: World) -> None:
    bob, ids = world.bob, world.planted.ids
    for run in (world.planted.waiting, world.planted.ended):
        for headers in ({"accept": "text/event-stream"}, {"last-event-id": "1"}):
            answer = bob.http.get(f"{RUNS}/{run}/events", headers=headers)
            assert answer.status_code == 404, answer.text
    response = f"/v1/responses/{ids['response_id']}"
    assert bob.http.get(response, params={"stream": "true"}).status_code == 404
    url = bob.url.replace("http", "ws") + "/v1/responses"
    with connect(url, additional_headers={"Authorization": f"Bearer {KEYS['bob'][1]}"}) as socket:
        for wanted in (
            {"previous_response_id": ids["response_id"]},
            {"conversation": ids["conversation_id"]},
        ):
            wish = {"type": "response.create", "model": "agent/clerk", "input": "and?", **wanted}
            socket.send(json.dumps(wish))
            told = json.loads(socket.recv(timeout=20))
            assert told["type"] == "error" and "not" in told["error"]["message"], told


@pytest.mark.parametrize(
    "path",
    [path for method, path in ROUTES if method == "GET" and "{" not in path and path != "/metrics"],
)
def test_a_list_shows_and_counts_nothing_of_another_tenants(world: World, path: str) -> None:
    planted = world.planted
    answer = world.eve.http.get(path, headers={"accept": "application/json"})
    assert answer.status_code == 200, answer.text
    assert SECRET not in answer.text
    for place in (planted.ended, planted.waiting, *planted.ids.values()):
        assert place not in answer.text
    if path == f"{MEMORIES}/stats":
        told = answer.json()
        assert (told["memories"], told["by_namespace"], told["vectors"]) == (0, {}, 0)


def test_filters_and_searches_find_nothing_of_another_tenants(world: World) -> None:
    eve, ids = world.eve, world.planted.ids
    for path, query in (
        (RUNS, {"session_id": ids["session_id"]}),
        (RUNS, {"workflow": ids["name"]}),
        (RUNS, {"q": SECRET}),
        (APPROVALS, {"run_id": world.planted.waiting}),
        (MEMORIES, {"q": SECRET}),
        (MEMORIES, {"session_id": ids["session_id"]}),
        (MEMORIES, {"subject": ids["subject"], "replaced": "true"}),
        (MEMORIES, {"run_id": world.planted.ended}),
        (WORKFLOWS, {"q": SECRET}),
    ):
        assert eve.listed(path, **query) == [], (path, query)
        assert world.ann.listed(path, **query), (path, query)
    found = {"query": f"which flower is the {SECRET}?", "limit": 200}
    assert made(eve, f"{MEMORIES}/search", found)["data"] == []
    assert made(world.ann, f"{MEMORIES}/search", found)["data"]
    assert eve.http.get(f"{MEMORIES}/export").text == ""
    assert world.api.http.get("/metrics").status_code == 200
    problem(eve.http.get("/metrics"), 403, "forbidden")


def inside(planted: Planted) -> dict[str, tuple[str, str, Json, int]]:
    """Requests with ann's ids inside, and what another tenant is answered."""
    ids = planted.ids
    response = {"model": "agent/clerk", "input": "and?"}
    part = {"type": "input_file", "file_id": ids["file_id"]}
    chat = {"type": "file", "file": {"file_id": ids["file_id"]}}
    reference = {"type": "item_reference", "id": ids["item_id"]}
    nested = definition("mine")
    nested["nodes"] = [{"id": "n", "type": "workflow", "workflow": ids["name"]}]
    consent = {"type": "mcp_approval_response", "approve": True}
    consent["approval_request_id"] = ids["approval_id"]
    return {
        "workflow of a run": ("POST", RUNS, {"workflow": ids["name"]}, 422),
        "version of a run": ("POST", RUNS, {"workflow": ids["name"] + "@1"}, 422),
        "workflow inside one": ("POST", RUNS, {"workflow": nested}, 422),
        "workflow inside a stored one": ("POST", WORKFLOWS, nested, 422),
        "dry run": ("POST", f"{WORKFLOWS}/dry-run", {"workflow": ids["name"]}, 422),
        "previous response": (
            "POST",
            "/v1/responses",
            {**response, "previous_response_id": ids["response_id"]},
            404,
        ),
        "conversation": (
            "POST",
            "/v1/responses",
            {**response, "conversation": ids["conversation_id"]},
            404,
        ),
        "reference": ("POST", "/v1/responses", {**response, "input": [reference]}, 404),
        "consent": ("POST", "/v1/responses", {**response, "input": [consent]}, 400),
        "file": (
            "POST",
            "/v1/responses",
            {**response, "input": [{"role": "user", "content": [part]}]},
            400,
        ),
        "file of a chat": (
            "POST",
            "/v1/chat/completions",
            {"model": "agent/clerk", "messages": [{"role": "user", "content": [chat]}]},
            400,
        ),
        "compaction": (
            "POST",
            "/v1/responses/compact",
            {"model": "agent/clerk", "previous_response_id": ids["response_id"]},
            404,
        ),
        "item of a new conversation": ("POST", "/v1/conversations", {"items": [reference]}, 404),
    }


NAMED = tuple(inside(Planted("", "", "", "", defaultdict(str), "")))


@pytest.mark.parametrize("what", NAMED)
def test_an_id_inside_a_body_names_nothing_of_another_tenants(world: World, what: str) -> None:
    planted = world.planted
    world.models.script(default={"text": "nothing"})
    method, path, body, status = inside(planted)[what]
    answer = world.bob.http.request(method, path, json=body)
    assert answer.status_code == status, answer.text
    assert f"The flower is {SECRET}" not in answer.text and world.models.calls == []
    assert world.ann.get(f"{APPROVALS}/{planted.ids['approval_id']}")["status"] == "pending"


def test_names_inside_a_run_reach_into_the_runs_own_tenant_alone(world: World) -> None:
    bob, ids = world.bob, world.planted.ids
    world.models.script(
        rule("find", calling(("recall", {"query": "which flower is it?"})), {"text": "none"}),
        rule("lose", calling(("forget", {"memory_id": ids["memory_id"]})), {"text": "gone"}),
        default={"text": "nothing"},
    )
    on = {"agent": "clerk", "session_id": ids["session_id"], "subject": ids["subject"]}
    for text in ("find it", "lose it", "go on"):
        run = bob.carry_out(**on, input=text, on_busy="reject")
        assert run["status"] == "succeeded", run
    part = [{"role": "user", "content": [{"type": "input_file", "file_id": ids["file_id"]}]}]
    for fields in (
        {"input": part},
        {"input": "and?", "options": {"previous": world.planted.ended}},
    ):
        run = bob.carry_out(agent="clerk", **fields)
        assert run["status"] == "failed", run
        assert SECRET not in json.dumps(run["error"])
    assert SECRET not in json.dumps(world.models.calls)
    assert world.ann.get(f"{MEMORIES}/{ids['memory_id']}")["content"].endswith(f"{SECRET}.")
    session = world.ann.get(f"/api/v1/sessions/{ids['session_id']}")
    assert session["item_count"] == 2, "bob's session of that name is another"


def test_what_looks_like_a_reference_to_a_stored_value_stays_the_text_it_is(world: World) -> None:
    large = SECRET * 20_000
    hers = world.ann.carry_out(agent="clerk", input="keep", metadata={"large": large})
    assert world.ann.get(f"{RUNS}/{hers['id']}")["metadata"] == {"large": large}
    forged: Json = {
        "head": '@["acme","$blob"]{"$blob":"' + "0" * 64 + '"}',
        "$blob": "0" * 64,
        "inside": {"$blob": ["acme", large[:9]], "also": "x" * 200_000},
    }
    mine = world.bob.carry_out(agent="clerk", input=forged["head"], metadata=forged)
    found = world.bob.get(f"{RUNS}/{mine['id']}")
    assert found["metadata"] == forged and found["input"] == forged["head"]


def test_one_tenants_name_key_or_subject_is_not_the_others(world: World) -> None:
    ann, bob, ids = world.ann, world.bob, world.planted.ids
    place = f"{WORKFLOWS}/{ids['name']}"
    before = ann.get(place)
    assert bob.http.put(place, json=definition(ids["name"], "mine")).status_code == 201
    assert bob.get(place)["definition"]["description"] == "mine"
    assert ann.get(place) == before
    assert bob.http.delete(place).status_code == 204 and ann.get(place) == before
    keep = snapshot(ann, world.planted)
    person = f"/api/v1/subjects/{ids['subject']}"
    made(bob, MEMORIES, {"kind": "knowledge", "content": "mine", "subject": ids["subject"]})
    assert bob.http.delete(person).json()["erased"]["memories"] >= 1
    assert bob.http.delete(person).json()["erased"] == {}
    fact = {"kind": "knowledge", "content": "mine", "id": ids["memory_id"]}
    written = made(bob, MEMORIES, fact)
    assert (written["id"], written["content"]) == (ids["memory_id"], "mine")
    for verb, change in (("PATCH", {"content": "still mine"}), ("DELETE", None)):
        answer = bob.http.request(verb, f"{MEMORIES}/{written['id']}", json=change)
        assert answer.status_code == 200, answer.text
        assert snapshot(ann, world.planted) == keep
    key = {"Idempotency-Key": "one-key"}
    body = {"agent": "clerk", "input": "the same"}
    runs = {api.http.post(RUNS, json=body, headers=key).json()["id"] for api in (ann, bob)}
    assert len(runs) == 2
    fact = {"kind": "knowledge", "key": "the key", "content": "mine"}
    one, other = (made(api, MEMORIES, fact) for api in (ann, bob))
    assert one["id"] != other["id"] and one["superseded_by"] is other["superseded_by"] is None
    assert snapshot(ann, world.planted) == keep


def test_keys_of_one_tenant_steer_its_runs_and_no_others(world: World) -> None:
    world.models.script(rule("hold", {"latency_s": 60, "text": "late"}))
    run = world.ann.submit(agent="clerk", input="hold", session_id="shared")
    place = f"{RUNS}/{run}"
    for what in ("reject", "interrupt", "steer"):
        mine = world.bob.carry_out(agent="clerk", input="x", session_id="shared", on_busy=what)
        assert (mine["status"], mine["id"] == run) == ("succeeded", False)
    for verb in ("pause", "resume", "cancel"):
        problem(world.bob.http.post(f"{place}/{verb}"), 404, "not_found")
    paused = world.ann.http.post(f"{place}/pause").json()
    assert paused["waiting_for"]["paused_by"] == "ann"
    for verb in ("resume", "cancel", "pause"):
        answer = world.bob.http.post(f"{RUNS}/{verb}", json={"agent": "clerk"}).json()
        assert run not in json.dumps(answer)
    assert world.ann.get(place)["status"] == "waiting"
    assert world.amy.http.post(f"{place}/resume").status_code == 200
    assert "by amy" in [e["reason"] for e in world.ann.events(run) if e["type"] == "run.resumed"]
    many = world.amy.http.post(f"{RUNS}/cancel", json={"q": "clerk", "reason": "enough"}).json()
    assert run in [one["id"] for one in many["data"]]
    assert world.ann.ended(run)["status"] == "cancelled"


def test_only_who_may_decide_decides_and_another_tenant_sees_no_question(world: World) -> None:
    world.models.script(rule("give", calling(("gift", {"eur": 5})), {"text": "given"}))
    run = world.ann.submit(agent="clerk", input="give")
    assert world.ann.ended(run)["status"] == "waiting"
    (asked,) = world.ann.listed(APPROVALS, run_id=run)
    place, yes = f"{APPROVALS}/{asked['id']}", {"decision": "approve"}
    problem(world.bob.http.post(place, json=yes), 404, "not_found")
    problem(world.ann.http.post(place, json=yes), 403, "forbidden")
    problem(world.api.http.post(place, json=yes), 404, "not_found")
    assert "gift 5" not in world.book()
    decided = world.amy.http.post(place, json=yes).json()
    assert (decided["status"], decided["decided_by"]) == ("approved", "amy")
    for _ in range(60):
        if world.ann.get(f"{RUNS}/{run}", wait=0.5)["ended_at"]:
            break
    assert world.book().count("gift 5") == 1


def test_every_statement_that_goes_by_a_name_names_the_tenant(world: World) -> None:
    walk(world, plant(world, "walked"))
    told = world.statements()
    assert {
        "runs", "sessions", "session_items", "memories", "memory_uses", "workflows",
        "workflow_versions", "idempotency_keys",
    } <= {table for one in told for table in tables_in(one)}  # fmt: skip
    assert [one for one in told if unbound(one)] == []
    for pattern in ELSEWISE:
        assert any(re.search(pattern, one) for one in told) or "lexemes" in pattern, pattern
    without = [one for one in told if unbound(re.sub(r"\btenant\b", "nobody", one))]
    assert len(without) > 40, "a statement that lost its tenant would be seen"


def walk(world: World, planted: Planted) -> None:
    """Every route as ann calls it, with the names of hers in it."""
    ann, ids = world.ann, planted.ids
    snapshot(ann, planted)
    for path, names in FILTERS.items():
        for name in names:
            ann.http.get(path, params={name: ids.get(name, SECRET)})
    found = {"query": SECRET, "session_id": ids["session_id"], "subject": ids["subject"]}
    made(ann, f"{MEMORIES}/search", {**found, "filter": {SECRET: SECRET}})
    world.models.script(
        rule("find", calling(("recall", {"query": SECRET})), {"text": "none"}),
        rule("lose", calling(("forget", {"key": f"walked/{SECRET}"})), {"text": "gone"}),
        default={"text": "nothing"},
    )
    for text in ("find it", "lose it"):
        ann.carry_out(agent="clerk", input=text, session_id=ids["session_id"])
    ann.http.post(RUNS, json={"agent": "clerk", "input": "x"}, headers={"Idempotency-Key": SECRET})
    for method, path in WITH_IDS:
        if method != "GET":
            call(ann, planted, method, path)
