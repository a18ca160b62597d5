"""Ways through a workflow: where a failure goes, who wins, what is left out, when time is up."""

from random import Random
from typing import Any

import pytest

from agent_server.domain.errors import RunCancelled
from agent_server.execution.ports import TaskOutcome
from agent_server.workflow.failures import NodeFailed

from .fake_context import FakeContext, World, tools
from .test_interpreter import run, tool


async def test_a_failure_goes_to_the_node_that_on_error_names() -> None:
    nodes = [
        tool("a", "fail", on_error="rescue"),
        tool("b", value=1),
        tool("rescue", value="{{ nodes.a.error.code }}"),
        tool("after", value="{{ nodes.rescue.output }}"),
    ]
    world = World(tools)
    assert await run(nodes, world=world) == "tool_error"
    assert world.skipped == {"2": "a failed and went to rescue"}
    assert world.carried_out == ["1", "3", "4"]


async def test_a_node_that_is_only_gone_to_is_passed_over_when_nothing_fails() -> None:
    nodes = [tool("a", value=1, on_error="rescue"), tool("b", value=2), tool("rescue", value=3)]
    world = World(tools)
    assert await run(nodes, world=world) == 2
    assert world.skipped == {"3": "nothing failed that goes to it"}


async def test_in_a_graph_only_what_depends_on_the_failure_is_passed_over() -> None:
    nodes = [
        tool("a", "fail", on_error="rescue", depends_on=[]),
        tool("b", value=1, depends_on=["a"]),
        tool("c", value=2, depends_on=[]),
        tool("rescue", value=3, depends_on=[]),
        tool("d", value="{{ [nodes.b.status, nodes.c.output] }}", depends_on=["b", "c", "rescue"]),
    ]
    world = World(tools)
    assert await run(nodes, world=world) == ["skipped", 2]
    assert set(world.carried_out) == {"1", "3", "4", "5"}


def racing(*branches: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    return {"id": "p", "type": "parallel", "branches": list(branches), **fields}


async def test_the_first_branch_that_succeeds_wins_and_the_others_are_cancelled() -> None:
    node = racing([tool("a")], [tool("f", "fail")], [tool("b", value=7)], join="any")
    world = World(tools)
    ctx = FakeContext(world, hold=frozenset({"1.1.1"}))
    after = tool("z", value="{{ [nodes.p.output, nodes.a.status, nodes.b.status] }}")
    assert await run([node, after], ctx=ctx) == [7, "cancelled", "succeeded"]
    assert world.ended["1.1.1"] == TaskOutcome("cancelled")


async def test_the_first_n_give_their_outputs_in_the_order_in_which_they_came() -> None:
    branches = [[tool(f"t{n}", value=n)] for n in range(4)]
    world = World(tools)
    output = await run([racing(*branches, first=2)], ctx=FakeContext(world, random=Random(3)))
    assert output == [int(path.split(".")[1]) - 1 for path in world.carried_out][:2]
    assert await run([racing(*branches, first=2)], ctx=FakeContext(world)) == output


async def test_a_race_fails_when_too_few_are_left() -> None:
    node = racing([tool("a", "fail")], [tool("b", "fail")], [tool("c")], first=2)
    with pytest.raises(NodeFailed, match="Node 'a' failed"):
        await run([node], ctx=FakeContext(World(tools), hold=frozenset({"1.3.1"})))


async def test_losers_write_no_variables() -> None:
    def branch(name: str) -> list[dict[str, Any]]:
        return [
            {"id": f"s{name}", "type": "set", "variables": {f"v{name}": 1}},
            tool(name, value=name),
        ]

    ctx = FakeContext(World(tools), hold=frozenset({"1.1.2"}))
    node = racing(branch("a"), branch("b"), join="any")
    variables = {"va": 0, "vb": 0}
    assert await run([node], {"x": "{{ vars }}"}, ctx=ctx, variables=variables) == {
        "x": {"va": 0, "vb": 1}
    }


async def test_every_way_whose_condition_is_true_is_taken() -> None:
    node = {
        "id": "b",
        "type": "branch",
        "choose": "all",
        "cases": [
            {"when": "inputs.n > 1", "nodes": [tool("one", value=1)]},
            {"when": "inputs.n > 5", "nodes": [tool("five", value=5)]},
            {"when": "inputs.n > 2", "nodes": [tool("two", value=2)]},
        ],
        "else": [tool("none", value=0)],
    }
    assert await run([node], inputs={"n": 3}) == [1, 2]
    assert await run([node], inputs={"n": 0}) == [0]


@pytest.mark.parametrize(("policy", "output"), [("continue", [0, None, 2, None]), ("drop", [0, 2])])
async def test_a_map_goes_on_without_the_items_that_fail(policy: str, output: Any) -> None:
    def odd_fails(spec: Any) -> Any:
        value = spec.payload["arguments"]["value"]
        return tools(spec) if value % 2 == 0 else tools(_failing(spec))

    node = {
        "id": "m",
        "type": "map",
        "over": [0, 1, 2, 3],
        "on_item_error": policy,
        "nodes": [tool("t", value="{{ item }}")],
    }
    world = World(odd_fails)
    made = await run(
        [node], {"o": "{{ nodes.m.output }}", "f": "{{ nodes.m.failures }}"}, world=world
    )
    assert made["o"] == output
    assert [(f["index"], f["error"]["code"]) for f in made["f"]] == [
        (1, "tool_error"),
        (3, "tool_error"),
    ]
    with pytest.raises(NodeFailed, match="2 of the 4 items of the map 'm' failed, more than the 1"):
        await run([{**node, "max_failures": 1}], world=World(odd_fails))


def _failing(spec: Any) -> Any:
    return type(spec)(spec.path, spec.node, spec.kind, {"tool": "fail", "arguments": {}})


async def test_the_variable_that_a_node_names_takes_its_output() -> None:
    nodes = [tool("a", value=3, output="x"), tool("b", value="{{ vars.x + 1 }}", output="x")]
    assert await run(nodes, {"x": "{{ vars.x }}"}) == {"x": 4}


async def test_a_node_with_others_inside_has_its_time_too_and_that_is_decided_once() -> None:
    node = racing([tool("a"), tool("b")], timeout_s=0.05, on_error="continue")
    after = tool("z", value="{{ [nodes.p.error.code, nodes.b.status] }}")
    world = World(tools)
    ctx = FakeContext(world, hold=frozenset({"1.1.2"}))
    assert await run([node, after], ctx=ctx) == ["task_timeout", "cancelled"]
    assert world.ended["1.1.2"] == TaskOutcome("cancelled")
    assert await run([node, after], ctx=FakeContext(world)) == ["task_timeout", "cancelled"]


async def test_a_node_that_ended_in_time_is_in_time_on_every_replay() -> None:
    node = racing([tool("a", value=1)], timeout_s=30)
    world = World(tools)
    assert await run([node], world=world) == [1]
    world.values["", "1/until"] = "2020-01-01T00:00:00+00:00"
    assert await run([node], world=world) == [1]


async def test_a_task_that_somebody_else_cancelled_ends_the_run() -> None:
    world = World(tools)
    world.ended["1"] = TaskOutcome("cancelled")
    with pytest.raises(RunCancelled):
        await run([tool("a", on_error="continue")], world=world)


@pytest.mark.parametrize(
    "node",
    [
        {"id": "a", "type": "tool", "tool": "big", "arguments": {}, "output": "x"},
        {"id": "a", "type": "set", "variables": {"x": "{{ inputs.big }}"}},
        {"id": "a", "type": "set", "variables": {f"x{i}": "{{ inputs.mega }}" for i in range(9)}},
    ],
)
async def test_a_variable_that_is_too_large_fails_its_node_and_the_policy_is_applied(
    node: dict[str, Any],
) -> None:
    world = World(lambda spec: "x" * 10_000_000 if spec.node == "a" else tools(spec))
    after = tool("z", value="{{ nodes.a.error.code }}")
    inputs = {"big": "x" * 10_000_000, "mega": "x" * 999_999}
    given = [{**node, "on_error": "continue"}, after]
    assert await run(given, world=world, inputs=inputs) == "expression_error"
