"""What the store of runs is asked with a tenant, it answers of that tenant alone.

The doors look up the run first, so that another tenant never comes this far: these are the
conditions behind it.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, select, update

from agent_server.domain.base import utcnow
from agent_server.domain.errors import NotFound
from agent_server.domain.ids import DEFAULT_TENANT, Tenant
from agent_server.execution import store
from agent_server.execution.store.conversations import conversation
from agent_server.storage.tables import runs, steps, tasks
from tests.memory.kit import home

US, THEM = DEFAULT_TENANT, Tenant("them")


def _known(connection: Connection, tenant: Tenant, run: str) -> Any:
    try:
        return store.known_run_row(connection, tenant, run)
    except NotFound:
        return None


READERS: dict[str, Callable[[Connection, Tenant, str], Any]] = {
    "approval_row": lambda c, t, run: store.approval_row(c, "appr_1", t),
    "conversation": lambda c, t, run: conversation(c, t, run),
    "event_rows": lambda c, t, run: store.event_rows(c, t, run, 0, 9),
    "events_of": lambda c, t, run: store.events_of(c, t, run, ("run.created",)),
    "files_named": lambda c, t, run: store.files_named(c, t, [run]),
    "known_run_row": _known,
    "last_event": lambda c, t, run: store.last_event(c, t, run, ("run.created",)),
    "list_approval_rows": lambda c, t, run: store.list_approval_rows(
        c, t, status=None, run_id=run, subject=None, now=utcnow(), before=None, limit=9
    ),
    "list_run_rows": lambda c, t, run: store.list_run_rows(
        c, t, status=None, agent="clerk", session_id="s", workflow=None, created_after=None,
        q=None, live=False, before=None, limit=9,
    ),
    "made_from": lambda c, t, run: store.made_from(c, t, [run], "made-from-"),
    "run_row": lambda c, t, run: store.run_row(c, t, run),
    "runs_about": lambda c, t, run: store.runs_about(c, t, "ada"),
    "runs_of_sessions": lambda c, t, run: store.runs_of_sessions(c, t, ["s"]),
    "step_in": lambda c, t, run: store.step_in(c, t, run, _a_step(c, run)),
    "step_rows": lambda c, t, run: store.step_rows(c, t, run, None, 9),
    "stored_key": lambda c, t, run: store.stored_key(c, t, f"made-from-{run}"),
    "task_paths": lambda c, t, run: store.task_paths(c, t, run),
    "task_rows": lambda c, t, run: store.task_rows(c, t, run),
}  # fmt: skip
WRITING = {
    "answer_key",
    "continue_before",
    "erase_runs",
    "insert_events",
    "lane_of",
    "tell",
    "upsert_steps",
}
"""They write what they are given under the tenant that they are given, or erase it there."""
WAITING = {"begin_erasing", "hold_off"}
"""They wait for others of the same tenant: tests/memory/test_erasure_races.py."""


def _a_step(connection: Connection, run: str) -> str:
    asked = select(steps.c.key).where(steps.c.run_id == run, steps.c.kind == "model")
    return str(connection.execute(asked).scalar_one())


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
async def test_each_question_with_a_tenant_is_answered_of_that_tenant_alone(
    database: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = f"sqlite:///{tmp_path}/data/server.db"
    if database == "postgresql":
        url = request.getfixturevalue("upgraded_postgres_url")
    async with home(url, tmp_path) as server:
        run = (await server.run("hello", session_id="s", subject="ada"))["id"]
        opened, now = server.parts.database, utcnow()
        key = {"key": f"made-from-{run}", "fingerprint": "f", "run_id": run, "response": []}
        asked = {
            "id": "appr_1", "run_id": run, "task_path": "1", "step": "1", "status": "pending",
            "subject": "x", "arguments_hash": "h", "detail": "d", "on_expiry": "reject",
            "requested_at": now,
        }  # fmt: skip
        await opened.write(lambda c: store.take_key(c, {**key, "tenant": US, "created_at": now}))
        await opened.write(lambda c: store.insert_approval(c, {**asked, "tenant": US}))
        await opened.write(lambda c: c.execute(update(tasks).values(hidden=False, path="1")))
        named = {"agent": "clerk", "input": [{"content": [{"file_id": "file_1"}]}]}
        await opened.write(lambda c: c.execute(update(runs).values(request=named)))

        async def answers(tenant: Tenant) -> dict[str, bool]:
            return {
                name: bool(await opened.read(lambda c, r=reader: r(c, tenant, run)))
                for name, reader in READERS.items()
            }

        assert await answers(THEM) == dict.fromkeys(READERS, False)
        assert await answers(US) == dict.fromkeys(READERS, True)
        assert not any((await opened.write(lambda c: store.erase_runs(c, THEM, [run]))).values())
        assert await answers(US) == dict.fromkeys(READERS, True)


def test_no_question_with_a_tenant_is_left_out_here() -> None:
    named = {
        name
        for name in store.__all__
        if inspect.isfunction(asked := getattr(store, name))
        and "tenant" in inspect.signature(asked).parameters
    }
    assert named | {"conversation"} == {*READERS, *WRITING, *WAITING}
