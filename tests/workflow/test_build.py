"""Workflows built in Python are the data that YAML gives, and the published schema knows both."""

import json
from pathlib import Path

import jsonschema
import pytest

from agent_server.domain.workflows import NODE_MODELS
from agent_server.workflow import build as b
from agent_server.workflow.schema import definition_schema
from agent_server.workflow.source import read_source
from agent_server.workflow.validation import validate

from .test_interpreter import TRIAGE

SCHEMA = Path(__file__).parents[2] / "docs" / "workflow.schema.json"
EVERYTHING = """
name: everything
nodes:
  - {id: a, type: agent, agent: clerk, input: hello, retry: {max_attempts: 2, on: [tool_error]}}
  - {id: b, type: approach, approach: direct, input: [1], timeout_s: 5.0}
  - {id: p, type: plan, goal: "Sum {{ nodes.a.output }}", tools: [add]}
  - {id: c, type: tool, tool: add, arguments: {a: 1, b: 2}, output: sum,
     compensate: [{id: u, type: tool, tool: echo, arguments: {value: 1}}]}
  - {id: d, type: action, action: emit, parameters: {x: 1}, on_error: continue}
  - {id: e, type: set, variables: {n: 1}}
  - {id: f, type: parallel, join: any, branches: [[{id: f1, type: wait, signal: go}],
                                                  [{id: f2, type: wait, duration_s: 5.0}]]}
  - {id: g, type: branch, choose: all, cases: [{when: vars.n > 0, nodes: [{id: g1, type: set, variables: {n: 2}}]}],
     else: [{id: g2, type: set, variables: {n: 3}}]}
  - {id: h, type: map, over: "[1, 2]", as: one, nodes: [{id: h1, type: set, variables: {n: "{{ one }}"}}]}
  - {id: i, type: loop, while: vars.n < 3, max_iterations: 5, nodes: [{id: i1, type: set, variables: {n: 3}}]}
  - {id: j, type: workflow, workflow: {name: inner, nodes: [{id: x, type: set, variables: {y: 1}}]}}
  - {id: k, type: approval, subject: "Send it?", on_reject: continue}
output: {n: "{{ vars.n }}"}
"""


def built() -> b.WorkflowDefinition:
    return b.workflow(
        "everything",
        b.agent("a", "clerk", "hello", retry={"max_attempts": 2, "on": ["tool_error"]}),
        b.approach("b", "direct", [1], timeout_s=5),
        b.plan("p", "Sum {{ nodes.a.output }}", tools=["add"]),
        b.tool(
            "c",
            "add",
            {"a": 1, "b": 2},
            output="sum",
            compensate=[b.tool("u", "echo", {"value": 1})],
        ),
        b.action("d", "emit", {"x": 1}, on_error="continue"),
        b.set_("e", {"n": 1}),
        b.parallel("f", [b.wait("f1", signal="go")], [b.wait("f2", duration_s=5)], join="any"),
        b.branch(
            "g",
            b.case("vars.n > 0", b.set_("g1", {"n": 2})),
            choose="all",
            else_=[b.set_("g2", {"n": 3})],
        ),
        b.map_("h", "[1, 2]", b.set_("h1", {"n": "{{ one }}"}), as_="one"),
        b.loop("i", b.set_("i1", {"n": 3}), while_="vars.n < 3", max_iterations=5),
        b.sub("j", b.workflow("inner", b.set_("x", {"y": 1}))),
        b.approval("k", "Send it?", on_reject="continue"),
        output={"n": "{{ vars.n }}"},
    )


def test_builders_give_the_data_that_yaml_gives() -> None:
    data = read_source(EVERYTHING).data
    assert {node["type"] for node in data["nodes"]} == NODE_MODELS.keys() - {"wait"}
    assert b.data(built()) == data
    assert validate(data) == built() == validate(b.data(built()))


def test_the_published_schema_is_fresh_and_takes_what_validation_takes() -> None:
    schema = definition_schema()
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == schema
    validator = jsonschema.Draft202012Validator(schema)
    for text in (EVERYTHING, TRIAGE):
        validator.validate(read_source(text).data)
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({"name": "w", "nodes": [{"id": "a", "type": "tol"}]})
