"""What a workflow does: order, results, policies and limits."""

from random import Random
from typing import Any

import pytest
import yaml

from agent_server.domain.errors import (
    BudgetExceeded,
    ErrorInfo,
    ExpressionError,
    ModelError,
    RunCancelled,
    WorkflowLimit,
)
from agent_server.domain.workflows import Node
from agent_server.execution.ports import LostLease, TaskOutcome
from agent_server.workflow.failures import NodeFailed
from agent_server.workflow.interpreter import Interpreter, run_workflow
from agent_server.workflow.steps import Steps
from agent_server.workflow.validation import validate

from .fake_context import FakeContext, World, failure, tools

TRIAGE = """
name: triage
inputs: {type: object, properties: {text: {type: string}}, required: [text]}
variables: {score: 0}
nodes:
  - {id: classify, type: agent, agent: clerk, input: "Classify: {{ inputs.text }}",
     output_schema: {type: object}}
  - {id: facts, type: parallel, branches: [[{id: a, type: tool, tool: add, arguments: {a: 1, b: 2}}],
                                           [{id: b, type: tool, tool: add, arguments: {a: 3, b: 4}}]]}
  - id: route
    type: branch
    cases: [{when: "nodes.a.output + nodes.b.output > 9",
             nodes: [{id: high, type: set, variables: {score: 2}}]}]
    else: [{id: low, type: set, variables: {score: 1}}]
  - {id: each, type: map, over: "[1, 2, 3]", as: n, max_parallel: 2,
     nodes: [{id: plus, type: tool, tool: add, arguments: {a: "{{ n }}", b: 10}}]}
  - {id: grow, type: loop, while: "vars.score < 5", max_iterations: 10,
     nodes: [{id: inc, type: set, variables: {score: "{{ vars.score + 1 }}"}}]}
output: {score: "{{ vars.score }}", sums: "{{ nodes.each.output }}", a: "{{ nodes.a.output }}"}
"""


def tool(id: str, name: str = "echo", **fields: Any) -> dict[str, Any]:
    arguments = {k: fields.pop(k) for k in ("value", "a", "b", "attempt") if k in fields}
    return {"id": id, "type": "tool", "tool": name, "arguments": arguments, **fields}


async def run(
    nodes: list[dict[str, Any]],
    output: Any = None,
    *,
    world: World | None = None,
    ctx: FakeContext | None = None,
    inputs: dict[str, Any] | None = None,
    variables: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    definition = validate(
        {"name": "test", "nodes": nodes, "output": output, "variables": variables or {}},
        known=options.get("finished", ()),
    )
    ctx = ctx or FakeContext(world or World(tools))
    return await run_workflow(ctx, definition, inputs or {}, **options)


async def test_the_example_of_the_api_ends_as_it_promises() -> None:
    world = World(tools)
    output = await run_workflow(
        FakeContext(world), validate(yaml.safe_load(TRIAGE)), {"text": "It burns"}
    )
    assert output == {"score": 5, "sums": [11, 12, 13], "a": 3}
    assert world.paths == {"1", "2.1.1", "2.2.1", "4.1.1", "4.2.1", "4.3.1"}
    assert world.specs["1"].payload == {
        "agent": "clerk",
        "input": "Classify: It burns",
        "output_schema": {"type": "object"},
    }
    assert world.skipped == {"3.2.1": "route took another way"}


async def test_nodes_of_a_list_run_one_after_another() -> None:
    ctx = FakeContext(World(tools))
    assert await run([tool("a", value=1), tool("b", value=2), tool("c", value=3)], ctx=ctx) == 3
    assert ctx.most_at_once == 1
    assert ctx.world.carried_out == ["1", "2", "3"]


async def test_depends_on_lets_the_rest_run_side_by_side() -> None:
    ctx = FakeContext(World(tools))
    nodes = [tool("a", value=1), tool("b", value=2), tool("c", value=3, depends_on=["a", "b"])]
    assert await run(nodes, ctx=ctx) == 3
    assert ctx.most_at_once == 2
    assert ctx.world.carried_out[-1] == "3"


async def test_a_node_without_depends_on_waits_for_the_results_that_it_uses() -> None:
    nodes = [
        tool("late", value="{{ nodes.early.output }}"),
        tool("early", value=7),
        tool("other", depends_on=[]),
    ]
    assert await run(nodes, "{{ nodes.late.output }}") == 7


async def test_no_more_tasks_run_at_once_than_allowed() -> None:
    ctx = FakeContext(World(tools))
    nodes = [tool(f"n{i}", value=i, depends_on=[]) for i in range(20)]
    await run(nodes, ctx=ctx, max_parallel=3)
    assert ctx.most_at_once == 3


async def test_a_map_runs_no_more_items_at_once_than_it_says_and_keeps_their_order() -> None:
    ctx = FakeContext(World(tools), random=Random(1))
    inner = tool("inner", value="{{ [item, index] }}")
    each = {"id": "m", "type": "map", "over": "inputs.all", "max_parallel": 4, "nodes": [inner]}
    output = await run([each], ctx=ctx, inputs={"all": list(range(10, 30))})
    assert output == [[10 + i, i] for i in range(20)]
    assert ctx.most_at_once == 4


async def test_a_map_over_nothing_gives_an_empty_list() -> None:
    assert await run([{"id": "m", "type": "map", "over": [], "nodes": [tool("x")]}]) == []


async def test_a_map_over_something_that_is_not_a_list_fails_with_its_name() -> None:
    with pytest.raises(NodeFailed, match=r"map 'm' goes over 'inputs.x', which gives str"):
        await run(
            [{"id": "m", "type": "map", "over": "inputs.x", "nodes": [tool("x")]}],
            inputs={"x": "abc"},
        )


async def test_parallel_gives_the_outputs_of_its_branches_in_order() -> None:
    node = {
        "id": "p",
        "type": "parallel",
        "branches": [[tool("a", value=1), tool("b", value=2)], [tool("c", value=3)]],
    }
    assert await run([node], ctx=FakeContext(World(tools), random=Random(3))) == [2, 3]


async def test_a_branch_without_a_true_case_and_without_else_gives_null() -> None:
    node = {"id": "b", "type": "branch", "cases": [{"when": "inputs == 0", "nodes": [tool("x")]}]}
    assert await run([node], ["{{ nodes.b.output }}", "{{ nodes.x.status }}"]) == [None, "skipped"]


async def test_until_is_asked_after_each_iteration() -> None:
    node = {
        "id": "l",
        "type": "loop",
        "until": "nodes.x.output >= 3",
        "max_iterations": 5,
        "nodes": [tool("x", value="{{ iteration }}")],
    }
    world = World(tools)
    assert await run([node], world=world) == 3
    assert world.carried_out == ["1.1.1", "1.2.1", "1.3.1"]


async def test_a_loop_sees_the_previous_iteration_of_a_later_node() -> None:
    node = {
        "id": "refine",
        "type": "loop",
        "until": "iteration == 3",
        "max_iterations": 3,
        "nodes": [
            tool("draft", value="{{ [nodes.check.status, nodes.check.output] }}"),
            tool("check", value="{{ 'seen ' + str(iteration) }}"),
        ],
    }
    world = World(tools)
    await run([node], world=world)
    drafts = [world.specs[f"1.{i}.1"].payload["arguments"]["value"] for i in (1, 2, 3)]
    assert drafts == [["pending", None], ["succeeded", "seen 1"], ["succeeded", "seen 2"]]


@pytest.mark.parametrize("condition", [{"while": "true"}, {"until": "false"}])
async def test_a_loop_that_would_go_on_after_its_bound_fails(condition: dict[str, str]) -> None:
    node = {"id": "l", "type": "loop", "max_iterations": 3, "nodes": [tool("x")], **condition}
    world = World(tools)
    with pytest.raises(NodeFailed) as caught:
        await run([node], world=world)
    assert caught.value.error.code == "loop_bound"
    assert len(world.carried_out) == 3


async def test_a_while_loop_may_use_all_of_its_iterations() -> None:
    node = {
        "id": "l",
        "type": "loop",
        "while": "vars.n < 3",
        "max_iterations": 3,
        "nodes": [{"id": "s", "type": "set", "variables": {"n": "{{ vars.n + 1 }}"}}],
    }
    assert await run([node], "{{ vars.n }}", variables={"n": 0}) == 3


async def test_variables_are_written_all_at_once() -> None:
    swap = {"id": "s", "type": "set", "variables": {"x": "{{ vars.y }}", "y": "{{ vars.x }}"}}
    variables = {"x": 1, "y": "{{ inputs.y }}"}
    assert await run([swap], "{{ vars }}", variables=variables, inputs={"y": 2}) == {"x": 2, "y": 1}


@pytest.mark.parametrize("seed", range(5))
async def test_of_branches_that_wrote_the_same_variable_the_last_in_the_list_counts(
    seed: int,
) -> None:
    def branch(i: int) -> list[dict[str, Any]]:
        return [tool(f"t{i}"), {"id": f"s{i}", "type": "set", "variables": {"x": i}}]

    node = {"id": "p", "type": "parallel", "branches": [branch(i) for i in range(4)]}
    ctx = FakeContext(World(tools), random=Random(seed))
    assert await run([node], "{{ vars.x }}", ctx=ctx, variables={"x": 0}) == 3


async def test_a_node_does_not_see_a_variable_written_beside_it() -> None:
    nodes = [
        {"id": "w", "type": "set", "variables": {"x": 1}, "depends_on": []},
        tool("beside", value="{{ vars.x }}", depends_on=[]),
        tool("after", value="{{ vars.x }}", depends_on=["w"]),
    ]
    output = await run(nodes, "{{ [nodes.beside.output, nodes.after.output] }}", variables={"x": 0})
    assert output == [0, 1]


async def test_when_false_skips_the_node_and_what_depends_on_it_still_runs() -> None:
    nodes = [
        tool("a", value=1, when="inputs.go"),
        tool("b", value="{{ nodes.a.status }}", when="nodes.a.status == 'skipped'"),
    ]
    world = World(tools)
    assert await run(nodes, world=world, inputs={"go": False}) == "skipped"
    assert world.skipped == {"1": "inputs.go is false"}


async def test_a_failure_ends_the_workflow_and_names_node_and_cause() -> None:
    world = World(tools)
    with pytest.raises(NodeFailed) as caught:
        await run([tool("a", value=5), tool("b", "fail"), tool("c")], world=world)
    assert caught.value.node_id == "b"
    assert caught.value.error == ErrorInfo(
        code="tool_error", message="2 failed", hint="Try something else."
    )
    assert caught.value.detail == "Node 'b' failed: 2 failed"
    assert caught.value.code == "task_failed"
    assert caught.value.finished == {"a": 5}
    assert world.paths == {"1", "2"}


async def test_on_error_continue_lets_the_rest_run_and_see_the_error() -> None:
    nodes = [
        tool("a", "fail", on_error="continue"),
        tool("b", value="{{ [nodes.a.status, nodes.a.output, nodes.a.error.code] }}"),
    ]
    assert await run(nodes) == ["failed", None, "tool_error"]


async def test_a_retry_is_a_task_of_its_own_and_its_backoff_too() -> None:
    world = World(tools)
    retry = {"max_attempts": 3, "backoff_s": 2}
    assert await run([tool("a", "fail_until", attempt=3, retry=retry)], world=world) == 3
    assert world.carried_out == ["1", "1@2.0", "1@2", "1@3.0", "1@3"]
    assert world.specs["1@2.0"].payload == {"delay_s": 2}
    assert world.specs["1@3.0"].payload == {"delay_s": 4}
    assert world.specs["1@3.0"].hidden


async def test_retries_are_bounded() -> None:
    world = World(tools)
    with pytest.raises(NodeFailed) as caught:
        await run([tool("a", "fail", retry={"max_attempts": 2})], world=world)
    assert world.carried_out == ["1", "1@2"]
    assert caught.value.path == "1@2"


async def test_only_the_named_errors_are_retried() -> None:
    world = World(tools)
    with pytest.raises(NodeFailed):
        await run([tool("a", "fail", retry={"on": ["model_error"]})], world=world)
    assert world.carried_out == ["1"]


async def test_a_composite_is_retried_as_a_whole_under_new_paths() -> None:
    def work(spec: Any) -> Any:
        if spec.path == "1.2.1":
            raise ModelError("no")
        return tools(spec)

    node = {
        "id": "p",
        "type": "parallel",
        "retry": {"max_attempts": 2},
        "branches": [[tool("a", value=1)], [tool("b", value=2)]],
    }
    world = World(work)
    assert await run([node], world=world) == [1, 2]
    assert world.paths == {"1.1.1", "1.2.1", "1@2.1.1", "1@2.2.1"}


async def test_an_expression_that_fails_is_not_retried_and_fails_its_node() -> None:
    world = World(tools)
    with pytest.raises(NodeFailed) as caught:
        await run([tool("a", value="{{ 1 / inputs.zero }}", retry={})], inputs={"zero": 0})
    assert caught.value.error.code == ExpressionError.code
    assert not world.carried_out


@pytest.mark.parametrize("where", ["parallel", "graph", "map"])
@pytest.mark.parametrize("seed", range(4))
async def test_of_failures_side_by_side_the_first_in_order_is_reported(
    where: str, seed: int
) -> None:
    parts = [tool(f"n{i}", "fail" if i in (2, 4) else "echo", value=i) for i in range(6)]
    if where == "parallel":
        nodes = [{"id": "p", "type": "parallel", "branches": [[part] for part in parts]}]
    elif where == "graph":
        nodes = [{**part, "depends_on": []} for part in parts]
    else:
        inner = {"id": "b", "type": "branch", "cases": [], "else": []}
        inner["cases"] = [{"when": "item == 2 or item == 4", "nodes": [tool("bad", "fail")]}]
        inner["else"] = [tool("good")]
        nodes = [{"id": "m", "type": "map", "over": [0, 1, 2, 3, 4, 5], "nodes": [inner]}]
    with pytest.raises(NodeFailed) as caught:
        await run(nodes, ctx=FakeContext(World(tools), random=Random(seed)))
    assert caught.value.path in {"1.3.1", "3", "1.3.1.1.1"}


async def test_a_failure_breaks_off_what_comes_later_and_starts_nothing_more() -> None:
    ctx = FakeContext(World(tools), hold=frozenset({"2"}))
    nodes = [
        tool("a", "fail", depends_on=[]),
        tool("held", depends_on=[]),
        tool("never", depends_on=["held"]),
    ]
    with pytest.raises(NodeFailed):
        await run(nodes, ctx=ctx)
    assert ctx.broken_off == {"2"}
    assert ctx.world.paths == {"1", "2"}


async def test_with_drain_everything_that_does_not_need_the_failure_is_finished() -> None:
    nodes = [
        tool("a", "fail", depends_on=[]),
        tool("b", value=2, depends_on=[]),
        tool("c", value=3, depends_on=["b"]),
        tool("d", value=4, depends_on=["a"]),
    ]
    with pytest.raises(NodeFailed) as caught:
        await run(nodes, drain=True)
    assert caught.value.finished == {"b": 2, "c": 3}


async def test_a_revised_graph_takes_finished_nodes_as_done_under_its_own_paths() -> None:
    world = World(tools)
    nodes = [
        tool("b", value="not again"),
        tool("e", value="{{ nodes.b.output + nodes.gone.output }}"),
    ]
    finished = {"b": 2, "gone": 40}
    assert await run(nodes, world=world, finished=finished, path_prefix="r2") == 42
    assert world.paths == {"r2.2"}


@pytest.mark.parametrize(
    ("code", "error"), [("budget_exceeded", BudgetExceeded), ("cancelled", RunCancelled)]
)
async def test_no_policy_holds_up_the_end_of_a_run(code: str, error: type[Exception]) -> None:
    world = World(tools)
    world.ended["1.1.1"] = failure(code)
    parallel = {"id": "p", "type": "parallel", "branches": [[tool("a", on_error="continue")]]}
    with pytest.raises(error):
        await run([{**parallel, "on_error": "continue", "retry": {}}, tool("c")], world=world)
    assert world.carried_out == []


async def test_a_cancelled_task_cancels_the_run() -> None:
    world = World(tools)
    world.ended["1"] = TaskOutcome("cancelled")
    with pytest.raises(RunCancelled):
        await run([tool("a", on_error="continue"), tool("b")], world=world)


async def test_an_error_of_the_engine_passes_through_as_it_is() -> None:
    def work(spec: Any) -> Any:
        raise LostLease

    nodes = [tool("a", depends_on=[]), tool("b", depends_on=[], on_error="continue")]
    with pytest.raises(LostLease):
        await run(nodes, world=World(work))


async def test_the_number_of_executions_is_bounded() -> None:
    inner = {"id": "s", "type": "set", "variables": {"x": 1}}
    loop = {"id": "l", "type": "loop", "while": "true", "max_iterations": 10_000, "nodes": [inner]}
    with pytest.raises(WorkflowLimit):
        await run([{**loop, "on_error": "continue"}], steps=Steps(100))
    with pytest.raises(WorkflowLimit):
        await run(
            [{"id": "m", "type": "map", "over": list(range(200)), "nodes": [inner]}],
            steps=Steps(100),
        )


class Witness:
    def __init__(self) -> None:
        self.seen: list[tuple[str, str, Any]] = []

    async def node_completed(self, node: Node, path: str, output: Any) -> None:
        self.seen.append((node.id, path, output))

    async def node_failed(self, node: Node, path: str, error: ErrorInfo) -> None:
        self.seen.append((node.id, path, error.code))

    async def node_skipped(self, node: Node, path: str, reason: str) -> None:
        self.seen.append((node.id, path, "skipped"))


async def test_an_observer_is_told_of_each_node_before_what_depends_on_it_starts() -> None:
    witness = Witness()
    nodes = [
        tool("a", value=1),
        tool("b", "fail", on_error="continue"),
        tool("c", when="inputs == 0"),
        {"id": "m", "type": "map", "over": [7], "nodes": [tool("d", value="{{ item }}")]},
    ]
    await run(nodes, observer=witness)
    assert witness.seen == [
        ("a", "1", 1),
        ("b", "2", "tool_error"),
        ("c", "3", "skipped"),
        ("d", "4.1.1", 7),
        ("m", "4", [7]),
    ]


async def test_a_result_tells_the_variables_and_what_finished() -> None:
    definition = validate(
        {
            "name": "w",
            "nodes": [tool("a", value=1), {"id": "s", "type": "set", "variables": {"x": 2}}],
        }
    )
    result = await Interpreter(FakeContext(World(tools)), definition, {}).run()
    assert (result.output, result.variables, result.finished) == (
        {"x": 2},
        {"x": 2},
        {"a": 1, "s": {"x": 2}},
    )
