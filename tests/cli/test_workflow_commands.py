"""``agent-server workflow …``, on files without a server and on stored workflows."""

import json
import os
from pathlib import Path

import pytest

from tests.cli.test_commands import run_cli
from tests.workflow.test_pictures import EVERYTHING

SUM = """\
name: sum
inputs: {type: object, properties: {a: {type: integer}, word: {type: string}}, required: [a]}
nodes:
  - {id: first, type: tool, tool: plus, arguments: {a: "{{ inputs.a }}", b: 1}}
  - id: way
    type: branch
    cases: [{when: nodes.first.output > 9, nodes: [{id: big, type: set, variables: {size: big}}]}]
    else: [{id: small, type: set, variables: {size: small}}]
output: {sum: "{{ nodes.first.output }}", size: "{{ vars.size }}", word: "{{ inputs.word }}"}
"""
AGENTS = '''
from agents import function_tool


@function_tool
def plus(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b
'''


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with a workflow and its tool, and another one to work in."""
    for name in [n for n in os.environ if n.startswith(("AGENT_SERVER_", "OPENAI_"))]:
        monkeypatch.delenv(name)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    there = tmp_path / "there"
    there.mkdir()
    (there / "sum.yaml").write_text(SUM)
    (there / "agents.py").write_text(AGENTS)
    return there


def test_validate_tells_every_error_with_its_line_and_needs_no_server(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "bad.yaml").write_text(
        SUM.replace("vars.size", "vars.sise").replace("way\n", "x y\n")
    )
    files = [str(folder / "sum.yaml"), str(folder / "bad.yaml")]
    assert run_cli("workflow", "validate", *files) == 1
    out, err = capsys.readouterr()
    assert out == f"{files[0]}: valid\n"
    assert "/nodes/1/id line 5" in err and "/output/size line 9" in err
    assert "(Did you mean 'size'?)" in err and "--agents or --server" in err
    assert run_cli("workflow", "validate", "--json", *files) == 1
    reports = json.loads(capsys.readouterr().out)
    assert reports[files[0]] == {"valid": True, "errors": []}
    assert [e["line"] for e in reports[files[1]]["errors"]] == [5, 9]
    assert list(Path.cwd().iterdir()) == []


def test_validate_looks_names_up_where_there_are_agents(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "bad.yaml").write_text(SUM.replace("tool: plus", "tool: puls"))
    argv = ["workflow", "validate", "--agents", str(folder / "agents.py")]
    assert run_cli(*argv, str(folder / "bad.yaml")) == 1
    assert "/nodes/0/tool line 4: there is no tool 'puls' (Did you mean 'plus'?)" in (
        capsys.readouterr().err
    )
    assert run_cli(*argv, str(folder / "sum.yaml")) == 0


def test_run_serves_the_agents_beside_the_file_and_reads_values_as_json_or_text(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["workflow", "run", str(folder / "sum.yaml"), "-v", "a=9", "-v", "word=hello you"]
    assert run_cli(*argv, "-q") == 0
    assert json.loads(capsys.readouterr().out) == {"sum": 10, "size": "big", "word": "hello you"}
    assert run_cli("workflow", "run", str(folder / "sum.yaml"), "--variables", '{"a": 1}') == 0
    out = capsys.readouterr().out
    assert "task 1 done: first" in out and "task 2.1.1 skipped: big" in out
    assert run_cli("workflow", "run", str(folder / "sum.yaml"), "-v", "b=1") == 1
    assert "/variables/b" in capsys.readouterr().err
    assert run_cli("workflow", "run", str(folder / "sum.yaml"), "-v", "b") == 1
    assert "not `name=value`" in capsys.readouterr().err


def test_a_file_that_does_not_fit_is_told_with_its_lines(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "bad.yaml").write_text(SUM.replace("tool: plus", "tool: puls"))
    assert run_cli("workflow", "run", str(folder / "bad.yaml"), "-v", "a=1") == 1
    assert "/nodes/0/tool line 4: there is no tool 'puls'" in capsys.readouterr().err
    (folder / "worse.yaml").write_text("name: w\nnodes: [\n  }\n")
    assert run_cli("workflow", "graph", str(folder / "worse.yaml")) == 1
    assert "line 3" in capsys.readouterr().err
    assert run_cli("workflow", "show", str(folder / "none.yaml")) == 1
    assert "cannot be read: No such file" in capsys.readouterr().err


def test_a_dry_run_tells_the_way_that_the_given_outputs_lead(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["workflow", "run", str(folder / "sum.yaml"), "--dry", "-v", "a=1"]
    assert run_cli(*argv, "--output", "first=99") == 0
    out = capsys.readouterr().out
    assert "✓ 1 first" in out and "a=1, b=1" in out or '"a": 1' in out
    assert "– 2.2.1 small" in out and "✓ 2.1.1 big" in out and '"sum": 99' in out
    assert run_cli(*argv, "--fail", "first", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["status"], found["nodes"][0]["error"]["code"]) == ("failed", "tool_error")
    assert run_cli(*argv[:3], "--output", "first=1") == 2


def test_graph_draws_a_file_as_a_tree_and_as_mermaid(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "everything.yaml").write_text(EVERYTHING)
    path = str(folder / "everything.yaml")
    assert run_cli("workflow", "graph", path) == 0
    out = capsys.readouterr().out
    for line in (
        "everything",
        "├── • ask  agent clerk",
        "│   ├── when nodes.ask.output.urgent",
        "│   │   ├── • act  tool echo  (on error rescue)",
        "│   │   └── • rescue  set done  (only if act fails)",
        "│   └── else",
        "│   └── branch 2",
        "    └── • step  set i",
    ):
        assert line in out.splitlines()
    assert run_cli("workflow", "graph", path, "--mermaid") == 0
    assert capsys.readouterr().out.startswith("flowchart TD\n")
    assert run_cli("workflow", "graph") == 2


def test_workflows_are_pushed_listed_shown_run_and_deleted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "sum.yaml"
    agents = ["--agents", str(folder / "agents.py")]
    assert run_cli("workflow", "list") == 0
    assert "No workflows are stored" in capsys.readouterr().out
    for text in (SUM, SUM, SUM.replace("b: 1", "b: 2")):
        file.write_text(text)
        assert run_cli("workflow", "push", str(file), *agents) == 0
    assert capsys.readouterr().out == "sum@1\nsum@1\nsum@2\n"
    assert run_cli("workflow", "list", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["version"] == "2"
    assert run_cli("workflow", "show", "sum@1") == 0
    assert "1 (shown)" in capsys.readouterr().out
    assert run_cli("workflow", "run", "sum@1", "-v", "a=1", "--json", *agents) == 0
    run = json.loads(capsys.readouterr().out)
    assert (run["output"]["sum"], run["workflow"], run["workflow_version"]) == (2, "sum", "1")
    assert run_cli("workflow", "graph", "--run", run["id"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("sum @1\n")
    assert "✓ first  tool plus" in out and "– big  set size" in out and "✓ small  set size" in out
    assert run_cli("workflow", "delete", "sum") == 0
    assert run_cli("workflow", "graph", "sum") == 1
    assert "There is no stored workflow 'sum'" in capsys.readouterr().err
