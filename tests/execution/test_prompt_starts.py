"""Whatever becomes claimable begins at once, here and on another node, without anybody polling.

The polls that repair what was missed are set to an hour: a task that nobody was told of would hold
its test up to its bound.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import Any

import anyio
import pytest

from agent_server.domain.approvals import Decide
from agent_server.domain.base import utcnow
from agent_server.domain.ids import DEFAULT_TENANT
from agent_server.domain.runs import Run, RunStatus
from agent_server.execution import engine, relay, store, watch
from agent_server.execution.halts import Halts
from agent_server.execution.ports import ApprovalAsk, TaskContext, TaskSpec
from agent_server.execution.runs import Runs
from tests.support.until import until

from .kit import Handler, control, finished, running, standing, submit, wired

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("nobody_polls")]
SOON_S = 12
"""Far above what a prompt start takes here, far below a poll."""


@pytest.fixture
def nobody_polls(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(engine, "POLL_S", 3600.0)
    monkeypatch.setattr(watch, "POLL_S", 3600.0)
    monkeypatch.setattr(relay, "LOOK_S", 3600.0)
    yield


class Work:
    """Handlers of every kind of standing still; what is to be held waits for ``go``."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.begun: list[str] = []

    async def agent(self, ctx: TaskContext) -> Any:
        said = str(ctx.run.request.input)
        self.begun.append(said)
        kind = said.partition(" ")[0]
        if kind == "held":
            await self.go.wait()
        elif kind == "signal":
            got = await ctx.wait_signal("go", key="s")
            return None if got is None else got.payload
        elif kind == "approval":
            ask = ApprovalAsk(subject="pay", arguments={})
            return (await ctx.ask_approval(ask, key="a")).decision
        elif kind == "sleep":
            await ctx.sleep_until(ctx.run.created_at + timedelta(seconds=1.2), key="t")
        elif kind == "children":
            specs = [TaskSpec(path=f"{n}", node="n", kind="leaf", payload={}) for n in range(6)]
            return [
                (await child).output for child in map(asyncio.ensure_future, map(ctx.child, specs))
            ]
        return "done"

    async def leaf(self, ctx: TaskContext) -> str:
        self.begun.append(ctx.path)
        return ctx.path

    @property
    def handlers(self) -> dict[str, Handler]:
        return {"agent": self.agent, "leaf": self.leaf}


class World:
    """A node that callers speak to, and one that carries out: the same on SQLite."""

    def __init__(self, door: Runs, worker: Runs, work: Work) -> None:
        self.door, self.worker, self.work = door, worker, work

    async def ask(self, said: str, **more: Any) -> Run:
        return await submit(self.door, agent="a", input=said, **more)

    async def done(self, run: Run, status: RunStatus = RunStatus.SUCCEEDED) -> Run:
        ended = await soon(self.door, run)
        assert ended.status is status
        return ended

    async def begins(self, said: str) -> None:
        await until(lambda: said in self.work.begun, SOON_S)


@pytest.fixture(params=["sqlite", "postgresql", "postgresql, two nodes"])
async def world(
    request: pytest.FixtureRequest, tmp_path: Any, nobody_polls: None
) -> AsyncIterator[World]:
    """With one slot, so that what is queued is not begun by whoever queues it."""
    work = Work()
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path}/server.db"
    else:
        url = request.getfixturevalue("upgraded_postgres_url")
    async with running(url, work.handlers, worker_concurrency=1) as worker:
        if "two" not in request.param:
            yield World(worker, worker, work)
            return
        async with running(url, {}, role="api") as door:
            await wired(door, worker)
            yield World(door, worker, work)


async def soon(runs: Runs, run: Run) -> Run:
    """The run at its end, which this node hears of at once."""
    with anyio.fail_after(SOON_S):
        return await finished(runs, run, 60)


async def test_what_stood_in_the_queue_before_a_worker_starts(url: str) -> None:
    work = Work()
    async with running(url, {}, role="api") as door:
        run = await submit(door, agent="a", input="plain")
    async with running(url, work.handlers) as worker:
        assert (await soon(worker, run)).output == "done"


async def test_what_is_queued_behind_a_full_node(world: World) -> None:
    held = await world.ask("held")
    await world.begins("held")
    queued = [await world.ask(f"plain {n}") for n in range(3)]
    world.work.go.set()
    for run in (held, *queued):
        await world.done(run)


async def test_what_is_queued_on_an_idle_node_that_has_looked_and_found_nothing(
    world: World,
) -> None:
    for n in range(3):
        await world.done(await world.ask(f"plain {n}"))


async def test_what_a_run_begins_side_by_side(world: World) -> None:
    ended = await world.done(await world.ask("children"))
    assert ended.output == [f"{n}" for n in range(6)]


async def test_what_waits_for_a_signal(world: World) -> None:
    run = await world.ask("signal")
    await standing(world.door, run)
    await control(world.door).signal(DEFAULT_TENANT, run.id, "go", 7, by="p")
    assert (await world.done(run)).output == 7


async def test_what_waits_for_a_decision(world: World) -> None:
    run = await world.ask("approval")
    await standing(world.door, run)
    door = control(world.door)
    pending = (await door.approvals(DEFAULT_TENANT, limit=1)).data[0]
    await door.decide(DEFAULT_TENANT, pending.id, Decide(decision="approve"), by="p")
    assert (await world.done(run)).output == "approve"


async def test_what_sleeps(world: World) -> None:
    ended = await world.done(await world.ask("sleep"))
    assert ended.ended_at is not None
    assert ended.ended_at >= ended.created_at + timedelta(seconds=1.2)


async def test_what_is_to_begin_later_also_when_another_stands_still_for_a_later_moment(
    world: World,
) -> None:
    await world.ask("plain", start_after=utcnow() + timedelta(days=3))
    for n in range(2):
        due = utcnow() + timedelta(seconds=1.2)
        ended = await world.done(await world.ask(f"plain {n}", start_after=due))
        assert ended.started_at is not None and ended.started_at >= due


async def test_what_is_due_while_the_node_is_full(world: World) -> None:
    await world.ask("held")
    await world.begins("held")
    due = utcnow() + timedelta(seconds=0.5)
    later = await world.ask("plain", start_after=due)
    await until(lambda: utcnow() > due + timedelta(seconds=0.2))
    world.work.go.set()
    await world.done(later)


async def test_what_stands_behind_a_run_that_ends(world: World) -> None:
    first = await world.ask("held", session_id="s")
    await world.begins("held")
    behind = [await world.ask(f"plain {n}", session_id="s") for n in range(2)]
    world.work.go.set()
    for run in (first, *behind):
        await world.done(run)


@pytest.mark.parametrize("how", ["cancel", "interrupt"])
async def test_what_stands_behind_a_run_that_is_cancelled_while_it_waits(
    world: World, how: str
) -> None:
    first = await world.ask("signal", session_id="s")
    await standing(world.door, first)
    if how == "interrupt":
        behind = await world.ask("plain", session_id="s", on_busy="interrupt")
    else:
        behind = await world.ask("plain", session_id="s")
        await world.door.cancel(DEFAULT_TENANT, first.id)
    await world.done(behind)
    await world.done(first, RunStatus.CANCELLED)


async def test_what_stands_behind_a_run_that_cannot_be_read(world: World) -> None:
    await world.ask("held")
    await world.begins("held")
    bad = await world.ask("plain bad", session_id="s")
    behind = await world.ask("plain", session_id="s")
    await world.door.database.write(lambda c: store.set_run(c, bad.id, request={"no": "request"}))
    world.work.go.set()
    await world.done(behind)


async def test_what_was_paused(world: World) -> None:
    doors = Halts(world.door)
    run = await world.ask("held")
    await world.begins("held")
    await doors.pause(DEFAULT_TENANT, run.id, by="p")
    await until(lambda: not world.worker.engine.roster.busy, SOON_S)
    world.work.go.set()
    await doors.resume(DEFAULT_TENANT, run.id, by="p")
    await world.done(run)


async def test_what_a_tenant_s_limit_held_back(url: str) -> None:
    work = Work()
    async with running(url, work.handlers, tenant_concurrency={"*": 1}) as runs:
        held = await submit(runs, agent="a", input="held")
        await until(lambda: "held" in work.begun, SOON_S)
        queued = [await submit(runs, agent="a", input=f"plain {n}") for n in range(3)]
        work.go.set()
        for run in (held, *queued):
            await soon(runs, run)


@asynccontextmanager
async def two_workers(url: str, work: Work, **settings: Any) -> AsyncIterator[tuple[Runs, Runs]]:
    settings = {"worker_concurrency": 1, **settings}
    async with AsyncExitStack() as stack:
        nodes = [
            await stack.enter_async_context(running(url, work.handlers, **settings))
            for _ in range(2)
        ]
        await wired(*nodes)
        yield nodes[0], nodes[1]


async def test_what_is_queued_on_a_full_node_begins_on_another(
    upgraded_postgres_url: str,
) -> None:
    work = Work()
    async with two_workers(upgraded_postgres_url, work) as (one, _):
        await submit(one, agent="a", input="held")
        other = await submit(one, agent="a", input="plain")
        assert (await soon(one, other)).output == "done"
        work.go.set()


async def test_what_falls_due_together_on_a_node_with_one_slot_is_carried_out_by_both(
    upgraded_postgres_url: str,
) -> None:
    work = Work()
    async with two_workers(upgraded_postgres_url, work) as (one, _):
        due = utcnow() + timedelta(seconds=0.3)
        held = [await submit(one, agent="a", input=f"held {n}", start_after=due) for n in range(2)]
        await until(lambda: len(work.begun) == 2, SOON_S)
        work.go.set()
        for run in held:
            await soon(one, run)


async def test_what_falls_due_on_a_full_node_begins_on_another(
    upgraded_postgres_url: str,
) -> None:
    work = Work()
    async with two_workers(upgraded_postgres_url, work) as (one, two):
        due = utcnow() + timedelta(seconds=1.2)
        later = await submit(one, agent="a", input="plain", start_after=due)
        held = await submit(one, agent="a", input="held")
        assert (await soon(one, later)).output == "done"
        work.go.set()
        await soon(two, held)


async def test_what_sleeps_on_a_node_that_is_full_then_goes_on_on_another(
    upgraded_postgres_url: str,
) -> None:
    work = Work()
    async with two_workers(upgraded_postgres_url, work) as (one, _):
        sleeps = await submit(one, agent="a", input="sleep")
        await standing(one, sleeps)
        await submit(one, agent="a", input="held")
        assert (await soon(one, sleeps)).output == "done"
        work.go.set()


async def test_what_a_draining_node_leaves_and_what_is_queued_on_it(
    upgraded_postgres_url: str,
) -> None:
    work = Work()
    async with two_workers(upgraded_postgres_url, work, shutdown_grace_s=30) as (one, two):
        await submit(one, agent="a", input="held")
        behind = await submit(one, agent="a", input="plain behind", session_id="s")
        one.engine.drain()
        asked = await submit(one, agent="a", input="plain")
        for run in (behind, asked):
            assert (await soon(two, run)).output == "done"
        work.go.set()


async def test_what_a_stopped_node_carried_out(upgraded_postgres_url: str) -> None:
    work = Work()
    async with running(upgraded_postgres_url, work.handlers) as two:
        async with running(upgraded_postgres_url, work.handlers) as one:
            await wired(one, two)
            held = await submit(one, agent="a", input="held")
            await until(lambda: "held" in work.begun, SOON_S)
        await until(lambda: work.begun.count("held") == 2, SOON_S)
        work.go.set()
        await soon(two, held)


async def test_what_a_dead_node_carried_out(upgraded_postgres_url: str) -> None:
    work = Work()
    url: str = upgraded_postgres_url
    lease: Any = {"lease_s": 1.0}
    async with running(url, work.handlers, **lease) as two:
        async with running(url, work.handlers, dies=True, **lease) as one:
            held = await submit(one, agent="a", input="held")
            await until(lambda: "held" in work.begun, SOON_S)
        await until(lambda: work.begun.count("held") == 2, SOON_S)
        work.go.set()
        await soon(two, held)


async def test_what_was_said_while_the_wire_was_cut(upgraded_postgres_url: str) -> None:
    """The node hears nothing; when its wire is laid again it looks by itself."""
    work = Work()
    async with running(upgraded_postgres_url, work.handlers) as worker:
        async with running(upgraded_postgres_url, {}, role="api") as door:
            await wired(door, worker)
            joined = worker.engine.roster.relay
            assert joined is not None
            wire: Any = joined._wire
            wire._driver.terminate()
            run = await submit(door, agent="a", input="plain")
            assert (await soon(door, run)).output == "done"


async def test_a_clock_that_is_an_hour_fast_does_not_hold_up_what_it_nudges(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agent_server.execution import control as door

    run = await world.ask("signal")
    await standing(world.door, run)
    monkeypatch.setattr(door, "utcnow", lambda: utcnow() + timedelta(hours=1))
    await control(world.door).signal(DEFAULT_TENANT, run.id, "go", 7, by="p")
    assert (await world.done(run)).output == 7


async def test_who_waits_for_a_run_that_ends_elsewhere_as_the_word_of_it_travels_hears_it(
    upgraded_postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work()
    async with running(upgraded_postgres_url, work.handlers) as worker:
        async with running(upgraded_postgres_url, {}, role="api") as door:
            await wired(door, worker)
            await soon(door, await submit(door, agent="a", input="plain"))
            monkeypatch.setattr(relay, "WINDOW_S", 0.2)
            run = await submit(worker, agent="a", input="held")
            waiting = asyncio.ensure_future(soon(door, run))
            await until(lambda: run.id in door.hub.followed(), SOON_S)
            work.go.set()
            assert (await soon(worker, run)).output == "done"
            assert (await waiting).output == "done"
