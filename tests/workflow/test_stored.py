"""Stored workflows through the API, on SQLite and PostgreSQL: versions that never change, edits
that notice each other, runs that no change touches."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI

from agent_server.client import AgentServerClient
from agent_server.domain.errors import (
    Conflict,
    InvalidWorkflow,
    NotFound,
    PreconditionFailed,
    UnknownWorkflow,
)
from agent_server.domain.ids import DEFAULT_TENANT, Tenant
from tests.api import gates
from tests.workflow.kit import carried_out, serving

YAML = {"Content-Type": "application/yaml"}
TRIAGE = """\
# how we sort
name: triage
description: Sorts.
inputs: {type: object, properties: {a: {type: integer}}, required: [a]}
nodes:
  - {id: sum, type: tool, tool: add, arguments: {a: "{{ inputs.a }}", b: 1}}
"""


def constant(name: str, value: Any, **more: Any) -> dict[str, Any]:
    """A workflow that gives ``value``."""
    node = {"id": "x", "type": "set", "variables": {"x": value}}
    return {"name": name, "nodes": [node], "output": "{{ vars.x }}", **more}


def calling(name: str, other: Any, **more: Any) -> dict[str, Any]:
    return {"name": name, "nodes": [{"id": "sub", "type": "workflow", "workflow": other, **more}]}


@pytest.fixture
def database(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The settings that name the database: SQLite, unless a test asks for both."""
    if getattr(request, "param", "sqlite") == "sqlite":
        return {}
    return {"database_url": request.getfixturevalue("upgraded_postgres_url")}


on_both = pytest.mark.parametrize("database", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
async def server(
    tmp_path: Path, database: dict[str, Any]
) -> AsyncIterator[tuple[AgentServerClient, FastAPI]]:
    async with serving(tmp_path, **database) as served:
        yield served


@pytest.fixture
def client(server: tuple[AgentServerClient, FastAPI]) -> AgentServerClient:
    return server[0]


@pytest.fixture
def http(client: AgentServerClient) -> httpx2.AsyncClient:
    return client._http


async def test_a_workflow_is_kept_as_it_was_sent_and_runs_by_its_name(
    client: AgentServerClient, http: httpx2.AsyncClient
) -> None:
    answer = await http.post("/api/v1/workflows", content=TRIAGE, headers=YAML)
    assert (answer.status_code, answer.headers["location"]) == (201, "/api/v1/workflows/triage")
    stored = await client.workflows.get("triage")
    assert answer.headers["etag"] == stored.etag == answer.json()["etag"]
    assert (stored.version, stored.number, stored.latest) == ("1", 1, True)
    assert (stored.description, stored.created_by) == ("Sorts.", "anonymous")
    assert stored.definition["nodes"][0]["arguments"] == {"a": "{{ inputs.a }}", "b": 1}
    run = await carried_out(client, "triage", a=2)
    assert (run.output, run.workflow, run.workflow_version) == (3, "triage", "1")
    assert (await client.runs.list(workflow="triage")).data[0].id == run.id


async def test_versions_count_up_and_the_old_ones_stay_as_they_were(
    client: AgentServerClient,
) -> None:
    for value in (1, 2, 2, 3):
        await client.workflows.put("w", constant("w", value))
    assert [v.version for v in (await client.workflows.versions("w")).data] == ["3", "2", "1"]
    assert (await client.workflows.get("w", "1")).definition == constant("w", 1)
    assert not (await client.workflows.get("w", "1")).latest
    assert [(await carried_out(client, f"w{at}")).output for at in ("", "@1", "@2")] == [3, 1, 2]


async def test_a_definition_may_name_its_version_which_then_is_taken_for_good(
    client: AgentServerClient,
) -> None:
    first = await client.workflows.create(constant("w", 1, version="1.0.0"))
    assert (first.version, first.number) == ("1.0.0", 1)
    same = await client.workflows.put("w", constant("w", 1, version="1.0.0"))
    assert same.number == 1
    with pytest.raises(Conflict, match=r"has a version '1\.0\.0' already"):
        await client.workflows.put("w", constant("w", 2, version="1.0.0"))
    assert (await client.workflows.put("w", constant("w", 2, version=3))).version == "3"
    counted = [(await client.workflows.put("w", constant("w", v))).version for v in (4, 5)]
    assert counted == ["4", "5"]
    with pytest.raises(NotFound, match="no version '9'"):
        await client.workflows.get("w", "9")


async def test_creating_needs_a_free_name_and_adding_a_taken_one(
    client: AgentServerClient, http: httpx2.AsyncClient
) -> None:
    await client.workflows.create(constant("w", 1))
    with pytest.raises(Conflict, match="already, at version '1'"):
        await client.workflows.create(constant("w", 2))
    added = await http.post("/api/v1/workflows/w/versions", json=constant("w", 2))
    assert (added.status_code, added.json()["version"]) == (201, "2")
    again = await http.post("/api/v1/workflows/w/versions", json=constant("w", 2))
    assert (again.status_code, again.json()["version"]) == (200, "2")
    missing = await http.post("/api/v1/workflows/v/versions", json=constant("v", 1))
    assert missing.json()["code"] == "not_found"
    other = await http.put("/api/v1/workflows/v", json=constant("w", 1))
    assert other.json()["errors"][0]["path"] == "/name"


@on_both
async def test_an_edit_that_did_not_see_another_one_is_refused(
    client: AgentServerClient, http: httpx2.AsyncClient
) -> None:
    first = await client.workflows.create(constant("w", 1))
    edits = await asyncio.gather(
        *(client.workflows.put("w", constant("w", n), if_match=first.etag) for n in range(2, 10)),
        return_exceptions=True,
    )
    assert [type(e) for e in edits].count(PreconditionFailed) == 7
    newest = await client.workflows.get("w")
    assert newest.number == 2
    with pytest.raises(PreconditionFailed):
        await client.workflows.delete("w", if_match=first.etag)
    path = "/api/v1/workflows/w"
    known = await http.get(path, headers={"If-None-Match": newest.etag})
    assert (known.status_code, known.headers["etag"]) == (304, newest.etag)
    taken = await http.put(path, json=constant("w", 5), headers={"If-None-Match": "*"})
    assert taken.status_code == 412
    none = await http.put("/api/v1/workflows/v", json=constant("v", 5), headers={"If-Match": "*"})
    assert none.status_code == 412
    bad = await http.put(path, json=constant("w", 5), headers={"If-Match": "abc"})
    assert bad.json()["code"] == "invalid_request"
    await client.workflows.delete("w", if_match=newest.etag)


@on_both
async def test_many_equal_posts_with_one_key_store_one_version(http: httpx2.AsyncClient) -> None:
    key = {"Idempotency-Key": "once"}
    answers = await asyncio.gather(
        *(http.post("/api/v1/workflows", json=constant("w", 1), headers=key) for _ in range(10))
    )
    assert {a.status_code for a in answers} == {201}
    assert {a.text for a in answers} == {answers[0].text}
    assert [a.headers.get("idempotency-replayed") for a in answers].count("true") == 9
    other = await http.post("/api/v1/workflows", json=constant("v", 1), headers=key)
    assert other.json()["code"] == "idempotency_mismatch"
    assert (await http.get("/api/v1/workflows/v")).status_code == 404


@on_both
async def test_at_once_versions_of_one_name_get_numbers_without_a_gap(
    client: AgentServerClient,
) -> None:
    await asyncio.gather(*(client.workflows.put("w", constant("w", n)) for n in range(20)))
    numbers = [v.number for v in (await client.workflows.versions("w")).data]
    assert numbers == list(range(20, 0, -1))


async def test_a_change_or_a_deletion_never_touches_a_run_under_way(
    client: AgentServerClient,
) -> None:
    gate = gates.Gate()
    gates.current.append(gate)
    try:
        await client.workflows.create(constant("inner", "old"))
        await client.workflows.create(calling("middle", "inner"))
        nodes = [
            {"id": "wait", "type": "tool", "tool": "hold"},
            {"id": "sub", "type": "workflow", "workflow": "middle"},
        ]
        await client.workflows.create({"name": "outer", "nodes": nodes})
        run = await client.runs.create(workflow="outer")
        await asyncio.wait_for(gate.reached.wait(), 10)
        await client.workflows.put("inner", constant("inner", "new"))
        await client.workflows.delete("middle")
        await client.workflows.delete("outer")
        gate.open.set()
        ended = await client.runs.wait(run.id, timeout_s=30)
    finally:
        gates.current.pop()
    assert (ended.status.value, ended.output) == ("succeeded", "old")
    with pytest.raises(UnknownWorkflow, match="no stored workflow 'outer'"):
        await client.runs.create(workflow="outer")


@on_both
async def test_a_number_is_never_used_again_after_a_deletion(client: AgentServerClient) -> None:
    await client.workflows.create(constant("w", 1))
    await client.workflows.put("w", constant("w", 2))
    await client.workflows.delete("w")
    with pytest.raises(NotFound):
        await client.workflows.get("w")
    with pytest.raises(NotFound):
        await client.workflows.delete("w")
    assert (await client.workflows.list()).data == []
    assert (await client.workflows.create(constant("w", 3))).version == "3"
    with pytest.raises(UnknownWorkflow, match="no version '1'"):
        await client.runs.create(workflow="w@1")


async def test_sub_workflows_may_name_a_version_or_be_held_by_the_definition(
    client: AgentServerClient,
) -> None:
    await client.workflows.create(constant("inner", 1))
    await client.workflows.put("inner", constant("inner", 2))
    assert (await carried_out(client, calling("w", "inner@1"))).output == 1
    assert (await carried_out(client, calling("w", "inner", version=1))).output == 1
    assert (await carried_out(client, calling("w", "inner"))).output == 2
    held = calling("w", "inner") | {"workflows": {"inner": constant("inner", 7)}}
    assert (await carried_out(client, held)).output == 7
    with pytest.raises(InvalidWorkflow, match="does not hold them"):
        await client.workflows.create(held)
    with pytest.raises(InvalidWorkflow, match="/workflows/inner/nodes"):
        await client.runs.create(
            workflow=calling("w", "inner") | {"workflows": {"inner": {"name": "inner"}}}
        )


async def test_workflows_that_come_to_call_themselves_are_refused(
    client: AgentServerClient,
) -> None:
    async def refused(definition: Any, chain: str) -> None:
        """By whoever checks, stores, rehearses or runs it: with the same words."""
        name = definition["name"]
        report = await client.workflows.validate(json.dumps(definition, indent=1))
        (told,) = report.errors
        assert not report.valid and told.line is not None and told.path == "/nodes/0/workflow"
        for asked in (
            client.workflows.put(name, definition),
            client.workflows.dry_run(definition),
            client.runs.create(workflow=definition),
        ):
            with pytest.raises(InvalidWorkflow, match=f"calls itself: {chain}") as caught:
                await asked
            (found,) = caught.value.errors
            assert (found.path, found.message) == (told.path, told.message)

    await refused(calling("a", "a"), "a → a")
    await refused(calling("a", "a@7", version=None) | {"version": 7}, "a@7 → a@7")
    inner = {"name": "in", "nodes": calling("a", "a")["nodes"]}
    await refused({"name": "a", "nodes": [calling("", inner)["nodes"][0]]}, "a → in → a")
    await client.workflows.create(constant("a", 1))
    await client.workflows.create(calling("b", "a"))
    await client.workflows.create(calling("c", "b"))
    await refused(calling("a", "a"), "a → a")
    await refused(calling("a", "b"), "a → b@1 → a")
    await refused(calling("a", "c"), "a → c@1 → b@1 → a")
    assert (await client.workflows.put("a", calling("a", "a@1"))).version == "2"
    assert (await carried_out(client, "c")).output == 1


async def test_what_is_stored_calls_the_version_it_names_and_not_itself(
    client: AgentServerClient,
) -> None:
    """A workflow that was valid stays so when a newer version calls another one back."""
    await client.workflows.create(constant("a", 1))
    await client.workflows.create(calling("b", "a"))
    await client.workflows.put("a", calling("a", "a@1"))
    for name in ("a", "a@1", "a@2", "b"):
        assert (await client.workflows.dry_run(name)).output == 1
        assert (await carried_out(client, name)).output == 1
    chain = {"name": "w", "nodes": [{"id": "x", "type": "set", "variables": {"x": 1}}]}
    for n in range(8):
        chain = calling(f"n{n}", chain)
    with pytest.raises(InvalidWorkflow, match="more than 8 workflows"):
        await client.runs.create(workflow=chain)


async def test_a_definition_with_faults_is_refused_with_the_line_of_each(
    client: AgentServerClient, http: httpx2.AsyncClient
) -> None:
    text = (
        "name: w w\n"
        "nodes:\n"
        "  - {id: a, type: tool, tool: ad}\n"
        "  - id: b\n"
        "    type: set\n"
        "    variables: {x: '{{ nodes.c.output }}'}\n"
        "  - {id: s, type: workflow, workflow: trage}\n"
    )
    await client.workflows.create(TRIAGE)
    answer = await http.post("/api/v1/workflows", content=text, headers=YAML)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_workflow")
    found = {(e["path"], e["line"]): e.get("hint") for e in answer.json()["errors"]}
    assert found == {
        ("/name", 1): found["/name", 1],
        ("/nodes/0/tool", 3): "Did you mean 'add'?",
        ("/nodes/1/variables/x", 6): found["/nodes/1/variables/x", 6],
        ("/nodes/2/workflow", 7): "Did you mean 'triage'?",
    }
    report = await client.workflows.validate(text)
    assert not report.valid
    assert [e.path for e in report.errors] == [e["path"] for e in answer.json()["errors"]]
    assert (await client.workflows.validate(TRIAGE)).valid
    assert [w.name for w in (await client.workflows.list()).data] == ["triage"]


@pytest.mark.parametrize(
    ("content", "media", "code"),
    [
        (b"{", "application/json", "malformed_body"),
        (b"[]", "application/json", "invalid_request"),
        (b"", "application/json", "malformed_body"),
        (b'{"name": "w", "name": "w", "nodes": []}', "application/json", "invalid_workflow"),
        (b"name: [", "application/yaml", "invalid_workflow"),
        (b"\xff\xfe\x00", "text/yaml", "malformed_body"),
        (b"name: w", "text/plain", "unsupported_media_type"),
        (b"a: " + b"[" * 5000, "application/x-yaml", "invalid_workflow"),
    ],
)
async def test_what_is_no_definition_is_refused(
    http: httpx2.AsyncClient, content: bytes, media: str, code: str
) -> None:
    for path in ("/api/v1/workflows", "/api/v1/workflows/validate"):
        answer = await http.post(path, content=content, headers={"Content-Type": media})
        if path.endswith("validate") and code == "invalid_workflow":
            assert answer.json()["valid"] is False and answer.json()["errors"]
        else:
            assert answer.json()["code"] == code


async def test_yaml_is_read_for_workflows_and_nowhere_else(http: httpx2.AsyncClient) -> None:
    answer = await http.post("/api/v1/runs", content="goal: x", headers=YAML)
    assert answer.json()["code"] == "unsupported_media_type"


@on_both
async def test_the_list_is_paged_and_searched(
    client: AgentServerClient, http: httpx2.AsyncClient
) -> None:
    for number in range(5):
        await client.workflows.create(constant(f"w{number}", number))
    names, cursor = [], None
    while True:
        page = await client.workflows.list(limit=2, cursor=cursor)
        names += [w.name for w in page.data]
        cursor = page.next_cursor
        if cursor is None:
            break
    assert names == ["w4", "w3", "w2", "w1", "w0"]
    assert [w.name for w in (await client.workflows.list(q="3")).data] == ["w3"]
    assert (await client.workflows.list(q="%")).data == []
    bad = await http.get("/api/v1/workflows", params={"cursor": "x"})
    assert bad.json()["code"] == "invalid_cursor"
    for number in range(4):
        await client.workflows.put("w0", constant("w0", f"v{number}"))
    first = await client.workflows.versions("w0", limit=3)
    rest = await client.workflows.versions("w0", limit=3, cursor=first.next_cursor)
    assert [v.number for v in [*first.data, *rest.data]] == [5, 4, 3, 2, 1]


@on_both
async def test_another_tenant_sees_changes_and_runs_none_of_it(
    server: tuple[AgentServerClient, FastAPI],
) -> None:
    client, app = server
    library = app.state.parts.library
    await client.workflows.create(constant("w", 1))
    other = Tenant("other")
    for call in (
        library.get(other, "w"),
        library.versions(other, "w", limit=5, below=None),
        library.delete(other, "w"),
    ):
        with pytest.raises(NotFound):
            await call
    with pytest.raises(UnknownWorkflow):
        await library.definition(other, "w", None)
    assert (await library.list(other, q=None, limit=5, before=None))[0] == []
    await library.save(
        other, "them", "{name: w, nodes: [{id: a, type: set, variables: {x: 9}}]}", "create"
    )
    assert (await client.workflows.get("w")).number == 1
    assert (await library.get(DEFAULT_TENANT, "w")).definition == constant("w", 1)


@on_both
async def test_texts_that_a_database_cannot_hold_are_kept_all_the_same(
    client: AgentServerClient, http: httpx2.AsyncClient
) -> None:
    made = constant("w", "a\x00\ud800", description="a\x00b")
    answer = await http.put("/api/v1/workflows/w", content=json.dumps(made), headers=YAML)
    assert answer.status_code == 201
    assert (await client.workflows.get("w")).definition == made
    assert (await client.workflows.list()).data[0].description == "ab"
