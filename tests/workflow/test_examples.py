"""The examples: each command of their README, as it stands there, with the demo model."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_commands import run_cli

EXAMPLES = Path(__file__).parents[2] / "examples"
COMMANDS = re.findall(r"^uv run agent-server (.*)$", (EXAMPLES / "README.md").read_text(), re.M)
WORKFLOWS = sorted((EXAMPLES / "workflows").glob("*.yaml"))


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder with the examples, as in a fresh clone."""
    for name in [n for n in os.environ if n.startswith(("AGENT_SERVER_", "OPENAI_"))]:
        monkeypatch.delenv(name)
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command_of(name: str) -> list[str]:
    """The README's one command that runs the workflow ``name``."""
    (found,) = [
        c for c in COMMANDS if f"run examples/workflows/{name}.yaml" in c and "--dry" not in c
    ]
    return shlex.split(found)


def carry_out(name: str, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, dict]:  # type: ignore[type-arg]
    code = run_cli(*command_of(name), *more, "--json")
    return code, json.loads(capsys.readouterr().out)


def test_every_workflow_has_its_one_command_and_is_valid(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(WORKFLOWS) == 5
    assert all(command_of(path.stem) for path in WORKFLOWS)
    files = [str(path) for path in WORKFLOWS]
    argv = ["workflow", "validate", "--agents", "examples/workflows/agents.py", *files]
    assert run_cli(*argv) == 0, capsys.readouterr().err


def test_each_command_works_as_a_process_of_its_own_in_an_empty_home(folder: Path) -> None:
    home = folder / "home"
    home.mkdir()
    kept = {n: v for n, v in os.environ.items() if n in ("PATH", "PYTHONPATH", "LANG")}
    said = {}
    for path in WORKFLOWS:
        done = subprocess.run(
            [sys.executable, "-m", "agent_server", *command_of(path.stem)],
            cwd=folder,
            env={**kept, "HOME": str(home)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        said[path.stem] = done.stdout
        assert done.returncode == int(path.stem == "saga"), done
        assert "Traceback" not in done.stdout + done.stderr
        assert not re.search(r"started: [\w-]+:\s*$", done.stdout, re.M), done.stdout
    assert "task 1!.1: tool cancel_booking = flight-lisbon is cancelled" in said["saga"]
    assert '"done": "39.00 EUR paid back to Ada"' in said["triage"]
    assert sorted(path.name for path in folder.iterdir()) == [".agent-server", "examples", "home"]


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if "--dry" in c or "graph" in c or "front" in c]
)
def test_the_other_commands_work_as_they_stand(folder: Path, command: str) -> None:
    assert run_cli(*shlex.split(command)) == 0


def test_triage_pays_back_only_what_a_person_consented_to(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, run = carry_out("triage", capsys)
    assert (code, run["output"]["done"]) == (0, "39.00 EUR paid back to Ada")
    code, run = carry_out("triage", capsys, "--reject")
    assert (code, run["output"]["done"]) == (0, "the refund was refused")
    code, run = carry_out("triage", capsys, "-v", "text=Where is my lamp?")
    assert code == 0 and run["output"]["done"].startswith("noted as ")


def test_research_maps_and_reduces_and_drops_what_fails(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, run = carry_out("research", capsys)
    assert (code, run["output"]["topics"]) == (0, 3)
    assert run["usage"]["model_calls"] == 4 and run["usage"]["tool_calls"] == 3
    assert "Sum up: Batteries" in run["output"]["report"]


def test_refine_goes_on_until_its_check_passes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, run = carry_out("refine", capsys)
    assert code == 0 and run["output"]["words"] >= 120 and run["output"]["drafts"] > 1
    code, run = carry_out("refine", capsys, "-v", "words=100000")
    assert (code, run["error"]["code"]) == (1, "task_failed")
    assert "after 6 iterations" in run["error"]["message"]


def test_saga_undoes_what_it_booked_the_last_first(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(*command_of("saga")) == 1
    out, err = capsys.readouterr()
    done = re.findall(r"tool (cancel_booking|book) = (.*)", out)
    assert done == [
        ("book", "flight-lisbon"),
        ("book", "car-lisbon"),
        ("cancel_booking", "car-lisbon is cancelled"),
        ("cancel_booking", "flight-lisbon is cancelled"),
    ]
    assert "no hotel is left for lisbon" in err
    code, run = carry_out("saga", capsys, "-v", 'parts=["flight", "car"]')
    assert (code, run["output"]["hotel"], run["output"]["car"]) == (0, None, "car-lisbon")


def test_report_sums_up_the_day_after_its_hour(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, run = carry_out("report", capsys)
    assert (code, run["output"]["title"]) == (0, "3 orders")
    assert [order["due"] for order in run["output"]["orders"]] == [0, 39.0, 0]
