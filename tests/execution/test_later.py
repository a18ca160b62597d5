"""Runs that begin later: over a restart, on a session, cancelled before, and by which clock."""

import asyncio
from datetime import datetime, timedelta
from typing import Any

import pytest
import time_machine

from agent_server.domain.base import utcnow
from agent_server.domain.errors import SessionBusy
from agent_server.domain.ids import DEFAULT_TENANT
from agent_server.domain.runs import Run, RunStatus
from agent_server.execution.ports import TaskContext
from tests.execution.kit import event_types, finished, running, submit

SESSION = {"agent": "a", "input": "x", "session_id": "s"}


async def at_once(ctx: TaskContext) -> Any:
    return "done"


async def test_a_run_for_later_outlives_a_restart_and_begins_once_at_its_moment(url: str) -> None:
    due = utcnow() + timedelta(seconds=1)
    async with running(url, {"agent": at_once}) as runs:
        later = await submit(runs, agent="a", input="x", start_after=due)
        past = await submit(runs, agent="a", input="x", start_after=utcnow() - timedelta(days=9))
        assert (await finished(runs, past)).output == "done"
    async with running(url, {"agent": at_once}) as runs:
        ended = await finished(runs, later)
        assert ended.started_at is not None and ended.started_at >= due
        assert await event_types(runs, later) == ["run.created", "run.started", "run.succeeded"]


async def test_a_run_for_later_holds_its_session_from_its_moment_on(url: str) -> None:
    order: list[str] = []
    go = asyncio.Event()

    async def agent(ctx: TaskContext) -> Any:
        order.append(str(ctx.run.request.input))
        if ctx.run.request.input == "busy":
            await go.wait()
        return "done"

    async with running(url, {"agent": agent}) as runs:
        due = utcnow() + timedelta(seconds=0.6)
        later = await submit(runs, **SESSION | {"input": "later"}, start_after=due)
        never = await submit(runs, **SESSION, start_after=utcnow() + timedelta(days=9))
        # Nothing is under way on the session yet: neither is refused, nor does it wait.
        now = await submit(runs, **SESSION | {"input": "now"}, on_busy="reject")
        assert (await finished(runs, now)).status is RunStatus.SUCCEEDED
        busy = await submit(runs, **SESSION | {"input": "busy"})
        while utcnow() < due + timedelta(seconds=0.2):
            await runs.get(DEFAULT_TENANT, later.id)
        with pytest.raises(SessionBusy):
            await submit(runs, **SESSION, on_busy="reject")
        assert (await runs.get(DEFAULT_TENANT, later.id)).status is RunStatus.QUEUED
        go.set()
        await finished(runs, busy)
        assert (await finished(runs, later)).started_at >= due  # type: ignore[operator]
        assert order == ["now", "busy", "later"]
        cancelled = await runs.cancel(DEFAULT_TENANT, never.id)
        assert (cancelled.status, cancelled.started_at) == (RunStatus.CANCELLED, None)
        assert await event_types(runs, never) == ["run.created", "run.cancelled"]


async def test_runs_that_fall_due_while_others_are_submitted_never_share_their_session(
    url: str,
) -> None:
    under_way = most = 0

    async def agent(ctx: TaskContext) -> Any:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        for _ in range(5):
            await runs.get(DEFAULT_TENANT, ctx.run.id)
        under_way -= 1
        return "done"

    async with running(url, {"agent": agent}) as runs:
        made = []
        for number in range(12):
            due = utcnow() + timedelta(milliseconds=20 * number)
            made.append(await submit(runs, **SESSION, start_after=due))
            made.append(await submit(runs, **SESSION))
        for run in made:
            assert (await finished(runs, run)).status is RunStatus.SUCCEEDED
        assert most == 1


async def test_the_moment_is_read_from_the_clock_of_whoever_begins_the_run(sqlite_url: str) -> None:
    """A clock that is set back delays the run, and never begins it twice."""
    with time_machine.travel(datetime.now().astimezone(), tick=True) as clock:
        async with running(sqlite_url, {"agent": at_once}) as runs:
            due = utcnow() + timedelta(hours=1)
            later = await submit(runs, agent="a", input="x", start_after=due)
            for jump in (-3_600, 3_000):
                clock.shift(jump)
                other = await submit(runs, agent="a", input="x")
                await finished(runs, other)
                assert (await runs.get(DEFAULT_TENANT, later.id)).status is RunStatus.QUEUED
            clock.shift(2 * 3_600)
            ended = await finished(runs, later)
            assert ended.started_at is not None and ended.started_at >= due
            assert (await event_types(runs, later)).count("run.started") == 1


async def test_two_nodes_begin_what_is_due_once_whatever_their_clock_does(
    postgres_url: str,
) -> None:
    """Through the night in which 02:30 comes twice; the clock is put back after the first."""
    begun: list[str] = []

    async def agent(ctx: TaskContext) -> Any:
        begun.append(str(ctx.run.request.input))
        return "done"

    evening = datetime.fromisoformat("2026-10-25T02:20:00+02:00")
    with time_machine.travel(evening, tick=True) as clock:
        async with (
            running(postgres_url, {"agent": agent}) as runs,
            running(postgres_url, {"agent": agent}) as beside,
        ):
            due: dict[str, list[Run]] = {}
            for name, moment in (
                ("summer", "2026-10-25T02:30:00+02:00"),
                ("winter", "2026-10-25T02:30:00+01:00"),
            ):
                due[name] = [
                    await submit(
                        (runs, beside)[n % 2],
                        **{"agent": "a", "input": f"{name} {n}"},
                        start_after=datetime.fromisoformat(moment),
                    )
                    for n in range(10)
                ]
            clock.shift(15 * 60)
            for run in due["summer"]:
                assert (await finished(beside, run)).output == "done"
            for hours in (-1, 1, 1):
                clock.shift(hours * 3_600)
                await finished(runs, await submit(runs, agent="a", input="between"))
            for run in due["winter"]:
                assert (await finished(runs, run)).output == "done"
            expected = [f"{name} {n}" for name in due for n in range(10)]
            assert sorted(said for said in begun if said != "between") == sorted(expected)
            assert len(begun) == len(expected) + 3
            for run in (*due["summer"], *due["winter"]):
                assert (await event_types(runs, run)).count("run.started") == 1
