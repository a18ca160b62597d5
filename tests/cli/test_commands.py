"""The commands, from their arguments to their output and exit code."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from agent_server import __version__
from agent_server.cli import main
from agent_server.cli.serve import bind, print_key
from agent_server.domain.errors import ConfigurationError
from tests.cli.conftest import KEY, Running


def run_cli(*argv: str) -> int:
    """The exit code of ``agent-server argv…`` in this process."""
    with pytest.raises(SystemExit) as left:
        main(argv)
    code = left.value.code
    return code if isinstance(code, int) else 0


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder to work in, and an environment without settings."""
    for name in [n for n in os.environ if n.startswith(("AGENT_SERVER_", "OPENAI_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("asked", "by_typer"),
    [(["--help"], []), (["workflow", "run", "--help"], ["pydantic"])],
)
def test_help_imports_neither_the_sdk_nor_the_web_framework_nor_the_database(
    asked: list[str], by_typer: list[str]
) -> None:
    program = (
        "import sys\nfrom agent_server.cli import main\n"
        f"try:\n    main({asked})\nexcept SystemExit: pass\n"
        "heavy = {'agents', 'openai', 'sqlalchemy', 'fastapi', 'starlette', 'uvicorn', 'httpx2',"
        " 'pydantic', 'yaml', 'structlog', 'prometheus_client'}\n"
        "print('loaded:', sorted(heavy & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "Usage: agent-server" in answer.stdout, answer.stderr
    assert f"loaded: {by_typer}" in answer.stdout


def test_the_module_is_the_command_too() -> None:
    argv = [sys.executable, "-m", "agent_server", "--version"]
    answer = subprocess.run(argv, capture_output=True, text=True)
    assert (answer.returncode, answer.stdout) == (0, f"agent-server {__version__}\n")


@pytest.mark.parametrize(
    "argv",
    [
        ["run"],
        ["run", "goal", "--workflow", "w.yaml"],
        ["run", "goal", "--variables", "{}"],
        ["runs", "list", "--limit", "0"],
        ["nonsense"],
        ["run", "goal", "--nonsense"],
    ],
)
def test_a_command_that_is_not_understood_ends_with_2(here: Path, argv: list[str]) -> None:
    assert run_cli(*argv) == 2


def test_run_follows_a_goal_and_prints_its_answer(
    server: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("run", "Do it", "--server", server.url, "--model", "demo") == 0
    out, err = capsys.readouterr()
    assert server.answers.bodies == [{"goal": "Do it", "model": "demo"}]
    assert out.startswith("run run_1: Do it\n")
    assert out.endswith("\nAnswer:\nIt is done.\n")
    assert err == ""


def test_run_names_an_agent_a_session_and_an_approach(server: Running) -> None:
    argv = ["--agent", "clerk", "--session", "s1", "--approach", "direct", "--server", server.url]
    assert run_cli("run", "Hello", *argv) == 0
    assert server.answers.bodies == [
        {"agent": "clerk", "input": "Hello", "session_id": "s1", "approach": "direct"}
    ]


def test_run_takes_a_workflow_from_a_yaml_file(server: Running, tmp_path: Path) -> None:
    file = tmp_path / "w.yaml"
    file.write_text("name: w\nnodes:\n  - {id: a, type: set, variables: {x: 1}}\n")
    argv = ["--workflow", str(file), "--variables", '{"text": "hi"}', "--server", server.url]
    assert run_cli("run", *argv) == 0
    nodes = [{"id": "a", "type": "set", "variables": {"x": 1}}]
    assert server.answers.bodies == [
        {"workflow": {"name": "w", "nodes": nodes}, "variables": {"text": "hi"}}
    ]


def test_run_says_which_line_of_a_workflow_file_is_wrong(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "w.yaml").write_text("name: w\nnodes: [\n  }\n")
    assert run_cli("run", "--workflow", "w.yaml") == 1
    assert "Error: The workflow file 'w.yaml', line 3" in capsys.readouterr().err


def test_json_prints_the_final_run_and_nothing_else(
    server: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers.succeed({"sum": 3})
    assert run_cli("run", "Do it", "--json", "--server", server.url) == 0
    out, err = capsys.readouterr()
    run = json.loads(out)
    assert (run["id"], run["status"], run["output"]) == ("run_1", "succeeded", {"sum": 3})
    assert err == ""


def test_quiet_prints_the_answer_only(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("run", "Do it", "-q", "--server", server.url) == 0
    assert capsys.readouterr().out == "It is done.\n"


def test_a_failed_run_ends_with_1_and_says_why_and_what_to_do(
    server: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers.fail("The model answered 401.", "Check OPENAI_API_KEY.")
    assert run_cli("run", "Do it", "--server", server.url) == 1
    err = capsys.readouterr().err
    assert "Error: The model answered 401.\nHint: Check OPENAI_API_KEY.\n" == err


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--agent", "nobody"], "Error: There is no agent 'nobody'."),
        (["--api-key", "wrong-key"], "Error: The key does not fit.\nHint: Set it."),
    ],
)
def test_a_refusal_is_shown_with_its_hint_and_without_a_traceback(
    server: Running, capsys: pytest.CaptureFixture[str], argv: list[str], told: str
) -> None:
    assert run_cli("run", "Hello", *argv, "--server", server.url) == 1
    err = capsys.readouterr().err
    assert told in err and "Traceback" not in err


def test_no_server_is_said_with_its_address(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("runs", "list", "--server", "127.0.0.1:1") == 1
    err = capsys.readouterr().err
    assert "Error: No server answers at 'http://127.0.0.1:1'" in err.replace("\n", " ")
    assert "Traceback" not in err


def test_ctrl_c_leaves_the_run_and_says_how_to_come_back(server: Running) -> None:
    server.answers.open_ended = True
    command = subprocess.Popen(
        [sys.executable, "-m", "agent_server", "run", "Do it", "--server", server.url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert command.stdout is not None
    assert command.stdout.readline() == "run run_1: Do it\n"
    command.send_signal(signal.SIGINT)
    _, err = command.communicate(timeout=30)
    assert command.returncode == 130
    assert f"agent-server runs follow run_1 --server {server.url}" in err
    assert "Traceback" not in err


def test_runs_are_listed_shown_followed_and_cancelled(
    server: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ["--server", server.url]
    assert run_cli("runs", "list", *at) == 0
    assert "run_1" in capsys.readouterr().out
    assert run_cli("runs", "show", "run_1", *at) == 0
    shown = capsys.readouterr().out
    assert "✓ goal Do it" in shown and shown.endswith("It is done.\n")
    assert run_cli("runs", "follow", "run_1", *at) == 0
    assert capsys.readouterr().out.endswith("It is done.\n")
    assert run_cli("runs", "cancel", "run_1", *at) == 0
    assert capsys.readouterr().out == "run_1: cancelled\n"
    assert run_cli("runs", "show", "run_9", *at) == 1
    assert "There is nothing at" in capsys.readouterr().err


def test_agents_are_listed_with_what_could_not_be_loaded(
    server: Running, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENT_SERVER_URL", server.url)
    assert run_cli("agents") == 0
    out, err = capsys.readouterr()
    assert "clerk" in out and "add" in out
    assert "other.py, line 3: invalid syntax" in err


def test_config_masks_secrets_and_names_where_values_come_from(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENT_SERVER_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary-123456")
    monkeypatch.setenv("AGENT_SERVER_DATABASE_URL", "postgresql://app:canary@db:5432/runs")
    monkeypatch.setenv("AGENT_SERVER_PROT", "9000")
    (here / ".env").write_text("AGENT_SERVER_WORKER_CONCURRENCY=7\n")
    assert run_cli("config", "--json") == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert rows["AGENT_SERVER_WORKER_CONCURRENCY"]["value"] == 7
    assert rows["AGENT_SERVER_WORKER_CONCURRENCY"]["source"] == ".env"
    assert rows["AGENT_SERVER_API_KEY"]["source"] == "environment"
    assert rows["AGENT_SERVER_HOST"] | {"description": ""} == {
        "value": "127.0.0.1",
        "source": "default",
        "description": "",
    }
    assert rows["AGENT_SERVER_DATABASE_URL"]["value"] == "postgresql://app:••••••@db:5432/runs"
    assert KEY not in out and "canary" not in out
    assert "AGENT_SERVER_PROT" in err and "Did you mean AGENT_SERVER_PORT?" in err

    assert run_cli("config") == 0
    assert KEY not in (out := capsys.readouterr().out) and "canary" not in out
    assert "Tasks this process carries out at once." in out


def test_a_setting_that_is_wrong_is_named_with_what_to_do(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENT_SERVER_PORT", "many")
    assert run_cli("config") == 1
    err = capsys.readouterr().err
    assert "AGENT_SERVER_PORT" in err and "Hint:" in err and "Traceback" not in err


def test_doctor_finds_nothing_wrong_in_an_empty_folder_and_makes_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENT_SERVER_PORT", "0")
    assert run_cli("doctor") == 0
    out = capsys.readouterr().out
    for name in (
        "database",
        "memory",
        "disk",
        "agents",
        "model",
        "key",
        "port",
        "clock",
        "open files",
    ):
        assert f" {name}: " in out
    assert "✗" not in out
    assert list(here.iterdir()) == []


def test_doctor_names_each_fault_with_its_remedy(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        (here / "agents.py").write_text("def broken(:\n")
        monkeypatch.setenv("AGENT_SERVER_PORT", str(taken.getsockname()[1]))
        monkeypatch.setenv("AGENT_SERVER_ENV", "production")
        monkeypatch.setenv("AGENT_SERVER_DATABASE_URL", "mysql://nobody@nowhere/x")
        monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
        assert run_cli("doctor") == 1
    out = capsys.readouterr().out
    faults = [line for line in out.splitlines() if line.startswith("✗")]
    assert [fault.split()[1] for fault in faults] == [
        "database:",
        "agents:",
        "model:",
        "key:",
        "port:",
    ]
    assert "agents.py" in out and "line 1" in out
    assert out.count("\n    ") >= len(faults)


def test_doctor_counts_memories_and_says_how_they_are_found(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_cli("memory", "add", "Ana likes green.", "--namespace", "people") == 0
    capsys.readouterr()
    assert run_cli("doctor") in (0, 1)
    assert "memory: 1 memories, found by words (AGENT_SERVER_EMBEDDER" in capsys.readouterr().out
    monkeypatch.setattr("agent_server.cli.doctor.LARGE_NAMESPACE", 0)
    monkeypatch.setenv("AGENT_SERVER_EMBEDDER", "openai")
    assert run_cli("doctor") in (0, 1)
    out = capsys.readouterr().out
    assert (
        "by vectors of openai, searched by sqlite-vec; 1 of them in the namespace 'people'" in out
    )
    assert "`agent-server db copy`" in out


def test_db_upgrade_brings_an_empty_folder_to_the_newest_schema_once(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("db", "upgrade") == 0
    assert "is now at revision" in capsys.readouterr().out
    assert run_cli("db", "upgrade") == 0
    assert "was already at revision" in capsys.readouterr().out
    assert run_cli("doctor") in (0, 1)
    assert "sqlite, at the newest revision" in capsys.readouterr().out


def test_a_database_that_cannot_be_opened_is_named_with_what_to_do(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "file").write_text("not a folder")
    monkeypatch.setenv("AGENT_SERVER_DATA_DIR", "file/inside")
    assert run_cli("db", "upgrade") == 1
    err = capsys.readouterr().err
    assert err.startswith("Error: ") and "Hint: " in err and "Traceback" not in err


def test_a_port_in_use_is_named_with_what_to_do() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"listens already on port {port}") as caught:
            bind("127.0.0.1", port)
    assert "--port" in (caught.value.hint or "")


def test_a_generated_key_is_told_once_with_a_call_that_uses_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_key("as-secret", 8000)
    out = capsys.readouterr().out
    assert 'curl -H "Authorization: Bearer as-secret" http://localhost:8000/api/v1/agents' in out
