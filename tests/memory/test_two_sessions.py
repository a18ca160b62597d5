"""The example of memory: each command of its README, as it stands there, with the demo model."""

import shlex
import shutil
from pathlib import Path

import pytest

from tests.cli.test_commands import run_cli
from tests.workflow.test_examples import COMMANDS, EXAMPLES

FIRST, SECOND, FORGET = (c for c in COMMANDS if "examples/remembering.py" in c)
SEARCH, ERASE = (c for c in COMMANDS if c.startswith("memory "))


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AGENT_SERVER_DATA_DIR", str(tmp_path / "data"))
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], command: str) -> str:
    assert run_cli(*shlex.split(command)) == 0
    return capsys.readouterr().out


def kept_in_files(folder: Path, word: str) -> list[str]:
    """The files of the database in which the bytes of ``word`` are found."""
    files = [path for path in (folder / "data").rglob("*") if path.is_file()]
    assert any(path.suffix == ".db" for path in files)
    return [path.name for path in files if word.encode().lower() in path.read_bytes().lower()]


def test_what_one_session_was_told_the_next_knows_with_its_source_until_it_is_erased(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = said(capsys, FIRST)
    run_id = first.split("run ")[1].split(":")[0]
    assert " to memory" in first

    second = said(capsys, SECOND)
    assert "recalled mem_" in second
    assert f"3 May at 9:40. (written by agent secretary in {run_id})" in second
    assert f"by secretary in {run_id}" in said(capsys, SEARCH)
    assert kept_in_files(folder, "Lisbon")

    assert "forgotten" in said(capsys, FORGET)
    assert run_cli("memory", "show", "--kind", "knowledge") == 0
    assert "Lisbon" not in capsys.readouterr().out

    said(capsys, ERASE)
    assert run_cli("memory", "search", "Lisbon flight") == 0
    assert "Nothing is found" in capsys.readouterr().out
    for word in ("Lisbon", "ana/flight", "9:40"):
        assert not kept_in_files(folder, word), word
