"""What goes wrong before a run begins: a clear error in the API, on the command line, in the log."""

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.model_thread import ModelThread
from tests.support.server_process import Nursery

from .kit import BUREAU, RUNS, Api, House, Json, problem

SYNTAX = "from agents import Agent\n\nlost = Agent(name='Lost'\n\ndef broken(:\n"


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery, models: ModelThread) -> House:
    folder = tmp_path_factory.mktemp("bad")
    (folder / "broken.py").write_text(SYNTAX)
    return House(folder, nursery, models, AGENT_SERVER_AGENTS=f"{BUREAU},{folder / 'broken.py'}")


@pytest.fixture(scope="module")
def api(house: House) -> Iterator[Api]:
    api = house.start()
    yield api
    left = api.listed(RUNS)
    assert not left, "a refused request left a run"
    api.http.close()


TALKER = {"agent": "talker", "input": "hi"}
WORKFLOW = {"name": "w", "nodes": [{"id": "n", "type": "tool", "tool": "ad", "arguments": {}}]}
REFUSED: dict[str, tuple[Json, str, str]] = {
    "unknown agent": ({"agent": "talkr", "input": "hi"}, "unknown_agent", "talker"),
    "unknown agent of a goal": ({"goal": "g", "agents": ["nobody"]}, "unknown_agent", "nobody"),
    "unknown tool": ({"goal": "g", "tools": ["ad"]}, "unknown_tool", "add"),
    "unknown tool of a workflow": ({"workflow": WORKFLOW}, "invalid_workflow", "add"),
    "unknown model": ({**TALKER, "model": "litellm/"}, "unknown_model", "litellm"),
    "unknown approach": ({**TALKER, "approach": "reakt"}, "unknown_approach", "react"),
    "unknown field": ({**TALKER, "sesion_id": "x"}, "invalid_request", "session_id"),
    "two kinds": ({**TALKER, "goal": "g"}, "invalid_request", "exactly one"),
    "no kind": ({"input": "hi"}, "invalid_request", "exactly one"),
    "no input": ({"agent": "talker"}, "invalid_request", "input"),
    "field of another kind": ({"goal": "g", "input": "hi"}, "invalid_request", "agent"),
    "wrong type": ({"agent": 7, "input": "hi"}, "invalid_request", "agent"),
    "bad schema": (
        {"goal": "g", "expected_output": {"type": "objekt"}},
        "invalid_request",
        "objekt",
    ),
    "budget of nothing": ({**TALKER, "budget": {"max_tokens": 0}}, "invalid_request", "max_tokens"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_request_that_cannot_be_carried_out_is_refused_with_what_to_do(
    api: Api, what: str
) -> None:
    body, code, word = REFUSED[what]
    found = problem(api.post(body), 422, code)
    said = json.dumps([found["detail"], found.get("hint"), found.get("errors")])
    assert word in said, said
    assert found.get("hint") or found.get("errors"), found


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "malformed_body"),
        (b"not json", 400, "malformed_body"),
        (b"\xff\xfe", 400, "malformed_body"),
        (b"", 400, "malformed_body"),
        (b'{"goal": NaN}', 400, "malformed_body"),
        (b'["goal"]', 422, "invalid_request"),
        (b'{"goal": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400, "malformed_body"),
        (b'{"goal": "' + b"x" * 1_100_000 + b'"}', 413, "body_too_large"),
    ],
    ids=["cut", "words", "bytes", "empty", "nan", "list", "deep", "large"],
)
def test_a_body_that_cannot_be_read_is_refused(
    api: Api, body: bytes, status: int, code: str
) -> None:
    headers = {"content-type": "application/json"}
    problem(api.http.post(RUNS, content=body, headers=headers), status, code)


def test_what_is_not_there_is_said_in_the_same_form(api: Api) -> None:
    problem(api.http.get(f"{RUNS}/run_{'0' * 32}"), 404, "not_found")
    problem(api.http.get("/api/v1/nothing"), 404, "not_found")
    problem(api.http.delete(RUNS), 405, "method_not_allowed")
    problem(api.http.get(RUNS, params={"stauts": "failed"}), 422, "invalid_request")
    problem(api.http.post(RUNS, content=b"goal=x"), 415, "unsupported_media_type")


def test_a_broken_agents_file_is_named_with_its_line_and_the_others_are_served(
    api: Api, house: House
) -> None:
    listed = api.get("/api/v1/agents")
    assert "talker" in {agent["name"] for agent in listed["data"]}
    for (told,) in (listed["load_errors"], api.get("/api/v1/server")["load_errors"]):
        assert told["source"].endswith("broken.py") and told["line"] in (3, 5)
        assert told["message"]
    log = (house.folder / "server.log").read_text()
    assert "broken.py" in log
    shown = house.run("agents", "--server", api.url)
    assert shown.exit_code() in (0, 1)
    assert "talker" in shown.output and "broken.py" in shown.output


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("run", "--agent", "talkr", "hi"), ("talkr", "Did you mean 'talker'?")),
        (("run", "--agent", "talker", "hi", "--model", "litellm/"), ("litellm", "Hint: ")),
        (("run", "--agent", "talker", "hi", "--approach", "reakt"), ("reakt", "react")),
        (("runs", "show", "run_" + "0" * 32), ("There is no run", "Hint: ")),
        (("runs", "cancel", "nonsense"), ("There is no run", "Hint: ")),
    ],
)
def test_the_command_line_says_what_the_server_refused(
    api: Api, house: House, argv: tuple[str, ...], words: tuple[str, ...]
) -> None:
    shown = house.run(*argv, "--server", api.url)
    assert shown.exit_code() == 1, shown.output
    assert shown.output.startswith("Error: ") and "Traceback" not in shown.output
    assert all(word in shown.output for word in words), shown.output


def test_the_command_line_without_a_server_says_the_same(house: House, api: Api) -> None:
    shown = house.run(
        "run", "--agent", "talkr", "hi", AGENT_SERVER_DATA_DIR=str(house.folder / "other")
    )
    assert shown.exit_code() == 1
    assert "talkr" in shown.output and "Did you mean 'talker'?" in shown.output
    assert "Traceback" not in shown.output


def test_a_server_that_does_not_answer_is_named(house: House) -> None:
    shown = house.run("run", "goal", "--server", "http://127.0.0.1:1")
    assert shown.exit_code() == 1
    assert "No server answers at 'http://127.0.0.1:1'" in shown.output
    assert "agent-server serve" in shown.output and "Traceback" not in shown.output


def _file_in_the_way(folder: Path) -> dict[str, str]:
    (folder / "file").write_text("x")
    return {"AGENT_SERVER_DATA_DIR": str(folder / "file" / "data")}


def _garbage(folder: Path) -> dict[str, str]:
    (folder / "garbage.db").write_bytes(b"This is no database. " * 500)
    return {"AGENT_SERVER_DATABASE_URL": f"sqlite:///{folder / 'garbage.db'}"}


def _folder_for_a_file(folder: Path) -> dict[str, str]:
    (folder / "folder.db").mkdir(exist_ok=True)
    return {"AGENT_SERVER_DATABASE_URL": f"sqlite:///{folder / 'folder.db'}"}


def _not_ours(folder: Path) -> dict[str, str]:
    (folder / "closed").mkdir(mode=0o500, exist_ok=True)
    return {"AGENT_SERVER_DATA_DIR": str(folder / "closed" / "data")}


def _refused(folder: Path) -> dict[str, str]:
    return {"AGENT_SERVER_DATABASE_URL": "postgresql://ada:hunter2secret@127.0.0.1:1/x"}


def _mysql(folder: Path) -> dict[str, str]:
    return {"AGENT_SERVER_DATABASE_URL": "mysql://ada:hunter2secret@127.0.0.1/x"}


@pytest.mark.parametrize(
    "fault", [_file_in_the_way, _garbage, _folder_for_a_file, _not_ours, _refused, _mysql]
)
@pytest.mark.parametrize("command", [("serve", "--port", "0"), ("run", "goal"), ("runs", "list")])
def test_a_database_that_cannot_be_opened_ends_the_command_with_one_clear_error(
    house: House, tmp_path: Path, fault: Any, command: tuple[str, ...]
) -> None:
    if fault is _not_ours and os.geteuid() == 0:
        pytest.skip("nothing is forbidden to root")
    shown = house.run(*command, **fault(tmp_path))
    assert shown.exit_code() == 1, shown.output
    assert "Error: " in shown.output and "Hint: " in shown.output, shown.output
    assert "Traceback" not in shown.output, shown.output
    assert "hunter2secret" not in shown.output, "the password is shown"


def test_a_port_in_use_ends_serve_with_one_clear_error(house: House) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        shown = house.run("serve", "--port", port)
        assert shown.exit_code() == 1
        assert port in shown.output and "Hint: " in shown.output
        assert "Traceback" not in shown.output


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AGENT_SERVER_PORT", "99999"),
        ("AGENT_SERVER_LEASE_S", "soon"),
        ("AGENT_SERVER_LOG_LEVEL", "LOUD"),
        ("AGENT_SERVER_ENV", "production"),
        ("OPENAI_BASE_URL", "not a url"),
    ],
)
def test_a_setting_that_does_not_fit_keeps_the_server_from_starting(
    house: House, name: str, value: str
) -> None:
    fresh = {"AGENT_SERVER_DATA_DIR": str(house.folder / "third"), "AGENT_SERVER_PORT": "0"}
    shown = house.run("serve", **(fresh | {name: value}))
    assert shown.exit_code() == 1, shown.output
    assert "Error: " in shown.output and "Hint: " in shown.output
    assert name in shown.output or "production" in shown.output.lower()
    assert "Traceback" not in shown.output, shown.output


def test_an_agents_file_that_is_not_there_is_named(house: House) -> None:
    fresh = {"AGENT_SERVER_DATA_DIR": str(house.folder / "fourth")}
    shown = house.run("agents", AGENT_SERVER_AGENTS=f"{BUREAU},no/such/file.py", **fresh)
    shown.exit_code()
    assert "no/such/file.py" in shown.output and "talker" in shown.output
    assert "Traceback" not in shown.output, shown.output
