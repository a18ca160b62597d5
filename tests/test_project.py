"""The project's own files: what CI, the image and the package promise."""

import json
import re
import subprocess
import sys
from pathlib import Path

from agent_server import __version__
from scripts.refresh_pins import OLDEST, unpinned, with_pins

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, continuation lines joined."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


def final_stage() -> dict[str, list[str]]:
    """What each instruction of the last stage says."""
    found: dict[str, list[str]] = {}
    for name, rest in instructions():
        if name == "FROM":
            found = {}
        found.setdefault(name, []).append(rest)
    return found


def test_the_image_is_built_in_stages_and_leaves_the_builder_behind() -> None:
    stages = [rest for name, rest in instructions() if name == "FROM"]
    assert [stage.split()[-1] for stage in stages] == ["build", "run"]
    assert all(stage.startswith("python:3.12-slim ") for stage in stages)
    assert not any("pip install" in run or "uv " in run for run in final_stage()["RUN"])
    assert final_stage()["COPY"] == ["--from=build /opt/agent-server /opt/agent-server"]


def test_the_image_runs_unprivileged_and_writes_to_its_volume_only() -> None:
    stage = final_stage()
    assert stage["USER"] == ["agent"]
    assert stage["VOLUME"] == ["/data"] and "AGENT_SERVER_DATA_DIR=/data" in stage["ENV"][0]
    assert "PYTHONDONTWRITEBYTECODE=1" in stage["ENV"][0]
    assert stage["EXPOSE"] == ["8000"] and "AGENT_SERVER_HOST=0.0.0.0" in stage["ENV"][0]


def test_the_image_starts_closed_with_a_key_of_its_own_and_says_whether_it_lives() -> None:
    stage = final_stage()
    assert json.loads(stage["CMD"][0]) == ["agent-server", "serve", "--generate-key"]
    assert "AGENT_SERVER_ENV=production" in stage["ENV"][0]
    command = json.loads(stage["HEALTHCHECK"][0].partition("CMD ")[2])
    assert command[:2] == ["python", "-c"] and "/livez" in command[2]
    compile(command[2], "HEALTHCHECK", "exec")


def test_only_what_is_built_from_goes_into_the_image() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    copied = [r for n, r in instructions() if n == "COPY" and not r.startswith("--from")]
    wanted = {part for copy in copied for part in copy.split()[:-1]}
    assert "*" in ignored
    assert {line[1:] for line in ignored if line.startswith("!")} == wanted


def test_every_dependency_is_pinned_for_every_supported_python() -> None:
    assert unpinned(PYPROJECT) == []
    assert f'requires-python = ">={OLDEST}"' in PYPROJECT


def test_refreshing_pins_changes_nothing_but_the_pins() -> None:
    changed = with_pins(PYPROJECT, ["alembic==9.9", "tomli==2.0 ; python_full_version < '3.11'"])
    assert '    "alembic==9.9",\n    "tomli==2.0 ; python_full_version < \'3.11\'",\n' in changed
    before, after = PYPROJECT.splitlines(), changed.splitlines()
    assert {line for line in before if "==" not in line} <= set(after)


def test_the_package_and_the_project_have_one_version() -> None:
    assert f'version = "{__version__}"' in PYPROJECT


def test_ci_is_a_script_that_anyone_can_run() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "set -euo pipefail" in script.read_text()
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


def test_no_file_names_a_download_host_or_a_lock() -> None:
    assert "uv.lock" in (ROOT / ".gitignore").read_text().split()
    for name in ("pyproject.toml", "Dockerfile", "Makefile", ".ci/run"):
        assert not re.search(r"https?://\S*(pypi|index|simple|registry)", (ROOT / name).read_text())


def test_the_readme_command_is_the_installed_one() -> None:
    argv = [sys.executable, "-m", "agent_server", "--help"]
    assert "serve" in subprocess.run(argv, capture_output=True, text=True, check=True).stdout
