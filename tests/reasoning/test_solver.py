"""How one task is solved: the approaches, the form of the answer, and what replay repeats."""

import json
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint
from typing import Any

import pytest
from agents import Agent, function_tool
from pydantic import BaseModel

from agent_server.domain.agents import AgentPolicy
from agent_server.domain.errors import (
    ConfigurationError,
    OutputInvalid,
    UnknownAgent,
    UnknownApproach,
    UnknownTool,
)
from agent_server.domain.runs import RunRequest
from agent_server.execution.ports import FinalOutput, TaskSpec
from agent_server.plugins import APPROACHES, extensions
from agent_server.reasoning.approaches import Approaches, choose
from agent_server.reasoning.solver import Solver
from agent_server.reasoning.tasks import AgentRun, AgentTask
from agent_server.registry.catalog import Catalog
from agent_server.registry.policies import Policies
from tests.support.durable import RuleModel, call, loop_for, outputs_of, say
from tests.support.mortal import World, every_death

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
ADDED: list[tuple[int, int]] = []


async def nothing_before(tenant: str, run_id: str) -> list[Any]:
    return []


@function_tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    ADDED.append((a, b))
    return a + b


class Answer(BaseModel):
    n: int


def last(items: list[Any]) -> str:
    return str(items[-1].get("content", "")) if items else ""


def agents() -> dict[str, Agent[Any]]:
    return {
        "clerk": Agent(name="clerk", instructions="clerk"),
        "adder": Agent(name="adder", instructions="adder", tools=[add]),
        "typed": Agent(name="typed", instructions="typed", output_type=Answer),
    }


def solving(
    rule: Callable[..., Any], policies: Policies | None = None
) -> tuple[Solver, RuleModel, Callable[[RunRequest], World]]:
    catalog = Catalog(agents=agents(), tools={"add": add}, policies=policies or Policies())
    loop, model = loop_for(rule)
    solver = Solver(lambda: catalog, loop, Approaches())
    return solver, model, lambda request: World(request, {"agent": AgentTask(solver)})


async def run_agent(rule: Callable[..., Any], **request: Any) -> tuple[Any, RuleModel]:
    solver, model, world = solving(rule)
    asked = RunRequest(**{"agent": "clerk", "input": "hi", **request})
    return await world(asked).run(AgentRun(solver, nothing_before)), model


async def run_task(rule: Callable[..., Any], **payload: Any) -> tuple[Any, RuleModel]:
    solver, model, world = solving(rule)

    async def root(ctx: Any) -> Any:
        spec = TaskSpec(path="1", node="t", kind="agent", payload={"input": "hi", **payload})
        return await ctx.child(spec)

    return await world(RunRequest(goal="g")).run(root), model


def hello(instructions: str, items: list[Any]) -> Any:
    return [say(f"{instructions}: {last(items)}")]


async def test_a_run_of_an_agent_gives_what_the_agent_says() -> None:
    output, _ = await run_agent(hello)
    assert output == "clerk: hi"


async def test_the_default_approach_lets_the_agent_use_its_tools() -> None:
    def rule(instructions: str, items: list[Any]) -> Any:
        results = outputs_of(items)
        return [say(f"sum {results['c']}")] if results else [call("add", {"a": 2, "b": 3}, "c")]

    output, model = await run_agent(rule, agent="adder")
    assert output == "sum 5"
    assert len(model.asked) == 2


async def test_direct_is_one_model_call_without_tools() -> None:
    output, model = await run_agent(hello, agent="adder", approach="direct")
    assert output == "adder: hi"
    assert len(model.asked) == 1
    assert agents()["adder"].tools  # the user's own agent keeps them


async def test_chain_of_thought_thinks_first_and_answers_with_the_answer_alone() -> None:
    def rule(instructions: str, items: list[Any]) -> Any:
        return [say("41 and one more")] if "step by step" in last(items) else [say("42")]

    output, model = await run_agent(rule, approach="chain_of_thought")
    assert output == "42"
    answering = model.asked[1][1]
    assert [item["role"] for item in answering] == ["user", "assistant", "user"]
    assert answering[1]["content"] == "41 and one more"


async def test_chain_of_thought_keeps_the_type_of_the_output() -> None:
    def rule(instructions: str, items: list[Any]) -> Any:
        return [say("I think")] if "step by step" in last(items) else [say('{"n": 42}')]

    output, _ = await run_agent(rule, agent="typed", approach="chain_of_thought")
    assert output == {"n": 42}


@pytest.mark.parametrize(
    ("name", "asked", "expected"),
    [
        ("adder", "hi", "react"),
        ("clerk", "What is the capital of Norway?", "direct"),
        ("clerk", "word " * 100, "chain_of_thought"),
        ("clerk", "first\nsecond", "chain_of_thought"),
    ],
)
def test_auto_chooses_by_tools_and_length(name: str, asked: str, expected: str) -> None:
    assert choose(agents()[name], asked) == expected


async def test_the_operator_sets_an_agents_approach_and_a_run_overrides_it() -> None:
    policies = Policies(agents={"adder": AgentPolicy(approach="chain_of_thought")})
    for approach, calls in ((None, 2), ("direct", 1)):
        solver, model, world = solving(hello, policies)
        request = RunRequest(agent="adder", input="hi", approach=approach)
        await world(request).run(AgentRun(solver, nothing_before))
        assert len(model.asked) == calls


async def test_an_unknown_approach_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UnknownApproach) as caught:
        await run_agent(hello, approach="chain_of_though")
    assert "'chain_of_thought'" in (caught.value.hint or "")


async def test_an_unknown_agent_or_tool_is_refused() -> None:
    with pytest.raises(UnknownAgent):
        await run_agent(hello, agent="clark")
    outcome, _ = await run_task(hello, tools=["ad"])
    assert outcome.error.code == UnknownTool.code


async def test_a_task_without_agent_is_done_by_the_generalist_with_the_named_tools() -> None:
    def rule(instructions: str, items: list[Any]) -> Any:
        results = outputs_of(items)
        return [say(f"sum {results['c']}")] if results else [call("add", {"a": 1, "b": 1}, "c")]

    outcome, model = await run_task(rule, tools=["add"])
    assert outcome.output == "sum 2"
    assert "one task of a larger piece of work" in model.asked[0][0]


async def test_a_tool_that_the_plan_names_is_lent_to_an_agent_that_lacks_it() -> None:
    def rule(instructions: str, items: list[Any]) -> Any:
        results = outputs_of(items)
        return [say(f"sum {results['c']}")] if results else [call("add", {"a": 1, "b": 2}, "c")]

    outcome, _ = await run_task(rule, agent="clerk", tools=["add"])
    assert outcome.output == "sum 3"


async def test_an_answer_that_fits_its_schema_is_json() -> None:
    outcome, model = await run_task(
        lambda i, items: [say('```json\n{"n": 1}\n```')], output_schema=SCHEMA
    )
    assert outcome.output == {"n": 1}
    assert json.dumps(SCHEMA) in last(model.asked[0][1])


async def test_an_answer_that_does_not_fit_goes_back_with_its_faults() -> None:
    def rule(instructions: str, items: list[Any]) -> Any:
        return [say('{"n": 1}')] if "'n' is a required" in last(items) else [say("{}")]

    outcome, model = await run_task(rule, output_schema=SCHEMA)
    assert outcome.output == {"n": 1}
    assert len(model.asked) == 2


async def test_an_answer_that_never_fits_fails_the_task_after_two_repairs() -> None:
    outcome, model = await run_task(lambda i, items: [say("no")], output_schema=SCHEMA)
    assert outcome.error.code == OutputInvalid.code
    assert "not JSON" in outcome.error.message
    assert len(model.asked) == 3


async def test_a_schema_that_points_elsewhere_is_a_fault_and_no_request() -> None:
    schema = {"$ref": "http://169.254.169.254/schema.json"}
    outcome, _ = await run_task(lambda i, items: [say("{}")], output_schema=schema)
    assert "not in it" in outcome.error.message


async def test_a_schema_that_is_none_is_refused() -> None:
    outcome, model = await run_task(hello, output_schema={"type": "integre"})
    assert "not a JSON Schema" in outcome.error.message
    assert model.asked == []


async def test_a_replay_repeats_no_finished_call_of_a_repaired_task() -> None:
    ADDED.clear()

    def rule(instructions: str, items: list[Any]) -> Any:
        if "is a required property" in last(items):
            return [say('{"n": 5}')]
        results = outputs_of(items)
        return [say("{}")] if results else [call("add", {"a": 2, "b": 3}, "c")]

    def make() -> Any:
        solver, _, world = solving(rule)

        async def root(ctx: Any) -> Any:
            payload = {"agent": "adder", "input": "x", "output_schema": SCHEMA}
            outcome = await ctx.child(TaskSpec(path="1", node="t", kind="agent", payload=payload))
            return outcome.output

        one = world(RunRequest(goal="g"))
        return one, root

    world, root = make()
    assert await world.run(root) == {"n": 5}
    assert list(world.steps["1"]) == ["1/model/1", "1/tool/c", "1/model/2", "1/fix/1/model/1"]
    solver, model, of = solving(rule)
    again = of(world.request)
    again.run_id, again.steps = world.run_id, world.steps
    assert await again.run(root) == {"n": 5}
    assert model.asked == []
    assert ADDED == [(2, 3)]


async def test_the_output_and_the_session_of_an_agents_run_are_committed_together() -> None:
    class Session:
        shortened = False

        def __init__(self) -> None:
            self.items: list[Any] = []

        async def get_items(self, limit: int | None = None) -> list[Any]:
            return [{"role": "user", "content": "before"}]

        async def add_items(self, items: list[Any]) -> None:
            self.items += items

        def staged(self, pending: Any = ()) -> list[Any]:
            return self.items

    def rule(instructions: str, items: list[Any]) -> Any:
        return [say("thinking")] if "step by step" in last(items) else [say("hello")]

    for approach in ("react", "chain_of_thought"):
        catalog = Catalog(agents=agents())
        loop, model = loop_for(rule, open_session=lambda ctx, name: Session())
        solver = Solver(lambda: catalog, loop, Approaches())  # noqa: B023
        request = RunRequest(agent="clerk", input="hi", session_id="s", approach=approach)
        output = await World(request, {}).run(AgentRun(solver, nothing_before))
        assert isinstance(output, FinalOutput)
        assert (output.value, output.session_id) == ("hello", "s")
        assert [item["role"] for item in output.session_items] == ["user", "assistant"]
        assert model.asked[0][1][0]["content"] == "before"


def entry(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, APPROACHES.group)


def found(*entries: EntryPoint) -> Approaches:
    def find(group: str) -> Iterable[EntryPoint]:
        return entries

    return Approaches(extensions(APPROACHES, find))


class Shout:
    name = "shout"
    description = "Say it loudly."

    async def solve(self, task: Any) -> Any:
        return await task.run(task.agent.clone(instructions="LOUD"))


async def test_an_approach_of_a_plugin_comes_in_through_the_same_door() -> None:
    approaches = found(entry("shout", "tests.reasoning.test_solver:Shout"))
    assert "shout" in approaches.names
    loop, _ = loop_for(hello)
    solver = Solver(lambda: Catalog(agents=agents()), loop, approaches)
    request = RunRequest(agent="clerk", input="hi", approach="shout")
    assert await World(request, {}).run(AgentRun(solver, nothing_before)) == "LOUD: hi"


def test_a_broken_plugin_names_its_owner_and_hides_nobody() -> None:
    approaches = found(entry("broken", "tests.nowhere:Nothing"))
    described = {item["name"]: item for item in approaches.describe()}
    assert set(described) == {"react", "direct", "chain_of_thought", "broken", "auto"}
    assert "cannot be loaded from 'tests.nowhere:Nothing'" in described["broken"]["error"]
    assert described["react"]["default"] is True
    with pytest.raises(ConfigurationError):
        approaches.get("broken", agents()["clerk"], "hi")


def test_two_extensions_of_one_name_are_an_error() -> None:
    with pytest.raises(ConfigurationError, match="Two distributions bring"):
        found(entry("react", "tests.reasoning.test_solver:Shout"))


async def test_a_run_of_an_agent_ends_right_after_any_death() -> None:
    def make() -> Any:
        solver, _, world = solving(hello)
        return world(RunRequest(agent="clerk", input="hi", approach="chain_of_thought")), AgentRun(
            solver,
            nothing_before,
        )

    async for world, output in every_death(make):
        assert output.startswith("clerk: ")
        assert list(world.steps[""]) == ["think/model/1", "answer/model/1"]
