"""A plan's faults are all found at once, and each says what to do."""

from typing import Any

import pytest
from agents import function_tool
from agents.strict_schema import ensure_strict_json_schema
from hypothesis import given
from hypothesis import strategies as st

from agent_server.domain.agents import AgentInfo
from agent_server.domain.plans import Plan, PlanAction, PlanTask
from agent_server.planning.check import Offer, cycles, plan_faults
from agent_server.planning.draft import PlanOutput, read_plan
from agent_server.registry.catalog import Catalog
from tests.actions.test_actions import actions


@function_tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


OFFER = Offer(
    (AgentInfo(name="clerk", title="Clerk", tools=("stamp",)),),
    tuple(Catalog(tools={"add": add}).describe_tools()),
    actions(),
)


def task(id: str, *depends_on: str, **fields: Any) -> PlanTask:
    return PlanTask(id=id, depends_on=depends_on, **{"description": "d", **fields})


def faults(*tasks: PlanTask, planned: tuple[PlanAction, ...] = (), **options: Any) -> list[str]:
    found = plan_faults(Plan(tasks=tasks, actions=planned), OFFER, **{"max_tasks": 10, **options})
    return [f"{fault.path}: {fault.message} {fault.hint or ''}" for fault in found]


def test_a_good_plan_has_no_faults() -> None:
    assert not faults(
        task("a", agent="clerk", tools=("stamp", "add")),
        task("b", "a", when="nodes.a.output == 'yes'", expected_output={"type": "object"}),
        task("c", "b", when="nodes.a.status == 'succeeded'"),
        planned=(
            PlanAction(
                trigger="task.completed:a", action="emit", parameters={"event": "{{ event.node }}"}
            ),
        ),
    )


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ((), "the plan has no tasks"),
        ((task("a", agent="clark"),), "there is no agent 'clark' Did you mean 'clerk'?"),
        ((task("a", tools=("ad",)),), "there is no tool 'ad' Did you mean 'add'?"),
        ((task("a", tools=("stamp",)),), "there is no tool 'stamp'"),
        ((task("a"), task("a")), "two tasks have the id 'a'"),
        ((task(" "),), "the task has no id"),
        ((task("1 a"),), "is not a letter followed by"),
        ((task("a", "z"),), "there is no task 'z'"),
        ((task("a", "a"),), "wait for each other: a → a"),
        ((task("a", "c"), task("b", "a"), task("c", "b")), "a → c → b → a"),
        ((task("a", when="nodes.b.output"),), "there is no task 'b'"),
        ((task("a"), task("b", when="nodes.a.output")), "which it does not depend on"),
        ((task("a", when="1 +"),), "when:"),
        ((task("a", when="inputs.x"),), "'inputs' is not known here"),
        ((task("a", when="__import__('os')"),), "when:"),
        ((task("a", expected_output={"type": "nothing"}),), "not a JSON Schema"),
        ((task("a", description=" "),), "no description"),
        (tuple(task(f"t{n}") for n in range(11)), "11 tasks; at most 10"),
    ],
)
def test_each_fault_is_named(tasks: tuple[PlanTask, ...], expected: str) -> None:
    assert expected in "\n".join(faults(*tasks))


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (
            PlanAction(trigger="task.done", action="emit", parameters={"event": "e"}),
            "unknown trigger",
        ),
        (
            PlanAction(trigger="task.failed:x", action="emit", parameters={"event": "e"}),
            "not in the plan",
        ),
        (
            PlanAction(trigger="run.failed:a", action="emit", parameters={"event": "e"}),
            "takes no task",
        ),
        (PlanAction(trigger="run.failed", action="emmit", parameters={}), "'emit'"),
        (
            PlanAction(trigger="run.failed", action="emit", parameters={}),
            "needs the parameter 'event'",
        ),
        (
            PlanAction(trigger="run.failed", action="emit", parameters={"event": "e", "x": 1}),
            "no parameter 'x'",
        ),
        (PlanAction(trigger="run.failed", action="emit", parameters={"event": "{{ 1 + }}"}), "1 +"),
    ],
)
def test_each_fault_of_an_action_is_named(action: PlanAction, expected: str) -> None:
    assert expected in "\n".join(faults(task("a"), planned=(action,)))


def test_every_fault_is_told_at_once() -> None:
    found = "\n".join(
        faults(
            task("a", "b", agent="x"),
            task("b", "a", tools=("y",)),
            task("b", "q", when="(("),
            planned=(PlanAction(trigger="t", action="z"),),
        )
    )
    for part in ("agent 'x'", "tool 'y'", "id 'b'", "task 'q'", "when", "a → b → a", "'t'", "'z'"):
        assert part in found


def test_a_finished_task_may_be_depended_on_and_not_used_again() -> None:
    assert not faults(task("b", "a", when="nodes.a.output"), finished={"a"})
    assert "finished already" in "\n".join(faults(task("a"), finished={"a"}))
    assert not faults(finished={"a"})


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=20))
def test_a_ring_is_found_exactly_when_there_is_no_order(edges: list[tuple[int, int]]) -> None:
    tasks = [
        task(f"t{n}", *sorted({f"t{to}" for start, to in edges if start == n})) for n in range(8)
    ]
    rings = cycles(tasks)
    waits = {t.id: set(t.depends_on) for t in tasks}
    for ring in rings:
        for name, following in zip(ring, [*ring[1:], ring[0]], strict=True):
            assert following in waits[name]
    while free := [name for name, needs in waits.items() if not needs]:
        for name in free:
            del waits[name]
            for needs in waits.values():
                needs.discard(name)
    assert bool(waits) == bool(rings)


def test_the_plans_shape_is_one_that_strict_structured_outputs_take() -> None:
    schema = PlanOutput().json_schema()
    assert ensure_strict_json_schema(schema) == schema

    def walk(part: Any) -> None:
        if isinstance(part, dict):
            if part.get("type") == "object":
                assert part["additionalProperties"] is False
                assert set(part["required"]) == set(part["properties"])
            assert "default" not in part
            for inner in part.values():
                walk(inner)
        elif isinstance(part, list):
            for inner in part:
                walk(inner)

    walk(schema)
    item = schema["$defs"]["TaskDraft"]["properties"]
    assert set(item) >= {"id", "description", "agent", "tools", "depends_on", "expected_output"}


def test_free_form_parts_are_read_as_text_and_as_objects() -> None:
    shape = {"type": "object"}
    for given_as in (shape, '{"type": "object"}'):
        for parameters in ({"event": "e"}, '{"event": "e"}'):
            plan, found = read_plan(
                {
                    "tasks": [
                        {"id": "a", "description": "d", "expected_output": given_as, "when": ""}
                    ],
                    "actions": [{"trigger": "x", "action": "y", "parameters": parameters}],
                    "thoughts": "a field that nobody asked for",
                },
                3,
            )
            assert plan is not None, found
            assert plan.tasks[0].expected_output == shape
            assert plan.tasks[0].when is None
            assert plan.actions[0].parameters == {"event": "e"}
            assert plan.revision == 3


@pytest.mark.parametrize(
    "answer", ["no plan", "[]", 7, None, {"tasks": "x"}, {"tasks": [{"id": 1}]}]
)
def test_an_answer_that_is_no_plan_gives_faults(answer: Any) -> None:
    plan, found = read_plan(answer, 1)
    assert plan is None
    assert found
