"""Old runs are forgotten by age and status, in whole or in detail; what lives is left alone."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, func, select, update

from agent_server.cli.database import vacuum_database
from agent_server.domain.base import utcnow
from agent_server.domain.errors import Conflict, NotFound, RunError
from agent_server.domain.history import ForkRequest
from agent_server.domain.ids import DEFAULT_TENANT
from agent_server.domain.runs import RunRequest, RunStatus
from agent_server.execution import retention
from agent_server.execution.history import History
from agent_server.execution.ports import StepRecord, TaskContext
from agent_server.execution.runs import Idempotency, Runs
from agent_server.settings import Settings
from agent_server.storage.tables import (
    events,
    idempotency_keys,
    metadata,
)
from agent_server.storage.tables import runs as runs_table
from agent_server.storage.tables import steps
from tests.support.until import until

from .kit import event_types, finished, running, submit

RULES = {"retention_days": 10, "retention_failed_days": 30}


async def _agent(ctx: TaskContext) -> str:
    said = str(ctx.run.request.input)
    await ctx.journal.finish(
        StepRecord(key=ctx.journal.key("tool", "a"), kind="tool", name="t").done(1)
    )
    if said == "bad":
        raise RunError("It went wrong.")
    if said == "live":
        await asyncio.Event().wait()
    return said


async def aged(runs: Runs, said: str, days: float, **more: Any) -> str:
    """A run that looks as if it had been made, and perhaps ended, so long ago."""
    run = await submit(runs, agent="a", input=said, **more)
    if said != "live":
        await finished(runs, run)
    ago = timedelta(days=days)

    def shift(connection: Connection) -> None:
        values: dict[str, Any] = {"created_at": run.created_at - ago}
        if said != "live":
            values["ended_at"] = utcnow() - ago
        connection.execute(update(runs_table).where(runs_table.c.id == run.id).values(**values))

    await runs.database.write(shift)
    return run.id


async def left(runs: Runs, ids: dict[str, str]) -> set[str]:
    found = set()
    for name, run_id in ids.items():
        try:
            await runs.get(DEFAULT_TENANT, run_id)
        except NotFound:
            continue
        found.add(name)
    return found


async def forget(runs: Runs, **settings: int) -> list[int]:
    rules = retention.rules(Settings(**settings))  # type: ignore[arg-type]
    return [await retention.forget(runs.database, rule) for rule in rules]


async def test_what_is_older_than_the_rule_of_its_status_goes_with_all_that_is_its_own(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "ROWS", 2)
    monkeypatch.setattr(retention, "RUNS", 2)
    async with running(url, {"agent": _agent}) as runs:
        ids = {
            "old": await aged(runs, "ok", 11),
            "older": await aged(runs, "ok", 500, session_id="s"),
            "oldest": await aged(runs, "ok", 900),
            "young": await aged(runs, "ok", 9),
            "failed": await aged(runs, "bad", 29),
            "failed long ago": await aged(runs, "bad", 31),
            "live": await aged(runs, "live", 900),
        }
        keyed = await runs.submit(
            RunRequest(agent="a", input="ok"),
            tenant=DEFAULT_TENANT,
            principal="p",
            idempotency=Idempotency("k", "f"),
        )
        await finished(runs, keyed.run)
        assert await forget(runs, **RULES) == [3, 1]
        assert await left(runs, ids) == {"young", "failed", "live"}
        gone = {ids[name] for name in ids} - {ids[n] for n in ("young", "failed", "live")}

        def rows(connection: Connection) -> dict[str, int]:
            return {
                table.name: connection.execute(
                    select(func.count()).select_from(table).where(table.c.run_id.in_(gone))
                ).scalar()
                or 0
                for table in metadata.sorted_tables
                if "run_id" in table.c
            }

        assert not any((await runs.database.read(rows)).values())
        assert await forget(runs, **RULES) == [0, 0]
        kept = await runs.database.read(
            lambda c: c.execute(select(func.count()).select_from(idempotency_keys)).scalar()
        )
        assert kept == 1
        assert (await runs.get(DEFAULT_TENANT, ids["live"])).status is RunStatus.RUNNING
        await runs.cancel(DEFAULT_TENANT, ids["live"])


async def test_details_go_before_the_run_which_then_cannot_be_forked(url: str) -> None:
    async with running(url, {"agent": _agent}) as runs:
        old, young = await aged(runs, "ok", 8), await aged(runs, "ok", 1)
        live = await aged(runs, "live", 8)
        assert await forget(runs, retention_detail_days=7) == [1]
        assert await forget(runs, retention_detail_days=7) == [0]
        found = await runs.get(DEFAULT_TENANT, old)
        assert (found.status, found.output) == (RunStatus.SUCCEEDED, "ok")

        def of(run_id: str) -> Any:
            return lambda c: [
                c.execute(
                    select(func.count()).select_from(table).where(table.c.run_id == run_id)
                ).scalar()
                for table in (events, steps)
            ]

        assert await runs.database.read(of(old)) == [0, 0]
        for run_id in (young, live):
            assert min(await runs.database.read(of(run_id))) > 0
        async with runs.follow(DEFAULT_TENANT, old, 0) as follow:
            assert [batch async for batch in follow.batches()] == []
        history: Any = History(
            runs,
            effect_of=lambda name: "none",  # type: ignore[arg-type,return-value]
            branch_session=lambda *a, **k: None,
            session_before=lambda *a: [],
            version="0",
        )
        with pytest.raises(Conflict, match="too old"):
            await history.fork(DEFAULT_TENANT, old, ForkRequest(), principal="p")
        await runs.cancel(DEFAULT_TENANT, live)


async def test_a_server_forgets_by_its_settings_beside_its_work(url: str) -> None:
    async with running(url, {"agent": _agent}) as runs:
        old = await aged(runs, "ok", 11)
    async with running(url, {"agent": _agent}, **RULES) as runs:
        run = await submit(runs, agent="a", input="ok")
        await finished(runs, run)

        async def forgotten() -> bool:
            return not await left(runs, {"old": old})

        await until(forgotten)
        assert await left(runs, {"old": old, "new": run.id}) == {"new"}
        assert "run.succeeded" in await event_types(runs, run)


async def test_vacuum_says_what_it_would_delete_and_what_it_deleted(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running(url, {"agent": _agent}) as runs:
        ids = {"old": await aged(runs, "ok", 11), "young": await aged(runs, "ok", 1)}
    monkeypatch.setenv("AGENT_SERVER_DATABASE_URL", url)
    await vacuum_database(10, None, None, dry_run=True)
    assert "1 would be deleted: runs that succeeded" in capsys.readouterr().out
    await vacuum_database(10, None, None, dry_run=False)
    assert "1 deleted: runs that succeeded" in capsys.readouterr().out
    async with running(url, {"agent": _agent}) as runs:
        assert await left(runs, ids) == {"young"}


@pytest.mark.parametrize("role", ["api", "worker", "all"])
async def test_an_api_server_deletes_nothing_by_itself(sqlite_url: str, role: str) -> None:
    """One that looks at a restored copy would empty the place of large values that the original
    still uses."""
    async with running(sqlite_url, {}, role=role, retention_days=1):
        names = {task.get_name() for task in asyncio.all_tasks()}
        assert ({"engine-forget", "engine-collect"} <= names) is (role != "api")
        assert bool({"engine-forget", "engine-collect"} & names) is (role != "api")
