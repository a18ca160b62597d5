"""Budgets hold over a run's whole tree, on both databases, across processes, with real agents."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from decimal import Decimal
from typing import Any

import pytest
from agents import Agent, ModelResponse

from agent_server.domain.errors import BudgetExceeded
from agent_server.domain.ids import DEFAULT_TENANT
from agent_server.domain.runs import Run, RunStatus, Usage
from agent_server.execution import store
from agent_server.execution.ports import (
    Estimate,
    FinalOutput,
    StepRecord,
    TaskContext,
    TaskOutcome,
    TaskSpec,
)
from agent_server.execution.runs import Runs
from agent_server.inference.agent_loop import AgentLoop
from tests.support.durable import OneModel, RuleModel, call, loop_for, say, settings

from .kit import event_types, finished, running, submit

Handler = Callable[[TaskContext], Awaitable[Any]]


def leaf_spec(path: str) -> TaskSpec:
    return TaskSpec(path=path, node=path, kind="leaf", payload={})


async def gathered(ctx: TaskContext, count: int) -> list[TaskOutcome]:
    """``count`` leaves side by side; a budget that one of them met ends the run."""
    found = await asyncio.gather(*[ctx.child(leaf_spec(f"{i}")) for i in range(count)])
    for outcome in found:
        if outcome.error is not None and outcome.error.code == BudgetExceeded.code:
            raise BudgetExceeded(outcome.error.message, errors=outcome.error.errors)
    return found


async def check_totals(runs: Runs, run: Run) -> None:
    """I5: the run's usage is the sum of its steps'; I3: no gap in its events."""
    page = await runs.steps(DEFAULT_TENANT, run.id, limit=10_000, cursor=None)
    for name in ("model_calls", "tool_calls", "input_tokens", "output_tokens"):
        summed = sum(getattr(step.usage, name) for step in page.data)
        assert getattr(run.usage, name) == summed, name
    await event_types(runs, run)
    left = await runs.database.read(lambda c: store.reservations_of(c, run.id))
    assert not left, "nothing stays reserved when a run has ended"


def tree(depth_calls: list[str]) -> tuple[dict[str, Handler], RuleModel]:
    """A run of three levels: a root, its leaves' agents, and an agent that each uses as a tool."""

    async def rule(instructions: str, items: list[Any]) -> Any:
        depth_calls.append(instructions)
        await asyncio.sleep(0)  # a model answers later, and others ask meanwhile
        if instructions == "inner" or items[-1].get("type") == "function_call_output":
            return [say(f"{instructions} done")]
        return [call("inner", {"input": "deeper"}, "c1")]

    loop, model = loop_for(rule)

    async def leaf(ctx: TaskContext) -> Any:
        inner = Agent(name="inner", instructions="inner")
        outer = Agent(
            name="outer", instructions="outer", tools=[inner.as_tool("inner", "Go deeper")]
        )
        return (await loop.run(ctx, outer, f"work {ctx.path}")).text

    async def goal(ctx: TaskContext) -> Any:
        return len(await gathered(ctx, 40))

    return {"goal": goal, "leaf": leaf}, model


async def test_a_tree_of_three_levels_and_forty_parallel_calls_makes_at_most_its_budget(
    url: str,
) -> None:
    made: list[str] = []
    handlers, model = tree(made)
    async with running(url, handlers) as runs:
        run = await finished(runs, await submit(runs, goal="g", budget={"max_model_calls": 20}))
        assert run.status is RunStatus.BUDGET_EXCEEDED
        assert len(model.asked) == len(made) <= 20
        assert run.usage.model_calls <= 20
        assert run.error is not None and "max_model_calls=20" in run.error.message
        assert run.output["partial"] is True and run.output["stopped_by"] == "max_model_calls"
        types = await event_types(runs, run)
        assert types.count("budget.warning") == 1 and types[-1] == "run.budget_exceeded"
        await check_totals(runs, run)
        made.clear()
        enough = await finished(runs, await submit(runs, goal="g", budget={"max_model_calls": 120}))
        assert (enough.status, enough.output, len(made)) == (RunStatus.SUCCEEDED, 40, 120)
        await check_totals(runs, enough)


async def test_two_processes_share_one_count(postgres_url: str) -> None:
    made: list[str] = []
    async with AsyncExitStack() as stack:
        servers = []
        for _ in range(2):
            handlers, _model = tree(made)
            servers.append(
                await stack.enter_async_context(
                    running(postgres_url, handlers, worker_concurrency=10)
                )
            )
        first, second = servers
        run = await finished(first, await submit(first, goal="g", budget={"max_model_calls": 20}))
        assert run.status is RunStatus.BUDGET_EXCEEDED and len(made) <= 20
        assert (await second.get(DEFAULT_TENANT, run.id)).usage.model_calls <= 20
        await check_totals(second, run)
        assert (await event_types(second, run)).count("budget.warning") <= 1


async def test_what_stopped_it_comes_with_what_was_done(url: str) -> None:
    async def goal(ctx: TaskContext) -> Any:
        for number in range(5):
            outcome = await ctx.child(leaf_spec(f"{number}"))
            if outcome.error is not None:
                raise BudgetExceeded(outcome.error.message, errors=outcome.error.errors)
        return "all"

    async def leaf(ctx: TaskContext) -> Any:
        record = StepRecord(key=ctx.journal.key("tool/t"), kind="tool", name="t")
        await ctx.journal.begin(record, commit=True)
        await ctx.journal.finish(record.done("x", Usage(tool_calls=1)))
        return f"result {ctx.path}"

    async with running(url, {"goal": goal, "leaf": leaf}) as runs:
        run = await finished(runs, await submit(runs, goal="g", budget={"max_tool_calls": 2}))
        assert run.status is RunStatus.BUDGET_EXCEEDED
        assert [one["output"] for one in run.output["tasks"]] == ["result 0", "result 1"]
        events = await runs.events(DEFAULT_TENANT, run.id, 0, 1000)
        assert b'"partial":true' in bytes(events[-1].data)


async def ask(ctx: TaskContext, tokens: int, *, bounded: bool, used: int, hold: Any = None) -> None:
    record = StepRecord(key=ctx.journal.key("model/1"), kind="model", name="m")
    guess = Estimate("m", 10, tokens, bounded, Decimal("0.1"), Decimal("0.4"))
    await ctx.journal.begin(record, commit=False, estimate=guess)
    if hold is not None:
        await hold()
    await ctx.journal.finish(record.done("said", Usage(model_calls=1, output_tokens=used)))


async def test_calls_that_cannot_be_bounded_take_turns_when_tokens_get_scarce(url: str) -> None:
    at_once = most = 0

    async def goal(ctx: TaskContext) -> Any:
        return len(await gathered(ctx, 12))

    async def leaf(ctx: TaskContext) -> Any:
        async def hold() -> None:
            nonlocal at_once, most
            at_once += 1
            most = max(most, at_once)
            await asyncio.sleep(0)  # others have their turn
            at_once -= 1

        await ask(ctx, 90, bounded=False, used=40, hold=hold)

    async with running(url, {"goal": goal, "leaf": leaf}) as runs:
        run = await finished(runs, await submit(runs, goal="g", budget={"max_tokens": 500}))
        assert run.status is RunStatus.SUCCEEDED, run.error
        assert run.usage.output_tokens == 480 and most <= 5
        scarce = await finished(runs, await submit(runs, goal="g", budget={"max_tokens": 300}))
        assert scarce.status is RunStatus.BUDGET_EXCEEDED
        assert 240 <= scarce.usage.output_tokens <= 300 + 40, "at most the one call in flight"
        await check_totals(runs, scarce)


async def test_a_bounded_call_that_does_not_fit_is_not_made(url: str) -> None:
    async def agent(ctx: TaskContext) -> Any:
        await ask(ctx, 2_000, bounded=True, used=5)

    async with running(url, {"agent": agent}) as runs:
        run = await finished(
            runs, await submit(runs, agent="a", input="x", budget={"max_tokens": 1_000})
        )
        assert run.status is RunStatus.BUDGET_EXCEEDED and run.usage.model_calls == 0
        assert run.error is not None and "about 2010 needed" in run.error.message
        money = await finished(
            runs, await submit(runs, agent="a", input="x", budget={"max_cost_usd": "0.49"})
        )
        assert money.error is not None and "max_cost_usd" in money.error.message
        assert money.usage.model_calls == 0


async def test_a_model_without_a_price_is_not_asked_on_a_money_budget(url: str) -> None:
    async def agent(ctx: TaskContext) -> Any:
        record = StepRecord(key="model/1", kind="model", name="m")
        guess = Estimate("nobody-knows", 1, 1, bounded=True)
        await ctx.journal.begin(record, commit=False, estimate=guess)

    async with running(url, {"agent": agent}) as runs:
        run = await finished(
            runs, await submit(runs, agent="a", input="x", budget={"max_cost_usd": "5"})
        )
        assert run.status is RunStatus.BUDGET_EXCEEDED and run.error is not None
        assert "'nobody-knows' has no known price" in run.error.message
        assert run.error.hint is not None and "AGENT_SERVER_PRICES" in run.error.hint


async def test_a_repeated_try_counts_as_a_call_of_its_own(url: str) -> None:
    tries = 0

    async def agent(ctx: TaskContext) -> Any:
        nonlocal tries
        record = StepRecord(key="model/1", kind="model", name="m")
        await ctx.journal.begin(record, commit=False)
        while True:
            tries += 1
            await ctx.journal.again(record)

    async with running(url, {"agent": agent}) as runs:
        run = await finished(
            runs, await submit(runs, agent="a", input="x", budget={"max_model_calls": 3})
        )
        assert run.status is RunStatus.BUDGET_EXCEEDED and tries == 3


async def test_a_call_lost_with_its_process_still_counts(url: str) -> None:
    lost = asyncio.Event()

    async def agent(ctx: TaskContext) -> Any:
        if ctx.attempt > 2:
            return FinalOutput("third time")
        record = StepRecord(key="model/1", kind="model", name="m")
        await ctx.journal.begin(record, commit=False)
        if ctx.attempt == 1:
            lost.set()
            await asyncio.Event().wait()
        await ctx.journal.finish(record.done("said", Usage(model_calls=1)))
        return "said"

    request = {"agent": "a", "input": "x", "budget": {"max_model_calls": 2}}
    async with running(url, {"agent": agent}) as runs:
        run = await submit(runs, **request)
        await asyncio.wait_for(lost.wait(), 10)
    async with running(url, {"agent": agent}) as runs:
        ended = await finished(runs, run)
        assert ended.output == "said" and ended.usage.model_calls == 2
        await check_totals(runs, ended)


class Wordy(RuleModel):
    """Says ``wanted`` tokens, and no more than it is asked for at most."""

    def __init__(self, wanted: Callable[[str], int]) -> None:
        super().__init__(lambda instructions, items: [say("x")])
        self.wanted = wanted
        self.said: list[int] = []
        self.cut_short = 0

    async def get_response(self, *args: Any, **more: Any) -> ModelResponse:
        answer = await super().get_response(*args, **more)
        await asyncio.sleep(0)  # others have their turn
        most = args[2].max_tokens
        given = self.wanted(str(args[1]))
        if most is not None and given > most:
            given = most
            self.cut_short += 1
        self.said.append(given)
        answer.usage.input_tokens, answer.usage.output_tokens = 0, given
        return answer


def wordy_tree(model: Wordy) -> dict[str, Handler]:
    """A run of three levels with 40 calls side by side, whose agent sets no maximum."""
    loop = AgentLoop(OneModel(model), settings(budget_output_tokens=500))

    async def leaf(ctx: TaskContext) -> Any:
        return (await loop.run(ctx, Agent(name="wordy"), f"work {ctx.path}", model="gpt-5")).text

    async def middle(ctx: TaskContext) -> Any:
        inside = [TaskSpec(f"{ctx.path}.{i}", "leaf", "leaf", {}) for i in range(10)]
        return judged(await asyncio.gather(*map(ctx.child, inside)))

    async def goal(ctx: TaskContext) -> Any:
        inside = [TaskSpec(f"{i}", "middle", "middle", {}) for i in range(4)]
        return judged(await asyncio.gather(*map(ctx.child, inside)))

    return {"goal": goal, "middle": middle, "leaf": leaf}


def judged(found: list[TaskOutcome]) -> int:
    for outcome in found:
        if outcome.error is not None:
            assert outcome.error.code == BudgetExceeded.code, outcome.error
            raise BudgetExceeded(outcome.error.message, errors=outcome.error.errors)
    return sum(outcome.output if isinstance(outcome.output, int) else 1 for outcome in found)


@pytest.mark.parametrize(
    "budget", [{"max_tokens": 20_000}, {"max_cost_usd": "0.2"}], ids=["tokens", "money"]
)
async def test_parallel_calls_without_a_maximum_pass_a_budget_by_at_most_one_of_them(
    url: str, budget: dict[str, Any]
) -> None:
    model = Wordy(lambda asked: 3_000)
    async with running(url, wordy_tree(model)) as runs:
        run = await finished(runs, await submit(runs, goal="g", budget=budget))
        assert run.status is RunStatus.BUDGET_EXCEEDED
        most = 20_000  # gpt-5 is 10 US dollars per million output tokens
        assert sum(model.said) <= most + 3_000 and run.usage.output_tokens <= most + 3_000
        assert run.usage.output_tokens <= sum(model.said)
        await check_totals(runs, run)


async def test_an_answer_that_was_cut_short_beside_others_is_asked_for_again_and_whole(
    url: str,
) -> None:
    model = Wordy(lambda asked: 3_000 if "work 2.7" in asked else 100)
    async with running(url, wordy_tree(model)) as runs:
        run = await finished(runs, await submit(runs, goal="g", budget={"max_tokens": 50_000}))
        assert (run.status, run.output) == (RunStatus.SUCCEEDED, 40), run.error
        assert run.usage.output_tokens == sum(model.said)
        assert model.said.count(3_000) == 1 and run.usage.model_calls == 40 + model.cut_short
        await check_totals(runs, run)


async def test_two_processes_share_one_budget_of_tokens(postgres_url: str) -> None:
    models = [Wordy(lambda asked: 3_000), Wordy(lambda asked: 3_000)]
    async with AsyncExitStack() as stack:
        first, second = [
            await stack.enter_async_context(
                running(postgres_url, wordy_tree(model), worker_concurrency=10)
            )
            for model in models
        ]
        run = await finished(first, await submit(first, goal="g", budget={"max_tokens": 20_000}))
        assert run.status is RunStatus.BUDGET_EXCEEDED
        assert sum(models[0].said + models[1].said) <= 20_000 + 3_000
        await check_totals(second, run)
