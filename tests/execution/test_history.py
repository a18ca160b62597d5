"""Forks and retries share exactly what they may, on both databases, also when chance decides."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from agent_server.domain.agents import ToolEffect
from agent_server.domain.errors import BudgetExceeded, Conflict, RunCancelled, ToolError
from agent_server.domain.history import ForkedRun, ForkRequest, RetryRequest
from agent_server.domain.ids import DEFAULT_TENANT
from agent_server.domain.runs import Budget, Run, RunStatus, Usage, WaitingFor
from agent_server.execution.history import History
from agent_server.execution.ports import StepRecord, Suspend, TaskContext, TaskSpec
from agent_server.execution.runs import Runs
from agent_server.memory.session_store import branch_session, items_before
from tests.support.until import until

from .kit import event_types, finished, running, standing, submit


def history_of(runs: Runs) -> History:
    return History(
        runs,
        effect_of=lambda tool: ToolEffect.ONCE,
        branch_session=branch_session,
        session_before=items_before,
    )


async def retried(runs: Runs, run: Run, **asked: Any) -> ForkedRun:
    made, _ = await history_of(runs).retry(
        DEFAULT_TENANT, run.id, RetryRequest(**asked), principal="test"
    )
    return made


async def forked(runs: Runs, run: Run, start: str | None = None, **asked: Any) -> ForkedRun:
    request = ForkRequest(start=start, **asked)
    made, _ = await history_of(runs).fork(DEFAULT_TENANT, run.id, request, principal="test")
    return made


class Calls:
    """What was really called; ``fail`` and ``hold`` decide what happens there."""

    def __init__(self) -> None:
        self.made: Counter[str] = Counter()
        self.fail: Callable[[str], bool] = lambda key: False
        self.hold: Callable[[str], asyncio.Event | None] = lambda key: None

    async def step(self, ctx: TaskContext, kind: Any, name: str) -> Any:
        """A model or tool call as the inference floor makes it."""
        key = ctx.journal.key(kind, name)
        found = ctx.journal.recorded().get(key)
        if found is not None and found.status == "done":
            return found.output
        if found is not None and kind == "tool" and found.status in ("started", "in_doubt"):
            await ctx.journal.in_doubt(found, "it may have happened")
            raise Suspend(WaitingFor(kind="reconciliation", detail="decide", step=key))
        record = StepRecord(key=key, kind=kind, name=name, input={"of": key})
        await ctx.journal.begin(record, commit=kind == "tool")
        self.made[key] += 1
        wait = self.hold(key)
        if wait is not None:
            await wait.wait()
        usage = Usage(model_calls=kind == "model", tool_calls=kind == "tool", output_tokens=1)
        if self.fail(key):
            error = ToolError(f"{key} failed")
            await ctx.journal.finish(record.failed(error.info(), usage))
            raise error
        output = f"{key}!"
        await ctx.journal.finish(record.done(output, usage), commit=kind == "tool")
        return output

    def handlers(self, width: int = 3) -> dict[str, Any]:
        """A root that plans by a model call, works at ``width`` leaves side by side, and sums up."""

        async def goal(ctx: TaskContext) -> Any:
            await self.step(ctx, "model", "plan")
            leaves = [
                TaskSpec(path=f"{n}", node=f"n{n}", kind="agent", payload={"n": n})
                for n in range(1, width + 1)
            ]
            outcomes = await asyncio.gather(*[ctx.child(leaf) for leaf in leaves])
            for outcome in outcomes:
                if outcome.error is not None:
                    kinds = {"budget_exceeded": BudgetExceeded, "cancelled": RunCancelled}
                    raise kinds.get(outcome.error.code, ToolError)(outcome.error.message)
            await self.step(ctx, "model", "sum")
            return [outcome.output for outcome in outcomes]

        async def leaf(ctx: TaskContext) -> Any:
            said = [await self.step(ctx, "model", "1")]
            said.append(await self.step(ctx, "tool", "pay"))
            said.append(await self.step(ctx, "model", "2"))
            return [*said, ctx.payload.get("input")]

        return {"goal": goal, "agent": leaf}


async def check(runs: Runs, run: Run) -> None:
    """I3: no gap in the events; I5: usage is the sum of the run's own steps, shared ones are free;
    what is told is what is stored."""
    await event_types(runs, run)
    page = await runs.steps(DEFAULT_TENANT, run.id, limit=10_000, cursor=None)
    for name in ("model_calls", "tool_calls", "input_tokens", "output_tokens"):
        assert getattr(run.usage, name) == sum(getattr(s.usage, name) for s in page.data), name
    assert all(step.usage == Usage() for step in page.data if step.shared)
    whole = (await history_of(runs).export(DEFAULT_TENANT, run.id)).events
    told = {e["step"] for e in whole if e["type"] in ("step.completed", "step.failed")}
    assert told == {s.key for s in page.data if s.status in ("done", "failed")}
    ended = {e["path"] for e in whole if e["type"] in ("task.completed", "task.failed")}
    tasks = await runs.tasks(DEFAULT_TENANT, run.id)
    assert {t.path for t in tasks if t.status in ("succeeded", "failed")} == ended


async def test_a_fork_shares_what_ran_beside_and_does_anew_what_came_after(url: str) -> None:
    calls = Calls()
    async with running(url, calls.handlers()) as runs:
        first = await finished(runs, await submit(runs, goal="g"))
        calls.made.clear()
        made = await forked(runs, first, "2", input="changed")
        run = await finished(runs, made)
        assert (
            run.output
            == [
                ["1/model/1!", "1/tool/pay!", "1/model/2!", None],
                ["2/model/1!", "2/tool/pay!", "2/model/2!", "changed"],
                ["3/model/1!", "3/tool/pay!", "3/model/2!", None],
            ]
            or run.status is RunStatus.FAILED
        ), run
        assert calls.made["model/plan"] == 0 and calls.made["1/tool/pay"] == 0
        assert calls.made["2/tool/pay"] == 1 and calls.made["model/sum"] == 1
        assert {one.step for one in made.will_repeat} == {"2/tool/pay"}
        await check(runs, run)
        calls.made.clear()
        made = await forked(runs, first, "3/model/2")
        run = await finished(runs, made)
        assert run.output == first.output and not made.will_repeat
        assert set(calls.made) == {"3/model/2", "model/sum"}
        await check(runs, run)


async def test_a_retry_calls_nothing_that_finished_and_two_at_once_are_one(url: str) -> None:
    calls = Calls()
    calls.fail = lambda key: key == "2/tool/pay"
    async with running(url, calls.handlers()) as runs:
        failed = await finished(runs, await submit(runs, goal="g", session_id="s"))
        assert failed.status is RunStatus.FAILED
        before = Counter(calls.made)
        calls.fail = lambda key: False
        both = await asyncio.gather(*[retried(runs, failed) for _ in range(5)])
        assert len({one.id for one in both}) == 1
        run = await finished(runs, both[0])
        assert run.status is RunStatus.SUCCEEDED and run.session_id == "s"
        assert run.forked_from == failed.id
        again = calls.made - before
        assert again["2/tool/pay"] == 1 and again["2/model/1"] == 0 and again["model/plan"] == 0
        finished_ones = {s for s in before if s.startswith(("1/", "3/"))}
        twice = [s for s in finished_ones if calls.made[s] > 1 and s.endswith("pay")]
        assert not twice, "a payment that was made is not made again"
        await check(runs, run)
        with pytest.raises(Conflict, match="nothing to retry"):
            await retried(runs, run)
        with pytest.raises(Conflict, match="already retried with another budget"):
            await retried(runs, failed, budget=Budget(max_tokens=5))


async def test_what_was_in_doubt_stays_in_doubt_in_a_retry(url: str) -> None:
    calls, gate = Calls(), asyncio.Event()
    calls.hold = lambda key: gate if key == "1/tool/pay" else None
    async with running(url, calls.handlers(width=1)) as runs:
        run = await submit(runs, goal="g")
        await until(lambda: calls.made["1/tool/pay"])
        await runs.cancel(DEFAULT_TENANT, run.id)
        calls.hold = lambda key: None
        cancelled = await runs.get(DEFAULT_TENANT, run.id)
        assert cancelled.status is RunStatus.CANCELLED
        made = await retried(runs, cancelled)
        now = await standing(runs, made)
        assert now.waiting_for is not None and now.waiting_for.kind == "reconciliation"
        assert calls.made["1/tool/pay"] == 1, "never twice without a decision"


async def test_a_run_can_be_forked_while_it_goes_on(url: str) -> None:
    calls, gate = Calls(), asyncio.Event()
    calls.hold = lambda key: gate if key == "2/model/2" else None
    async with running(url, calls.handlers()) as runs:
        run = await submit(runs, goal="g")

        async def two_ended() -> bool:
            tasks = await runs.tasks(DEFAULT_TENANT, run.id)
            return len([task for task in tasks if task.ended_at]) >= 2

        await until(two_ended)
        calls.hold = lambda key: None
        fork = await finished(runs, await forked(runs, run, "3/model/2"))
        assert fork.status is RunStatus.SUCCEEDED and calls.made["2/tool/pay"] == 1
        await check(runs, fork)
        gate.set()
        assert (await finished(runs, run)).output == fork.output


async def mixed(runs: Runs, calls: Calls, chance: random.Random) -> None:
    """One run that fails, is cut short or succeeds by chance, and what is then made of it."""
    broken = {f"{chance.randint(1, 3)}/{chance.choice(['tool/pay', 'model/2'])}"}
    calls.fail = lambda key: key in broken
    budget = {"max_model_calls": chance.randint(1, 9)} if chance.random() < 0.4 else None
    if chance.random() < 0.4:
        broken.clear()
    run = await submit(runs, goal="g", budget=budget)
    if chance.random() < 0.3:
        for _ in range(chance.randint(0, 30)):
            await asyncio.sleep(0)  # it is cancelled somewhere on its way
        try:
            await runs.cancel(DEFAULT_TENANT, run.id)
        except Conflict:
            pass
    run = await finished(runs, run)
    await check(runs, run)
    if budget is not None:
        assert run.usage.model_calls <= budget["max_model_calls"]
    for _ in range(3):
        steps = (await runs.steps(DEFAULT_TENANT, run.id, limit=100, cursor=None)).data
        if run.status is not RunStatus.SUCCEEDED:
            done = {s.key for s in steps if s.status == "done" and s.kind == "tool"}
            before = Counter(calls.made)
            broken.clear()
            made = await retried(runs, run, budget=Budget(max_model_calls=100))
            repeated = done & set(calls.made - before)
        else:
            place = chance.choice([s.key for s in steps if s.kind != "value"] + ["1", "2", None])
            before = Counter(calls.made)
            made = await forked(runs, run, place)
            done = {s.key for s in steps} - {one.step for one in made.will_repeat}
            done = {key for key in done if "/tool/" in key}
            repeated = set()
        run = Run(**{n: v for n, v in made.model_dump().items() if n in Run.model_fields})
        run = await standing(runs, run)
        assert not repeated and not done & set(calls.made - before), (done, calls.made - before)
        if run.status is RunStatus.WAITING:
            assert run.waiting_for is not None and run.waiting_for.kind == "reconciliation"
            await runs.cancel(DEFAULT_TENANT, run.id)
            return
        assert run.status is RunStatus.SUCCEEDED, run.error
        await check(runs, run)


@pytest.mark.parametrize("count", [8, pytest.param(200, marks=pytest.mark.slow)])
async def test_whatever_is_cut_retried_and_forked_no_call_that_finished_is_made_again(
    url: str, count: int
) -> None:
    chance = random.Random(count)
    for _ in range(2):
        calls = Calls()
        async with running(url, calls.handlers()) as runs:
            for _ in range(count // 2):
                calls.made.clear()
                await mixed(runs, calls, chance)
