"""What goes wrong around a run: answers that cannot be stored, a database that goes away,
orders and announcements that cross."""

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import anyio
import pytest
from sqlalchemy import Connection, text, update

from agent_server.domain.base import utcnow
from agent_server.domain.errors import DatabaseUnavailable, RunEnded
from agent_server.domain.events import EventBase, RunStarted
from agent_server.domain.ids import DEFAULT_TENANT
from agent_server.domain.runs import Run, RunStatus, Usage, WaitingFor
from agent_server.execution import store
from agent_server.execution.events import TERMINAL, StoredEvent
from agent_server.execution.ports import StepRecord, Suspend, TaskContext, TaskSpec
from agent_server.execution.runs import Runs
from agent_server.storage.tables import runs as runs_table
from agent_server.storage.tables import tasks as tasks_table

from .kit import RULE, event_types, finished, running, submit

CHILD = TaskSpec(path="1", node="n1", kind="leaf", payload={})


async def _until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    with anyio.fail_after(timeout_s):
        while not condition():
            await anyio.lowlevel.checkpoint()


async def _status(runs: Runs, run: Run, status: RunStatus) -> Run:
    with anyio.fail_after(20):
        while True:
            found = await runs.get(DEFAULT_TENANT, run.id)
            if found.status is status:
                return found


async def _forever(ctx: TaskContext) -> Any:
    await asyncio.Event().wait()


# What handlers give -----------------------------------------------------------------------------


@pytest.mark.parametrize("output", [object(), {1, 2}, float("nan"), b"bytes"])
async def test_an_output_that_is_not_json_fails_the_task_at_once_and_says_so(
    url: str, output: Any
) -> None:
    calls: list[int] = []

    async def goal(ctx: TaskContext) -> Any:
        calls.append(ctx.attempt)
        return (await ctx.child(CHILD)).error

    async def agent(ctx: TaskContext) -> Any:
        outcome = await ctx.child(CHILD)
        return outcome.error.message if outcome.error else "no error"

    async def leaf(ctx: TaskContext) -> Any:
        return output

    async with running(url, {"goal": goal, "agent": agent, "leaf": leaf}) as runs:
        root = await finished(runs, await submit(runs, goal="g"))
        child = await finished(runs, await submit(runs, agent="a", input="x"))
    assert root.status is RunStatus.FAILED and calls == [1]
    assert root.error is not None and "not JSON" in root.error.message
    assert "not JSON" in child.output


async def test_a_step_that_cannot_be_stored_fails_its_task_at_once(url: str) -> None:
    calls: list[int] = []

    async def goal(ctx: TaskContext) -> Any:
        calls.append(ctx.attempt)
        record = StepRecord(key=ctx.journal.key("tool", "t"), kind="tool", name="t")
        await ctx.journal.finish(record.done(object()))

    async with running(url, {"goal": goal}) as runs:
        run = await finished(runs, await submit(runs, goal="g"))
    assert run.status is RunStatus.FAILED and calls == [1]
    assert run.error is not None and "could not be stored" in run.error.message


@pytest.mark.parametrize("said", ["a\0b", "a\ud800b", "\U0001f600" * 10, "x" * 3_000_000])
async def test_any_text_goes_in_and_comes_out_unchanged(url: str, said: str) -> None:
    async def goal(ctx: TaskContext) -> Any:
        record = StepRecord(key="tool/t", kind="tool", name="t", input={"said": said})
        await ctx.journal.begin(record, commit=True)
        await ctx.journal.finish(record.done(said, Usage(tool_calls=1)))
        child = await ctx.child(CHILD)
        return {"said": child.output}

    async def leaf(ctx: TaskContext) -> Any:
        return said

    async with running(url, {"goal": goal, "leaf": leaf}) as runs:
        run = await finished(runs, await submit(runs, goal="g"))
        steps = await runs.steps(DEFAULT_TENANT, run.id, limit=10, cursor=None)
        assert (await event_types(runs, run))[-1] == "run.succeeded"
    assert run.output == {"said": said}
    assert steps.data[0].output == said


async def test_a_parent_sees_the_same_answer_of_a_child_live_and_in_a_replay(url: str) -> None:
    async def goal(ctx: TaskContext) -> Any:
        return repr((await ctx.child(CHILD)).output)

    async def leaf(ctx: TaskContext) -> Any:
        return {"pair": (1, 2), 3: "three"}

    async with running(url, {"goal": goal, "leaf": leaf}) as runs:
        run = await finished(runs, await submit(runs, goal="g"))
    assert run.output == "{'pair': [1, 2], '3': 'three'}"


async def test_an_observer_that_fails_changes_nothing(url: str) -> None:
    async def goal(ctx: TaskContext) -> Any:
        return (await ctx.child(CHILD)).output

    async def leaf(ctx: TaskContext) -> Any:
        return "fine"

    def broken(events: list[EventBase]) -> None:
        raise RuntimeError("metrics are broken")

    async with running(url, {"goal": goal, "leaf": leaf}, observe=broken) as runs:
        run = await finished(runs, await submit(runs, goal="g"))
    assert run.output == "fine"


async def test_a_stored_run_that_cannot_be_read_fails_and_the_others_go_on(url: str) -> None:
    async def goal(ctx: TaskContext) -> Any:
        return "fine"

    later = utcnow() + timedelta(hours=1)
    async with running(url, {"goal": goal}) as runs:
        bad = await submit(runs, goal="bad", start_after=later)
        good = await submit(runs, goal="good", start_after=later)

        def corrupt(connection: Connection) -> None:
            connection.execute(
                update(runs_table).where(runs_table.c.id == bad.id).values(request={"goal": 1})
            )
            connection.execute(update(tasks_table).values(wake_at=None))

        await runs.database.write(corrupt)
        runs.engine.wake()
        assert (await finished(runs, good)).output == "fine"
        row = await runs.database.read(lambda c: store.engine_run_row(c, bad.id))
        with anyio.fail_after(20):
            while row.status != "failed":
                row = await runs.database.read(lambda c: store.engine_run_row(c, bad.id))
        assert "cannot be read" in row.error["message"]


# The database goes away -------------------------------------------------------------------------


class _Outage:
    """The database's ``write``, which fails while ``down`` and ``refused`` times more; ``lost``
    answers of commits are lost."""

    def __init__(self, runs: Runs) -> None:
        self._write = runs.database.write
        self.down = False
        self.refused = 0
        self.lost = 0
        self.failed = 0
        runs.database.write = self.write  # type: ignore[method-assign]

    async def write(self, fn: Any) -> Any:
        if self.down or self.refused:
            self.refused = max(0, self.refused - 1)
            self.failed += 1
            raise DatabaseUnavailable("The database is away.")
        answer = await self._write(fn)
        if self.lost:
            self.lost -= 1
            raise DatabaseUnavailable("The connection was lost in the commit.")
        return answer


async def test_a_call_that_ended_while_the_database_was_away_is_recorded_and_not_repeated(
    url: str,
) -> None:
    calls: list[str] = []
    outage: list[_Outage] = []

    async def goal(ctx: TaskContext) -> Any:
        record = StepRecord(key=ctx.journal.key("tool", "pay"), kind="tool", name="pay")
        await ctx.journal.begin(record, commit=True)
        calls.append("pay")
        outage[0].down = True
        await ctx.journal.finish(record.done("paid", Usage(tool_calls=1)))
        return "paid"

    async with running(url, {"goal": goal}) as runs:
        outage.append(_Outage(runs))
        run = await submit(runs, goal="g")
        await _until(lambda: outage[0].failed > 1)
        outage[0].down = False
        ended = await finished(runs, run)
        assert (await event_types(runs, run)).count("step.completed") == 1
    assert ended.output == "paid" and calls == ["pay"]
    assert ended.usage.tool_calls == 1


async def test_a_commit_whose_answer_was_lost_is_not_stored_twice(url: str) -> None:
    outage: list[_Outage] = []

    async def goal(ctx: TaskContext) -> Any:
        for name in ("a", "b"):
            record = StepRecord(key=ctx.journal.key("tool", name), kind="tool", name=name)
            await ctx.journal.begin(record, commit=True)
            outage[0].lost = 1
            await ctx.journal.finish(record.done(name, Usage(tool_calls=1)))
        await ctx.journal.flush()
        outage[0].lost = 1
        return "done"

    async with running(url, {"goal": goal}) as runs:
        outage.append(_Outage(runs))
        run = await submit(runs, goal="g")
        seen: list[str] = []
        async with runs.follow(DEFAULT_TENANT, run.id, 0) as follow:
            with anyio.fail_after(20):
                async for batch in follow.batches():
                    seen += [event.type for event in batch]
        ended = await finished(runs, run)
        assert await event_types(runs, run) == seen
    assert ended.output == "done" and ended.usage.tool_calls == 2
    assert seen.count("step.completed") == 2 and seen.count("run.succeeded") == 1


async def test_a_child_goes_on_when_its_sibling_could_not_be_begun(url: str) -> None:
    outage: list[_Outage] = []
    begun, go = asyncio.Event(), asyncio.Event()
    calls: list[str] = []

    async def goal(ctx: TaskContext) -> Any:
        outcomes: dict[str, Any] = {}

        async def one(path: str) -> None:
            spec = TaskSpec(path=path, node=path, kind="leaf", payload={})
            outcomes[path] = await ctx.child(spec)

        async with anyio.create_task_group() as group:
            group.start_soon(one, "1")
            await begun.wait()
            if ctx.attempt == 1:
                outage[0].refused = 2  # It is tried once more.
            else:
                go.set()
            group.start_soon(one, "2")
        return [outcomes[path].status for path in ("1", "2")]

    async def leaf(ctx: TaskContext) -> Any:
        calls.append(ctx.path)
        await ctx.journal.flush()  # Its own row is stored, which was not waited for.
        begun.set()
        await go.wait()

    async with running(url, {"goal": goal, "leaf": leaf}) as runs:
        outage.append(_Outage(runs))
        run = await submit(runs, goal="g")
        ended = await finished(runs, run)
    assert ended.output == ["succeeded", "succeeded"]
    assert calls.count("1") == 1 and "2" in calls


async def test_a_child_that_could_not_be_begun_is_begun_when_the_database_is_back(
    url: str,
) -> None:
    outage: list[_Outage] = []

    async def goal(ctx: TaskContext) -> Any:
        if ctx.attempt == 1:
            outage[0].down = True
        with suppress(DatabaseUnavailable):  # A handler that swallows it must not get further.
            return (await ctx.child(CHILD)).output
        return "as if nothing had happened"

    async def leaf(ctx: TaskContext) -> Any:
        return "child"

    async with running(url, {"goal": goal, "leaf": leaf}) as runs:
        outage.append(_Outage(runs))
        run = await submit(runs, goal="g")
        await _until(lambda: outage[0].failed > 1)
        outage[0].down = False
        ended = await finished(runs, run)
    assert ended.output == "child"


async def test_connections_that_postgresql_cuts_lose_nothing(postgres_url: str) -> None:
    calls: list[str] = []
    cut = text(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )

    async def goal(ctx: TaskContext) -> Any:
        for number in range(5):
            record = StepRecord(key=f"tool/{number}", kind="tool", name="t")
            await ctx.journal.begin(record, commit=True)
            calls.append(record.key)
            await killer.database.write(lambda c: c.execute(cut) and None)
            await ctx.journal.finish(record.done("ok", Usage(tool_calls=1)))
        return "done"

    async with running(postgres_url, {}, role="api") as killer:
        async with running(postgres_url, {"goal": goal}) as runs:
            run = await finished(runs, await submit(runs, goal="g"))
            assert (await event_types(runs, run)).count("step.completed") == 5
    assert run.output == "done" and len(calls) == len(set(calls)) == 5


# Orders that cross ------------------------------------------------------------------------------


async def test_a_run_whose_cancellation_was_stored_before_a_crash_does_not_run_after_it(
    url: str,
) -> None:
    attempts: list[int] = []

    async def goal(ctx: TaskContext) -> Any:
        attempts.append(ctx.attempt)
        await asyncio.Event().wait()

    async with running(url, {"goal": goal}) as runs:
        run = await submit(runs, goal="g")
        await _until(lambda: bool(attempts))
    async with running(url, {"goal": goal}, role="api") as runs:
        assert (await runs.get(DEFAULT_TENANT, run.id)).status is RunStatus.QUEUED
        await runs.database.write(lambda c: store.order_cancel(c, run.id, "enough"))
    async with running(url, {"goal": goal}) as runs:
        ended = await finished(runs, run)
        assert (await event_types(runs, run)).count("run.cancelled") == 1
    assert ended.status is RunStatus.CANCELLED and attempts == [1]


async def test_a_run_is_cancelled_though_only_its_child_is_being_carried_out(url: str) -> None:
    begun = asyncio.Event()

    async def goal(ctx: TaskContext) -> Any:
        return (await ctx.child(CHILD)).status

    async def leaf(ctx: TaskContext) -> Any:
        begun.set()
        await asyncio.Event().wait()

    def hand_over_root(connection: Connection) -> None:
        connection.execute(
            update(tasks_table)
            .where(tasks_table.c.path == "")
            .values(status="queued", owner=None, wake_at=utcnow() + timedelta(hours=1))
        )

    async with running(url, {"goal": goal, "leaf": leaf}) as runs:
        run = await submit(runs, goal="g")
        await asyncio.wait_for(begun.wait(), 20)
        await runs.database.write(hand_over_root)
        ended = await runs.cancel(DEFAULT_TENANT, run.id, "enough")
        assert ended.status is RunStatus.CANCELLED
        assert (await event_types(runs, run))[-1] == "run.cancelled"
        await _until(lambda: not runs.engine.roster.runs)
        held = await runs.database.read(lambda c: store.held_tasks(c, runs.engine.node))
    assert held == set()


async def test_cancel_crosses_with_the_end_any_way_and_the_run_ends_once(url: str) -> None:
    async def goal(ctx: TaskContext) -> Any:
        outcomes = await asyncio.gather(
            *[ctx.child(TaskSpec(path=f"{i}", node="n", kind="leaf", payload={})) for i in "123"]
        )
        return [o.status for o in outcomes]

    async def leaf(ctx: TaskContext) -> Any:
        record = StepRecord(key=ctx.journal.key("tool", "t"), kind="tool", name="t")
        await ctx.journal.begin(record, commit=True)
        await ctx.journal.finish(record.done("ok", Usage(tool_calls=1)))

    async def one(runs: Runs) -> None:
        run = await submit(runs, goal="g")
        for _ in range(random.randrange(60)):
            await anyio.lowlevel.checkpoint()
        cancels = [runs.cancel(DEFAULT_TENANT, run.id, f"reason {i}") for i in range(2)]
        for answer in await asyncio.gather(*cancels, return_exceptions=True):
            assert isinstance(answer, (Run, RunEnded)), answer
        ended = await finished(runs, run)
        types = await event_types(runs, run)
        assert len(TERMINAL.intersection(types)) == 1 and types[-1] in TERMINAL
        assert types[-1] == f"run.{ended.status.value}"
        assert all(t.status not in store.LIVE for t in await runs.tasks(DEFAULT_TENANT, run.id))

    async with running(url, {"goal": goal, "leaf": leaf}) as runs:
        for _ in range(4):
            await asyncio.gather(*[one(runs) for _ in range(8)])
        await _until(lambda: runs.engine.roster.busy == 0)
        assert await runs.database.read(lambda c: store.held_tasks(c, runs.engine.node)) == set()


async def test_what_a_stopped_process_leaves_is_shown_as_queued(url: str) -> None:
    begun = asyncio.Event()

    async def goal(ctx: TaskContext) -> Any:
        begun.set()
        await asyncio.Event().wait()

    async with running(url, {"goal": goal}) as runs:
        run = await submit(runs, goal="g")
        await asyncio.wait_for(begun.wait(), 20)
    async with running(url, {}, role="api") as runs:
        left = await runs.get(DEFAULT_TENANT, run.id)
    assert left.status is RunStatus.QUEUED and left.started_at is not None


async def test_a_run_that_waits_is_still_seen_to_wait_after_a_restart(url: str) -> None:
    begun, replayed = asyncio.Event(), asyncio.Event()

    async def goal(ctx: TaskContext) -> Any:
        assert ctx.attempt == 1, "it only waited"
        (replayed if begun.is_set() else begun).set()
        return (await ctx.child(CHILD)).output

    async def leaf(ctx: TaskContext) -> Any:
        raise Suspend(WaitingFor(kind="reconciliation", detail="was it paid?"))

    handlers = {"goal": goal, "leaf": leaf}
    async with running(url, handlers) as runs:
        run = await submit(runs, goal="g")
        await _status(runs, run, RunStatus.WAITING)
    async with running(url, handlers) as runs:
        await asyncio.wait_for(replayed.wait(), 20)
        found = await _status(runs, run, RunStatus.WAITING)
        assert found.waiting_for is not None and found.waiting_for.detail == "was it paid?"
        await runs.cancel(DEFAULT_TENANT, run.id)


async def test_a_run_goes_on_being_shown_as_running_when_it_gives_up_a_child_that_waits(
    url: str,
) -> None:
    gave_up = asyncio.Event()
    go_on = asyncio.Event()

    async def goal(ctx: TaskContext) -> Any:
        async with anyio.create_task_group() as group:
            group.start_soon(ctx.child, CHILD)
            await go_on.wait()
            group.cancel_scope.cancel()
        gave_up.set()
        await asyncio.Event().wait()

    async def leaf(ctx: TaskContext) -> Any:
        raise Suspend(WaitingFor(kind="approval"))

    async with running(url, {"goal": goal, "leaf": leaf}) as runs:
        run = await submit(runs, goal="g")
        await _status(runs, run, RunStatus.WAITING)
        go_on.set()
        await asyncio.wait_for(gave_up.wait(), 20)
        assert (await runs.get(DEFAULT_TENANT, run.id)).status is RunStatus.RUNNING


async def test_nothing_of_a_run_is_taken_or_said_after_its_end(url: str) -> None:
    async def goal(ctx: TaskContext) -> Any:
        return "done"

    async with running(url, {"goal": goal, "leaf": _forever}) as runs:
        run = await finished(runs, await submit(runs, goal="g"))
        before = await event_types(runs, run)

        def straggler(connection: Connection) -> None:
            store.insert_task(
                connection,
                {
                    **{"run_id": run.id, "path": "9", "tenant": DEFAULT_TENANT, "node": "n"},
                    **{"kind": "leaf", "payload": {}, "hidden": False, "status": "queued"},
                    **{"epoch": 0, "attempts": 0, "created_at": utcnow()},
                },
            )

        await runs.database.write(straggler)
        runs.engine.wake()
        with anyio.fail_after(20):
            while [t.status for t in await runs.tasks(DEFAULT_TENANT, run.id)] != ["cancelled"]:
                await anyio.lowlevel.checkpoint()
        assert await event_types(runs, run) == before


async def test_a_run_of_a_session_is_not_taken_beside_one_that_began(url: str) -> None:
    begun = asyncio.Event()

    async def agent(ctx: TaskContext) -> Any:
        begun.set()
        await asyncio.Event().wait()

    async with running(url, {"agent": agent}) as runs:
        first = await submit(runs, agent="a", input="1", session_id="s")
        await asyncio.wait_for(begun.wait(), 20)
        second = await submit(runs, agent="a", input="2", session_id="s")

        def another_clock(connection: Connection) -> Any:
            """The second came from a server whose clock is behind."""
            connection.execute(
                update(tasks_table)
                .where(tasks_table.c.run_id == second.id)
                .values(created_at=first.created_at - timedelta(seconds=5))
            )
            return store.claim(connection, "x", 10, utcnow(), store.Turns(), RULE)

        assert (await runs.database.write(another_clock))[0] == []


async def test_a_call_that_was_given_up_counts_as_made_and_holds_nobody_up(url: str) -> None:
    scopes: dict[tuple[str, str], anyio.CancelScope] = {}

    async def goal(ctx: TaskContext) -> Any:
        for path in ("1", "2"):
            with anyio.CancelScope() as scope:
                scopes[ctx.run.id, path] = scope
                await ctx.child(TaskSpec(path=path, node="n", kind="leaf", payload={}))
        record = StepRecord(key="tool/t", kind="tool", name="t")
        await ctx.journal.begin(record, commit=True)
        await ctx.journal.finish(record.done("ok", Usage(tool_calls=1)))
        return "there was room"

    async def leaf(ctx: TaskContext) -> Any:
        record = StepRecord(key=ctx.journal.key("tool", "t"), kind="tool", name="t")
        await ctx.journal.begin(record, commit=True)
        scopes[ctx.run.id, ctx.path].cancel()
        await asyncio.Event().wait()

    async with running(url, {"goal": goal, "leaf": leaf}) as runs:
        enough = await finished(runs, await submit(runs, goal="g", budget={"max_tool_calls": 3}))
        scarce = await finished(runs, await submit(runs, goal="g", budget={"max_tool_calls": 2}))
    assert enough.output == "there was room", enough.error
    assert enough.usage.tool_calls == 1
    assert scarce.status is RunStatus.BUDGET_EXCEEDED and scarce.error is not None
    assert "max_tool_calls=2" in scarce.error.message and "2 begun" in scarce.error.message


async def test_what_comes_of_being_stopped_is_not_recorded(url: str) -> None:
    begun = asyncio.Event()

    async def goal(ctx: TaskContext) -> Any:
        if ctx.attempt > 1:
            return [*ctx.journal.recorded()]
        record = StepRecord(key="tool/slow", kind="tool", name="slow")
        await ctx.journal.begin(record, commit=False)
        done = StepRecord(key="model/1", kind="model", name="m").done("said")
        await ctx.journal.finish(done, commit=False)
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:  # As the SDK does inside a tool.
            await ctx.journal.finish(record.done("was interrupted"))
        return "interrupted"

    async with running(url, {"goal": goal}, shutdown_grace_s=0) as runs:
        run = await submit(runs, goal="g")
        await asyncio.wait_for(begun.wait(), 20)
    async with running(url, {"goal": goal}) as runs:
        assert (await finished(runs, run)).output == ["model/1"]


# Readers ----------------------------------------------------------------------------------------


async def _read(runs: Runs, run: Run, after: int) -> list[int]:
    seen: list[int] = []
    with anyio.fail_after(20):
        async with runs.follow(DEFAULT_TENANT, run.id, after) as follow:
            async for batch in follow.batches():
                seen += [e.seq for e in batch if e.seq is not None]
    return seen


async def test_a_reader_that_has_seen_the_end_is_let_go(url: str) -> None:
    async def goal(ctx: TaskContext) -> Any:
        return "done"

    async with running(url, {"goal": goal}) as runs:
        run = await finished(runs, await submit(runs, goal="g"))
        last = len(await event_types(runs, run))
        assert await _read(runs, run, last) == []
        assert await _read(runs, run, last + 1_000_000) == []
        assert await _read(runs, run, last - 1) == [last]


async def test_a_reader_that_claims_to_have_seen_the_future_gets_what_follows(url: str) -> None:
    go_on = asyncio.Event()

    async def goal(ctx: TaskContext) -> Any:
        await go_on.wait()
        return "done"

    async with running(url, {"goal": goal}) as runs:
        run = await submit(runs, goal="g")
        seen: list[int] = []
        with anyio.fail_after(20):
            async with runs.follow(DEFAULT_TENANT, run.id, 1_000_000) as follow:
                go_on.set()
                async for batch in follow.batches():
                    seen += [e.seq for e in batch if e.seq is not None]
        assert seen == [3]


async def test_announcements_in_any_order_are_read_in_order_without_a_gap(url: str) -> None:
    go_on = asyncio.Event()

    async def goal(ctx: TaskContext) -> Any:
        await go_on.wait()
        ctx.journal.delta("model/1", None, "late")
        return "done"

    async with running(url, {"goal": goal}) as runs:
        run = await submit(runs, goal="g")
        seen: list[int | None] = []

        async def read() -> None:
            async with runs.follow(DEFAULT_TENANT, run.id, 0) as follow:
                async for batch in follow.batches():
                    seen.extend(event.seq for event in batch)

        def three(connection: Connection) -> list[StoredEvent]:
            first, _ = store.advance(connection, run.id, 3, store.NO_USAGE)
            items = [store.encode_event(RunStarted(run_id=run.id, attempt=9))] * 3
            store.insert_events(connection, DEFAULT_TENANT, run.id, first, items)
            return [StoredEvent(first + i, kind, b"") for i, (kind, _) in enumerate(items)]

        reader = asyncio.ensure_future(read())
        await _until(lambda: len(seen) == 2)
        one, two, last = await runs.database.write(three)
        runs.hub.publish(run.id, [one, last, two])
        await _until(lambda: len(seen) == 5)
        go_on.set()
        await asyncio.wait_for(reader, 20)
    assert [seq for seq in seen if seq is not None] == [1, 2, 3, 4, 5, 6]


async def test_a_reader_stops_at_the_end_whatever_comes_after(url: str) -> None:
    async with running(url, {"goal": _forever}) as runs:
        run = await submit(runs, goal="g")
        async with runs.follow(DEFAULT_TENANT, run.id, 0) as follow:
            batches = follow.batches()
            assert [e.seq for e in await batches.__anext__()] == [1, 2]
            late = StoredEvent(None, "message.delta", b"{}")
            runs.hub.publish(run.id, [StoredEvent(3, "run.failed", b"{}"), late])
            assert [e.seq for e in await batches.__anext__()] == [3]
            with pytest.raises(StopAsyncIteration):
                await asyncio.wait_for(batches.__anext__(), 20)


async def test_a_reader_hears_of_what_another_server_does_with_the_run(postgres_url: str) -> None:
    begun = asyncio.Event()
    go_on = asyncio.Event()

    async def goal(ctx: TaskContext) -> Any:
        begun.set()
        await go_on.wait()
        return (await ctx.child(CHILD)).output

    async def leaf(ctx: TaskContext) -> Any:
        return "by a worker"

    handlers = {"goal": goal, "leaf": leaf}
    async with running(postgres_url, handlers, role="api") as api:
        async with running(postgres_url, handlers, role="worker") as worker:
            run = await submit(api, goal="g")
            reader = asyncio.ensure_future(_read(api, run, 0))
            await asyncio.wait_for(begun.wait(), 20)
            assert worker.engine.roster.hears_all(run.id)
            assert not api.engine.roster.hears_all(run.id)
            go_on.set()
            ended = await finished(api, run)
            assert await reader == list(range(1, len(await event_types(api, run)) + 1))
            assert ended.output == "by a worker"

            begun.clear(), go_on.clear()
            other = await submit(api, goal="g")
            await asyncio.wait_for(begun.wait(), 20)
            assert (await api.cancel(DEFAULT_TENANT, other.id)).status is RunStatus.CANCELLED
