"""Tool calls of a durable run: effects, doubt, time limits, approvals, cancellation."""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from agents import Agent, FunctionTool, Runner, ToolOutputImage, ToolOutputText, function_tool

from agent_server.domain.agents import ApprovalTerms, ToolEffect
from agent_server.domain.errors import (
    BudgetExceeded,
    MaxTurnsExceeded,
    ModelError,
    ModelRateLimited,
    ToolError,
)
from agent_server.domain.runs import Budget
from agent_server.execution.ports import LostLease, StepRecord, Suspend
from agent_server.inference.durable_run import HintedPolicies
from agent_server.inference.tool_output import output_from_json, output_to_json
from agent_server.testing.journal import memory_context
from tests.support.durable import call, loop_for, outputs_of, say


class Policies(HintedPolicies):
    def __init__(
        self,
        effect: ToolEffect = ToolEffect.ONCE,
        timeout_s: float | None = None,
        approve: bool = False,
    ) -> None:
        self._effect, self._timeout_s, self._approve = effect, timeout_s, approve

    def effect(self, tool: str, annotations: Mapping[str, Any] | None = None) -> ToolEffect:
        return self._effect

    def timeout_s(self, tool: str) -> float | None:
        return self._timeout_s

    def approval(
        self, tool: str, tags: frozenset[str] = frozenset(), agent: str | None = None
    ) -> ApprovalTerms | None:
        return ApprovalTerms() if self._approve else None


def once(*names: str) -> Any:
    """A rule: call each tool without arguments, side by side, then say what they gave."""

    def rule(instructions: str, items: list[Any]) -> list[Any]:
        got = outputs_of(items)
        return [say(str(got))] if got else [call(name, {}, f"call_{name}") for name in names]

    return rule


@function_tool
def ping() -> str:
    return "pong"


async def test_a_call_in_doubt_waits_for_a_decision_until_its_siblings_have_ended() -> None:
    release = asyncio.Event()
    finished: list[str] = []

    @function_tool
    async def slow() -> str:
        release.set()
        await asyncio.sleep(0)  # the sibling finds its call in doubt in these turns
        await asyncio.sleep(0)
        finished.append("slow")
        return "done"

    @function_tool
    async def risky() -> str:
        raise AssertionError("never called again")

    agent = Agent(name="a", tools=[slow, risky])
    loop, _ = loop_for(once("slow", "risky"))
    ctx, journal = memory_context(recorded=[started("tool/call_risky", "risky", "{}")])
    with pytest.raises(Suspend) as stopped:
        await loop.run(ctx, agent, "go")
    assert stopped.value.waiting_for.kind == "reconciliation"
    assert stopped.value.waiting_for.step == "tool/call_risky"
    assert "step.in_doubt" in journal.types()
    assert finished == ["slow"]
    assert {s.key for s in journal.writes if s.status == "done"} == {"model/1", "tool/call_slow"}


async def test_doubt_inside_runs_that_tools_started_side_by_side_does_not_wait_for_itself() -> None:
    inner = Agent(name="inner", instructions="inner", tools=[ping])

    @function_tool
    async def left() -> str:
        return str((await Runner.run(inner, "left")).final_output)

    @function_tool
    async def right() -> str:
        return str((await Runner.run(inner, "right")).final_output)

    def rule(instructions: str, items: list[Any]) -> list[Any]:
        if instructions == "inner":
            return [say("x")] if outputs_of(items) else [call("ping", {}, "p")]
        return once("left", "right")(instructions, items)

    class OnlyPing(HintedPolicies):
        def effect(self, tool: str, annotations: Mapping[str, Any] | None = None) -> ToolEffect:
            return ToolEffect.ONCE if tool == "ping" else ToolEffect.NONE

    loop, _ = loop_for(rule, policies=OnlyPing())
    doubtful = [f"tool/call_{side}/tool/p" for side in ("left", "right")]
    ctx, journal = memory_context(recorded=[started(key, "ping", "{}") for key in doubtful])
    with pytest.raises(Suspend):
        await asyncio.wait_for(loop.run(ctx, Agent(name="a", tools=[left, right]), "go"), 5)
    assert not [s for s in journal.writes if s.key in ("tool/call_left", "tool/call_right")]


async def test_doubt_inside_an_agent_used_as_a_tool_stops_the_whole_run() -> None:
    inner = Agent(name="inner", instructions="inner", tools=[ping])
    outer = Agent(name="outer", tools=[inner.as_tool("ask", "")])

    def rule(instructions: str, items: list[Any]) -> list[Any]:
        got = outputs_of(items)
        if instructions == "inner":
            return [say("inner done")] if got else [call("ping", {}, "p")]
        return [say("went on")] if got else [call("ask", {"input": "?"}, "o")]

    loop, model = loop_for(rule)
    ctx, journal = memory_context(recorded=[started("tool/o/tool/p", "ping", "{}")])
    with pytest.raises(Suspend):
        await loop.run(ctx, outer, "go")
    assert len(model.asked) == 2, "the outer model is not told of the doubt"


async def test_a_lost_lease_leaves_the_loop_unchanged() -> None:
    loop, _ = loop_for(once("ping"))
    ctx, journal = memory_context()
    finish = journal.finish

    async def lost(step: StepRecord, *, commit: bool = True) -> None:
        if step.kind == "tool":
            raise LostLease("taken over")
        await finish(step, commit=commit)

    journal.finish = lost  # type: ignore[method-assign]
    with pytest.raises(LostLease):
        await loop.run(ctx, Agent(name="a", tools=[ping]), "go")


async def test_a_used_up_budget_ends_the_run_even_inside_a_tool() -> None:
    inner = Agent(name="inner", instructions="inner")
    outer = Agent(name="outer", tools=[inner.as_tool("ask", "")])

    def rule(instructions: str, items: list[Any]) -> list[Any]:
        return (
            [call("ask", {"input": "?"}, f"o{len(items)}")]
            if instructions != "inner"
            else [say("x")]
        )

    loop, model = loop_for(rule)
    ctx, _ = memory_context(budget=Budget(max_model_calls=4))
    with pytest.raises(BudgetExceeded):
        await loop.run(ctx, outer, "go")
    assert len(model.asked) == 4


async def test_a_tool_over_its_time_is_told_to_the_model_and_recorded_as_failed() -> None:
    @function_tool
    async def forever() -> str:
        await asyncio.Event().wait()
        return "never"

    loop, _ = loop_for(once("forever"), policies=Policies(timeout_s=0.01))
    ctx, journal = memory_context()
    result = await loop.run(ctx, Agent(name="a", tools=[forever]), "go")
    assert "timed out after 0.01 seconds" in result.text
    assert "may or may not have taken effect" in result.text
    [step] = [s for s in journal.writes if s.status == "failed"]
    assert step.error is not None and step.error.code == "tool_error"
    ctx, _ = memory_context(recorded=journal.writes)
    again = await loop.run(ctx, Agent(name="a", tools=[forever]), "go")
    assert again.text == result.text


async def test_a_tools_own_time_limit_keeps_its_own_message() -> None:
    @function_tool(timeout=0.05, timeout_error_function=lambda context, error: "too slow for me")
    async def forever() -> str:
        await asyncio.Event().wait()
        return "never"

    loop, _ = loop_for(once("forever"))
    ctx, journal = memory_context()
    result = await loop.run(ctx, Agent(name="a", tools=[forever]), "go")
    assert "too slow for me" in result.text
    assert [s.status for s in journal.writes if s.kind == "tool"] == ["started", "failed"]


async def test_a_timeout_of_the_sdk_that_goes_off_while_the_ledger_writes_is_recorded_too() -> None:
    @function_tool(timeout=0.05)
    async def quick() -> str:
        return "never"

    loop, _ = loop_for(once("quick"))
    ctx, journal = memory_context()
    begin = journal.begin

    async def stalled(step: StepRecord, *, commit: bool, **more: Any) -> None:
        await begin(step, commit=commit, **more)
        if step.kind == "tool":
            await asyncio.Event().wait()

    journal.begin = stalled  # type: ignore[method-assign]  # a database that does not answer
    result = await loop.run(ctx, Agent(name="a", tools=[quick]), "go")
    assert "timed out after 0.05 seconds" in result.text
    assert [s.status for s in journal.writes if s.kind == "tool"] == ["started", "failed"]
    ctx, _ = memory_context(recorded=journal.writes)
    again = await loop.run(ctx, Agent(name="a", tools=[quick]), "go")
    assert again.text == result.text


async def test_a_tool_that_needs_approval_makes_the_run_wait_where_it_can_be_seen() -> None:
    @function_tool(needs_approval=True)
    def launch(code: int) -> str:
        raise AssertionError("not approved")

    def rule(instructions: str, items: list[Any]) -> list[Any]:
        return [call("launch", {"code": 7}, "l1")]

    loop, _ = loop_for(rule)
    ctx, journal = memory_context()
    agent = Agent(name="a", tools=[launch])
    with pytest.raises(Suspend) as stopped:
        await loop.run(ctx, agent, "go")
    waiting = stopped.value.waiting_for
    assert (waiting.kind, waiting.step) == ("approval", "tool/l1")
    assert "'launch'" in waiting.detail and '{"code": 7}' in waiting.detail
    assert journal.types().count("approval.requested") == 1

    ctx, again = memory_context(recorded=journal.writes, run_id=journal.run_id)
    with pytest.raises(Suspend):
        await loop.run(ctx, agent, "go")
    assert again.types().count("approval.requested") == 0, "asked once"


async def test_a_policy_may_ask_for_approval_of_any_tool() -> None:
    loop, _ = loop_for(once("ping"), policies=Policies(approve=True))
    ctx, journal = memory_context()
    with pytest.raises(Suspend) as stopped:
        await loop.run(ctx, Agent(name="a", tools=[ping]), "go")
    assert stopped.value.waiting_for.kind == "approval"
    assert "approval.requested" in journal.types()


async def test_cancelling_a_run_stops_its_model_call_at_once() -> None:
    asked = asyncio.Event()
    gone = asyncio.Event()

    async def rule(instructions: str, items: list[Any]) -> list[Any]:
        asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            gone.set()
        return []

    loop, _ = loop_for(rule)
    ctx, journal = memory_context()
    task = asyncio.ensure_future(loop.run(ctx, Agent(name="a"), "go"))
    await asyncio.wait_for(asked.wait(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gone.is_set()
    assert journal.writes == []


async def test_a_cancelled_run_goes_no_further_though_its_tool_ignores_it() -> None:
    began = asyncio.Event()

    @function_tool
    async def stubborn() -> str:
        began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            pass
        return "ignored it"

    loop, model = loop_for(once("stubborn"))
    ctx, journal = memory_context()
    task = asyncio.ensure_future(loop.run(ctx, Agent(name="a", tools=[stubborn]), "go"))
    await asyncio.wait_for(began.wait(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(model.asked) == 1
    assert "model/2" not in journal.recorded()


async def test_a_model_that_fails_in_passing_is_asked_again_and_the_step_counts_it() -> None:
    fails = iter([True, True, False])

    def rule(instructions: str, items: list[Any]) -> list[Any]:
        if next(fails):
            raise ModelRateLimited("slow down", retryable=True, retry_after_s=0)
        return [say("at last")]

    loop, _ = loop_for(rule, knobs={"model_retries": 3})
    ctx, journal = memory_context()
    result = await loop.run(ctx, Agent(name="a"), "go")
    assert result.output == "at last"
    assert [(s.status, s.attempts) for s in journal.writes] == [("done", 3)]


async def test_a_model_call_that_failed_is_made_anew_under_its_key() -> None:
    broken = True

    def rule(instructions: str, items: list[Any]) -> list[Any]:
        if broken:
            raise ModelError("out of order")
        return [say("repaired")]

    loop, _ = loop_for(rule)
    ctx, journal = memory_context()
    with pytest.raises(ModelError, match="out of order"):
        await loop.run(ctx, Agent(name="a"), "go")
    assert [s.status for s in journal.writes] == ["failed"]
    broken = False
    ctx, again = memory_context(recorded=journal.writes)
    assert (await loop.run(ctx, Agent(name="a"), "go")).output == "repaired"
    assert [(s.key, s.status, s.attempts) for s in again.writes] == [("model/1", "done", 2)]


async def test_a_loop_without_end_is_stopped_by_its_turns() -> None:
    def rule(instructions: str, items: list[Any]) -> list[Any]:
        return [call("no_such_tool", {}, f"c{len(items)}")]

    loop, model = loop_for(rule, knobs={"max_turns": 4})
    ctx, _ = memory_context()
    with pytest.raises(MaxTurnsExceeded, match="after 4 turns"):
        await loop.run(ctx, Agent(name="a"), "go")
    assert len(model.asked) == 4


async def test_usage_counts_models_and_tools() -> None:
    loop, _ = loop_for(once("ping"))
    ctx, journal = memory_context()
    await loop.run(ctx, Agent(name="a", tools=[ping]), "go")
    usage = journal.usage
    assert (usage.model_calls, usage.tool_calls) == (2, 1)
    assert (usage.input_tokens, usage.output_tokens) == (20, 10)
    assert usage.cost_usd is None


@pytest.mark.parametrize(
    "output",
    [
        None,
        3,
        2.5,
        "text",
        {"a": [1, {"b": None}]},
        {"$form": "mine", "value": 1},
        ToolOutputText(text="seen"),
        [ToolOutputText(text="seen"), ToolOutputImage(image_url="https://example.org/i.png")],
        ["words", ToolOutputText(text="seen")],
    ],
    ids=str,
)
def test_what_a_tool_returned_replays_equal(output: Any) -> None:
    assert output_from_json(ping, output_to_json(ping, output)) == output


def test_an_object_a_tool_returned_replays_as_the_text_the_model_saw() -> None:
    class Odd:
        def __str__(self) -> str:
            return "odd"

    replayed = output_from_json(ping, output_to_json(ping, (1, Odd())))
    assert str(replayed).startswith("(1, <")


async def test_a_tool_called_without_an_agent_is_a_step_of_its_own() -> None:
    calls: list[int] = []

    @function_tool
    def double(n: int) -> dict[str, int]:
        calls.append(n)
        return {"twice": 2 * n}

    loop, _ = loop_for(once())
    ctx, journal = memory_context()
    assert await loop.call_tool(ctx, double, {"n": 4}, key="tool/1") == {"twice": 8}
    assert [s.key for s in journal.writes] == ["tool/1", "tool/1"]
    ctx, _ = memory_context(recorded=journal.writes)
    assert await loop.call_tool(ctx, double, {"n": 4}, key="tool/1") == {"twice": 8}
    assert calls == [4]


async def test_a_tool_called_without_an_agent_fails_with_an_error_of_its_own() -> None:
    @function_tool
    def fragile() -> str:
        raise ValueError("glass")

    loop, _ = loop_for(once())
    ctx, journal = memory_context()
    for recorded in ([], journal.writes):
        ctx, journal = memory_context(recorded=recorded)
        with pytest.raises(ToolError, match="'fragile' failed: ValueError: glass"):
            await loop.call_tool(ctx, fragile, {}, key="tool/1")


async def test_a_tool_built_by_hand_is_ledgered_too() -> None:
    seen: list[Any] = []

    async def invoke(context: Any, arguments: str) -> str:
        seen.append(type(context).__name__)
        return "by hand"

    tool = FunctionTool(
        name="manual",
        description="",
        params_json_schema={"type": "object", "properties": {}},
        on_invoke_tool=invoke,
    )
    loop, _ = loop_for(once("manual"))
    ctx, journal = memory_context()
    result = await loop.run(ctx, Agent(name="a", tools=[tool]), "go")
    assert "by hand" in result.text
    assert [s.key for s in journal.writes if s.kind == "tool"] == ["tool/call_manual"] * 2
    model = loop_for(once("manual"))[1]
    outside = await Runner.run(Agent(name="a", tools=[tool], model=model), "go")
    assert "by hand" in str(outside.final_output)
    assert len([s for s in journal.writes if s.kind == "tool"]) == 2


def started(key: str, name: str, arguments: str) -> StepRecord:
    """A call that was begun by an attempt that died."""
    return replace(StepRecord(key=key, kind="tool", name=name), input={})
