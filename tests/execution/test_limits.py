"""What all nodes share a little of: permits, rates a minute, and the slots of one tenant."""

import asyncio
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import func, select

from agent_server.domain.ids import DEFAULT_TENANT, Tenant
from agent_server.domain.runs import RunRequest, RunStatus
from agent_server.execution.permits import Permits
from agent_server.execution.ports import TaskContext, TaskSpec
from agent_server.execution.rates import Rate, Rates, booked, closed
from agent_server.execution.runs import Runs
from agent_server.storage.tables import permits as permits_table

from .kit import finished, running, submit


class Press:
    """Counts who is inside at once; the first one stays until there is a second."""

    def __init__(self) -> None:
        self.inside = 0
        self.most = 0
        self.times = 0
        self.met = asyncio.Event()

    async def use(self) -> None:
        self.inside += 1
        self.times += 1
        self.most = max(self.most, self.inside)
        if self.inside > 1:
            self.met.set()
        await self.met.wait()
        await asyncio.sleep(0.02)  # long enough for others to come in, if they may
        self.inside -= 1


def permits_of(runs: Runs) -> Permits:
    return Permits(runs.database, lambda: runs.engine.node)


async def test_permits_hold_over_nodes_and_who_waits_takes_no_slot(postgres_url: str) -> None:
    press = Press()
    doors: dict[str, Permits] = {}

    def agent_of(name: str) -> Any:
        async def agent(ctx: TaskContext) -> str:
            if ctx.run.request.input == "free":
                return "passed by"
            async with doors[name].hold(ctx, "press", 2):
                async with doors[name].hold(ctx, "press", 2):  # Held already.
                    await press.use()
            return "pressed"

        return agent

    async with AsyncExitStack() as stack:
        members = []
        for name in ("one", "two"):
            runs = await stack.enter_async_context(
                running(postgres_url, {"agent": agent_of(name)}, worker_concurrency=8)
            )
            doors[name] = permits_of(runs)
            members.append(runs)
        made = [await submit(members[i % 2], agent="a", input="press") for i in range(16)]
        free = await submit(members[0], agent="a", input="free")
        assert (await finished(members[0], free)).output == "passed by"
        for run in made:
            assert (await finished(members[0], run)).output == "pressed"
        left = await members[0].database.read(
            lambda c: c.execute(select(func.count()).select_from(permits_table)).scalar()
        )
    assert (press.most, press.times, left) == (2, 16, 0)


async def test_a_task_that_waits_for_a_permit_holds_no_slot_and_a_cancelled_one_leaves_none(
    url: str,
) -> None:
    gate, inside = asyncio.Event(), asyncio.Event()
    box: list[Permits] = []

    async def agent(ctx: TaskContext) -> str:
        if ctx.run.request.input == "free":
            return "passed by"
        async with box[0].hold(ctx, "press", 1):
            inside.set()
            await gate.wait()
        return "pressed"

    async with running(url, {"agent": agent}, worker_concurrency=2) as runs:
        box.append(permits_of(runs))
        first = await submit(runs, agent="a", input="x")
        await asyncio.wait_for(inside.wait(), 20)
        waiting = [await submit(runs, agent="a", input="x") for _ in range(3)]
        assert (await finished(runs, await submit(runs, agent="a", input="free"))).output
        await runs.cancel(DEFAULT_TENANT, waiting[0].id)
        gate.set()
        for run in (first, *waiting[1:]):
            assert (await finished(runs, run)).output == "pressed"
        left = await runs.database.read(
            lambda c: c.execute(select(func.count()).select_from(permits_table)).scalar()
        )
    assert left == 0


async def test_the_permits_of_a_dead_node_are_given_to_others(url: str) -> None:
    inside = asyncio.Event()
    box: list[Permits] = []
    lives = False

    async def agent(ctx: TaskContext) -> str:
        async with box[-1].hold(ctx, "press", 1):
            inside.set()
            if not lives:
                await asyncio.Event().wait()
        return "pressed"

    async with running(url, {"agent": agent}, dies=True, lease_s=1.0) as runs:
        box.append(Permits(_Sealed(runs), lambda: runs.engine.node))  # type: ignore[arg-type]
        run = await submit(runs, agent="a", input="x")
        await asyncio.wait_for(inside.wait(), 20)
        box[0]._database.dead = True  # type: ignore[attr-defined]
    lives = True
    async with running(url, {"agent": agent}, lease_s=1.0) as runs:
        box.append(permits_of(runs))
        assert (await finished(runs, run)).output == "pressed"


class _Sealed:
    """The database as a process has it that dies: nothing of its end arrives."""

    def __init__(self, runs: Runs) -> None:
        self._database = runs.database
        self.dead = False

    async def write(self, fn: Any) -> Any:
        return None if self.dead else await self._database.write(fn)


async def test_a_tenant_has_no_more_tasks_at_work_than_its_slots_over_nodes(
    postgres_url: str,
) -> None:
    inside: dict[str, int] = {}
    most: dict[str, int] = {}
    met = asyncio.Event()

    async def agent(ctx: TaskContext) -> None:
        # The root only awaits: it takes none of its tenant's slots.
        await asyncio.gather(
            *(ctx.child(TaskSpec(path=f"{i}", node="n", kind="leaf", payload={})) for i in range(4))
        )

    async def leaf(ctx: TaskContext) -> None:
        tenant = ctx.run.tenant
        inside[tenant] = inside.get(tenant, 0) + 1
        most[tenant] = max(most.get(tenant, 0), inside[tenant])
        if tenant == "large":  # The first one stays until there is a second.
            if inside[tenant] > 1:
                met.set()
            await met.wait()
        await asyncio.sleep(0.03)  # long enough for others to come in, if they may
        inside[tenant] -= 1

    settings = {"tenant_concurrency": {"small": 1, "*": 3}, "worker_concurrency": 50}
    handlers = {"agent": agent, "leaf": leaf}
    async with running(postgres_url, handlers, **settings) as one:
        async with running(postgres_url, handlers, **settings) as two:
            made = []
            for number in range(3):
                for name in ("small", "large"):
                    request = RunRequest(agent="a", input="x")
                    tenant = Tenant(name)
                    answer = await (one, two)[number % 2].submit(
                        request, tenant=tenant, principal="p"
                    )
                    made.append((tenant, answer.run.id))
            for tenant, run_id in made:
                ended = await one.wait(tenant, run_id, 40)
                assert ended.status is RunStatus.SUCCEEDED
    assert most["small"] == 1 and 1 < most["large"] <= 3, most


async def test_the_work_of_one_tenant_takes_no_slot_of_another(url: str) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def agent(ctx: TaskContext) -> None:
        if ctx.run.tenant == "large":
            begun.set()
            await go_on.wait()

    async with running(url, {"agent": agent}, tenant_concurrency={"*": 1}) as runs:
        ended = []
        for name in ("large", "small"):
            request = RunRequest(agent="a", input="x")
            made = await runs.submit(request, tenant=Tenant(name), principal="p")
            ended.append(asyncio.ensure_future(runs.wait(Tenant(name), made.run.id, 20)))
            await asyncio.wait_for(begun.wait(), 20)
        assert (await ended[1]).status is RunStatus.SUCCEEDED and not ended[0].done()
        go_on.set()
        assert (await ended[0]).status is RunStatus.SUCCEEDED


@given(
    st.lists(st.tuples(st.floats(0, 20), st.integers(0, 900)), min_size=1, max_size=60),
    st.integers(1, 8),
    st.integers(100, 1000),
)
def test_no_minute_holds_more_calls_or_tokens_than_it_may(
    calls: list[tuple[float, int]], most: int, amount: int
) -> None:
    state: Any = None
    now = 1_000_000.0
    made: list[tuple[float, int]] = []
    for number, (gap, tokens) in enumerate(calls):
        now += gap
        wait, state = booked(state, now, Rate(most, amount), tokens, str(number))
        made.append((now + wait, min(tokens, amount)))
    assert [at for at, _ in made] == sorted(at for at, _ in made), "first come, first served"
    for at, _ in made:
        minute = [tokens for moment, tokens in made if at <= moment < at + 60]
        assert len(minute) <= most and sum(minute) <= amount


def test_who_was_booked_for_later_goes_then_without_another_look() -> None:
    rate = Rate(1)
    _, state = booked(None, 100.0, rate, 0, "a")
    wait, state = booked(state, 100.0, rate, 0, "b")
    assert 60 <= wait <= 61
    again, state = booked(state, 110.0, rate, 0, "b")
    assert again == wait - 10
    none, state = booked(state, 100.0 + wait, rate, 0, "b")
    assert none == 0
    later, _ = booked(state, 100.0 + wait, rate, 0, "c")
    assert 60 <= later <= 61
    shut = closed(None, 100.0, 30.0)
    assert booked(shut, 100.0, Rate(), 0, "a")[0] == 30.0


@pytest.mark.parametrize("calls", [3])
async def test_nodes_book_in_one_book(postgres_url: str, calls: int) -> None:
    async with running(postgres_url, {}) as one, running(postgres_url, {}) as two:
        books = [Rates(one.database), Rates(two.database)]
        waits: list[timedelta] = []

        async def book(number: int) -> None:
            name = f"call {number}"
            waits.append(await books[number % 2].book("openai", Rate(calls=calls), 1, name))

        async with anyio.create_task_group() as group:
            for number in range(3 * calls):
                group.start_soon(book, number)
        await books[0].close("openai", timedelta(seconds=500))
        shut = await books[1].book("openai", Rate(), 1, "another")
    # To the nearest minute: each wait counts from its own booking, and those are not made at once.
    minutes = sorted(round(wait.total_seconds() / 60) for wait in waits)
    assert minutes == [0] * calls + [1] * calls + [2] * calls
    assert 470 <= shut.total_seconds() <= 500
