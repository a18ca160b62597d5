"""A definition as text: every fault has its line, and text means what YAML 1.2 says."""

import json
from typing import Any

import pytest

from agent_server.domain.errors import InvalidWorkflow
from agent_server.workflow.source import read_source
from agent_server.workflow.validation import validate

from .test_validation import Names

BROKEN = """\
name: w
nodes:
  - id: a
    type: tool
    tool: ecko
    arguments:
      value: "{{ nodes.zz.output }}"
  - {id: l, type: loop, while: "vars.x > 1",
     nodes: [{id: b, type: tool, tool: add}]}
  - id: c
    type: tool
    tool: add
    depends_on:
      - a
      - bb
"""


def faults(text: str) -> dict[str, int | None]:
    source = read_source(text)
    with pytest.raises(InvalidWorkflow) as caught:
        validate(source.data, Names(), line=source.line)
    return {error.path: error.line for error in caught.value.errors}


def test_every_fault_of_a_text_has_its_line() -> None:
    assert faults(BROKEN) == {
        "/nodes/0/tool": 5,
        "/nodes/0/arguments/value": 7,
        "/nodes/1/max_iterations": 8,
        "/nodes/1/while": 8,
        "/nodes/2/depends_on/1": 15,
    }


def test_json_has_lines_too() -> None:
    text = json.dumps({"name": "w", "nodes": [{"id": "a", "type": "tool"}]}, indent=1)
    assert faults(text) == {"/nodes/0/tool": 4}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{on: [a], yes: no}", {"on": ["a"], "yes": "no"}),
        ("until: 2030-01-01T00:00:00Z", {"until": "2030-01-01T00:00:00Z"}),
        ("a: [1, 0x1F, -2.5, 1e3, true, ~, null, '7', 1_000]", None),
        ("a: &x [1]\nb: *x", {"a": [1], "b": [1]}),
        ('{"a": "\\u00e9"}', {"a": "é"}),
        ("a: !!str 5", {"a": "5"}),
    ],
)
def test_scalars_mean_what_yaml_1_2_says(text: str, value: Any) -> None:
    if value is None:
        value = {"a": [1, 31, -2.5, 1000.0, True, None, None, "7", "1_000"]}
    assert read_source(text).data == value


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("a: [1", "it is neither YAML nor JSON"),
        ('{"a": 1,\n "b": }', "line 2: it is not JSON"),
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' stands twice"),
        ('{"a": 1, "a": 2}', "stands twice"),
        ('{"a": NaN}', "not a JSON number"),
        ("a: !!python/object/apply:os.system [ls]", "tag"),
        ("a: !mine 1", "tag"),
        ("? [1]\n: 2", "a key must be a text"),
        ("a: 1\n---\nb: 2", "neither YAML nor JSON"),
        ("a: &a [*a]", "in itself"),
        (BOMB, "more than"),
        ("a: " + "9" * 5000, "not a number"),
        ("[" * 3000 + "]" * 3000, "nested deeper"),
        ("a: '" + "x" * 2_000_001 + "'", "longer than"),
    ],
)
def test_a_text_that_is_no_definition_is_refused_with_its_line(text: str, words: str) -> None:
    with pytest.raises(InvalidWorkflow, match=words):
        read_source(text)
