"""Files as somebody writes them who has not read the manual: what is printed helps them on."""

from pathlib import Path

import pytest

from tests.cli.test_commands import run_cli

HEAD = "name: x\nnodes:\n  - id: draft\n    type: agent\n    agent: w\n    input: hi\n"
SET = "  - id: a\n    type: set\n    variables:\n      x: "


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("name: x\nnodes:\n\t- id: a\n", 3, "by spaces, not by tabs"),
        (HEAD + "   retry: {}\n", 7, "the fields of a node begin in one column"),
        (HEAD + "    description: so: it is\n", 7, "a text with ': ' in it stands in quotes"),
        (HEAD + SET + "{{ inputs.topic }}\n", 10, 'in quotes: "{{ inputs.topic }}"'),
        (HEAD.replace("agent\n", "agnet\n"), 3, "Did you mean 'agent'?"),
        (HEAD + "    timeout: 3\n", 7, "Did you mean 'timeout_s'?"),
        (
            HEAD + "    timeout_s: 30s\n",
            7,
            "must be a number, not '30s' (Seconds, without a unit.)",
        ),
        (HEAD + "    retry: 3\n", 7, "Write {max_attempts: 3}."),
        (HEAD + "    depends_on: drft\n", 7, "must be a list, not 'drft' (Write [drft].)"),
        (HEAD + "    depends_on: [drft]\n", 7, "'drft', which does not exist"),
        (HEAD + "    on_error: contine\n", 7, "Did you mean 'continue'?"),
        (HEAD + HEAD[15:], 7, "the id 'draft' is taken by /nodes/0"),
        ("name: x\nnodes:\n  draft:\n    type: set\n", 2, "Begin each of them with '- '."),
        (HEAD + "  - {id: l, type: loop, while: vars.x, nodes: []}\n", 7, "A loop needs a bound"),
        (
            HEAD + "  - {id: p, type: parallel, join: som, branches: []}\n",
            7,
            "none of 'all' or 'any'",
        ),
        (HEAD + "  - {id: m, type: map, over: {a: 1}, nodes: []}\n", 7, "must be text or a list"),
        (HEAD + SET + "'{{ nodes.drafft.output }}'\n", 10, "Did you mean 'draft'?"),
        (HEAD + SET + "'{{ draft }}'\n", 10, "Write nodes.draft.output."),
        (HEAD + SET + "'{{ nodes.draft.result }}'\n", 10, "Write nodes.draft.output, or"),
        (HEAD.replace("draft", "my-node") + SET + "'{{ nodes.my-node }}'", 10, "nodes['my-node']"),
        (HEAD + SET + "'{{ length(inputs.a) }}'\n", 10, "Did you mean 'len'?"),
        (HEAD + SET + "'{{ inputs.a.upper() }}'\n", 10, "there are no methods. (Write upper(…).)"),
        (HEAD + SET + "'{{ inputs.a | upper }}'\n", 10, "upper(a), not a | upper"),
        (HEAD + SET + "'{{ inputs.a ? 1 : 2 }}'\n", 10, "Write 'a if condition else b'"),
        (HEAD + SET + "'{{ f\"{inputs.a}\" }}'\n", 10, "add texts with +"),
        (
            HEAD + SET + "'{{ [y for y in inputs.a] }}'\n",
            10,
            "A 'map' node does something for each",
        ),
        (HEAD + "    when: inputs.a = 'done'\n", 7, "Compare with '=='."),
        (HEAD + "  - {id: s, type: workflow, workflow: x}\n", 7, "calls itself: x → x (Use a loop"),
        ("inputs:\n  topic: string\n" + HEAD, 2, "{properties: {topic: {type: string}}}"),
        ("version: [1]\n" + HEAD, 1, "must be text or a whole number, not a list"),
        ("", 1, "A workflow is an object with 'name' and 'nodes'"),
    ],
)
def test_what_is_wrong_is_told_with_its_line_and_what_to_write(
    text: str, line: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "flow.yaml"
    file.write_text(text)
    assert run_cli("workflow", "validate", str(file)) == 1
    told = [told for told in capsys.readouterr().err.splitlines() if words.lower() in told.lower()]
    assert told and f"line {line}:" in told[0], capsys.readouterr().err


@pytest.mark.parametrize(
    "more",
    [
        SET + "'{{ len(inputs.a) if inputs.b == \"x\" else None }}'\n",
        "    when: inputs.a == True\n",
        "inputs: {type: object, title: t, x-mine: 1, $defs: {}, additionalProperties: true}\n",
    ],
)
def test_what_python_and_json_schema_have_and_we_have_too_is_valid(
    more: str, tmp_path: Path
) -> None:
    file = tmp_path / "flow.yaml"
    file.write_text(HEAD + more)
    assert run_cli("workflow", "validate", str(file)) == 0
