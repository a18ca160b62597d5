"""The engine through its door, with handlers of the test's own."""

import asyncio
import json
from datetime import timedelta
from typing import Any

import anyio
import pytest

from agent_server.domain.base import utcnow
from agent_server.domain.errors import IdempotencyMismatch, NotFound, RunEnded, ToolError
from agent_server.domain.ids import DEFAULT_TENANT, Tenant
from agent_server.domain.runs import RunRequest, RunStatus, Usage, WaitingFor
from agent_server.execution import store
from agent_server.execution.events import StoredEvent
from agent_server.execution.ports import (
    FinalOutput,
    LostLease,
    StepRecord,
    Suspend,
    TaskContext,
    TaskSpec,
)
from agent_server.execution.runs import Idempotency, Runs
from agent_server.memory.session_store import TenantSessions

from .kit import RULE, event_types, finished, running, submit


async def _step(ctx: TaskContext, name: str, *, commit: bool = True) -> None:
    record = StepRecord(key=ctx.journal.key("tool", name), kind="tool", name=name, input={})
    await ctx.journal.begin(record, commit=commit)
    await ctx.journal.finish(record.done(f"{name} done", Usage(tool_calls=1)))


def _child(path: str, kind: str = "leaf") -> TaskSpec:
    return TaskSpec(path=path, node=f"n{path}", kind=kind, payload={"path": path})


async def _fan_out(ctx: TaskContext) -> Any:
    outcomes = await asyncio.gather(*[ctx.child(_child(f"1.{i}")) for i in range(8)])
    return [outcome.output for outcome in outcomes]


async def _leaf(ctx: TaskContext) -> Any:
    await _step(ctx, "count")
    return ctx.payload["path"]


async def test_parallel_children_answer_in_order_and_totals_equal_the_sum_of_the_steps(
    url: str,
) -> None:
    async with running(url, {"goal": _fan_out, "leaf": _leaf}) as runs:
        run = await finished(runs, await submit(runs, goal="g"))
        assert run.output == [f"1.{i}" for i in range(8)]
        assert run.usage.tool_calls == 8
        types = await event_types(runs, run)
        assert types[:2] == ["run.created", "run.started"]
        assert types[-1] == "run.succeeded"
        assert types.count("task.completed") == types.count("step.completed") == 8
        steps = await runs.steps(DEFAULT_TENANT, run.id, limit=200, cursor=None)
        assert len(steps.data) == 8


async def test_nested_parents_do_not_starve_their_children_of_slots(url: str) -> None:
    async def middle(ctx: TaskContext) -> Any:
        outcome = await ctx.child(_child(ctx.path + ".1"))
        return outcome.output

    async def root(ctx: TaskContext) -> Any:
        outcomes = await asyncio.gather(*[ctx.child(_child(f"{i}", "middle")) for i in range(4)])
        return [outcome.output for outcome in outcomes]

    handlers = {"goal": root, "middle": middle, "leaf": _leaf}
    async with running(url, handlers, worker_concurrency=1) as runs:
        run = await finished(runs, await submit(runs, goal="g"))
        assert run.output == ["0.1", "1.1", "2.1", "3.1"]


async def test_no_more_tasks_run_at_once_than_the_concurrency_allows(url: str) -> None:
    now, most = 0, 0
    reached = asyncio.Event()

    async def leaf(ctx: TaskContext) -> Any:
        nonlocal now, most
        now += 1
        most = max(most, now)
        if now == 3:
            reached.set()
        await asyncio.wait_for(reached.wait(), 20)
        now -= 1

    async with running(url, {"goal": _fan_out, "leaf": leaf}, worker_concurrency=3) as runs:
        await finished(runs, await submit(runs, goal="g"))
    assert most == 3


async def test_restart_resumes_behind_the_last_finished_step(url: str) -> None:
    calls: list[str] = []
    blocked = asyncio.Event()

    async def goal(ctx: TaskContext) -> Any:
        done = ctx.journal.recorded()
        for name in ("a", "b", "c"):
            key = ctx.journal.key("tool", name)
            if key in done and done[key].status == "done":
                continue
            if name == "c" and ctx.attempt == 1:
                blocked.set()
                await asyncio.Event().wait()
            calls.append(name)
            await _step(ctx, name)
        value = await ctx.value("made", lambda: _append(calls, "value"))
        return value

    async with running(url, {"goal": goal}) as runs:
        run = await submit(runs, goal="g")
        await asyncio.wait_for(blocked.wait(), 20)
    async with running(url, {"goal": goal}) as runs:
        ended = await finished(runs, run)
        types = await event_types(runs, ended)
    assert calls == ["a", "b", "c", "value"]
    assert ended.status is RunStatus.SUCCEEDED
    assert types.count("run.started") == 2 and types.count("run.succeeded") == 1


async def _append(calls: list[str], name: str) -> str:
    calls.append(name)
    return name


async def test_restart_does_not_run_a_finished_child_again(url: str) -> None:
    ran: list[str] = []
    blocked = asyncio.Event()

    async def leaf(ctx: TaskContext) -> Any:
        ran.append(ctx.path)
        if ctx.path == "1.5" and ctx.attempt == 1:
            blocked.set()
            await asyncio.Event().wait()
        return ctx.path

    async def settled(runs: Runs, run_id: str) -> None:
        while True:
            tasks = await runs.tasks(DEFAULT_TENANT, run_id)
            if [t.status for t in tasks].count("succeeded") == 7:
                return

    handlers = {"goal": _fan_out, "leaf": leaf}
    async with running(url, handlers) as runs:
        run = await submit(runs, goal="g")
        await asyncio.wait_for(blocked.wait(), 20)
        await asyncio.wait_for(settled(runs, run.id), 20)
    async with running(url, handlers) as runs:
        ended = await finished(runs, run)
    assert ended.output == [f"1.{i}" for i in range(8)]
    assert sorted(ran) == sorted([f"1.{i}" for i in range(8)] + ["1.5"])


async def test_one_hundred_equal_requests_at_once_make_one_run(url: str) -> None:
    async def goal(ctx: TaskContext) -> Any:
        return "once"

    key = Idempotency("k", "f")
    async with running(url, {"goal": goal}) as runs:
        answers = await asyncio.gather(
            *[
                runs.submit(
                    RunRequest(goal="g"), tenant=DEFAULT_TENANT, principal="t", idempotency=key
                )
                for _ in range(100)
            ]
        )
        assert len({answer.run.id for answer in answers}) == 1
        assert [answer.replayed for answer in answers].count(False) == 1
        with pytest.raises(IdempotencyMismatch):
            await runs.submit(
                RunRequest(goal="other"),
                tenant=DEFAULT_TENANT,
                principal="t",
                idempotency=Idempotency("k", "another"),
            )


async def test_a_worker_that_lost_its_task_stores_nothing_more(url: str) -> None:
    taken = asyncio.Event()
    refused: list[BaseException] = []

    async def goal(ctx: TaskContext) -> Any:
        if ctx.attempt > 1:
            return "by the new owner"
        await taken.wait()
        try:
            await _step(ctx, "late")
        except BaseException as error:
            refused.append(error)
            raise

    async with running(url, {"goal": goal}) as runs:
        run = await submit(runs, goal="g")
        await runs.database.write(lambda c: store.release_tasks(c, runs.engine.node))
        await runs.database.write(
            lambda c: store.claim(c, "another", 1, utcnow(), store.Turns(), RULE)
        )
        taken.set()
        await _until(lambda: bool(refused))
        # The other owner gives it up; this node may take it again.
        await runs.database.write(lambda c: store.release_tasks(c, "another"))
        runs.engine.wake()
        ended = await finished(runs, run)
        steps = await runs.steps(DEFAULT_TENANT, run.id, limit=10, cursor=None)
    assert isinstance(refused[0], (LostLease, asyncio.CancelledError))
    assert ended.output == "by the new owner"
    assert steps.data == []


async def _until(condition: Any, timeout_s: float = 20) -> None:
    with anyio.fail_after(timeout_s):
        while not condition():
            await anyio.lowlevel.checkpoint()


async def test_cancel_stops_running_queued_and_waiting_runs_and_refuses_ended_ones(
    url: str,
) -> None:
    begun = asyncio.Event()
    aborted: list[str] = []

    async def goal(ctx: TaskContext) -> Any:
        outcome = await ctx.child(_child("1"))
        return outcome.status

    async def leaf(ctx: TaskContext) -> Any:
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            aborted.append(ctx.path)
            raise

    async def agent(ctx: TaskContext) -> Any:
        raise Suspend(WaitingFor(kind="approval", detail="pay"))

    handlers = {"goal": goal, "leaf": leaf, "agent": agent}
    async with running(url, handlers) as runs:
        run = await submit(runs, goal="g")
        await asyncio.wait_for(begun.wait(), 20)
        ended = await runs.cancel(DEFAULT_TENANT, run.id, "enough")
        assert ended.status is RunStatus.CANCELLED and aborted == ["1"]
        assert (await event_types(runs, run))[-1] == "run.cancelled"
        with pytest.raises(RunEnded):
            await runs.cancel(DEFAULT_TENANT, run.id)

        later = await submit(runs, goal="g", start_after=utcnow() + timedelta(hours=1))
        assert later.status is RunStatus.QUEUED
        assert (await runs.cancel(DEFAULT_TENANT, later.id)).status is RunStatus.CANCELLED

        waiting = await submit(runs, agent="a", input="x")
        await _wait_for_status(runs, waiting.id, RunStatus.WAITING)
        found = await runs.get(DEFAULT_TENANT, waiting.id)
        assert found.waiting_for is not None and found.waiting_for.detail == "pay"
        assert (await runs.cancel(DEFAULT_TENANT, waiting.id)).status is RunStatus.CANCELLED


async def _wait_for_status(runs: Runs, run_id: str, status: RunStatus) -> None:
    with anyio.fail_after(20):
        while (await runs.get(DEFAULT_TENANT, run_id)).status is not status:
            await anyio.lowlevel.checkpoint()


async def test_a_cancellation_that_a_handler_swallows_still_cancels(url: str) -> None:
    begun = asyncio.Event()

    async def goal(ctx: TaskContext) -> Any:
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "as if nothing had happened"

    async with running(url, {"goal": goal}) as runs:
        run = await submit(runs, goal="g")
        await asyncio.wait_for(begun.wait(), 20)
        assert (await runs.cancel(DEFAULT_TENANT, run.id)).status is RunStatus.CANCELLED


async def test_runs_of_one_session_go_one_after_another_in_the_order_they_came(url: str) -> None:
    order: list[str] = []
    now = 0

    async def agent(ctx: TaskContext) -> Any:
        nonlocal now
        now += 1
        assert now == 1
        order.append(str(ctx.run.request.input))
        await _step(ctx, "work")
        now -= 1
        item = {"role": "user", "content": ctx.run.request.input}
        return FinalOutput("ok", ctx.run.request.session_id, (item,))

    async with running(url, {"agent": agent}) as runs:
        made = [await submit(runs, agent="a", input=str(i), session_id="s") for i in range(6)]
        for run in made:
            await finished(runs, run)
        items = await TenantSessions(runs.database, DEFAULT_TENANT).items("s")
    assert order == [str(i) for i in range(6)]
    assert [item["content"] for item in items] == order


async def test_a_run_that_starts_later_waits_for_its_time(url: str) -> None:
    async def goal(ctx: TaskContext) -> Any:
        return "later"

    async with running(url, {"goal": goal}) as runs:
        due = utcnow() + timedelta(seconds=0.3)
        run = await submit(runs, goal="g", start_after=due)
        ended = await finished(runs, run)
        assert ended.started_at is not None and ended.started_at >= due


async def test_a_deadline_and_a_call_budget_end_the_run_as_budget_exceeded(url: str) -> None:
    async def goal(ctx: TaskContext) -> Any:
        await asyncio.Event().wait()

    async def agent(ctx: TaskContext) -> Any:
        outcomes = await asyncio.gather(*[ctx.child(_child(f"{i}")) for i in range(10)])
        for outcome in outcomes:
            if outcome.error is not None and outcome.error.code == "budget_exceeded":
                from agent_server.domain.errors import BudgetExceeded

                raise BudgetExceeded(outcome.error.message)

    async with running(url, {"goal": goal, "agent": agent, "leaf": _leaf}) as runs:
        late = await finished(runs, await submit(runs, goal="g", budget={"deadline_s": 0.2}))
        assert late.status is RunStatus.BUDGET_EXCEEDED
        assert late.error is not None and "deadline" in late.error.message
        spent = await finished(
            runs, await submit(runs, agent="a", input="x", budget={"max_tool_calls": 4})
        )
        assert spent.status is RunStatus.BUDGET_EXCEEDED
        assert spent.usage.tool_calls <= 4


async def test_a_deadline_ends_a_run_that_stands_still(url: str) -> None:
    async def agent(ctx: TaskContext) -> Any:
        raise Suspend(WaitingFor(kind="approval", detail="pay"))

    async with running(url, {"agent": agent}) as runs:
        run = await submit(runs, agent="a", input="x", budget={"deadline_s": 0.5})
        ended = await finished(runs, run)
        assert ended.status is RunStatus.BUDGET_EXCEEDED
        types = await event_types(runs, run)
        assert types.count("run.waiting") == 1


async def test_errors_are_recorded_with_code_and_hint_and_nothing_stays_running(url: str) -> None:
    async def goal(ctx: TaskContext) -> Any:
        raise ToolError("The tool 'x' is broken.", hint="Mend it.")

    async def agent(ctx: TaskContext) -> Any:
        await ctx.child(_child("1", "leaf"))
        raise ValueError("a bug")

    async with running(url, {"goal": goal, "agent": agent, "leaf": _leaf}) as runs:
        failed = await finished(runs, await submit(runs, goal="g"))
        assert failed.error is not None and failed.error.code == "tool_error"
        assert failed.error.hint == "Mend it."
        bug = await finished(runs, await submit(runs, agent="a", input="x"))
        assert bug.error is not None and bug.error.code == "internal"
        held = await runs.database.read(lambda c: store.held_tasks(c, runs.engine.node))
        assert held == set()


async def test_a_task_taken_up_too_often_fails_its_run_with_the_reason(url: str) -> None:
    began = asyncio.Event()

    async def goal(ctx: TaskContext) -> Any:
        began.set()
        await asyncio.Event().wait()

    run = None
    settings = {"max_attempts": 2, "lease_s": 1.0}
    for _ in range(2):
        async with running(url, {"goal": goal}, dies=True, **settings) as runs:
            began.clear()
            run = run or await submit(runs, goal="g")
            await asyncio.wait_for(began.wait(), 20)
    async with running(url, {"goal": goal}, **settings) as runs:
        assert run is not None
        ended = await finished(runs, run)
    assert ended.error is not None and ended.error.code == "too_many_attempts"


async def test_a_child_whose_parent_gives_it_up_is_cancelled(url: str) -> None:
    begun = asyncio.Event()

    async def goal(ctx: TaskContext) -> Any:
        async with anyio.create_task_group() as group:
            group.start_soon(ctx.child, _child("1"))
            await begun.wait()
            group.cancel_scope.cancel()
        return "went on"

    async def leaf(ctx: TaskContext) -> Any:
        begun.set()
        await asyncio.Event().wait()

    async with running(url, {"goal": goal, "leaf": leaf}) as runs:
        run = await finished(runs, await submit(runs, goal="g"))
        tasks = await runs.tasks(DEFAULT_TENANT, run.id)
    assert run.output == "went on"
    assert [task.status for task in tasks] == ["cancelled"]


async def test_a_skipped_task_is_recorded_once_however_often_it_is_said(url: str) -> None:
    async def goal(ctx: TaskContext) -> Any:
        await ctx.skip(_child("1"), "not needed")
        await ctx.skip(_child("1"), "not needed")

    async with running(url, {"goal": goal}) as runs:
        run = await finished(runs, await submit(runs, goal="g"))
        assert (await event_types(runs, run)).count("task.skipped") == 1
        assert [t.status for t in await runs.tasks(DEFAULT_TENANT, run.id)] == ["skipped"]


async def test_another_tenant_sees_nothing(url: str) -> None:
    async def goal(ctx: TaskContext) -> Any:
        return 1

    stranger = Tenant("stranger")
    async with running(url, {"goal": goal}) as runs:
        run = await finished(runs, await submit(runs, goal="g"))
        for call in (
            runs.get(stranger, run.id),
            runs.wait(stranger, run.id, 0),
            runs.cancel(stranger, run.id),
            runs.plan(stranger, run.id),
            runs.tasks(stranger, run.id),
            runs.steps(stranger, run.id, limit=5, cursor=None),
        ):
            with pytest.raises(NotFound):
                await call
        assert await runs.events(stranger, run.id, 0, 10) == []
        from agent_server.execution.runs import RunFilters

        page = await runs.list(stranger, filters=RunFilters(), limit=10, cursor=None)
        assert page.data == []


async def test_readers_that_resume_anywhere_see_every_event_once_and_in_order(url: str) -> None:
    async def goal(ctx: TaskContext) -> Any:
        return await _fan_out(ctx)

    async with running(url, {"goal": goal, "leaf": _leaf}) as runs:
        run = await submit(runs, goal="g")

        async def read(after: int, most: int) -> list[int]:
            seen: list[int] = []
            async with runs.follow(DEFAULT_TENANT, run.id, after) as follow:
                async for batch in follow.batches():
                    seen += [e.seq for e in batch if e.seq is not None]
                    if len(seen) >= most:
                        break
            return seen

        first, whole = await asyncio.gather(read(0, 5), read(0, 10_000))
        rest = await read(first[-1], 10_000)
    assert first + rest == whole == list(range(1, len(whole) + 1))


@pytest.mark.parametrize("meanwhile", ["nothing", "woken to look", "a fact too early"])
async def test_a_reader_that_submits_misses_no_delta_however_late_it_looks(
    url: str, meanwhile: str
) -> None:
    async def goal(ctx: TaskContext) -> Any:
        for word in ("never", "too", "early"):
            ctx.journal.delta("model/1", None, word)
        return "done"

    async with running(url, {"goal": goal}) as runs:
        made, follow = await runs.submit_followed(
            RunRequest(goal="g"), tenant=DEFAULT_TENANT, principal="test"
        )
        await finished(runs, made.run)
        if meanwhile == "woken to look":
            runs.hub.wake(made.run.id)
        elif meanwhile == "a fact too early":
            runs.hub.publish(made.run.id, [StoredEvent(99, "task.created", b"{}")])
        async with follow as late:
            seen = [event async for batch in late.batches() for event in batch]
        assert [e.seq for e in seen if e.seq is not None] == [1, 2, 3]
        texts = [json.loads(event.data)["text"] for event in seen if event.seq is None]
        assert texts == ["never", "too", "early"]


async def test_a_reader_that_is_let_go_without_a_look_is_listened_for_no_longer(url: str) -> None:
    begun, end = asyncio.Event(), asyncio.Event()

    async def goal(ctx: TaskContext) -> Any:
        begun.set()
        await end.wait()
        return "done"

    async with running(url, {"goal": goal}) as runs:
        made, follow = await runs.submit_followed(
            RunRequest(goal="g"), tenant=DEFAULT_TENANT, principal="test"
        )
        await begun.wait()
        assert runs.hub.listened(made.run.id)
        del follow
        assert not runs.hub.listened(made.run.id)
        end.set()
        await finished(runs, made.run)


async def test_a_reader_that_never_reads_is_cut_off_and_the_run_goes_on(url: str) -> None:
    ready = asyncio.Event()

    async def goal(ctx: TaskContext) -> Any:
        await ready.wait()
        for _ in range(50):
            ctx.journal.delta("model/1", None, "word ")
        return "done"

    async with running(url, {"goal": goal}, stream_queue_size=10) as runs:
        run = await submit(runs, goal="g")
        async with runs.follow(DEFAULT_TENANT, run.id, 0) as follow:
            ready.set()
            ended = await finished(runs, run)
            assert ended.output == "done"
            assert follow.lagged


async def test_the_end_of_a_task_waits_for_every_write_that_is_under_way(url: str) -> None:
    """One began while the end waited for another: both at once, and one would find the task gone."""
    writing: list[asyncio.Task[None]] = []

    async def goal(ctx: TaskContext) -> Any:
        for number in range(3):  # Each waits for the one before, and then begins its own.
            step = StepRecord(f"value/{number}", "value", "note")
            await ctx.journal.finish(step.done(number), commit=False)
            writing.append(asyncio.create_task(ctx.journal.flush()))
            await asyncio.sleep(0)
        return "done"

    async with running(url, {"goal": goal}) as runs:
        for _ in range(10):
            run = await finished(runs, await submit(runs, goal="g"))
            assert run.output == "done"
            await asyncio.gather(*writing)  # None of them lost its task.
            writing.clear()


async def test_a_call_is_stored_as_begun_before_it_is_made_however_many_begin_at_once(
    url: str,
) -> None:
    """More than one round takes; what each has said by then waits for one while it begins its call."""
    stored: list[str] = []

    async def wide(ctx: TaskContext) -> Any:
        await asyncio.gather(*[ctx.child(_child(f"1.{i}")) for i in range(90)])

    async def leaf(ctx: TaskContext) -> Any:
        for _ in range(int(ctx.path.rpartition(".")[2]) % 30):
            await asyncio.sleep(0)
        record = StepRecord(key=ctx.journal.key("tool"), kind="tool", name="tool", input={})
        await ctx.journal.begin(record, commit=True)
        found = await runs.database.read(
            lambda c: store.step_in(c, DEFAULT_TENANT, ctx.run.id, record.key)
        )
        stored.append(found[1].status if found else "nothing")
        await ctx.journal.finish(record.done("done"))

    async with running(url, {"goal": wide, "leaf": leaf}) as runs:
        run = await finished(runs, await submit(runs, goal="g"))
        assert (run.status, stored) == (RunStatus.SUCCEEDED, ["started"] * 90)
        types = await event_types(runs, run)
        assert types.count("task.started") == types.count("step.started") == 90


async def test_what_follows_from_the_first_to_end_begins_before_the_last_of_them_is_stored(
    url: str,
) -> None:
    """A hundred and twenty that end at the same moment do not go on in step for ever."""
    inside, full = 0, asyncio.Event()

    async def wide(ctx: TaskContext) -> Any:
        async def two(number: int) -> None:
            await ctx.child(_child(f"1.{number}", "first"))
            await ctx.child(_child(f"2.{number}"))

        await asyncio.gather(*map(two, range(120)))

    async def first(ctx: TaskContext) -> Any:
        nonlocal inside
        await ctx.journal.flush()
        inside += 1
        if inside == 120:
            full.set()
        await full.wait()

    handlers = {"goal": wide, "first": first, "leaf": _leaf}
    async with running(url, handlers, worker_concurrency=120) as runs:
        run = await finished(runs, await submit(runs, goal="g"))
        said = [json.loads(e.data) for e in await runs.events(DEFAULT_TENANT, run.id, 0, 2_000)]
        ends = [i for i, e in enumerate(said) if e["type"] == "task.completed"]
        follow = [e["type"] == "task.started" and e["path"].startswith("2.") for e in said]
        assert (len(ends), sum(follow)) == (240, 120)
        assert follow.index(True) < ends[119]
