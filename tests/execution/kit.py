"""A small engine with handlers of the test's own, on a real database file."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from agent_server.domain.errors import DatabaseUnavailable
from agent_server.domain.ids import DEFAULT_TENANT, Tenant
from agent_server.domain.runs import Run, RunRequest, RunStatus
from agent_server.execution.control import Control
from agent_server.execution.engine import Engine
from agent_server.execution.events import EventHub
from agent_server.execution.ports import TaskContext
from agent_server.execution.runs import Runs
from agent_server.execution.store import BlameRule
from agent_server.memory.session_store import append_items
from agent_server.settings import Settings
from agent_server.storage.database import database_at
from agent_server.storage.migrate import upgrade
from agent_server.storage.outside import keep_outside
from tests.support.until import until

RULE = BlameRule(most=10, lease_s=8)
Handler = Callable[[TaskContext], Awaitable[Any]]


async def accept(request: RunRequest, tenant: Tenant) -> RunRequest:
    """Every name is known."""
    return request


def control(runs: Runs) -> Control:
    """The door for signals and decisions beside ``runs``."""
    return Control(database=runs.database, engine=runs.engine)


async def standing(runs: Runs, run: Run) -> Run:
    """The run, once it has ended or waits."""

    async def stands() -> Run | None:
        found = await runs.get(DEFAULT_TENANT, run.id)
        return found if found.status.ended or found.status is RunStatus.WAITING else None

    found: Run = await until(stands)
    return found


async def wired(*nodes: Runs) -> None:
    """Return when the nodes hear one another; one whose database has no wire is passed over."""
    for runs in nodes:
        joined = runs.engine.roster.relay
        if joined is not None:
            await until(lambda wire=joined._wire: wire.up)  # type: ignore[misc]


@asynccontextmanager
async def running(
    url: str,
    handlers: Mapping[str, Handler],
    *,
    observe: Any = None,
    dies: bool = False,
    **settings: Any,
) -> AsyncIterator[Runs]:
    """The engine and its door, started and orderly stopped; one that ``dies`` writes nothing more
    at its end, and another finds what it carried out as it was."""
    chosen = Settings(**{"shutdown_grace_s": 0.2, **settings})  # type: ignore[arg-type]
    database = database_at(url)
    keep_outside(database, chosen)
    await database.open()
    await database.write(upgrade)
    watched = {"observe": observe} if observe is not None else {}
    hub = EventHub(chosen.stream_queue_size)
    engine = Engine(
        database=database,
        hub=hub,
        settings=chosen,
        handlers={**{f"run.{k}": h for k, h in handlers.items()}, **handlers},
        append_items=append_items,
        **watched,
    )
    await engine.start()
    try:
        yield Runs(
            database=database,
            engine=engine,
            hub=hub,
            settings=chosen,
            prepare=accept,
            **watched,
        )
    finally:
        if dies:
            engine.database = engine.roster.database = _Gone()
        await engine.stop()
        await database.close()


class _Gone:
    """The database of a process that is no more."""

    dialect = "none"

    async def write(self, fn: Any) -> Any:
        raise DatabaseUnavailable("The process is gone.")

    read = write


async def submit(runs: Runs, **request: Any) -> Run:
    submitted = await runs.submit(RunRequest(**request), tenant=DEFAULT_TENANT, principal="test")
    return submitted.run


async def finished(runs: Runs, run: Run, timeout_s: float = 30) -> Run:
    """The run at its end."""
    ended = await runs.wait(DEFAULT_TENANT, run.id, timeout_s)
    assert ended.status.ended, ended
    return ended


async def event_types(runs: Runs, run: Run) -> list[str]:
    events = await runs.events(DEFAULT_TENANT, run.id, 0, 10_000)
    assert [e.seq for e in events] == list(range(1, len(events) + 1))
    return [e.type for e in events]
