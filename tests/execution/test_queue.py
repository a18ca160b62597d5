"""Whose turn it is: fair among tenants and runs, by priority, at a cost that does not grow."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from sqlalchemy import Connection, event, insert, select, text

from agent_server.domain.base import utcnow
from agent_server.domain.ids import DEFAULT_TENANT, Tenant
from agent_server.domain.runs import Run, RunRequest, RunStatus
from agent_server.execution import store
from agent_server.execution.ports import TaskContext, TaskSpec
from agent_server.execution.runs import Runs
from agent_server.storage.database import database_at
from agent_server.storage.migrate import upgrade
from agent_server.storage.tables import tasks
from tests.support.until import until

from .kit import RULE, control, finished, running, standing

A, B = Tenant("a"), Tenant("b")


class Line:
    """Notes who was served, in order; the first one holds the only slot until ``open``."""

    def __init__(self) -> None:
        self.served: list[str] = []
        self.gate = asyncio.Event()

    async def agent(self, ctx: TaskContext) -> str:
        await self.gate.wait()
        self.served.append(str(ctx.run.request.input))
        return "done"

    async def until(self, count: int) -> None:
        await until(lambda: len(self.served) >= count, 60)


async def ask(runs: Runs, name: str, tenant: Tenant = DEFAULT_TENANT, **more: Any) -> Run:
    request = RunRequest(agent="a", input=name, **more)
    return (await runs.submit(request, tenant=tenant, principal="p")).run


async def test_a_tenant_with_a_long_queue_holds_up_nobody(url: str) -> None:
    line = Line()
    async with running(url, {"agent": line.agent}, worker_concurrency=1) as runs:
        for number in range(40):
            await ask(runs, f"a{number}", A)
        for number in range(4):
            await ask(runs, f"b{number}", B)
        line.gate.set()
        await line.until(44)
    places = [place for place, name in enumerate(line.served) if name.startswith("b")]
    gaps = [after - before for before, after in zip(places, places[1:], strict=False)]
    assert places[0] <= 3 and gaps == [2, 2, 2], line.served[:12]
    of_a = [name for name in line.served if name.startswith("a")]
    assert of_a == [f"a{number}" for number in range(40)], "first come, first served"


async def test_a_run_of_many_tasks_and_many_runs_of_one_share_the_slots(url: str) -> None:
    line = Line()

    async def root(ctx: TaskContext) -> Any:
        if ctx.run.request.input != "big":
            return await line.agent(ctx)
        specs = [TaskSpec(path=f"{i}", node="n", kind="leaf", payload={}) for i in range(60)]
        await asyncio.gather(*(ctx.child(spec) for spec in specs))

    async def leaf(ctx: TaskContext) -> None:
        await line.agent(ctx)

    async with running(url, {"agent": root, "leaf": leaf}, worker_concurrency=1) as runs:
        big = await ask(runs, "big")

        async def all_made() -> bool:
            return len(await runs.tasks(DEFAULT_TENANT, big.id)) >= 60

        await until(all_made, 30)
        small = [await ask(runs, f"s{number}") for number in range(60)]
        line.gate.set()
        await line.until(120)
        for run in (big, *small):
            assert (await finished(runs, run)).status is RunStatus.SUCCEEDED
    first = line.served[:64]
    # Of every sixteen runs that share, the big one is one.
    assert 3 <= first.count("big") <= 8, first
    assert [name for name in line.served if name != "big"] == [f"s{n}" for n in range(60)]


async def test_what_has_a_higher_priority_begins_first_within_its_tenant_only(url: str) -> None:
    line = Line()
    async with running(url, {"agent": line.agent}, worker_concurrency=1) as runs:
        await ask(runs, "first", A)
        for name, priority in (("low", -5), ("plain", 0), ("high", 5), ("higher", 100)):
            await ask(runs, name, A, priority=priority)
        await ask(runs, "other", B, priority=-100)
        line.gate.set()
        await line.until(6)
        listed = await runs.list(A, filters=runs_of_all(), limit=10, cursor=None)
    served = [name for name in line.served if name != "other"]
    assert served == ["first", "higher", "high", "plain", "low"]
    assert line.served.index("other") <= 2
    assert {run.priority for run in listed.data} == {-5, 0, 5, 100}


def runs_of_all() -> Any:
    from agent_server.execution.runs import RunFilters

    return RunFilters()


async def test_runs_of_one_session_follow_one_another_however_many_wait(url: str) -> None:
    line = Line()
    at_once: list[int] = []
    busy = 0

    async def agent(ctx: TaskContext) -> None:
        nonlocal busy
        busy += 1
        at_once.append(busy)
        await line.agent(ctx)
        busy -= 1

    async with running(url, {"agent": agent}) as runs:
        runs_made = [await ask(runs, f"{number}", session_id="s") for number in range(25)]
        await runs.cancel(DEFAULT_TENANT, runs_made[3].id)
        queued = await runs.database.read(store.queue_depth)
        line.gate.set()
        await line.until(24)
        await finished(runs, runs_made[-1])
    assert queued == 0, "what stands behind is not in the queue"
    assert line.served == [f"{number}" for number in range(25) if number != 3]
    assert set(at_once) == {1}


async def test_a_lane_whose_end_was_not_noticed_goes_on(url: str) -> None:
    line = Line()
    async with running(url, {"agent": line.agent}) as runs:
        first = await ask(runs, "first", session_id="s")
        second = await ask(runs, "second", session_id="s")
        # As a program of the version before ends it: nobody lets the next one in.
        await runs.database.write(lambda c: store.erase_runs(c, DEFAULT_TENANT, [first.id]))
        line.gate.set()
        assert (await finished(runs, second)).status is RunStatus.SUCCEEDED


def opcodes(connection: Connection, work: Callable[[], object]) -> int:
    """Steps of SQLite's machine that ``work`` takes, in hundreds."""
    count = 0

    def tick() -> int:
        nonlocal count
        count += 1
        return 0

    driver: Any = connection.connection.driver_connection
    driver.set_progress_handler(tick, 100)
    work()
    driver.set_progress_handler(None, 100)
    return count


async def test_a_claim_costs_the_same_however_much_is_queued(sqlite_url: str) -> None:
    database = database_at(sqlite_url)
    await database.open()
    await database.write(upgrade)

    def fill(connection: Connection, start: int, count: int) -> None:
        now = utcnow()
        rows = [
            {"run_id": f"run_{start + i:09}", "path": "", "tenant": f"t{i % 5}", "node": ""}
            | {"kind": "k", "payload": {}, "hidden": True, "status": "queued", "epoch": 0}
            | {"attempts": 0, "created_at": now}
            for i in range(count)
        ]
        connection.execute(insert(tasks), rows)

    def measure(connection: Connection) -> int:
        turns = store.Turns()

        def claims() -> None:
            for limit in (1, 1, 1, 8):
                taken, more = store.claim(connection, "node", limit, utcnow(), turns, RULE)
                assert len(taken) == limit and more

        return opcodes(connection, claims)

    try:
        await database.write(lambda c: fill(c, 0, 200))
        few = await database.write(measure)
        await database.write(lambda c: fill(c, 200, 20_000))
        many = await database.write(measure)
    finally:
        await database.close()
    assert few > 10, "it was not measured"
    assert many < 1.5 * few, (few, many)


Work = Callable[[TaskContext], Awaitable[Any]]


async def test_any_number_of_orderly_stops_is_borne_by_a_task_at_work(url: str) -> None:
    began = asyncio.Event()
    goes = asyncio.Event()

    async def agent(ctx: TaskContext) -> int:
        began.set()
        await goes.wait()
        return ctx.attempt

    run = None
    for _ in range(4):
        async with running(url, {"agent": agent}, max_attempts=2) as runs:
            began.clear()
            run = run or await ask(runs, "x")
            await asyncio.wait_for(began.wait(), 20)
    assert run is not None
    async with running(url, {"agent": agent}, max_attempts=2) as runs:
        goes.set()
        assert (await finished(runs, run)).output == 5


async def test_a_root_that_kills_its_worker_beside_a_task_that_waits_is_set_aside(
    url: str,
) -> None:
    began = asyncio.Event()

    async def agent(ctx: TaskContext) -> Any:
        async with anyio.create_task_group() as group:
            spec = TaskSpec(path="1", node="n", kind="wait", payload={})
            group.start_soon(ctx.child, spec)
            await ctx.child(TaskSpec(path="2", node="n", kind="quick", payload={}))
            began.set()
            await asyncio.Event().wait()

    async def wait(ctx: TaskContext) -> Any:
        return await ctx.wait_signal("go", key="w")

    async def quick(ctx: TaskContext) -> None:
        return None

    handlers = {"agent": agent, "wait": wait, "quick": quick}
    settings = {"max_attempts": 2, "lease_s": 1.0}
    run = None
    for _ in range(2):
        async with running(url, handlers, dies=True, **settings) as runs:
            began.clear()
            run = run or await ask(runs, "x")
            await asyncio.wait_for(began.wait(), 20)
            assert (await standing(runs, run)).status is RunStatus.WAITING
    assert run is not None
    async with running(url, handlers, **settings) as runs:
        ended = await finished(runs, run)
    assert ended.error is not None and ended.error.code == "too_many_attempts"


async def test_a_root_above_a_task_that_waits_outlives_any_number_of_deaths(url: str) -> None:
    async def agent(ctx: TaskContext) -> Any:
        return (await ctx.child(TaskSpec(path="1", node="n", kind="wait", payload={}))).output

    async def wait(ctx: TaskContext) -> Any:
        got = await ctx.wait_signal("go", key="w")
        return got.payload if got else None

    handlers = {"agent": agent, "wait": wait}
    settings = {"max_attempts": 2, "lease_s": 1.0}
    run = None

    def excused(connection: Connection) -> bool | None:
        query = select(tasks.c.excused).where(tasks.c.path == "", tasks.c.status == "running")
        return connection.execute(query).scalar()

    for _ in range(3):
        async with running(url, handlers, dies=True, **settings) as runs:
            run = run or await ask(runs, "x")
            await until(lambda: runs.database.read(excused), 30)
    assert run is not None
    async with running(url, handlers, **settings) as runs:
        await control(runs).signal(DEFAULT_TENANT, run.id, "go", "there", by="ann")
        assert (await finished(runs, run)).output == "there"


@pytest.mark.slow
async def test_a_root_that_kills_its_worker_late_beside_a_task_that_waits_is_set_aside(
    url: str,
) -> None:
    """Later than it is excused at first: what it has to outlive grows beyond that."""
    lives: list[bool] = []

    async def agent(ctx: TaskContext) -> Any:
        async with anyio.create_task_group() as group:
            group.start_soon(ctx.child, TaskSpec(path="1", node="n", kind="wait", payload={}))
            await asyncio.Event().wait()

    async def wait(ctx: TaskContext) -> Any:
        return await ctx.wait_signal("go", key="w")

    def excused(connection: Connection) -> bool | None:
        query = select(tasks.c.excused).where(tasks.c.path == "", tasks.c.status == "running")
        return connection.execute(query).scalar()

    handlers = {"agent": agent, "wait": wait}
    settings = {"max_attempts": 1, "lease_s": 2.0}
    run = None
    while not (lives and lives[-1]):
        async with running(url, handlers, dies=True, **settings) as runs:
            run = run or await ask(runs, "x")
            while not runs.engine.roster.carries_out(run.id, ""):  # Or until it has ended.
                ended = await runs.wait(DEFAULT_TENANT, run.id, 0.1)
                if ended.status.ended:
                    break
            ended = await runs.wait(DEFAULT_TENANT, run.id, 2.5)
            lives.append(ended.status.ended)
            late = await runs.database.read(excused)
        assert len(lives) < 12
    assert ended.error is not None and ended.error.code == "too_many_attempts"
    assert len(lives) > 2 and not late, "it was excused at first, and not for ever"


async def test_a_claim_goes_by_the_index_of_the_queue_alone(postgres_url: str) -> None:
    """However much waits or has ended: neither a sequence of all tasks nor a sort of the queue."""

    def plans(connection: Connection) -> str:
        kinds = {"queued": 2_000, "waiting": 1_000, "succeeded": 5_000}
        base = {"path": "", "node": "", "kind": "run.agent", "payload": {}, "hidden": True}
        rows = [
            {
                **base,
                **{"run_id": f"{status}{n}", "tenant": f"t{n % 100}", "status": status},
                **{"epoch": 0, "attempts": 0, "created_at": utcnow()},
            }
            for status, count in kinds.items()
            for n in range(count)
        ]
        connection.execute(insert(tasks), rows)
        connection.execute(text("ANALYZE tasks"))
        told: list[str] = []

        def explain(
            raw: Connection, cursor: Any, statement: str, values: Any, context: Any, many: bool
        ) -> None:
            if "FROM tasks" in statement and not statement.startswith("EXPLAIN"):
                told.extend(row[0] for row in raw.exec_driver_sql(f"EXPLAIN {statement}", values))

        event.listen(connection, "before_cursor_execute", explain)
        taken, more = store.claim(connection, "node", 16, utcnow(), store.Turns(), RULE)
        event.remove(connection, "before_cursor_execute", explain)
        assert len(taken) == 16 and more
        return "\n".join(told)

    async with running(postgres_url, {}, role="api") as runs:
        plan = await runs.database.write(plans)
    assert "ix_tasks_queue" in plan and "ix_tasks_moments" in plan
    assert "Seq Scan" not in plan and "Sort" not in plan, plan
