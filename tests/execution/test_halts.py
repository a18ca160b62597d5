"""Pause, resume and cancel: at once, across restarts and processes, for a run, a task, or many."""

import asyncio
from typing import Any

import anyio
import pytest

from agent_server.domain.errors import Conflict, InvalidRequest, NotFound, RunEnded
from agent_server.domain.ids import DEFAULT_TENANT, Tenant, task_id
from agent_server.domain.runs import Run, RunStatus
from agent_server.execution.halts import Halts
from agent_server.execution.ports import StepRecord, TaskContext, TaskSpec
from agent_server.execution.runs import RunFilters, Runs
from tests.execution.kit import control, event_types, finished, running, submit
from tests.support.until import until

AGENT = {"agent": "a", "input": "x"}


class World:
    """What handlers did, and what lets them go on."""

    def __init__(self) -> None:
        self.begun = 0
        self.calls: list[str] = []
        self.go = asyncio.Event()

    async def seen(self, begun: int) -> None:
        await until(lambda: self.begun >= begun)

    async def model(self, ctx: TaskContext) -> Any:
        """One call that may be repeated and waits until it is let go."""
        step = StepRecord(key=ctx.journal.key("model", "1"), kind="model", name="m")
        await ctx.journal.begin(step, commit=False)
        await ctx.journal.flush()  # A child's own row is stored by now.
        self.begun += 1
        await self.go.wait()
        await ctx.journal.finish(step.done("answer"))
        return "answer"

    async def tool(self, ctx: TaskContext) -> Any:
        """One call that must not be repeated, and another one behind it."""
        for name in ("one", "two"):
            key = ctx.journal.key("tool", name)
            earlier = ctx.journal.recorded().get(key)
            if earlier is not None and earlier.status == "done":
                continue
            assert earlier is None, f"{name} is in doubt"
            step = StepRecord(key=key, kind="tool", name=name)
            await ctx.journal.begin(step, commit=True)
            self.calls.append(name)
            self.begun += 1
            await self.go.wait()
            await ctx.journal.finish(step.done(name))
        return self.calls

    async def parent(self, ctx: TaskContext) -> Any:
        specs = [TaskSpec(path=str(n), node=f"n{n}", kind="leaf", payload={}) for n in (1, 2)]
        outcomes = await asyncio.gather(*(ctx.child(spec) for spec in specs))
        return [outcome.error.code if outcome.error else outcome.output for outcome in outcomes]


async def stands_still(runs: Runs, run: Run) -> Run:
    """The run, once nothing of it is carried out here."""
    await until(lambda: not runs.engine.roster.runs.get(run.id))
    return await runs.get(DEFAULT_TENANT, run.id)


async def test_a_paused_run_breaks_its_model_call_off_and_makes_it_again_when_resumed(
    url: str,
) -> None:
    world = World()
    async with running(url, {"agent": world.model}) as runs:
        halts = Halts(runs)
        run = await submit(runs, **AGENT)
        await world.seen(1)
        paused = await halts.pause(DEFAULT_TENANT, run.id, by="ann")
        assert paused.status is RunStatus.WAITING and "ann" in paused.waiting_for.detail
        again = await halts.pause(DEFAULT_TENANT, run.id, by="bob")
        assert "ann" in again.waiting_for.detail
        await stands_still(runs, run)
    async with running(url, {"agent": world.model}) as runs:
        halts = Halts(runs)
        runs.engine.wake()
        assert (await runs.get(DEFAULT_TENANT, run.id)).status is RunStatus.WAITING
        assert world.begun == 1
        world.go.set()
        resumed = await halts.resume(DEFAULT_TENANT, run.id, by="bob")
        assert resumed.status is not RunStatus.WAITING
        assert (await finished(runs, run)).output == "answer"
        assert world.begun == 2
        types = await event_types(runs, run)
        assert types.count("run.waiting") == types.count("run.resumed") == 1
        with pytest.raises(RunEnded):
            await halts.pause(DEFAULT_TENANT, run.id, by="ann")
        with pytest.raises(RunEnded):
            await halts.resume(DEFAULT_TENANT, run.id, by="ann")


async def test_a_tool_that_runs_has_its_grace_and_the_next_one_does_not_begin(url: str) -> None:
    world = World()
    async with running(url, {"agent": world.tool}, tool_grace_s=20) as runs:
        halts = Halts(runs)
        run = await submit(runs, **AGENT)
        await world.seen(1)
        await halts.pause(DEFAULT_TENANT, run.id, by="ann")
        await until(lambda: runs.engine.roster.runs[run.id].attempts[""].held)
        world.go.set()
        await stands_still(runs, run)
        assert world.calls == ["one"]
        await halts.resume(DEFAULT_TENANT, run.id, by="ann")
        assert (await finished(runs, run)).output == ["one", "two"]


async def test_a_cancelled_run_lets_its_tool_finish_within_the_grace(url: str) -> None:
    world = World()
    async with running(url, {"agent": world.tool}, tool_grace_s=20) as runs:
        run = await submit(runs, **AGENT)
        await world.seen(1)
        async with anyio.create_task_group() as group:
            group.start_soon(runs.cancel, DEFAULT_TENANT, run.id, "enough")
            await until(lambda: runs.engine.roster.runs[run.id].stops)
            world.go.set()
        assert (await finished(runs, run)).status is RunStatus.CANCELLED
        steps = await runs.steps(DEFAULT_TENANT, run.id, limit=10, cursor=None)
        assert [(step.name, step.status) for step in steps.data] == [("one", "done")]


async def test_pausing_many_times_is_no_attempt_that_failed(url: str) -> None:
    world = World()
    async with running(url, {"agent": world.model}, max_attempts=2) as runs:
        halts = Halts(runs)
        run = await submit(runs, **AGENT)
        for n in range(1, 5):
            await world.seen(n)
            await halts.pause(DEFAULT_TENANT, run.id, by="ann")
            await stands_still(runs, run)
            await halts.resume(DEFAULT_TENANT, run.id, by="ann")
        world.go.set()
        assert (await finished(runs, run)).status is RunStatus.SUCCEEDED


async def test_a_run_with_children_stands_still_and_goes_on_as_a_whole(url: str) -> None:
    world = World()
    async with running(url, {"agent": world.parent, "leaf": world.model}) as runs:
        halts = Halts(runs)
        run = await submit(runs, **AGENT)
        await world.seen(2)
        await halts.pause(DEFAULT_TENANT, run.id, by="ann")
        await stands_still(runs, run)
        tasks = await runs.tasks(DEFAULT_TENANT, run.id)
        assert {task.status for task in tasks} == {"queued"}
        world.go.set()
        await halts.resume(DEFAULT_TENANT, run.id, by="ann")
        assert (await finished(runs, run)).output == ["answer", "answer"]


async def test_one_task_is_paused_and_resumed_while_the_others_go_on(url: str) -> None:
    world = World()
    async with running(url, {"agent": world.parent, "leaf": world.model}) as runs:
        halts = Halts(runs)
        run = await submit(runs, **AGENT)
        await world.seen(2)
        one = task_id(run.id, "1")
        await halts.pause(DEFAULT_TENANT, run.id, by="ann", task=one)
        await until(lambda: not runs.engine.roster.carries_out(run.id, "1"))
        world.go.set()

        async def other_ended() -> bool:
            return (await runs.tasks(DEFAULT_TENANT, run.id))[1].status == "succeeded"

        await until(other_ended)
        assert (await runs.tasks(DEFAULT_TENANT, run.id))[0].status == "queued"
        with pytest.raises(NotFound):
            await halts.pause(DEFAULT_TENANT, run.id, by="ann", task="task_0")
        await halts.resume(DEFAULT_TENANT, run.id, by="ann", task=one)
        assert (await finished(runs, run)).output == ["answer", "answer"]


async def test_a_cancelled_task_fails_and_its_run_decides(url: str) -> None:
    world = World()
    async with running(url, {"agent": world.parent, "leaf": world.model}) as runs:
        halts = Halts(runs)
        run = await submit(runs, **AGENT)
        await world.seen(2)
        one, two = (task_id(run.id, path) for path in ("1", "2"))
        await halts.cancel_task(DEFAULT_TENANT, run.id, one, by="ann", reason="not needed")
        await halts.pause(DEFAULT_TENANT, run.id, by="ann", task=two)
        await until(lambda: not runs.engine.roster.carries_out(run.id, "2"))
        cancelled = await halts.cancel_task(DEFAULT_TENANT, run.id, two, by="ann")
        assert cancelled.status == "failed" and cancelled.error is not None
        assert (await finished(runs, run)).output == ["task_cancelled", "task_cancelled"]
        assert (await event_types(runs, run)).count("task.failed") == 2
        with pytest.raises(RunEnded):
            await halts.cancel_task(DEFAULT_TENANT, run.id, one, by="ann")


async def test_a_paused_run_can_be_cancelled(url: str) -> None:
    world = World()
    async with running(url, {"agent": world.parent, "leaf": world.model}) as runs:
        run = await submit(runs, **AGENT)
        await world.seen(2)
        await Halts(runs).pause(DEFAULT_TENANT, run.id, by="ann")
        ended = await runs.cancel(DEFAULT_TENANT, run.id, "enough")
        assert (await finished(runs, ended)).status is RunStatus.CANCELLED


async def test_many_runs_are_steered_by_filter_and_only_ones_own(url: str) -> None:
    world = World()
    async with running(url, {"agent": world.model}) as runs:
        halts = Halts(runs)
        mine = [await submit(runs, **AGENT) for _ in range(5)]
        other = await submit(runs, agent="b", input="x")
        await world.seen(6)
        chosen = RunFilters(agent="a")
        paused = await halts.many("pause", DEFAULT_TENANT, chosen, by="ann")
        assert {run.id for run in paused.data} == {run.id for run in mine}
        assert not (await halts.many("cancel", Tenant("else"), chosen, by="eve")).data
        with pytest.raises(NotFound):
            await halts.pause(Tenant("else"), other.id, by="eve")
        with pytest.raises(InvalidRequest):
            await halts.many("cancel", DEFAULT_TENANT, RunFilters(), by="ann")
        cancelled = await halts.many("cancel", DEFAULT_TENANT, chosen, by="ann")
        assert [run.status for run in cancelled.data] == [RunStatus.CANCELLED] * 5
        with pytest.raises(Conflict):
            await halts.resume(DEFAULT_TENANT, other.id, by="ann")
        world.go.set()
        assert (await finished(runs, other)).status is RunStatus.SUCCEEDED


async def test_a_run_carried_out_by_another_process_is_paused_and_resumed(
    postgres_url: str,
) -> None:
    world = World()
    handlers = {"agent": world.parent, "leaf": world.model}
    async with running(postgres_url, handlers) as worker:
        async with running(postgres_url, handlers, role="api") as api:
            run = await submit(api, **AGENT)
            await world.seen(2)
            await Halts(api).pause(DEFAULT_TENANT, run.id, by="ann")
            await stands_still(worker, run)
            await control(api).signal(DEFAULT_TENANT, run.id, "any", 1, by="ann")
            assert (await api.get(DEFAULT_TENANT, run.id)).status is RunStatus.WAITING
            world.go.set()
            await Halts(api).resume(DEFAULT_TENANT, run.id, by="ann")
            assert (await finished(worker, run)).output == ["answer", "answer"]
