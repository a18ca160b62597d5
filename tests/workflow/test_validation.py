"""Everything that is wrong with a workflow is said at once, with its place and a suggestion."""

import copy
import time
from typing import Any

import pytest
import yaml

from agent_server.domain.errors import InvalidRequest, InvalidWorkflow
from agent_server.workflow.validation import check_inputs, validate

from .test_interpreter import TRIAGE, tool


class Names:
    """A server with one agent and one tool."""

    def has_agent(self, name: str) -> bool:
        return name == "clerk"

    def has_tool(self, name: str) -> bool:
        return name in self.tool_names()

    def tool_parameters(self, name: str) -> dict[str, Any] | None:
        number = {"type": "number"}
        schema = {"type": "object", "properties": {"a": number, "b": number}}
        return {**schema, "additionalProperties": False} if name == "add" else None

    def agent_names(self) -> list[str]:
        return ["clerk"]

    def tool_names(self) -> list[str]:
        return ["add", "echo"]

    def approach_names(self) -> list[str]:
        return ["direct", "react", "auto"]


def faults(definition: Any, **options: Any) -> dict[str, tuple[str, str | None]]:
    with pytest.raises(InvalidWorkflow) as caught:
        validate(definition, Names(), **options)
    assert caught.value.code == "invalid_workflow"
    return {e.path: (e.message, e.hint) for e in caught.value.errors}


def triage() -> Any:
    return yaml.safe_load(TRIAGE)


def flow(*nodes: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"name": "w", "nodes": list(nodes), **fields}


def test_the_example_of_the_api_is_valid_and_survives_its_own_json() -> None:
    model = validate(triage(), Names())
    assert validate(model.model_dump(mode="json"), Names()) == model
    assert validate(model, Names()) is model


def test_faults_of_form_and_of_meaning_are_told_together() -> None:
    bad = triage()
    bad["nodes"][0]["agnet"] = "x"
    bad["nodes"][0]["agent"] = "clark"
    bad["nodes"][0]["input"] = "{{ inputs.txt }}"
    bad["nodes"][1]["branches"][0][0]["type"] = "tol"
    bad["nodes"][2]["cases"] = []
    del bad["nodes"][4]["max_iterations"]
    bad["output"]["more"] = "{{ nodes.eech.output }}"
    found = faults(bad)
    assert found == {
        "/nodes/0/agnet": ("there is no field 'agnet' here", "Did you mean 'agent'?"),
        "/nodes/0/agent": ("there is no agent 'clark'", "Did you mean 'clerk'?"),
        "/nodes/0/input": ("the inputs have no 'txt'", "Did you mean 'text'?"),
        "/nodes/1/branches/0/0": ("there is no node type 'tol'", "Did you mean 'tool'?"),
        "/nodes/2/cases": ("it is empty; at least one is needed", None),
        "/nodes/4/max_iterations": (
            "the field 'max_iterations' is missing",
            "A loop needs a bound; it fails when it would go on after it.",
        ),
        "/output/more": ("there is no node 'eech'", "Did you mean 'each'?"),
    }


def test_a_cycle_is_named_from_node_to_node() -> None:
    found = faults(
        flow(
            tool("a", depends_on=["c"]),
            tool("b", depends_on=["a"]),
            tool("c", depends_on=["b"]),
            tool("d", depends_on=["c"]),
        )
    )
    assert found["/nodes/0/depends_on"][0] == "a cycle: a → c → b → a"
    assert faults(flow(tool("a", depends_on=["a"])))["/nodes/0/depends_on"][0] == "a cycle: a → a"


def test_ids_are_unique_over_all_levels() -> None:
    inner = {"id": "p", "type": "parallel", "branches": [[tool("a")]]}
    assert faults(flow(tool("a"), inner))["/nodes/1/branches/0/0/id"][0] == (
        "the id 'a' is taken by /nodes/0"
    )


def test_a_dependency_must_stand_in_the_same_list() -> None:
    inner = {"id": "p", "type": "parallel", "branches": [[tool("x")]]}
    found = faults(flow(tool("first"), inner, tool("b", depends_on=["firts", "x"])))
    assert found["/nodes/2/depends_on/0"] == (
        "'b' depends on 'firts', which does not exist",
        "Did you mean 'first'?",
    )
    assert "not in the same list" in found["/nodes/2/depends_on/1"][0]


@pytest.mark.parametrize(
    ("nodes", "path", "words"),
    [
        ([tool("a", value="{{ nodes.b }}"), tool("b")], "/nodes/0/arguments/value", "has not run"),
        ([tool("a", value="{{ nodes.a }}")], "/nodes/0/arguments/value", "its own result"),
        ([tool("a", when="nodes.a.status == ''")], "/nodes/0/when", "its own result"),
        (
            [tool("a", depends_on=[]), tool("b", depends_on=[], value="{{ nodes.a.output }}")],
            "/nodes/1/arguments/value",
            "has not run",
        ),
        (
            [
                {
                    "id": "p",
                    "type": "parallel",
                    "branches": [[tool("a")], [tool("b", value="{{ nodes.a.output }}")]],
                }
            ],
            "/nodes/0/branches/1/0/arguments/value",
            "different branches",
        ),
        (
            [{"id": "p", "type": "parallel", "branches": [[tool("a", value="{{ nodes.p }}")]]}],
            "/nodes/0/branches/0/0/arguments/value",
            "has not ended",
        ),
        (
            [
                {"id": "m", "type": "map", "over": [1], "nodes": [tool("a")]},
                tool("b", value="{{ nodes.a.output }}"),
            ],
            "/nodes/1/arguments/value",
            "inside the map 'm'",
        ),
        ([tool("a"), tool("b", value="{{ nodes }}")], "/nodes/1/arguments/value", "written out"),
        (
            [tool("a"), tool("b", value="{{ nodes.a.outptu }}")],
            "/nodes/1/arguments/value",
            "has no",
        ),
        ([tool("a", value="{{ index }}")], "/nodes/0/arguments/value", "no 'index' here"),
        ([tool("a", value="{{ vars.x }}")], "/nodes/0/arguments/value", "no variable 'x'"),
        ([tool("a", value="{{ 1 + }}")], "/nodes/0/arguments/value", "cannot be read"),
        ([tool("a", value="{{ 1")], "/nodes/0/arguments/value", "never closed"),
        ([tool("a", when="x y")], "/nodes/0/when", "cannot be read"),
        ([tool("a", "ecko")], "/nodes/0/tool", "no tool 'ecko'"),
        (
            [{"id": "a", "type": "approach", "approach": "raect", "input": ""}],
            "/nodes/0/approach",
            "no approach",
        ),
        (
            [{"id": "a", "type": "agent", "agent": "clerk", "input": "", "tools": ["no"]}],
            "/nodes/0/tools/0",
            "no tool 'no'",
        ),
        (
            [
                {
                    "id": "a",
                    "type": "agent",
                    "agent": "clerk",
                    "input": "",
                    "output_schema": {"type": "objekt"},
                }
            ],
            "/nodes/0/output_schema",
            "not a JSON Schema",
        ),
        (
            [{"id": "m", "type": "map", "over": [1], "as": "vars", "nodes": [tool("a")]}],
            "/nodes/0/as",
            "something else",
        ),
        (
            [{"id": "l", "type": "loop", "max_iterations": 1, "nodes": [tool("a")]}],
            "/nodes/0",
            "exactly one of 'while' and 'until'",
        ),
        ([{"id": "m", "type": "map", "over": [1], "nodes": []}], "/nodes/0/nodes", "empty"),
        ([{"id": "p", "type": "parallel", "branches": [[]]}], "/nodes/0/branches/0", "empty"),
        ([{"id": "1-", "type": "set", "variables": {"x": 1}}], "/nodes/0/id", "cannot be an id"),
        ([tool("a", when="1 > 2")], "/nodes/0/when", "never runs"),
        (
            [
                {
                    "id": "b",
                    "type": "branch",
                    "cases": [{"when": "true", "nodes": [tool("x")]}],
                    "else": [tool("y")],
                }
            ],
            "/nodes/0/else",
            "always taken",
        ),
        (
            [
                {
                    "id": "b",
                    "type": "branch",
                    "cases": [
                        {"when": "true", "nodes": [tool("x")]},
                        {"when": "inputs == 1", "nodes": [tool("y")]},
                    ],
                }
            ],
            "/nodes/0/cases/1",
            "earlier case",
        ),
        (
            [{"id": "m", "type": "map", "over": "len('abc')", "nodes": [tool("a")]}],
            "/nodes/0/over",
            "is a number",
        ),
        (
            [
                {"id": "s", "type": "set", "variables": {"x": 1}},
                {"id": "m", "type": "map", "over": "nodes.s.output", "nodes": [tool("a")]},
            ],
            "/nodes/1/over",
            "is an object",
        ),
        (
            [
                {"id": "s", "type": "set", "variables": {"size": 1}},
                tool("a", value="{{ nodes.s.output.sice }}"),
            ],
            "/nodes/1/arguments/value",
            "no 'sice'",
        ),
        ([tool("a", "add", a="{{ 1 }}", b="two")], "/nodes/0/arguments/b", "not of type"),
        ([tool("a", "add", value=1)], "/nodes/0/arguments/value", "no argument 'value'"),
        ([tool("a", on_error="b")], "/nodes/0/on_error", "'fail', 'continue' or the id"),
        ([tool("b"), tool("a", on_error="b")], "/nodes/1/on_error", "cannot go back"),
        ([tool("a", retry={"on": ["tol_error"]})], "/nodes/0/retry/on/0", "no error code"),
        (
            [tool("a", compensate=[tool("u", compensate=[tool("v")])])],
            "/nodes/0/compensate/0/compensate",
            "not compensated itself",
        ),
        (
            [tool("a", compensate=[tool("u")]), tool("b", value="{{ nodes.u.status }}")],
            "/nodes/1/arguments/value",
            "only runs when 'a' is undone",
        ),
        ([{"id": "w", "type": "wait"}], "/nodes/0", "exactly one of 'duration_s'"),
        ([{"id": "w", "type": "wait", "until": "tomorrow"}], "/nodes/0/until", "RFC 3339"),
        (
            [{"id": "w", "type": "wait", "duration_s": "0 - 1"}],
            "/nodes/0/duration_s",
            "at least 0",
        ),
        (
            [{"id": "p", "type": "parallel", "first": 2, "branches": [[tool("a")]]}],
            "/nodes/0",
            "of 1 branches",
        ),
        (
            [{"id": "m", "type": "map", "over": [1], "max_failures": 1, "nodes": [tool("a")]}],
            "/nodes/0",
            "needs 'on_item_error'",
        ),
        (
            [{"id": "w", "type": "workflow", "workflow": flow(tool("a", "ecko"))}],
            "/nodes/0/workflow/nodes/0/tool",
            "no tool 'ecko'",
        ),
        (
            [
                {
                    "id": "w",
                    "type": "workflow",
                    "workflow": flow(
                        tool("a"), inputs={"properties": {"n": {}}, "required": ["n"]}
                    ),
                    "input": {"m": 1},
                }
            ],
            "/nodes/0/input/m",
            "no input 'm'",
        ),
        (
            [{"id": "p", "type": "plan", "goal": "{{ nodes.x }}", "agents": ["clerk"]}],
            "/nodes/0/goal",
            "no node 'x'",
        ),
        ([{"id": "a"}], "/nodes/0", "has no 'type'"),
        ([], "/nodes", "empty"),
    ],
)
def test_this_is_refused_with_its_place(nodes: list[Any], path: str, words: str) -> None:
    found = faults(flow(*nodes))
    assert path in found and not set(found) - {path, path.rpartition("/")[0]}
    assert words in found[path][0]


def test_what_compensates_a_node_sees_its_result_and_what_it_saw() -> None:
    undo = tool("u", value="{{ [nodes.a.output, nodes.b.output, vars.booked] }}")
    assert validate(flow(tool("a"), tool("b", output="booked", compensate=[undo])), Names())


def test_a_stored_workflow_must_be_there() -> None:
    node = {"id": "w", "type": "workflow", "workflow": "nightli@3"}
    found = faults(flow(node), workflows=["nightly"])
    assert found == {
        "/nodes/0/workflow": ("there is no stored workflow 'nightli'", "Did you mean 'nightly'?")
    }


def test_the_faults_of_triggers_and_actions_are_told() -> None:
    found = faults(
        flow(
            tool("a"),
            {"id": "b", "type": "action", "action": "htpt"},
            actions=[{"trigger": "task.completed:z", "action": "emitt"}],
        ),
        actions=["http", "emit"],
    )
    assert set(found) == {"/nodes/1/action", "/actions/0/trigger", "/actions/0/action"}
    assert found["/actions/0/action"][1] == "Did you mean 'emit'?"


def test_a_revised_plan_may_refer_to_what_finished_before() -> None:
    nodes = flow(tool("b", value="{{ nodes.a.output }}", depends_on=["a"]))
    assert "/nodes/0/depends_on/0" in faults(nodes)
    assert validate(nodes, Names(), known={"a"})


@pytest.mark.parametrize("bad", [None, [], "text", {}, {"nodes": 1}, {"name": 1, "nodes": "x"}])
def test_what_is_not_a_workflow_at_all_is_refused(bad: Any) -> None:
    with pytest.raises(InvalidWorkflow):
        validate(bad)


def test_depth_and_size_are_bounded() -> None:
    node: dict[str, Any] = tool("leaf")
    for level in range(40):
        node = {"id": f"p{level}", "type": "parallel", "branches": [[node]]}
    with pytest.raises(InvalidWorkflow, match="deeper"):
        validate(flow(node))
    with pytest.raises(InvalidWorkflow, match="more than 5000 nodes"):
        validate(flow(*(tool(f"n{i}") for i in range(5_001))))
    deep: Any = 1
    for _ in range(5_000):
        deep = [deep]
    with pytest.raises(InvalidWorkflow, match="nested deeper"):
        validate(flow(tool("a", value=deep)))


def test_thousands_of_faults_are_told_in_bounded_time_and_space() -> None:
    bad = flow(
        *(tool(f"n{i}", f"ecko{i}", value=f"{{{{ nodes.x{i}.output }}}}") for i in range(3_000))
    )
    start = time.process_time()
    assert len(faults(bad)) <= 100
    assert time.process_time() - start < 5


def test_a_definition_that_is_refused_is_left_as_it_was() -> None:
    bad = flow({"id": "a", "type": "tol"})
    before = copy.deepcopy(bad)
    faults(bad)
    assert bad == before


def test_inputs_get_their_defaults_and_null_for_what_is_left_out() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"default": 2}, "c": {}},
        "required": ["a"],
    }
    definition = validate(flow(tool("t"), inputs=schema))
    assert check_inputs(definition, {"a": 1}) == {"a": 1, "b": 2, "c": None}
    assert check_inputs(validate(flow(tool("t"))), {"any": 1}) == {"any": 1}


def test_every_fault_of_the_inputs_is_told() -> None:
    schema = {
        "type": "object",
        "properties": {"text": {"type": "string"}, "n": {"type": "integer"}},
        "required": ["n"],
    }
    definition = validate(flow(tool("t"), inputs=schema))
    with pytest.raises(InvalidRequest) as caught:
        check_inputs(definition, {"text": 1, "txet": "x"})
    assert [(e.path, e.hint) for e in caught.value.errors] == [
        ("/variables/text", None),
        ("/variables", None),
        ("/variables/txet", "Did you mean 'text'?"),
    ]


def test_a_schema_that_points_elsewhere_is_a_fault_and_no_request() -> None:
    schema = {"type": "object", "$ref": "http://127.0.0.1:9/schema.json"}
    definition = validate(flow(tool("t"), inputs=schema))
    with pytest.raises(InvalidRequest, match="not in it"):
        check_inputs(definition, {})
