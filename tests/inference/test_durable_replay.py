"""Each way of using the SDK, killed at every boundary of its ledger and replayed."""

import asyncio
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from agents import (
    Agent,
    AgentHooks,
    GuardrailFunctionOutput,
    ModelSettings,
    RunHooks,
    Runner,
    function_tool,
    input_guardrail,
    output_guardrail,
)
from agents.mcp import MCPServerStdio
from agents.retry import ModelRetryBackoffSettings, ModelRetrySettings
from pydantic import BaseModel

from agent_server.domain.agents import ToolEffect
from agent_server.domain.errors import GuardrailTripped, ModelError
from agent_server.inference.durable_run import HintedPolicies
from agent_server.testing.journal import memory_context
from tests.support.durable import (
    Scene,
    call,
    loop_for,
    outputs_of,
    play,
    replay_from_every_prefix,
    say,
)


class Effects(HintedPolicies):
    def __init__(self, **effects: ToolEffect) -> None:
        self.effects = effects

    def effect(self, tool: str, annotations: Mapping[str, Any] | None = None) -> ToolEffect:
        return self.effects.get(tool) or super().effect(tool, annotations)


def plain() -> Scene:
    return Scene(Agent(name="plain"), lambda instructions, items: [say("hello there")])


def _adding(*call_ids: str, effect: ToolEffect = ToolEffect.ONCE) -> Scene:
    calls: Counter[str] = Counter()

    @function_tool
    async def add(a: int, b: int) -> int:
        calls["add"] += 1
        await asyncio.sleep(0)  # the calls beside it begin
        return a + b

    def rule(instructions: str, items: list[Any]) -> list[Any]:
        got = outputs_of(items)
        if got:
            return [say(f"sum {got}")]
        return [call("add", {"a": n, "b": 1}, call_id) for n, call_id in enumerate(call_ids)]

    options = {"policies": Effects(add=effect)}
    return Scene(Agent(name="adder", tools=[add]), rule, calls, options=options)


def one_tool_once() -> Scene:
    return _adding("c1")


def one_tool_that_only_reads() -> Scene:
    return _adding("c1", effect=ToolEffect.NONE)


def parallel_tools() -> Scene:
    return _adding("c1", "c2", "c3", effect=ToolEffect.IDEMPOTENT)


def parallel_tools_once() -> Scene:
    return _adding("c1", "c2", "c3")


def sequential_tools() -> Scene:
    scene = _adding("c1")

    def rule(instructions: str, items: list[Any]) -> list[Any]:
        done = len(outputs_of(items))
        return [say("five")] if done == 5 else [call("add", {"a": done, "b": 1}, f"c{done}")]

    scene.rule = rule
    return scene


def handoff() -> Scene:
    calls: Counter[str] = Counter()

    @function_tool
    def book(day: str) -> str:
        calls["book"] += 1
        return f"booked {day}"

    clerk = Agent(name="clerk", instructions="clerk", tools=[book])
    desk = Agent(name="desk", instructions="desk", handoffs=[clerk])

    def rule(instructions: str, items: list[Any]) -> list[Any]:
        if "clerk" not in instructions:
            return [call("transfer_to_clerk", {}, "h1")]
        got = outputs_of(items)
        return [say(got["b1"])] if "b1" in got else [call("book", {"day": "Monday"}, "b1")]

    return Scene(desk, rule, calls)


def agent_as_tool() -> Scene:
    scene = _adding("c1")
    inner = scene.agent
    inner.instructions = "inner"
    inner_rule = scene.rule
    outer = Agent(
        name="outer", instructions="outer", tools=[inner.as_tool("ask_inner", "Ask the inner one.")]
    )

    def rule(instructions: str, items: list[Any]) -> Any:
        if instructions == "inner":
            return inner_rule(instructions, items)
        got = outputs_of(items)
        if got:
            return [say(" and ".join(got.values()))]
        return [call("ask_inner", {"input": f"number {n}"}, f"o{n}") for n in (1, 2)]

    scene.agent, scene.rule = outer, rule
    scene.options = {"policies": Effects(add=ToolEffect.IDEMPOTENT)}
    return scene


def runner_inside_a_tool() -> Scene:
    calls: Counter[str] = Counter()
    helper = Agent(name="helper", instructions="helper")

    @function_tool
    async def delegate(question: str) -> str:
        calls["delegate"] += 1
        result = await Runner.run(helper, question)
        return str(result.final_output)

    def rule(instructions: str, items: list[Any]) -> list[Any]:
        if instructions == "helper":
            return [say("helped")]
        got = outputs_of(items)
        return [say(got["d1"])] if got else [call("delegate", {"question": "?"}, "d1")]

    options = {"policies": Effects(delegate=ToolEffect.IDEMPOTENT)}
    return Scene(Agent(name="boss", tools=[delegate]), rule, calls, options=options)


def sync_runner_inside_a_sync_tool() -> Scene:
    scene = runner_inside_a_tool()
    helper = Agent(name="helper", instructions="helper")
    calls = scene.tool_calls

    @function_tool
    def delegate(question: str) -> str:
        calls["delegate"] += 1
        return str(Runner.run_sync(helper, question).final_output)

    scene.agent = Agent(name="boss", tools=[delegate])
    return scene


class Weather(BaseModel):
    city: str
    degrees: float


def structured_output() -> Scene:
    return Scene(
        Agent(name="weather", output_type=Weather),
        lambda instructions, items: [say('{"city": "Oslo", "degrees": 3.5}')],
    )


def structured_tool_output() -> Scene:
    calls: Counter[str] = Counter()

    @function_tool
    def measure(city: str) -> Weather:
        calls["measure"] += 1
        return Weather(city=city, degrees=1)

    def rule(instructions: str, items: list[Any]) -> list[Any]:
        got = outputs_of(items)
        return [say(got["m1"])] if got else [call("measure", {"city": "Oslo"}, "m1")]

    return Scene(Agent(name="weather", tools=[measure]), rule, calls)


def tool_output_as_the_answer() -> Scene:
    scene = structured_tool_output()
    scene.agent.tool_use_behavior = "stop_on_first_tool"
    return scene


def _guarded(trip: bool, side: str) -> Scene:
    judge = Agent(name="judge", instructions="judge")

    async def decide(value: Any) -> GuardrailFunctionOutput:
        verdict = await Runner.run(judge, f"judge {value}")
        return GuardrailFunctionOutput(
            output_info={"verdict": verdict.final_output}, tripwire_triggered=trip
        )

    @input_guardrail(name="polite", run_in_parallel=False)
    async def before(context: Any, agent: Any, input: Any) -> GuardrailFunctionOutput:
        return await decide(input)

    @output_guardrail(name="safe")
    async def after(context: Any, agent: Any, output: Any) -> GuardrailFunctionOutput:
        return await decide(output)

    agent = Agent(
        name="guarded",
        input_guardrails=[before] if side == "input" else [],
        output_guardrails=[after] if side == "output" else [],
    )

    def rule(instructions: str, items: list[Any]) -> list[Any]:
        return [say("fine" if instructions == "judge" else "answer")]

    return Scene(agent, rule)


def input_guardrail_passes() -> Scene:
    return _guarded(False, "input")


def output_guardrail_passes() -> Scene:
    return _guarded(False, "output")


def input_guardrail_trips() -> Scene:
    return _guarded(True, "input")


def output_guardrail_trips() -> Scene:
    return _guarded(True, "output")


def input_guardrail_in_parallel() -> Scene:
    scene = _guarded(False, "input")
    scene.agent.input_guardrails[0].run_in_parallel = True
    return scene


@dataclass
class Customer:
    name: str


def dynamic_instructions() -> Scene:
    ticks = iter(range(1_000))

    def instructions(context: Any, agent: Any) -> str:
        return f"serve {context.context.name} at {next(ticks)}"

    scene = _adding("c1", effect=ToolEffect.NONE)
    scene.agent.instructions = instructions
    scene.context = Customer("Ada")
    return scene


def failing_tool() -> Scene:
    calls: Counter[str] = Counter()

    @function_tool
    def fragile() -> str:
        calls["fragile"] += 1
        raise ValueError("glass")

    def rule(instructions: str, items: list[Any]) -> list[Any]:
        got = outputs_of(items)
        return [say(got["f1"])] if got else [call("fragile", {}, "f1")]

    return Scene(Agent(name="careful", tools=[fragile]), rule, calls)


def tool_that_fails_the_run() -> Scene:
    scene = failing_tool()
    calls = scene.tool_calls

    @function_tool(failure_error_function=None)
    def fragile() -> str:
        calls["fragile"] += 1
        raise ValueError("glass")

    scene.agent = Agent(name="careful", tools=[fragile])
    return scene


def tool_that_cancels_itself() -> Scene:
    scene = failing_tool()
    calls = scene.tool_calls

    @function_tool
    async def fragile() -> str:
        calls["fragile"] += 1
        raise asyncio.CancelledError

    scene.agent = Agent(name="careful", tools=[fragile])
    scene.options = {"policies": Effects(fragile=ToolEffect.NONE)}
    return scene


def model_repeated_by_the_sdk() -> Scene:
    """The agent's own retry settings ask again after a failure, within the SDK."""
    scene = plain()
    asked: list[int] = []

    def rule(instructions: str, items: list[Any]) -> list[Any]:
        asked.append(1)
        if len(asked) == 1:
            raise ModelError("a hiccup")
        return [say("better")]

    retry = ModelRetrySettings(max_retries=2, policy=lambda context: True)
    retry.backoff = ModelRetryBackoffSettings(initial_delay=0, max_delay=0, jitter=False)
    scene.agent.model_settings = ModelSettings(retry=retry)
    scene.rule = rule
    return scene


def unknown_tool_is_told_to_the_model() -> Scene:
    def rule(instructions: str, items: list[Any]) -> list[Any]:
        got = outputs_of(items)
        return [say(f"told: {got['u1']}")] if got else [call("nonsense", {}, "u1")]

    return Scene(Agent(name="confused"), rule)


def bad_arguments_are_told_to_the_model() -> Scene:
    scene = _adding("c1")

    def rule(instructions: str, items: list[Any]) -> list[Any]:
        got = outputs_of(items)
        if not got:
            return [call("add", {"a": "many", "b": 1}, "c1")]
        return [say(got["c1"])]

    scene.rule = rule
    return scene


def reused_call_id() -> Scene:
    """Locally served models number their calls from one in every run."""
    calls: Counter[str] = Counter()

    @function_tool
    def look(what: str) -> str:
        calls["look"] += 1
        return f"saw {what}"

    looker = Agent(name="looker", instructions="looker", tools=[look])
    first = looker.as_tool("first", "")
    second = looker.as_tool("second", "")

    def rule(instructions: str, items: list[Any]) -> list[Any]:
        got = outputs_of(items)
        if instructions == "looker":
            return [say(got["1"])] if got else [call("look", {"what": items[0]["content"]}, "1")]
        if "1" not in got:
            return [call("first", {"input": "sun"}, "1")]
        if "2" not in got:
            return [call("second", {"input": "moon"}, "2")]
        return [say(f"{got['1']} {got['2']}")]

    agent = Agent(name="watcher", tools=[first, second])
    return Scene(agent, rule, calls, options={"policies": Effects(look=ToolEffect.NONE)})


SCENES = [
    plain,
    one_tool_once,
    one_tool_that_only_reads,
    parallel_tools,
    parallel_tools_once,
    sequential_tools,
    handoff,
    agent_as_tool,
    runner_inside_a_tool,
    sync_runner_inside_a_sync_tool,
    structured_output,
    structured_tool_output,
    tool_output_as_the_answer,
    input_guardrail_passes,
    output_guardrail_passes,
    input_guardrail_trips,
    output_guardrail_trips,
    input_guardrail_in_parallel,
    dynamic_instructions,
    failing_tool,
    tool_that_fails_the_run,
    pytest.param(
        tool_that_cancels_itself,
        marks=pytest.mark.skipif(
            sys.version_info < (3, 11),
            reason="Python 3.10 cannot tell who cancelled: the call is left as begun",
        ),
    ),
    unknown_tool_is_told_to_the_model,
    bad_arguments_are_told_to_the_model,
    reused_call_id,
]

EXPECTED = {
    "plain": "hello there",
    "one_tool_once": "sum {'c1': '1'}",
    "handoff": "booked Monday",
    "agent_as_tool": "sum {'c1': '1'} and sum {'c1': '1'}",
    "runner_inside_a_tool": "helped",
    "sync_runner_inside_a_sync_tool": "helped",
    "structured_output": {"city": "Oslo", "degrees": 3.5},
    "structured_tool_output": "city='Oslo' degrees=1.0",
    "tool_output_as_the_answer": "city='Oslo' degrees=1.0",
    "sequential_tools": "five",
    "reused_call_id": "saw sun saw moon",
}


@pytest.mark.parametrize("make", SCENES, ids=lambda make: make.__name__)
async def test_a_run_killed_at_any_boundary_ends_the_same_and_repeats_nothing_finished(
    make: Any,
) -> None:
    first = await replay_from_every_prefix(make)
    if make.__name__ in EXPECTED:
        assert first.result is not None, first.error
        assert first.result.output == EXPECTED[make.__name__]


async def test_steps_of_a_nested_agent_are_keyed_by_the_tool_call_that_asked_it() -> None:
    played = await play(agent_as_tool)
    keys = {step.key for step in played.journal.writes}
    assert {"model/1", "model/2", "tool/o1", "tool/o2"} <= keys
    assert {"tool/o1/model/1", "tool/o1/tool/c1", "tool/o1/model/2"} <= keys


async def test_a_replayed_run_tells_its_readers_nothing_twice() -> None:
    first = await play(one_tool_once)
    again = await play(one_tool_once, list({s.key: s for s in first.journal.writes}.values()))
    assert first.journal.types() == [
        "step.started",
        "step.completed",
        "step.started",
        "step.completed",
        "step.started",
        "message.completed",
        "step.completed",
    ]
    assert again.journal.types() == []
    assert again.journal.deltas == []
    assert again.model.asked == []


async def test_deltas_reach_the_readers_and_join_to_the_message() -> None:
    played = await play(plain)
    assert played.journal.deltas == ["hello", "there"]
    messages = [e for e in played.journal.events if getattr(e, "type", "") == "message.completed"]
    assert [getattr(e, "text", "") for e in messages] == ["hello there"]


async def test_a_model_step_holds_only_what_earlier_steps_do_not() -> None:
    played = await play(sequential_tools)
    steps = [step for step in played.journal.writes if step.kind == "model"]
    assert [len(step.input["items"]) for step in steps] == [1, 2, 2, 2, 2, 2]
    assert steps[3].input["prefix"] == {"step": "model/3", "session": None, "items": 5}


async def test_a_tripped_guardrail_says_which_and_why() -> None:
    played = await play(input_guardrail_trips)
    assert isinstance(played.error, GuardrailTripped)
    assert "'polite'" in played.error.detail
    assert '{"verdict": "fine"}' in played.error.detail


async def test_a_call_that_the_sdk_repeated_is_answered_by_its_last_try_on_replay() -> None:
    first = await play(model_repeated_by_the_sdk)
    assert first.result is not None, first.error
    assert [(s.key, s.status) for s in first.journal.writes] == [
        ("model/1", "failed"),
        ("model/2", "done"),
    ]
    again = await play(model_repeated_by_the_sdk, first.journal.writes)
    assert again.result is not None and again.result.output == "better"
    assert again.model.asked == []


async def test_an_input_that_differs_on_replay_keeps_the_recorded_answer() -> None:
    first = await play(plain)

    def other() -> Scene:
        scene = plain()
        scene.input = "another question"
        return scene

    again = await play(other, first.journal.writes)
    assert again.result is not None and again.result.output == "hello there"
    assert again.model.asked == []


async def test_a_question_that_crashed_first_does_not_take_its_siblings_answer() -> None:
    def make() -> Scene:
        def rule(instructions: str, items: list[Any]) -> list[Any]:
            got = outputs_of(items)
            if instructions == "inner":
                return [say(f"about {items[0]['content']}")]
            if got:
                return [say(str(got))]
            return [call("both", {}, "b")]

        inner = Agent(name="inner", instructions="inner")

        @function_tool
        async def both() -> str:
            results = await asyncio.gather(*(Runner.run(inner, q) for q in ("x", "y")))
            return " ".join(str(result.final_output) for result in results)

        options = {"policies": Effects(both=ToolEffect.NONE)}
        return Scene(Agent(name="outer", tools=[both]), rule, options=options)

    first = await play(make)
    second_only = [s for s in first.journal.writes if s.key in ("model/1", "tool/b/model/2")]
    again = await play(make, second_only)
    assert first.result is not None and again.result is not None
    assert again.result.output == first.result.output == "{'b': 'about x about y'}"


async def test_the_users_own_hooks_are_called() -> None:
    told: list[str] = []

    class OnRun(RunHooks[Any]):
        async def on_tool_start(self, context: Any, agent: Any, tool: Any) -> None:
            told.append(f"run tool {tool.name}")

        async def on_llm_start(self, context: Any, agent: Any, *rest: Any) -> None:
            told.append(f"run model {agent.name}")

    class OnAgent(AgentHooks[Any]):
        async def on_end(self, context: Any, agent: Any, output: Any) -> None:
            told.append(f"agent end {output}")

        async def on_tool_end(self, context: Any, agent: Any, tool: Any, result: Any) -> None:
            told.append(f"agent tool {tool is agent.tools[0]} {result}")

    scene = one_tool_once()
    scene.agent.hooks = OnAgent()
    loop, _ = loop_for(scene.rule)
    ctx, _ = memory_context()
    await loop.run(ctx, scene.agent, "hi", hooks=OnRun())
    assert told == [
        "run model adder",
        "run tool add",
        "agent tool True 1",
        "run model adder",
        "agent end sum {'c1': '1'}",
    ]


async def test_models_are_resolved_by_the_agents_own_name_else_by_the_runs() -> None:
    second = Agent(name="second", model="its-own", instructions="second")
    first = Agent(name="first", handoffs=[second])

    def rule(instructions: str, items: list[Any]) -> list[Any]:
        return [say("done")] if "second" in instructions else [call("transfer_to_second", {}, "h")]

    loop, model = loop_for(rule)
    ctx, journal = memory_context()
    await loop.run(ctx, first, "hi", model="for-this-run")
    names = [step.name for step in journal.writes if step.kind == "model"]
    assert names == ["for-this-run", "its-own"]
    assert model.settings[0] == ModelSettings()


async def test_an_mcp_servers_tools_are_ledgered_with_its_hints(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    calls.touch()
    script = Path(__file__).parent.parent / "support" / "mcp_server.py"
    async with MCPServerStdio(
        {"command": sys.executable, "args": [str(script)], "env": {"CALLS": str(calls)}},
        name="probe",
        client_session_timeout_seconds=30,
    ) as server:

        def rule(instructions: str, items: list[Any]) -> list[Any]:
            got = outputs_of(items)
            if len(got) == 3:
                return [say(" | ".join(str(value) for value in got.values()))]
            wishes = {"look": {"what": "sky"}, "press": {"button": "red"}, "broken": {}}
            name = list(wishes)[len(got)]
            return [call(name, wishes[name], f"c{len(got)}")]

        def make() -> Scene:
            return Scene(Agent(name="hands", mcp_servers=[server]), rule)

        first = await replay_from_every_prefix(make)
        assert first.result is not None, first.error
        assert "seen sky" in first.result.text and "pressed red" in first.result.text
        assert "out of order" in first.result.text or "rror" in first.result.text
        committed = [s.key for s in first.journal.writes if s.status == "started"]
        assert committed == ["tool/c1", "tool/c2"], "only what is not a mere look is announced"
        pressed = calls.read_text().split().count("press")
        finished = sum(
            1
            for length in range(len(first.journal.writes) + 1)
            if not any(s.key == "tool/c1" for s in first.journal.writes[:length])
        )
        assert pressed == 1 + finished
