"""The docs are complete: what can be set, asked, called or met has its line."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import typer.main

from agent_server.cli.app import app as commands
from agent_server.cli.configuration import variable
from agent_server.domain.errors import AgentServerError, RunError, error_codes
from agent_server.domain.events import Event
from agent_server.server import create_app
from agent_server.settings import Settings
from scripts.write_docs import pages

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(pages()))
def test_generated_pages_are_current(path: str) -> None:
    found = (ROOT / path).read_text(encoding="utf-8")
    assert found == pages()[path], f"{path} is out of date: run `make docs`"


def test_every_setting_has_its_line_and_its_words() -> None:
    text = page("configuration.md")
    for name, field in Settings.model_fields.items():
        assert f"| `{variable(name)}` |" in text
        assert field.description, f"{name} has no description"


def test_every_error_code_has_its_section_with_its_status_and_no_other_has_one() -> None:
    sections = dict(re.findall(r"^### (\w+)\n(.+)$", page("errors.md"), re.MULTILINE))
    ours = {
        code: error
        for code, error in error_codes().items()
        if error.__module__.startswith("agent_server.")
        and not error.__module__.startswith("agent_server.client")
    }
    assert set(ours) == set(sections)
    for code, error in ours.items():
        if error is not AgentServerError and not issubclass(error, RunError):
            assert sections[code].startswith(f"Status {error.status}. "), code


def test_every_route_has_its_line() -> None:
    text = page("api.md")
    routes: Any = create_app(Settings(_env_file=None)).routes  # type: ignore[call-arg]
    listed = set(re.findall(r"^\| `([A-Z]+ [^`]+)` \|", text, re.MULTILINE))
    served = {
        f"{method} {getattr(route, 'path_format', route.path)}"
        for route in routes
        for method in (getattr(route, "methods", None) or ())
        if method not in ("HEAD", "OPTIONS")
    }
    assert served == listed


def test_every_event_type_has_its_line() -> None:
    listed = set(re.findall(r"^\| `([a-z_]+\.[a-z_]+)` \|", page("events.md"), re.MULTILINE))
    assert {kind.model_fields["type"].default for kind in get_args(get_args(Event)[0])} == listed


def test_every_command_and_option_has_its_line() -> None:
    text = page("cli.md")
    for command, options in _commands(typer.main.get_command(commands), "agent-server"):
        assert f"## `{command}`" in text, command
        for option in options:
            assert re.search(rf"{option}\b", text), f"{command} {option}"


def _commands(command: Any, path: str) -> list[tuple[str, list[str]]]:
    inner = getattr(command, "commands", None)
    if inner is None:
        options = [p.opts[0] for p in command.params if p.opts[0].startswith("--")]
        return [(path, [o for o in options if o != "--help"])]
    return [found for name in inner for found in _commands(inner[name], f"{path} {name}")]


def test_links_between_pages_lead_somewhere() -> None:
    for source in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", source.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (source.parent / target).exists(), f"{source.name} links to {target}"


def test_every_page_is_in_the_index() -> None:
    index = page("README.md")
    for found in DOCS.glob("*.md"):
        assert found.name == "README.md" or f"({found.name})" in index, found.name


def test_the_architecture_page_names_every_room_and_only_files_that_exist() -> None:
    text = page("architecture.md")
    source = ROOT / "src" / "agent_server"
    named = set(re.findall(r"`([\w/]+(?:\.py|/))`", text))
    for name in named - {"src/agent_server/"}:
        assert (source / name).exists(), name
    rooms = {f"{room.parent.name}/" for room in source.glob("*/__init__.py")}
    doors_to_come = {"protocols/", "ui/"}
    assert rooms - doors_to_come - {"testing/"} <= named


def test_each_attack_has_its_row_and_every_test_it_names_exists() -> None:
    rows = re.findall(r"^\| (\d+) \| .+ \| (`.+`) \|$", page("security.md"), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 18))
    for number, tests in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", tests)
        assert named and len(named) == tests.count("`") / 2, number
        for file, name in named:
            source = (ROOT / file).read_text(encoding="utf-8")
            assert re.search(rf"^(async )?def {name}\(", source, re.MULTILINE), f"{file}::{name}"


DANGEROUS = re.compile(
    r"^\s*(import|from) (pickle|marshal|shelve|dill|cloudpickle)\b"
    r"|\b(eval|exec)\(|\byaml\.(load|unsafe_load|full_load)\(|\bos\.(system|popen)\(|shell=True",
    re.MULTILINE,
)


def test_no_module_reads_objects_or_code_out_of_data() -> None:
    for file in (ROOT / "src").rglob("*.py"):
        found = DANGEROUS.search(file.read_text(encoding="utf-8"))
        assert found is None, f"{file}: {found}"
    assert all(DANGEROUS.search(text) for text in ("import pickle", "x = eval(y)", "yaml.load(z)"))


def test_the_words_of_the_house_have_one_meaning_each() -> None:
    words = re.findall(r"^\| \*\*(.+?)\*\* \|", page("glossary.md"), re.MULTILINE)
    assert len(words) == len(set(words))
    assert set(
        "Goal Plan Task Run Step Event Agent Approach Memory Action Trigger Signal Approval Budget "
        "Principal Tenant".split()
    ) <= set(words)


def test_the_first_agent_of_the_readme_has_at_most_twelve_lines_and_compiles() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks[0].strip().splitlines()) <= 12
    for block in blocks:
        compile(block, "README.md", "exec")
