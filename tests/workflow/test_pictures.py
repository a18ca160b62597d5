"""Workflows seen before they run, and while they do: dry runs, graphs, states."""

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from agent_server.domain.errors import InvalidRequest, InvalidWorkflow, NotFound
from agent_server.domain.stored_workflows import DryRun, DryRunRequest, WorkflowGraph
from agent_server.domain.workflows import WorkflowDefinition
from agent_server.workflow.dry_run import dry_run
from agent_server.workflow.picture import draw, node_at, states_of
from agent_server.workflow.source import read_source
from agent_server.workflow.validation import validate
from tests.api import gates
from tests.workflow.kit import serving

EVERYTHING = """\
name: everything
inputs: {type: object, properties: {n: {type: integer, default: 3}}}
nodes:
  - id: ask
    type: agent
    agent: clerk
    input: "How urgent?"
    output_schema: {type: object, properties: {urgent: {type: boolean}}, required: [urgent]}
  - id: route
    type: branch
    cases:
      - when: nodes.ask.output.urgent
        nodes:
          - {id: sure, type: approval, subject: "Really <now>?"}
          - {id: act, type: tool, tool: echo, arguments: {value: now}, on_error: rescue}
          - {id: fine, type: set, variables: {done: true}}
          - {id: rescue, type: set, variables: {done: false}}
    else: [{id: later, type: wait, duration_s: 5}]
  - id: side-by-side
    type: parallel
    branches:
      - [{id: end, type: tool, tool: echo, arguments: {value: a}, retry: {max_attempts: 2}}]
      - [{id: sub, type: workflow, workflow: {name: sub, nodes: [
            {id: inner, type: set, variables: {x: 7}}], output: "{{ vars.x }}"}}]
  - id: each
    type: map
    over: "[1, 2]"
    nodes: [{id: plus, type: tool, tool: add, arguments: {a: "{{ item }}", b: 1}}]
  - id: again
    type: loop
    until: iteration >= inputs.n
    max_iterations: 9
    nodes: [{id: step, type: set, variables: {i: "{{ iteration }}"}}]
output: {i: "{{ vars.i }}", sub: "{{ nodes.sub.output }}", sums: "{{ nodes.each.output }}"}
"""


def definition(text: str) -> WorkflowDefinition:
    return validate(read_source(text).data)


async def dry(text: str, **asked: Any) -> DryRun:
    data = read_source(text).data
    return await dry_run("t", data, DryRunRequest(workflow=data, **asked))  # type: ignore[arg-type]


def way(found: DryRun) -> list[str]:
    return [f"{n.node}:{n.status}" for n in found.nodes]


async def test_a_dry_run_tells_the_way_and_what_each_task_would_be_told() -> None:
    found = await dry(EVERYTHING, outputs={"plus": 5, "4.2.1": 6})
    assert found.status == "succeeded"
    assert found.output == {"i": 3, "sub": 7, "sums": [5, 6]}
    by_path = {n.path: n for n in found.nodes}
    assert by_path["4.1.1"].input == {"tool": "add", "arguments": {"a": 1, "b": 1}}
    assert by_path["1"].made_up and by_path["1"].output == {"urgent": True}
    assert not by_path["4.2.1"].made_up
    assert by_path["2.2.1"].status == "skipped" and "another way" in str(by_path["2.2.1"].reason)
    assert way(found)[:4] == ["ask:succeeded", "later:skipped", "sure:succeeded", "act:succeeded"]


async def test_a_dry_run_takes_the_way_that_the_given_outputs_and_errors_lead() -> None:
    calm = await dry(EVERYTHING, outputs={"ask": {"urgent": False}, "plus": 1}, variables={"n": 1})
    assert {"later:succeeded", "sure:skipped"} <= set(way(calm))
    failing = await dry(EVERYTHING, errors={"act": "tool_error"}, outputs={"plus": 1})
    assert {"act:failed", "fine:skipped", "rescue:succeeded"} <= set(way(failing))
    fatal = await dry(EVERYTHING, errors={"4.2.1": "tool_error"}, outputs={"plus": 1})
    assert (fatal.status, fatal.nodes[-1].node) == ("failed", "each")
    assert fatal.error is not None and "plus" in fatal.error.message
    retried = await dry(EVERYTHING, errors={"3.1.1": "tool_error"}, outputs={"plus": 1})
    assert retried.status == "failed"


async def test_a_dry_run_says_which_stubs_name_nothing() -> None:
    with pytest.raises(InvalidRequest) as refused:
        await dry(EVERYTHING, outputs={"pluss": 1}, errors={"act": "tool_eror"})
    assert {e.path: e.hint for e in refused.value.errors} == {
        "outputs.pluss": "Did you mean 'plus'?",
        "errors.act": "Did you mean 'tool_error'?",
    }
    with pytest.raises(InvalidRequest, match="/variables/n"):
        await dry(EVERYTHING, variables={"n": "x"})


UNDONE = """\
name: saga
nodes:
  - {id: book, type: tool, tool: echo, arguments: {value: b}, compensate: [
      {id: unbook, type: tool, tool: echo, arguments: {value: "not {{ nodes.book.output }}"}}]}
  - {id: sub, type: workflow, workflow: {name: sub, nodes: [
      {id: hire, type: tool, tool: echo, compensate: [{id: fire, type: set, variables: {x: 1}}]},
      {id: sign, type: tool, tool: echo}]}, compensate: [{id: unsub, type: tool, tool: echo}]}
  - {id: pay, type: tool, tool: echo, compensate: [{id: refund, type: tool, tool: echo}]}
"""


@pytest.mark.parametrize(
    ("errors", "undone"),
    [
        ({}, []),
        ({"book": "tool_error"}, []),
        ({"pay": "tool_error"}, ["2!.1 unsub", "1!.1 unbook"]),
        ({"pay": "task_timeout"}, ["3!.1 refund", "2!.1 unsub", "1!.1 unbook"]),
        ({"sign": "tool_error"}, ["2.1!.1 fire", "1!.1 unbook"]),
        ({"pay": "tool_error", "unsub": "tool_error"}, ["2!.1 unsub", "1!.1 unbook"]),
    ],
)
async def test_a_dry_run_that_fails_tells_what_would_be_undone_and_in_which_order(
    errors: dict[str, str], undone: list[str]
) -> None:
    found = await dry(UNDONE, errors=errors, outputs={"book": "B"})
    told = {f"{n.path} {n.node}": n for n in found.nodes if "!" in n.path}
    assert (list(told), found.status) == (undone, "failed" if errors else "succeeded")
    if "1!.1 unbook" in told:
        assert told["1!.1 unbook"].input["arguments"] == {"value": "not B"}
    if "unsub" in errors:
        assert found.error is not None and "'sub' could not be undone" in (found.error.hint or "")


STANDING = """\
name: w
nodes:
  - {id: ask, type: approval, subject: "Pay {{ inputs.n }}?", on_reject: continue}
  - {id: rest, type: plan, goal: "Do {{ inputs.n }}", output_schema: {type: array, items: {type: integer}}}
  - {id: each, type: map, over: nodes.rest.output, on_item_error: drop, nodes: [
      {id: work, type: tool, tool: echo, arguments: {value: "{{ item }}"}}]}
  - {id: go, type: wait, signal: "go-{{ len(nodes.each.output) }}"}
  - id: race
    type: parallel
    first: 2
    branches:
      - [{id: slow, type: wait, duration_s: 60, compensate: [{id: unslow, type: tool, tool: echo}]},
         {id: then, type: tool, tool: echo}, {id: last, type: tool, tool: echo}]
      - [{id: quick, type: tool, tool: echo}]
      - [{id: odd, type: tool, tool: echo, on_error: saved},
         {id: saved, type: tool, tool: echo}]
"""


async def test_a_dry_run_waits_for_nobody_and_takes_what_it_is_told_of_those_who_decide() -> None:
    said = {"rest": [4, 5], "go": {"by": 1}, "ask": {"approved": False}}
    found = await dry(STANDING, variables={"n": 3}, outputs=said, errors={"3.2.1": "tool_error"})
    told = {n.path: n for n in found.nodes}
    assert found.status == "succeeded", found.error
    assert told["1"].input["subject"] == "Pay 3?" and told["1"].output == {"approved": False}
    assert told["2"].input["goal"] == "Do 3" and not told["2"].made_up
    assert [told[p].status for p in ("3.1.1", "3.2.1", "3")] == ["succeeded", "failed", "succeeded"]
    assert told["4"].input == {"signal": "go-1"} and told["4"].output == {"by": 1}
    assert told["5"].output == ["[what quick gives]", "[what odd gives]"]
    assert told["5.3.2"].status == "skipped"
    assert "5.1.3" not in told and told["5.1.1!.1"].node == "unslow"
    made_up = await dry(STANDING, variables={"n": 3}, errors={"quick": "tool_error"})
    told = {n.path: n for n in made_up.nodes}
    assert told["1"].output["approved"] is True and told["2"].made_up
    assert told["5"].output[-1] == "[what last gives]" and "5.1.1!.1" not in told
    rescued = await dry(STANDING, variables={"n": 3}, errors={"odd": "tool_error"})
    told = {n.path: n.status for n in rescued.nodes}
    assert (told["5.3.1"], told["5.3.2"]) == ("failed", "succeeded")


async def test_a_dry_run_that_fails_on_what_was_made_up_says_so() -> None:
    text = (
        "name: w\nnodes:\n  - {id: list, type: agent, agent: clerk, input: x}\n"
        "  - {id: each, type: map, over: nodes.list.output, nodes: [{id: s, type: set, variables: {x: 1}}]}"
    )
    found = await dry(text)
    assert found.error is not None and "not a list" in found.error.message
    assert "made up" in (found.error.hint or "")
    assert (await dry(text, outputs={"list": [1]})).status == "succeeded"


async def test_a_dry_run_that_would_not_end_is_stopped() -> None:
    text = (
        "name: w\ninputs: {properties: {n: {type: integer}}}\nnodes:\n"
        "  - {id: i, type: loop, while: '1 == inputs.n', max_iterations: 10000, nodes: [\n"
        "      {id: a, type: set, variables: {x: 1}}]}"
    )
    found = await dry(text, variables={"n": 1})
    assert found.error is not None and found.error.code == "workflow_limit"


def edges(graph: WorkflowGraph) -> set[tuple[str, str, str]]:
    return {(e.source, e.kind, e.target) for e in graph.edges}


def test_a_graph_has_every_node_and_every_way_between_them() -> None:
    graph = draw(definition(EVERYTHING))
    assert {(n.id, n.inside, n.lane) for n in graph.nodes} >= {
        ("ask", None, 0),
        ("later", "route", 1),
        ("sub", "side-by-side", 1),
        ("step", "again", 0),
    }
    assert edges(graph) == {
        ("ask", "then", "route"),
        ("route", "then", "side-by-side"),
        ("side-by-side", "then", "each"),
        ("each", "then", "again"),
        ("route", "case", "sure"),
        ("route", "case", "later"),
        ("sure", "then", "act"),
        ("act", "then", "fine"),
        ("act", "error", "rescue"),
        ("step", "again", "step"),
    }


def test_a_graph_of_dependencies_draws_each_of_them() -> None:
    text = (
        "name: w\nnodes:\n"
        "  - {id: c, type: set, variables: {x: 1}, depends_on: [a, b]}\n"
        "  - {id: a, type: set, variables: {y: 1}, depends_on: []}\n"
        "  - {id: b, type: set, variables: {z: 1}, compensate: [{id: u, type: set, variables: {q: 1}}]}\n"
    )
    graph = draw(definition(text))
    assert edges(graph) == {("a", "then", "c"), ("b", "then", "c"), ("b", "undo", "u")}
    assert [n.id for n in graph.nodes if n.inside is None] == ["a", "b", "c"]


def test_the_mermaid_text_closes_what_it_opens_and_escapes_what_users_write() -> None:
    text = draw(definition(EVERYTHING)).mermaid
    lines = [line.strip() for line in text.splitlines()]
    assert lines[0] == "flowchart TD"
    assert len([x for x in lines if x.startswith("subgraph ")]) == lines.count("end") == 4
    assert 'sure{{"sure<br/>approval: Really #lt;now#gt;?"}}' in lines
    assert 'end_["end<br/>tool echo"]' in lines
    assert 'route_if -->|"nodes.ask.output.urgent"| sure' in lines
    assert "act -. on error .-> rescue" in lines
    for line in lines[1:]:
        assert re.fullmatch(
            r'subgraph \w+\[".*"\]|direction TB|end|\w+(\W+".*"\W+)|\w+ [-.=a-z >]+(\|".*"\|)? \w+',
            line,
        ), line


def test_a_path_leads_to_the_node_whose_task_stands_there() -> None:
    found = definition(EVERYTHING)
    paths = {"1": "ask", "2.1.2": "act", "2.2.1": "later", "3.1.1@2": "end", "4.17.1": "plus"}
    for path, name in (paths | {"5.3.1": "step", "2@2.1.1": "sure"}).items():
        node = node_at(found, path)
        assert node is not None and node.id == name
    saga = definition(
        "name: w\nnodes: [{id: a, type: set, variables: {x: 1}, "
        "compensate: [{id: u, type: set, variables: {x: 0}}]}]"
    )
    undoing = node_at(saga, "1!.1")
    assert undoing is not None and undoing.id == "u"
    for path in ("9", "3.2.1.1", "3.9.1", "r2.1", "4.1.2", "0"):
        assert node_at(found, path) is None


def test_the_state_of_a_node_is_the_most_telling_of_its_items() -> None:
    found = definition(EVERYTHING)
    done = [("1", "succeeded"), ("2.1.1", "succeeded"), ("2.1.2", "failed"), ("2.2.1", "skipped")]
    states = states_of(
        found,
        [*done, ("3.1.1", "failed"), ("3.1.1@2", "running")],  # type: ignore[list-item]
        succeeded=False,
    )
    assert states["route"] == ("succeeded", 0)
    assert (states["act"][0], states["later"][0]) == ("failed", "skipped")
    assert states["end"] == ("running", 1)
    assert states["side-by-side"][0] == "running"
    assert states["each"][0] == states["plus"][0] == "pending"
    items = [("4.1.1", "succeeded"), ("4.2.1", "running"), ("4.3.1", "failed")]
    assert states_of(found, items, succeeded=False)["plus"] == ("running", 3)  # type: ignore[arg-type]


async def test_graphs_and_dry_runs_over_the_api(tmp_path: Path) -> None:
    gate = gates.Gate()
    gates.current.append(gate)
    nodes = [
        {"id": "one", "type": "tool", "tool": "echo", "arguments": {"value": "x"}},
        {"id": "two", "type": "tool", "tool": "hold"},
        {"id": "three", "type": "set", "variables": {"z": 1}},
    ]
    try:
        async with serving(tmp_path) as (client, _):
            await client.workflows.create({"name": "w", "nodes": nodes})
            graph = await client.workflows.graph("w")
            assert [(n.id, n.status) for n in graph.nodes] == [
                ("one", None),
                ("two", None),
                ("three", None),
            ]
            assert (graph.name, graph.version) == ("w", "1")
            run = await client.runs.create(workflow="w")
            await asyncio.wait_for(gate.reached.wait(), 10)
            states = {n.id: n.status for n in (await client.runs.graph(run.id)).nodes}
            assert states == {"one": "succeeded", "two": "running", "three": "pending"}
            gate.open.set()
            await client.runs.wait(run.id, timeout_s=20)
            graph = await client.runs.graph(run.id)
            assert {n.status for n in graph.nodes} == {"succeeded"}
            assert "class one,two,three succeeded" in graph.mermaid
            found = await client.workflows.dry_run("w", outputs={"two": "through"})
            assert [n.output for n in found.nodes] == ["[what one gives]", "through", {"z": 1}]
            with pytest.raises(InvalidWorkflow):
                await client.workflows.dry_run({"name": "w", "nodes": []})
            agent = await carried_out_agent(client)
            with pytest.raises(NotFound, match="has no graph"):
                await client.runs.graph(agent)
            goal = await client.runs.create(goal="Compare tea, coffee or water")
            await client.runs.wait(goal.id, timeout_s=30)
            plan = await client.runs.graph(goal.id)
            assert {n.status for n in plan.nodes} == {"succeeded"} and plan.edges
    finally:
        gates.current.pop()


async def carried_out_agent(client: Any) -> str:
    run = await client.runs.create(agent="clerk", input="hi")
    await client.runs.wait(run.id, timeout_s=20)
    return str(run.id)
