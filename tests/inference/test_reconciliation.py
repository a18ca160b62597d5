"""A call that may or may not have happened: settled by a person or by a tool, never repeated."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from agents import Agent, FunctionTool, function_tool

from agent_server.domain.errors import AlreadyDecided, InvalidRequest, NotFound, RunEnded
from agent_server.domain.ids import DEFAULT_TENANT, Tenant
from agent_server.domain.runs import Reconcile, Run, RunStatus
from agent_server.execution.ports import TaskContext
from agent_server.execution.runs import Runs
from agent_server.inference.durable_run import HintedPolicies
from tests.execution.kit import control, event_types, finished, running, submit
from tests.execution.test_waits import waiting
from tests.support.durable import call, loop_for, outputs_of, say


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/data/server.db"


class Asking(HintedPolicies):
    """Policies under which a tool says how a payment in doubt went."""

    def __init__(self, tool: FunctionTool | None) -> None:
        self._tool = tool

    def reconciler(self, tool: str) -> FunctionTool | None:
        return self._tool if tool == "pay" else None


class Till:
    """A payment that hangs the first time, so that its process can be stopped in the middle."""

    def __init__(self, asked: FunctionTool | None = None) -> None:
        self.begun = asyncio.Event()
        self.calls = 0

        @function_tool
        async def pay(eur: int) -> str:
            self.calls += 1
            if self.calls == 1:
                self.begun.set()
                await asyncio.Event().wait()
            return f"paid {eur}"

        def rule(instructions: str, items: list[Any]) -> list[Any]:
            got = outputs_of(items)
            return [say(got["p"])] if got else [call("pay", {"eur": 5}, "p")]

        loop, _ = loop_for(rule, policies=Asking(asked))

        async def carry_out(ctx: TaskContext) -> Any:
            return (await loop.run(ctx, Agent(name="a", tools=[pay]), "go")).output

        self.handlers = {"agent": carry_out}

    async def stopped_in_the_middle(self, url: str) -> Run:
        async with running(url, self.handlers) as runs:
            run = await submit(runs, agent="a", input="go")
            await asyncio.wait_for(self.begun.wait(), 20)
        return run


def said(outcome: Any, **more: Any) -> Reconcile:
    return Reconcile(step="tool/p", outcome=outcome, **more)


async def reconcile(runs: Runs, run: Run, how: Reconcile) -> None:
    await waiting(runs, run, "reconciliation")
    await control(runs).reconcile(DEFAULT_TENANT, run.id, how, by="ann")


@pytest.mark.parametrize(
    ("how", "output", "calls"),
    [
        (said("happened", result="paid before"), "paid before", 1),
        (said("did_not_happen"), "paid 5", 2),
        (said("fail", reason="ask the bank"), None, 1),
    ],
)
async def test_a_person_says_how_a_call_in_doubt_went(
    url: str, how: Reconcile, output: str | None, calls: int
) -> None:
    till = Till()
    run = await till.stopped_in_the_middle(url)
    async with running(url, till.handlers) as runs:
        await reconcile(runs, run, how)
        ended = await finished(runs, run)
        assert (ended.output, till.calls) == (output, calls)
        if output is None:
            assert ended.status is RunStatus.FAILED and ended.error is not None
            assert "ask the bank" in ended.error.message
        assert ended.usage.tool_calls == 1
        types = await event_types(runs, run)
        assert types.count("step.in_doubt") == 1


async def test_it_is_said_once_by_who_may_see_the_run_and_only_of_what_is_in_doubt(
    url: str,
) -> None:
    till = Till()
    run = await till.stopped_in_the_middle(url)
    async with running(url, till.handlers, role="api") as runs:
        with pytest.raises(AlreadyDecided):  # not in doubt before somebody has looked
            await control(runs).reconcile(DEFAULT_TENANT, run.id, said("fail"), by="ann")
    async with running(url, till.handlers) as runs:
        await waiting(runs, run, "reconciliation")
        door = control(runs)
        with pytest.raises(NotFound):
            await door.reconcile(Tenant("other"), run.id, said("fail"), by="ann")
        with pytest.raises(NotFound):
            other = Reconcile(step="tool/q", outcome="fail")
            await door.reconcile(DEFAULT_TENANT, run.id, other, by="ann")
        with pytest.raises(InvalidRequest):
            await door.reconcile(DEFAULT_TENANT, run.id, said("fail", result=1), by="ann")
        answers = await asyncio.gather(
            *(
                door.reconcile(DEFAULT_TENANT, run.id, said("happened", result=str(i)), by="ann")
                for i in range(4)
            ),
            return_exceptions=True,
        )
        late = [a for a in answers if isinstance(a, (AlreadyDecided, RunEnded))]
        assert len(late) == 3
        assert (await finished(runs, run)).output in {"0", "1", "2", "3"}
        assert till.calls == 1


@pytest.mark.parametrize(
    ("answer", "output", "calls"),
    [
        ('{"outcome": "happened", "result": "paid after all"}', "paid after all", 1),
        ('{"outcome": "did_not_happen"}', "paid 5", 2),
        ("who knows", None, 1),
    ],
)
async def test_a_tool_that_can_find_out_says_how_it_went(
    url: str, answer: str, output: str | None, calls: int
) -> None:
    heard: list[tuple[str, str]] = []

    @function_tool
    def look_up(arguments_json: str, step: str) -> str:
        heard.append((arguments_json, step))
        return answer

    till = Till(look_up)
    run = await till.stopped_in_the_middle(url)
    async with running(url, till.handlers) as runs:
        if output is None:
            await waiting(runs, run, "reconciliation")
        else:
            assert (await finished(runs, run)).output == output
        assert (heard, till.calls) == ([('{"eur": 5}', "tool/p")], calls)
