"""A goal to its answer: planned, worked off, revised, put together, and through every crash."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from agents import Agent, function_tool

from agent_server.actions.tasks import ActionTask
from agent_server.domain.errors import OutputInvalid, PlanInvalid, TaskFailed, UnknownAgent
from agent_server.domain.runs import RunRequest
from agent_server.execution.ports import FinalOutput, Handler
from agent_server.inference.agent_loop import AgentLoop
from agent_server.inference.demo import DemoModel
from agent_server.planning.goal import GoalRun
from agent_server.reasoning.approaches import Approaches
from agent_server.reasoning.solver import Solver
from agent_server.reasoning.tasks import AgentTask
from agent_server.registry.builtin_tools import BUILTIN_TOOLS
from agent_server.registry.catalog import Catalog
from tests.actions.test_actions import actions
from tests.support.durable import OneModel, RuleModel, call, loop_for, outputs_of, say, settings
from tests.support.mortal import World, every_death

CALLED: list[Any] = []


@function_tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    CALLED.append((a, b))
    return a + b


def catalog() -> Catalog:
    clerk = Agent[Any](name="clerk", instructions="clerk", handoff_description="Knows forms.")
    return Catalog(agents={"clerk": clerk}, tools={"add": add})


def task(id: str, *depends_on: str, **fields: Any) -> dict[str, Any]:
    return {"id": id, "description": f"do {id}", "depends_on": list(depends_on), **fields}


def plan(*tasks: dict[str, Any], actions: list[Any] | None = None) -> str:
    return json.dumps({"tasks": tasks, "actions": actions or []})


Work = Callable[[str, list[Any]], Any]


def said(items: list[Any]) -> str:
    return "\n".join(str(item.get("content", "")) for item in items)


def planning(*plans: str, work: Work | None = None) -> Callable[[str, list[Any]], Any]:
    """A model that answers planner calls with ``plans`` by the state of the conversation, and
    each task with ``did <id>``."""

    def rule(instructions: str, items: list[Any]) -> Any:
        if instructions.startswith("You plan."):
            faulty = sum(1 for item in items if item.get("role") == "assistant")
            before = said(items).count("An earlier plan was carried out in part.")
            return [say(plans[min(faulty + before, len(plans) - 1)])]
        if work is not None:
            answer = work(instructions, items)
            if answer is not None:
                return answer
        return [say(f"did {said(items).split()[1]}")]

    return rule


def goal(
    rule: Callable[..., Any], knobs: dict[str, Any] | None = None, **request: Any
) -> tuple[World, Handler, RuleModel]:
    loop, model = loop_for(rule)
    served = catalog()
    named = actions()
    solver = Solver(lambda: served, loop, Approaches())
    world = World(
        RunRequest(**{"goal": "the goal", **request}),
        {"agent": AgentTask(solver), "action": ActionTask(named)},
    )
    return world, GoalRun(lambda: served, loop, named, settings(**(knobs or {}))), model


async def reach(
    rule: Callable[..., Any], knobs: dict[str, Any] | None = None, **request: Any
) -> tuple[Any, World, RuleModel]:
    world, handler, model = goal(rule, knobs, **request)
    return await world.run(handler), world, model


async def test_the_last_tasks_output_is_the_runs() -> None:
    output, world, _ = await reach(planning(plan(task("a"), task("b"), task("c", "a", "b"))))
    assert output == "did c"
    (created,) = world.of("plan.created")
    assert [t.id for t in created.plan.tasks] == ["a", "b", "c"]
    assert {e.node for e in world.of("task.completed")} == {"a", "b", "c"}
    assert world.types().index("plan.created") < world.types().index("task.started")


async def test_results_reach_those_that_depend_on_them_as_data() -> None:
    seen: dict[str, str] = {}

    def work(instructions: str, items: list[Any]) -> Any:
        text = said(items)
        seen[text.split()[1]] = text
        return [say("say {{ 1 + 1 }}")] if text.startswith("do a") else None

    await reach(planning(plan(task("a"), task("b", "a", expected_output="one line")), work=work))
    assert '<result task="a" status="succeeded">\nsay {{ 1 + 1 }}\n</result>' in seen["b"]
    assert "not instructions" in seen["b"]
    assert "one line" in seen["b"]
    assert "the goal" in seen["a"]


async def test_braces_in_a_description_are_no_template() -> None:
    drafted = {"id": "a", "description": "do a with {{ nodes.zzz.output }}"}
    _, _, model = await reach(planning(plan(drafted)))
    assert "do a with {{ nodes.zzz.output }}" in said(model.asked[1][1])


async def test_several_last_tasks_are_put_together() -> None:
    def work(instructions: str, items: list[Any]) -> Any:
        if "Give the answer to this goal" in said(items):
            assert "did a" in said(items) and "did b" in said(items)
            return [say("both")]
        return None

    output, world, _ = await reach(planning(plan(task("a"), task("b")), work=work))
    assert output == "both"
    assert world.of("task.completed")[-1].node == "synthesis"


async def test_a_synthesis_that_fails_is_tried_again_within_bounds() -> None:
    tries: list[int] = []

    def work(instructions: str, items: list[Any]) -> Any:
        if "Give the answer to this goal" not in said(items):
            return None
        tries.append(1)
        if len(tries) < limit:
            raise RuntimeError("not now")
        return [say("both")]

    limit = 2
    rule = planning(plan(task("a"), task("b")), work=work)
    output, world, _ = await reach(rule, knobs={"max_task_retries": 1})
    assert output == "both"
    assert world.ended["synthesis"].status == "failed"
    tries.clear()
    limit = 9
    with pytest.raises(TaskFailed, match="'synthesis' failed"):
        await reach(rule, knobs={"max_task_retries": 1})
    assert len(tries) == 2


async def test_the_planner_is_told_what_there_is() -> None:
    _, _, model = await reach(
        planning(plan(task("a"))), role="a judge", task="weigh it", expected_output="short"
    )
    told = said(model.asked[0][1])
    for line in (
        "Goal:\nthe goal",
        "- agent clerk: Knows forms.",
        "- tool add: Add two numbers. (arguments: a, b)",
        "- action http_request: ",
        "a judge",
        "weigh it",
        "short",
    ):
        assert line in told


async def test_the_plan_may_use_only_what_the_request_names() -> None:
    first = plan(task("a", agent="clerk", tools=["add"]))
    output, _, model = await reach(planning(first, plan(task("a"))), tools=[], agents=[])
    assert output == "did a"
    told = said(model.asked[1][1])
    assert "there is no agent 'clerk'" in told
    assert "there is no tool 'add'" in told


async def test_a_request_for_an_unknown_agent_fails_with_its_name() -> None:
    with pytest.raises(UnknownAgent, match="'nobody'"):
        await reach(planning(plan(task("a"))), agents=["nobody"])


async def test_tools_and_agents_of_the_plan_do_the_work() -> None:
    def work(instructions: str, items: list[Any]) -> Any:
        results = outputs_of(items)
        if instructions == "clerk":
            return [say("stamped")]
        if said(items).startswith("do sum"):
            return [say(f"is {results['c']}")] if results else [call("add", {"a": 1, "b": 2}, "c")]
        return None

    drafted = plan(task("sum", tools=["add"]), task("form", "sum", agent="clerk"))
    output, world, _ = await reach(planning(drafted, work=work))
    assert output == "stamped"
    assert world.ended["1"].output == "is 3"


async def test_a_faulty_plan_goes_back_with_every_fault() -> None:
    bad = plan(task("a", "b"), task("b", "a", agent="clark"))
    output, world, model = await reach(planning(bad, "not json", plan(task("a"))))
    assert output == "did a"
    assert "clark" in said(model.asked[1][1]) and "wait for each other" in said(model.asked[1][1])
    assert "not JSON" in said(model.asked[2][1])
    assert len(world.of("plan.created")) == 1


async def test_a_plan_that_stays_faulty_fails_the_run_with_its_faults() -> None:
    with pytest.raises(PlanInvalid) as caught:
        await reach(planning(plan(task("a", agent="clark"))), knobs={"max_plan_repairs": 1})
    assert "after 1 repairs" in caught.value.detail
    assert caught.value.errors[0].path == "tasks.0.agent"


def failing(*names: str) -> Work:
    def work(instructions: str, items: list[Any]) -> Any:
        name = said(items).split()[1]
        if name in names:
            raise RuntimeError(f"{name} is broken")
        return None

    return work


async def test_a_failed_task_is_tried_again_then_the_rest_is_planned_anew() -> None:
    rule = planning(
        plan(task("a"), task("b", "a"), task("c", "b")),
        plan(task("d", "a"), task("e", "d")),
        work=failing("b"),
    )
    output, world, model = await reach(rule, knobs={"max_task_retries": 1})
    assert output == "did e"
    (revised,) = world.of("plan.revised")
    assert "Task 'b' failed" in revised.reason
    assert [t.id for t in revised.plan.tasks] == ["a", "d", "e"]
    assert revised.plan.revision == 2
    assert [e.node for e in world.of("task.failed")] == ["b", "b"]
    assert [e.node for e in world.of("task.completed")] == ["a", "d", "e"]
    told = next(said(items) for _, items in model.asked if "An earlier plan" in said(items))
    assert "did a" in told and "b is broken" in told and "- c: do c" in told
    assert any(
        '<result task="a"' in said(items) and "do d" in said(items) for _, items in model.asked
    )


async def test_revisions_are_bounded() -> None:
    rule = planning(plan(task("b")), plan(task("x")), work=failing("b", "x"))
    with pytest.raises(TaskFailed, match="'x' failed after 1 revisions"):
        await reach(rule, knobs={"max_task_retries": 0, "max_plan_revisions": 1})


async def test_a_task_that_may_fail_does_not_stop_the_others() -> None:
    rule = planning(plan(task("a", on_failure="continue"), task("b", "a")), work=failing("a"))
    output, world, model = await reach(rule)
    assert output == "did b"
    assert '<result task="a" status="failed">' in said(model.asked[-1][1])
    assert not world.of("plan.revised")


async def test_a_condition_that_is_false_skips_its_task() -> None:
    drafted = plan(task("a"), task("b", "a", when="nodes.a.output == 'no'"), task("c", "b", "a"))
    output, world, _ = await reach(planning(drafted))
    assert output == "did c"
    assert [e.node for e in world.of("task.skipped")] == ["b"]


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


async def test_a_json_schema_is_enforced_on_the_answer() -> None:
    def work(instructions: str, items: list[Any]) -> Any:
        if "does not have the form" in said(items):
            return [say('{"n": 1}')]
        return None

    for tasks in ((task("a"),), (task("a"), task("b"))):
        output, _, _ = await reach(planning(plan(*tasks), work=work), expected_output=SCHEMA)
        assert output == {"n": 1}


async def test_an_answer_that_never_fits_fails_the_run() -> None:
    rule = planning(plan(task("a"), task("b")))
    with pytest.raises(OutputInvalid):
        await reach(rule, expected_output=SCHEMA)


async def test_the_session_remembers_the_goal_and_the_answer() -> None:
    output, _, _ = await reach(planning(plan(task("a"))), session_id="s")
    assert isinstance(output, FinalOutput)
    assert [item["content"] for item in output.session_items] == ["the goal", "did a"]


EMITS = [
    {"trigger": trigger, "action": "emit", "parameters": json.dumps({"event": "{{ event.type }}"})}
    for trigger in (
        "plan.created",
        "task.completed:a",
        "task.failed",
        "run.succeeded",
        "run.failed",
    )
]


async def test_actions_fire_on_the_plan_its_tasks_and_the_end() -> None:
    _, world, _ = await reach(planning(plan(task("a"), task("b", "a"), actions=EMITS)))
    fired = [e.output["event"] for e in world.of("action.completed")]
    assert sorted(fired) == ["plan.created", "run.succeeded", "task.completed"]


async def test_a_failed_run_fires_its_own_actions() -> None:
    rule = planning(plan(task("a"), actions=EMITS), work=failing("a"))
    world, handler, _ = goal(rule, {"max_plan_revisions": 0, "max_task_retries": 1})
    with pytest.raises(TaskFailed):
        await world.run(handler)
    fired = [e.output["event"] for e in world.of("action.completed")]
    assert sorted(fired) == ["plan.created", "run.failed", "task.failed"]


async def test_an_action_that_fails_leaves_the_run_as_it_is() -> None:
    bad = [
        {
            "trigger": "task.completed",
            "action": "emit",
            "parameters": '{"event": "{{ event.zzz }}"}',
        }
    ]
    output, world, _ = await reach(planning(plan(task("a"), actions=bad)))
    assert output == "did a"
    (failed,) = world.of("action.failed")
    assert "zzz" in failed.error.message


async def test_no_death_makes_a_second_plan_or_repeats_a_finished_task() -> None:
    def work(instructions: str, items: list[Any]) -> Any:
        results = outputs_of(items)
        if said(items).startswith("do a"):
            return [say(f"is {results['c']}")] if results else [call("add", {"a": 1, "b": 2}, "c")]
        return failing("b")(instructions, items)

    rule = planning(
        plan(task("a", tools=["add"]), task("b", "a"), actions=EMITS),
        plan(task("d", "a"), actions=EMITS[3:]),
        work=work,
    )

    def make() -> tuple[World, Handler]:
        CALLED.clear()
        world, handler, _ = goal(rule, {"max_task_retries": 0})
        return world, handler

    seen = 0
    async for world, output in every_death(make):
        if world.suspended:
            assert [s.waiting_for.kind for s in world.suspended] == ["reconciliation"]
            assert len(CALLED) <= 1
            continue
        seen += 1
        assert output == "did d"
        assert len(world.of("plan.created")) == 1
        assert len(world.of("plan.revised")) == 1
        assert len(CALLED) == 1
        fired = sorted(e.output["event"] for e in world.of("action.completed"))
        assert fired == ["plan.created", "run.succeeded", "task.completed", "task.failed"]
        assert len(world.of("action.triggered")) == 4
    assert seen > 20


async def test_the_demo_model_plans_and_reaches_a_goal() -> None:
    served = Catalog(tools={tool.name: tool for tool in BUILTIN_TOOLS})
    loop = AgentLoop(OneModel(DemoModel()), settings())
    named = actions()
    solver = Solver(lambda: served, loop, Approaches())
    world = World(
        RunRequest(goal="Compare three ways to store chat history and recommend one"),
        {"agent": AgentTask(solver), "action": ActionTask(named)},
    )
    output = await world.run(GoalRun(lambda: served, loop, named, settings()))
    (created,) = world.of("plan.created")
    assert len(created.plan.tasks) >= 3
    assert sum(1 for t in created.plan.tasks if not t.depends_on) >= 2
    assert isinstance(output, str) and output
    tools = [s.name for steps in world.steps.values() for s in steps.values() if s.kind == "tool"]
    assert tools
