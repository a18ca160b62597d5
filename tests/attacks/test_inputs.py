"""Rows 6 to 12, 14 and 17 of the attacks: what is sent is data, stays where it belongs, and ends.

Over 600 lines, since each further module would start the servers once more.
"""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.e2e.kit import Api, Json, problem
from tests.support.model_thread import calling, rule
from tests.workflow.test_expressions import ATTACKS

from .world import ANY_DATABASE, KEYS, MEMORIES, ROUTES, RUNS, WORKFLOWS, World, made

# Row 6

SQL = (
    "' OR 1=1 --",
    "x') OR ('1'='1",
    "a'; DROP TABLE memories; --",
    '$."a"',
    "$.a[0]",
    "a.b",
    '"',
    "\\",
    "%",
    "_",
    "*",
    "a OR b",
    "NEAR(a b)",
    "{a}",
    "tenant",
    ":moment",
    "%(moment)s",
    "?",
    "\N{FULLWIDTH APOSTROPHE}",
)
PLAIN = st.characters(exclude_categories=("Cs",), exclude_characters="\0")
WORDS = st.one_of(st.sampled_from(SQL), st.text(PLAIN, max_size=20))
VALUES = st.one_of(WORDS, st.integers(-5, 5), st.booleans(), st.none())


def matches(metadata: Json, filter: Json) -> bool:
    """What a filter means, said in Python."""

    def has(held: Any, wanted: Any) -> bool:
        held = held if isinstance(held, list) else [held]
        return any(type(one) is type(wanted) and one == wanted for one in held)

    return all(key in metadata and has(metadata[key], value) for key, value in filter.items())


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    metadata=st.lists(st.dictionaries(WORDS, VALUES, max_size=4), min_size=2, max_size=5),
    more=st.dictionaries(WORDS, VALUES, min_size=1, max_size=2),
)
@example(metadata=[{key: key} for key in SQL], more={"' OR 1=1 --": "x"})
def test_a_filter_of_memories_finds_what_has_the_value_and_nothing_else(
    world: World, metadata: list[Json], more: Json
) -> None:
    space = f"fuzz-{len(world.bob.get(f'{MEMORIES}/stats')['by_namespace'])}"
    drafts = [
        {"kind": "knowledge", "content": f"thing {n}", "namespace": space, "metadata": one}
        for n, one in enumerate(metadata)
    ]
    made(world.bob, MEMORIES, {"memories": drafts})
    for filter in [{k: v} for k, v in metadata[0].items()] + metadata + [more]:
        body = {"query": "thing", "namespace": space, "filter": filter, "limit": 200}
        found = made(world.bob, f"{MEMORIES}/search", body)["data"]
        wanted = {f"thing {n}" for n, one in enumerate(metadata) if matches(one, filter)}
        assert {one["memory"]["content"] for one in found} == wanted, filter


LISTS = {
    RUNS: ("status", "agent", "session_id", "workflow", "created_after", "q", "cursor", "order"),
    MEMORIES: ("kind", "namespace", "key", "session_id", "subject", "q", "part_of", "cursor"),
    "/api/v1/approvals": ("status", "run_id", "subject", "cursor"),
    "/api/v1/sessions": ("cursor", "limit", "order"),
    WORKFLOWS: ("q", "cursor", "order_by"),
    "/v1/files": ("purpose", "order", "after", "limit"),
}


@pytest.mark.parametrize("path", LISTS)
def test_whatever_a_list_is_asked_for_is_a_value_or_refused(world: World, path: str) -> None:
    for name in LISTS[path]:
        for word in SQL:
            answer = world.eve.http.get(path, params={name: word})
            assert answer.status_code in (200, 400, 422), (name, word, answer.text)
            if answer.status_code == 200:
                assert answer.json()["data"] == [], (name, word)
        name_too = world.eve.http.get(path, params={f"{name}' OR 1=1 --": "x"})
        assert name_too.status_code in (400, 422), name_too.text
    assert world.api.http.get("/readyz").status_code == 200


# Rows 7 and 8

CODE = (
    "__import__('os').system('touch {}')",
    "{{{{ __import__('os').system('touch {}') }}}}",
    "exec(\"open('{}', 'w')\")",
    "!!python/object/apply:os.system ['touch {}']",
    "${{jndi:touch {}}}",
    "$(touch {})",
    "`touch {}`",
)
NODES: list[Json] = [
    {"id": "a", "type": "set", "variables": {"x": "text"}},
    {"id": "b", "type": "tool", "tool": "calculator", "arguments": {"expression": "1"}},
    {"id": "c", "type": "agent", "agent": "clerk", "input": "text", "context": {"k": "text"}},
    {
        "id": "d",
        "type": "branch",
        "cases": [{"when": "true", "nodes": [{"id": "e", "type": "set", "variables": {"y": 1}}]}],
    },
    {
        "id": "f",
        "type": "map",
        "over": "[1]",
        "as": "one",
        "nodes": [{"id": "g", "type": "set", "variables": {"z": "text"}}],
    },
    {
        "id": "h",
        "type": "loop",
        "while": "vars.v == 1",
        "max_iterations": 2,
        "nodes": [{"id": "i", "type": "set", "variables": {"w": 1}}],
    },
    {"id": "j", "type": "action", "action": "emit", "parameters": {"name": "text"}},
    {"id": "k", "type": "wait", "duration_s": "0"},
    {"id": "l", "type": "plan", "goal": "text", "role": "text"},
    {"id": "m", "type": "approach", "approach": "direct", "input": "text"},
]
DEFINITION: Json = {
    "name": "code",
    "description": "text",
    "inputs": {"type": "object", "properties": {"q": {"type": "string"}}},
    "variables": {"v": "text"},
    "nodes": NODES,
    "output": "{{ vars.v }}",
    "actions": [{"trigger": "run.succeeded", "action": "emit", "parameters": {"name": "text"}}],
}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each text in ``value``."""
    if isinstance(value, str):
        yield path
    elif isinstance(value, (dict, list)):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(one, (*path, key))


def put(value: Any, path: tuple[Any, ...], text: str) -> Any:
    """``value`` with ``text`` at ``path``."""
    if not path:
        return text
    made = value.copy()
    made[path[0]] = put(value[path[0]], path[1:], text)
    return made


@ANY_DATABASE
def test_code_in_any_text_of_a_workflow_is_text_or_refused(world: World, tmp_path: Path) -> None:
    proof, bob = tmp_path / "proof", world.bob
    world.models.script(default={"text": json.dumps({"tasks": []})})
    sound = bob.http.post(f"{WORKFLOWS}/validate", json=DEFINITION).json()
    assert sound["valid"], sound
    found = list(places(DEFINITION))
    assert len(found) > 40
    for n, path in enumerate(found):
        for code in (CODE[n % len(CODE)], CODE[1]):
            sent = put(DEFINITION, path, code.format(proof))
            answer = bob.http.post(f"{WORKFLOWS}/validate", json=sent)
            assert answer.status_code in (200, 422), (path, answer.text)
    runs = []
    for place in (("variables", "v"), ("nodes", 0, "variables", "x"), ("nodes", 2, "input")):
        for code in CODE[:4]:
            answer = bob.post({"workflow": put(DEFINITION, place, code.format(proof))})
            assert answer.status_code in (202, 422), answer.text
            if answer.status_code == 202:
                runs.append(answer.json()["id"])
    assert runs
    for run in runs:
        assert bob.ended(run)["ended_at"], run
    yaml = {"content-type": "application/yaml"}
    text = f"name: !!python/object/apply:os.system ['touch {proof}']\nnodes: []\n"
    refused = bob.http.post(WORKFLOWS, content=text.encode(), headers=yaml)
    assert refused.status_code in (400, 422), refused.text
    assert not proof.exists()


SUSPICIOUS = ("script", "python", "source_code", "module", "import", "callable", "class", "exec")
SUSPICIOUS += ("eval", "lambda", "command", "shell", "code", "handler", "factory", "path")


@ANY_DATABASE
def test_no_field_that_is_sent_asks_for_code(world: World) -> None:
    document = world.api.get("/openapi.json")
    sent: set[str] = set()

    known: set[str] = set()
    todo: list[Any] = [
        operation.get("requestBody")
        for path in document["paths"].values()
        for operation in path.values()
    ]
    while todo:
        schema = todo.pop()
        if isinstance(schema, list):
            todo += schema
        if not isinstance(schema, dict):
            continue
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference not in known:
            known.add(reference)
            todo.append(document["components"]["schemas"][reference.rpartition("/")[2]])
        sent.update(schema.get("properties", {}))
        todo += schema.values()
    assert len(sent) > 100 and "nodes" in sent and "content" in sent
    assert [name for name in sorted(sent) if name in SUSPICIOUS] == []


DOTTED = (
    "os.system",
    "subprocess.run",
    "builtins.eval",
    "os:system",
    "__import__",
    "tests.attacks",
)


@ANY_DATABASE
@pytest.mark.parametrize("name", DOTTED)
def test_a_dotted_name_of_python_is_no_name_here(world: World, name: str) -> None:
    def node(**fields: Any) -> Json:
        return {"workflow": {"name": "w", "nodes": [{"id": "n", **fields}]}}

    plain = {"agent": "clerk", "input": "x"}
    for body in (
        {"agent": name, "input": "x"},
        {"goal": "x", "agents": [name]},
        {"goal": "x", "tools": [name]},
        {**plain, "approach": name},
        {"workflow": name},
        node(type="tool", tool=name, arguments={"command": "id"}),
        node(type="agent", agent=name, input="x"),
        node(type="agent", agent="clerk", input="x", approach=name),
        node(type="agent", agent="clerk", input="x", tools=[name]),
        node(type="approach", approach=name, input="x"),
        node(type="action", action=name, parameters={}),
        node(type="workflow", workflow=name),
    ):
        told = world.bob.post(body)
        assert told.status_code in (404, 422), (body, told.text)
        found = told.json()
        assert found.get("hint") or found.get("errors"), found
        assert name.partition(":")[0] in told.text
    for model in (f"agent/{name}", f"workflow/{name}", name):
        told = world.bob.http.post("/v1/responses", json={"model": model, "input": "x"})
        assert told.status_code in (400, 404), told.text


# Row 9: the list itself is in tests/workflow/test_expressions.py


@ANY_DATABASE
def test_an_expression_that_attacks_fails_its_run_or_is_refused(world: World) -> None:
    variables = {"big": list(range(2_000)), "long": "x" * 20_000}
    for source in ATTACKS:
        if not all(ch.isprintable() and ord(ch) < 0x10000 for ch in source) or len(source) > 1_000:
            continue
        nodes = [{"id": "n", "type": "set", "variables": {"x": "{{ " + source + " }}"}}]
        body = {"workflow": {"name": "w", "variables": variables, "nodes": nodes}}
        answer = world.bob.http.post(f"{WORKFLOWS}/dry-run", json=body)
        assert answer.status_code in (200, 400, 422), (source, answer.text)
        if answer.status_code == 200:
            assert answer.json().get("error") or "Traceback" not in answer.text, answer.text


# Row 10

SPELLINGS = (
    "127.0.0.1",
    "localhost",
    "127.1",
    "2130706433",
    "0x7f000001",
    "0177.0.0.1",
    "[::ffff:127.0.0.1]",
    "[::1]",
    "[64:ff9b::7f00:1]",
    "0.0.0.0",
    "127.0.0.1.",
    "user@127.0.0.1",
)


@contextmanager
def neighbour() -> Iterator[tuple[int, list[Any]]]:
    """A service beside the server, and who connected to it."""
    seen: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def take() -> None:
            try:
                while True:
                    connection, peer = listener.accept()
                    seen.append(peer)
                    connection.close()
            except OSError:
                return

        thread = threading.Thread(target=take)
        thread.start()
        try:
            yield listener.getsockname()[1], seen
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)


@ANY_DATABASE
def test_no_request_of_a_workflow_reaches_a_neighbour_in_any_spelling(world: World) -> None:
    with neighbour() as (port, seen):
        urls = [f"http://{host}:{port}/" for host in SPELLINGS]
        urls += [
            "http://169.254.169.254/latest/",
            "file:///etc/passwd",
            f"gopher://127.0.0.1:{port}",
        ]
        nodes = [
            {
                "id": f"n{n}",
                "type": "action",
                "action": "http_request",
                "parameters": {"url": url, "method": "GET", "timeout_s": 5},
                "on_error": "continue",
                "depends_on": [],
            }
            for n, url in enumerate(urls)
        ]
        output = {node["id"]: f"{{{{ nodes.{node['id']}.error.message }}}}" for node in nodes}
        run = world.bob.carry_out(workflow={"name": "ssrf", "nodes": nodes, "output": output})
        assert run["status"] == "succeeded", run
        assert len(run["output"]) == len(urls) and all(run["output"].values()), run
        assert seen == []


LINKS = (
    "http://127.0.0.1:9/cat.png",
    "http://169.254.169.254/latest/",
    "http://[::ffff:10.0.0.1]/",
    "http://0x7f.1/",
    "http://db.localhost/",
    "file:///etc/passwd",
    "gopher://example.org/",
)


@ANY_DATABASE
def test_no_model_is_asked_to_fetch_what_is_not_public(world: World) -> None:
    world.models.script(default={"text": "seen"})
    bob, runs = world.bob, []
    for url in LINKS:
        image = {"type": "input_image", "image_url": url}
        said = [{"role": "user", "content": [image]}]
        call = {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"}
        shown = [call, {"type": "function_call_output", "call_id": "c", "output": [image]}]
        file = [{"role": "user", "content": [{"type": "input_file", "file_url": url}]}]
        for sent in (said, shown, file):
            refused = bob.post({"agent": "clerk", "input": sent})
            assert "data: address" in problem(refused, 422, "invalid_request")["hint"]
            answer = bob.http.post("/v1/responses", json={"model": "agent/clerk", "input": sent})
            assert answer.status_code == 400 and "no model is asked" in answer.text, answer.text
        part = {"type": "image_url", "image_url": {"url": url}}
        chat = {"model": "agent/clerk", "messages": [{"role": "user", "content": [part]}]}
        assert bob.http.post("/v1/chat/completions", json=chat).status_code == 400
        node = {"id": "n", "type": "agent", "agent": "clerk", "input": said}
        runs.append(bob.submit(workflow={"name": "w", "nodes": [node]}))
    for run_id in runs:
        run = bob.ended(run_id)
        assert run["status"] == "failed" and "no model is asked" in run["error"]["message"], run
    assert world.models.calls == []


@ANY_DATABASE
def test_nobody_names_an_mcp_server_or_a_webhook_through_the_api(world: World) -> None:
    tool = {"type": "mcp", "server_label": "x", "server_url": "http://169.254.169.254/"}
    body = {"model": "agent/clerk", "input": "x", "tools": [tool]}
    answer = world.bob.http.post("/v1/responses", json=body)
    assert answer.status_code == 400 and "mcp" in answer.text
    options = {"mcp_servers": ["http://10.0.0.1/"]}
    body = {"agent": "clerk", "input": "x", "options": options}
    problem(world.bob.post(body), 422, "invalid_request")
    body = {"agent": "clerk", "input": "x", "webhook": "http://10.0.0.1/"}
    problem(world.bob.post(body), 422, "invalid_request")
    assert not [path for _, path in ROUTES if "hook" in path]


# Row 11

TRAVERSALS = (
    "../../../../etc/passwd",
    "..%2f..%2f..%2f..%2fetc%2fpasswd",
    "%2e%2e/%2e%2e/%2e%2e/etc/passwd",
    "..%252f..%252fetc%252fpasswd",
    "....//....//etc/passwd",
    "..\\..\\etc\\passwd",
    "/etc/passwd",
    "%2fetc%2fpasswd",
    "passwd%00.txt",
    "file:%2f%2f%2fetc%2fpasswd",
)


def raw(api: Api, path: str, key: str) -> bytes:
    """The whole answer to a path that no client has tidied."""
    host, port = api.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as peer:
        head = f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n"
        peer.sendall(f"{head}Authorization: Bearer {key}\r\n\r\n".encode("latin-1"))
        found = b""
        while part := peer.recv(65_536):
            found += part
    return found


@pytest.mark.parametrize("way", TRAVERSALS)
def test_no_path_leads_to_a_file_of_the_machine(world: World, way: str) -> None:
    for place in ("/", "/docs/", "/v1/files/", "/ui/", "/static/", "/api/v1/sessions/", f"{RUNS}/"):
        for end in ("", "/content", "/items"):
            found = raw(world.api, f"{place}{way}{end}", KEYS["bob"][1])
            status = int(found.split(b" ", 2)[1])
            assert status in (400, 401, 404, 405, 422), (place, way, found[:300])
            assert b"root:" not in found


def test_a_files_name_is_a_text_and_makes_no_file(world: World) -> None:
    before = sorted(world.folder.rglob("*"))
    for name in ("../../../evil.txt", "/tmp/evil.txt", "..\\evil.txt", "a\x7f.txt"):
        form = {"file": (name, b"x", "text/plain")}
        answer = world.bob.http.post("/v1/files", files=form, data={"purpose": "user_data"})
        assert answer.status_code == 200, answer.text
        file = answer.json()
        content = world.bob.http.get(f"/v1/files/{file['id']}/content")
        assert content.content == b"x" and name not in str(content.headers)
        document = {"kind": "document", "key": f"file:{name}", "content": "x"}
        made(world.bob, MEMORIES, {**document, "metadata": {"title": name}})
    problem(
        world.bob.http.post(MEMORIES, json={"kind": "document", "key": "a\0b", "content": "x"}),
        422,
        "invalid_request",
    )
    databases = {path for path in world.folder.rglob("*") if "agent-server.db" in path.name}
    assert set(world.folder.rglob("*")) - databases == set(before) - databases
    assert not (world.folder.parent / "evil.txt").exists()


@ANY_DATABASE
def test_an_import_takes_nothing_from_outside_its_folder(world: World, tmp_path: Path) -> None:
    (tmp_path / "secret.md").write_text("outside")
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "far.md").write_text("outside")
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "note.md").write_text("inside")
    (folder / ".hidden.md").write_text("outside")
    (folder / "link.md").symlink_to(tmp_path / "secret.md")
    (folder / "linked").symlink_to(tmp_path / "away")
    (folder / "up.md").symlink_to("../secret.md")
    key = {"AGENT_SERVER_API_KEY": KEYS["amy"][1], "AGENT_SERVER_TENANT_KEYS": "{}"}
    command = (
        "memory",
        "import",
        str(folder),
        "--namespace",
        "imported",
        "--server",
        world.api.url,
    )
    shown = world.run(*command, **key)
    assert shown.exit_code() == 0, shown.output
    found = world.amy.listed(MEMORIES, namespace="imported")
    assert [(one["key"], one["content"]) for one in found] == [("file:note.md", "inside")]


# Row 12

SHELLS = ("bash", "sh", "shell", "local_shell", "exec", "python", "code_interpreter", "apply_patch")
SHELLS += ("run_command", "terminal", "subprocess", "computer", "computer_use_preview", "eval")


@ANY_DATABASE
def test_there_is_no_tool_that_runs_commands(world: World) -> None:
    served = {tool["name"] for tool in world.api.get("/api/v1/tools")["data"]}
    assert served == {
        *("calculator", "current_time", "text_statistics"),
        *("remember", "recall", "forget", "search_documents"),
        *("pay", "gift", "read_page"),
    }
    for name in SHELLS:
        for spelt in (name, name.upper(), f" {name}", f"{name};id", f"calculator;{name}"):
            node = {"id": "n", "type": "tool", "tool": spelt, "arguments": {"command": "id"}}
            refused = world.bob.post({"workflow": {"name": "w", "nodes": [node]}})
            problem(refused, 422, "invalid_workflow")
        body = {"model": "agent/clerk", "input": "x", "tools": [{"type": name}]}
        assert world.bob.http.post("/v1/responses", json=body).status_code == 400


# Rows 14 and 17


@ANY_DATABASE
def test_a_body_too_large_or_too_deep_is_refused_before_it_is_read(world: World) -> None:
    headers = {"content-type": "application/json"}
    large = b'{"goal": "' + b"x" * 1_048_576 + b'"}'

    def chunks() -> Iterator[bytes]:
        for start in range(0, len(large), 65_536):
            yield large[start : start + 65_536]

    for content in (large, chunks()):
        refused = world.bob.http.post(RUNS, content=content, headers=headers)
        problem(refused, 413, "body_too_large")
    deep = b'{"goal": "x", "metadata": {"a":' + b"[" * 70 + b"]" * 70 + b"}}"
    problem(world.bob.http.post(RUNS, content=deep, headers=headers), 400, "malformed_body")


@ANY_DATABASE
def test_a_key_that_has_its_streams_open_gets_429_and_others_do_not(world: World) -> None:
    world.models.script(rule("hold", {"latency_s": 60, "text": "late"}))
    bob, ann = world.bob, world.ann
    runs = {name: api.submit(agent="clerk", input="hold") for name, api in (("b", bob), ("a", ann))}
    mine, hers = (f"{RUNS}/{runs[name]}" for name in ("b", "a"))
    sse = {"accept": "text/event-stream"}
    with ExitStack() as stack:
        opened = []
        for _ in range(3):
            stream = bob.http.stream("GET", f"{mine}/events", headers=sse)
            opened.append(stack.enter_context(stream).iter_raw())
            assert next(opened[-1])
        refused = bob.http.get(f"{mine}/events", headers=sse)
        told = problem(refused, 429, "rate_limited")
        assert "'bob'" in told["detail"] and refused.headers["retry-after"]
        body = {"model": "agent/clerk", "input": "x", "stream": True}
        assert bob.http.post("/v1/responses", json=body).status_code == 429
        with ann.http.stream("GET", f"{hers}/events", headers=sse) as other:
            assert other.status_code == 200
    for api, run in ((bob, mine), (ann, hers)):
        assert api.http.post(f"{run}/cancel").status_code == 200


@ANY_DATABASE
def test_a_loop_stops_at_its_bound_and_a_run_at_its_nodes(world: World) -> None:
    step = {"id": "s", "type": "set", "variables": {"x": 1}}
    loop = {"id": "l", "type": "loop", "while": "true", "nodes": [step]}
    short = {"name": "w", "nodes": [{**loop, "max_iterations": 5}]}
    run = world.bob.carry_out(workflow=short)
    assert run["status"] == "failed" and "after 5 iterations" in run["error"]["message"], run
    long = world.bob.carry_out(workflow={"name": "w", "nodes": [{**loop, "max_iterations": 9_999}]})
    assert long["status"] == "failed", long
    assert "AGENT_SERVER_MAX_RUN_NODES" in json.dumps(long["error"])
    unbounded = {"name": "w", "nodes": [{**loop, "max_iterations": 10**9}]}
    problem(world.bob.post({"workflow": unbounded}), 422, "invalid_workflow")


def test_a_workflow_that_calls_itself_is_bounded_and_its_children_share_one_budget(
    world: World,
) -> None:
    bob, place = world.bob, f"{WORKFLOWS}/again"
    ask = {"id": "ask", "type": "agent", "agent": "clerk", "input": "x"}
    assert bob.http.put(place, json={"name": "again", "nodes": [ask]}).status_code == 201
    again = {"id": "n", "type": "workflow", "workflow": "again"}
    endless = {"name": "again", "nodes": [ask, again]}
    for answer in (bob.http.put(place, json=endless), bob.post({"workflow": endless})):
        assert "calls itself" in problem(answer, 422, "invalid_workflow")["detail"]
    chain = {"name": "chain-3", "nodes": [ask]}
    for n in (2, 1, 0):
        inner = chain
        nodes = [
            {"id": f"n{k}", "type": "workflow", "workflow": inner, "depends_on": []}
            for k in range(2)
        ]
        chain = {"name": f"chain-{n}", "nodes": nodes}
    world.models.script(default={"text": "one"})
    run = bob.carry_out(workflow=chain, budget={"max_model_calls": 3})
    assert run["status"] == "budget_exceeded", run
    assert len(world.models.calls) == run["usage"]["model_calls"] == 3


@ANY_DATABASE
def test_an_agent_that_asks_itself_without_end_stops(world: World) -> None:
    world.models.script(default=calling(("ask_mirror", {"input": "deeper"})))
    run = world.bob.carry_out(agent="mirror", input="go")
    assert (run["status"], run["error"]["code"]) == ("failed", "agents_too_deep"), run
    assert len(world.models.calls) == run["usage"]["model_calls"] == 11
