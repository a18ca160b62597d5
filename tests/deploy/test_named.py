"""What the docs and the files for operators name is there: variables, commands and their flags."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from agent_server.cli.app import app as commands
from agent_server.settings import Settings, unknown_variables

ROOT = Path(__file__).resolve().parents[2]
HISTORY = {ROOT / "docs" / "decisions"}
PAGES = sorted(
    path
    for path in (
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "deploy").rglob("*.*"),
        *(ROOT / name for name in ("README.md", "CHANGELOG.md", "Dockerfile", "compose.yaml")),
    )
    if not HISTORY & set(path.parents)
)
TOLD = re.compile(r"^[ \t$]*(?:\w+=\S* )*(agent-server(?: .*)?)$|`(agent-server [^`]+)`", re.M)


def test_every_variable_that_a_page_names_is_a_setting() -> None:
    named = {
        name: path.name
        for path in PAGES
        for name in re.findall(r"AGENT_SERVER_[A-Z0-9_]*[A-Z0-9](?![A-Z0-9_…])", path.read_text())
    }
    assert len(named) > len(Settings.model_fields)
    placeholders = ("AGENT_SERVER_X", "AGENT_SERVER_X_FILE")
    unknown = unknown_variables(dict.fromkeys(set(named) - set(placeholders), ""))
    assert not unknown, {name: named[name] for name in unknown}


def told() -> Iterator[tuple[str, list[str]]]:
    """Each command line of a page, as words."""
    for path in PAGES:
        for found in TOLD.finditer(path.read_text()):
            line = (found[1] or found[2]).partition(" # ")[0].rstrip(" \\;&")
            try:
                yield path.name, shlex.split(line)[1:]
            except ValueError:  # An apostrophe of a sentence.
                continue


def test_every_command_and_flag_that_a_page_names_is_one_of_the_command_line() -> None:
    seen = 0
    for page, words in told():
        group: Any = typer.main.get_command(commands)
        rest = list(words)
        while rest and hasattr(group, "commands") and re.match(r"[a-z]", rest[0]):
            names = re.split(r"[|/]", rest.pop(0))
            assert set(names) <= set(group.commands), f"{page}: agent-server {' '.join(words)}"
            group = group.commands[names[0]]
        known = {name for option in group.params for name in (*option.opts, *option.secondary_opts)}
        known |= {"--help", "-h"}
        for word in rest:
            flag = re.match(r"--?[a-z][\w-]*", word)
            if flag:
                seen += 1
                assert flag[0] in known, f"{page}: agent-server {' '.join(words)}: {flag[0]}"
    assert seen > 30


def test_haproxy_takes_its_configuration(tmp_path: Path) -> None:
    haproxy = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
    if haproxy is None:
        pytest.skip("haproxy is not installed (Debian: apt-get install haproxy)")
    text = (ROOT / "deploy" / "haproxy" / "agent-server.cfg").read_text()
    for name in ("api-1", "api-2"):  # Names that only compose's network knows.
        text = text.replace(f"{name}:8000", "127.0.0.1:8000")
    config = tmp_path / "haproxy.cfg"
    config.write_text(text)
    checked = subprocess.run(
        [haproxy, "-c", "-f", str(config)], capture_output=True, text=True, timeout=30
    )
    assert checked.returncode == 0 and "WARNING" not in checked.stderr, checked.stderr
