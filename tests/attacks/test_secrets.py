"""Rows 1, 15 and 16 of the attacks: who is let in, and what is never written down or shown as a page."""

import json
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from tests.e2e.kit import Api, problem
from tests.support.model_thread import calling, rule

from .world import (
    ANY_DATABASE,
    CANARIES,
    KEYS,
    MEMORIES,
    OPERATOR,
    PROVIDER,
    ROUTES,
    RUNS,
    WORKFLOWS,
    World,
    made,
)

MARKUP = "<img src=x onerror=alert(1)><script>alert(1)</script>"
PROBES = ("/livez", "/readyz")


# Rows 1 and 16


@ANY_DATABASE
@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_no_route_but_the_probes_answers_without_a_key(
    world: World, method: str, path: str
) -> None:
    place = path.replace(":path}", "}").replace("{", "").replace("}", "")
    stranger: Any = {"authorization": ""}
    for headers in (
        stranger,
        {"authorization": "Bearer wrong-wrong"},
        {"authorization": "Basic eA=="},
    ):
        answer = world.api.http.request(method, place, headers=headers)
        if path in PROBES:
            assert answer.status_code == 200
        else:
            assert answer.status_code == 401, answer.text
            assert answer.headers["www-authenticate"].startswith("Bearer")


@ANY_DATABASE
def test_tokens_that_were_made_up_open_nothing(world: World) -> None:
    """There are no signed tokens here, so none is believed: neither ``none`` nor any algorithm."""
    none = "eyJhbGciOiJub25lIn0.eyJ0ZW5hbnQiOiJhY21lIiwic3ViIjoiYW5uIn0."
    signed = "eyJhbGciOiJIUzI1NiJ9.eyJ0ZW5hbnQiOiJhY21lIn0.c2lnbmF0dXJl"
    key = KEYS["ann"][1]
    made_up = (none, signed, f"{key} {key}", key[:-1], key.upper(), f"{key},{OPERATOR}", "ann")
    for given in made_up:
        answer = world.api.http.get(RUNS, headers={"authorization": f"Bearer {given}"})
        assert answer.status_code == 401, given
    for name in ("x-tenant", "x-tenant-id", "x-principal", "x-forwarded-user"):
        listed = world.eve.http.get(RUNS, headers={name: "acme"}).json()
        assert listed["data"] == []
    assert world.eve.http.get(RUNS, params={"tenant": "acme"}).status_code == 422
    url = world.api.url.replace("http", "ws") + "/v1/responses"
    with pytest.raises(InvalidStatus) as refused, connect(url):
        pass
    assert refused.value.response.status_code == 401
    assert not [path for _, path in ROUTES if "hook" in path or "oauth" in path]


# Row 15


def everything(world: World) -> str:
    """All that the server tells anybody, and all that it has logged."""
    found = [world.log]
    for api in (world.api, world.ann, world.bob):
        for method, path in ROUTES:
            if method == "GET" and "{" not in path:
                found.append(api.http.get(path).text)
        for run in api.listed(RUNS):
            place = f"{RUNS}/{run['id']}"
            for end in ("", "/events", "/steps", "/tasks", "/export"):
                headers = {"accept": "application/json"}
                found.append(api.http.get(place + end, headers=headers).text)
    return "\n".join(found)


def test_no_key_and_no_secret_header_is_told_or_logged_anywhere(world: World) -> None:
    header = "header-canary-42aa"
    world.models.script(
        rule("echo", {"status": 401, "error": {"message": f"Incorrect API key: {PROVIDER}"}}),
        rule("boom", calling(("no_such_tool", {})), {"text": "done"}),
        default={"text": "fine"},
    )
    for text in ("echo", "boom", "fine"):
        world.ann.carry_out(agent="clerk", input=text)
    secret = {"Authorization": f"Bearer {header}", "X-Api-Key": header}
    node = {"id": "n", "type": "action", "action": "http_request"}
    node |= {"parameters": {"url": f"http://127.0.0.1:1/?key={header}", "headers": secret}}
    run = world.ann.carry_out(workflow={"name": "w", "nodes": [node]})
    assert run["status"] == "failed", run
    for api in (world.ann, world.api):
        api.http.get(RUNS, params={"api_key": OPERATOR})
        api.http.get("/nothing", headers={"x-api-key": KEYS["bob"][1], "cookie": f"a={OPERATOR}"})
        api.http.post(RUNS, content=b"{", headers={"content-type": "application/json"})
    told = everything(world)
    assert len(told) > 100_000 and '"level":"debug"' in told.replace(" ", "")
    for canary in CANARIES:
        assert canary not in told, told[max(0, told.index(canary) - 300) : told.index(canary) + 100]
    assert header not in world.log
    events = json.dumps(world.ann.events(run["id"]) + world.ann.steps(run["id"]))
    assert f"Bearer {header}" not in events


@ANY_DATABASE
@pytest.mark.parametrize(
    "command", [("config",), ("config", "--json"), ("doctor",), ("runs", "list"), ("agents",)]
)
def test_no_command_prints_a_key(world: World, command: tuple[str, ...]) -> None:
    where = ("--server", world.api.url) if command[0] in ("runs", "agents") else ()
    shown = world.run(*command, *where, log=f"cli-{'-'.join(command)}.log")
    shown.exit_code()
    assert shown.output and "Traceback" not in shown.output
    for canary in CANARIES:
        assert canary not in shown.output


@ANY_DATABASE
def test_keys_that_cannot_be_told_apart_keep_the_server_from_starting(world: World) -> None:
    def refused(value: Any, **env: str) -> str:
        text = value if isinstance(value, str) else json.dumps(value)
        fresh = {"AGENT_SERVER_DATA_DIR": str(world.folder / "other"), "AGENT_SERVER_PORT": "0"}
        shown = world.run("serve", **fresh, AGENT_SERVER_TENANT_KEYS=text, **env)
        assert shown.exit_code() == 1, shown.output
        assert "Error: " in shown.output and "Traceback" not in shown.output
        assert "AGENT_SERVER_TENANT_KEYS" in shown.output.upper(), shown.output
        assert "canary" not in shown.output
        return shown.output

    one = {"tenant": "acme", "key": "same-canary-0001"}
    assert "same" in refused({"ann": one, "bob": {**one, "tenant": "globex"}})
    assert "same" in refused({"ann": {"tenant": "acme", "key": OPERATOR}})
    assert "own" in refused({"api_key": one})
    refused({"ann": {"tenant": "acme", "key": "short"}})
    refused({"ann": {"tenant": "../x", "key": "canary-long-enough"}})
    refused({"ann": {"tenant": "acme", "key": "canary-long-enough", "scope": "all"}})
    refused('{"ann": canary')


def texts_with(api: Api) -> list[str]:
    """Paths that answer what was stored with markup in each field that takes a text."""
    run = api.carry_out(
        agent="clerk", input=MARKUP, session_id=f"s {MARKUP}", metadata={MARKUP: MARKUP}
    )
    api.http.post(f"{RUNS}/{run['id']}/fork", json={"metadata": {"x": MARKUP}})
    fact = {"kind": "knowledge", "content": MARKUP, "key": MARKUP, "author": MARKUP}
    memory = made(api, MEMORIES, {**fact, "namespace": MARKUP, "subject": MARKUP})
    flow = {"name": "markup", "description": MARKUP, "output": MARKUP}
    nodes = [{"id": "n", "type": "set", "description": MARKUP, "variables": {"x": MARKUP}}]
    api.http.put(f"{WORKFLOWS}/markup", json={**flow, "nodes": nodes})
    form = {"file": ("x.html", MARKUP.encode(), "text/html")}
    file = api.http.post("/v1/files", files=form, data={"purpose": "user_data"}).json()["id"]
    response = made(api, "/v1/responses", {"model": "agent/clerk", "input": MARKUP})["id"]
    return [
        *(f"{RUNS}/{run['id']}{end}" for end in ("", "/events", "/steps", "/export")),
        *(f"{MEMORIES}/{memory['id']}", MEMORIES, f"{MEMORIES}/export", "/api/v1/sessions"),
        *(f"{WORKFLOWS}/markup", f"{WORKFLOWS}/markup/graph", WORKFLOWS),
        *(f"/v1/files/{file}", f"/v1/files/{file}/content", "/v1/files"),
        *(f"/v1/responses/{response}", f"{RUNS}/{MARKUP}", f"/{MARKUP}", f"{RUNS}?status={MARKUP}"),
    ]


@ANY_DATABASE
def test_stored_markup_never_comes_back_as_a_page(world: World) -> None:
    world.models.script(default={"text": MARKUP})
    browser = {"accept": "text/html,application/xhtml+xml"}
    seen = 0
    for path in texts_with(world.bob):
        for headers in (browser, {"accept": "application/json"}):
            answer = world.bob.http.get(path, headers=headers)
            kind = answer.headers.get("content-type", "").partition(";")[0]
            seen += MARKUP in answer.text or "onerror" in answer.text
            assert kind in (
                *("application/json", "application/problem+json", "application/x-ndjson"),
                *("text/event-stream", "application/octet-stream"),
            ), (path, kind)
            assert answer.headers["x-content-type-options"] == "nosniff"
            if path.endswith("/content"):
                assert answer.headers["content-disposition"] == "attachment"
                assert answer.headers["content-security-policy"] == "sandbox"
    assert seen > 20


@ANY_DATABASE
def test_each_page_that_is_served_runs_only_what_stands_in_it(world: World) -> None:
    pages = 0
    for method, path in ROUTES:
        if method != "GET" or "{" in path:
            continue
        answer = world.bob.http.get(path, headers={"accept": "text/html"})
        assert answer.headers["x-content-type-options"] == "nosniff"
        if answer.headers.get("content-type", "").startswith("text/html"):
            pages += 1
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
            assert "unsafe" not in policy and "*" not in policy
            assert MARKUP not in answer.text
    assert pages == 2
    problem(world.bob.http.get(f"/docs/{MARKUP}"), 404, "not_found")
