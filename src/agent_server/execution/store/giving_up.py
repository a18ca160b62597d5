"""The SQL of giving tasks up: whoever began them, or a person, needs them no more.

Leans on the tasks' SQL. Each function runs inside the caller's transaction and refuses to commit. A
live task whose row has an error is to undo what it has done and to end with that, whoever takes it
up: as cancelled where it was given up, else as failed.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, select, update

from agent_server.domain.errors import ErrorInfo, RunCancelled
from agent_server.execution.ports import UNDO_MARK
from agent_server.execution.store.columns import LIVE
from agent_server.execution.store.halts import CANCEL, subtree
from agent_server.execution.store.tasks import TAKE_UP, UNDOES, cancel_task
from agent_server.storage.tables import tasks

GIVEN_UP = RunCancelled("Whoever began it needs it no more.").info()


def doom(connection: Connection, run_id: str, path: str, error: ErrorInfo = GIVEN_UP) -> None:
    """Mark a live task: it is to undo what it has done and to end with ``error``, whoever takes it
    up; as cancelled where it was given up."""
    connection.execute(
        update(tasks)
        .where(tasks.c.run_id == run_id, tasks.c.path == path, tasks.c.status.in_(LIVE))
        .where(tasks.c.error.is_(None))
        .values(error=error.model_dump())
    )


def give_up(connection: Connection, run_id: str, path: str, now: datetime) -> list[str]:
    """Cancel one task with all below it, but for what undoes there. Those that have something to undo
    themselves are marked, and taken up, or told by whoever carries them out. Which those are."""
    live = select(tasks.c.path, tasks.c.status, UNDOES.label("undoes"))
    live = live.where(subtree(run_id, path), tasks.c.status.in_(LIVE)).order_by(tasks.c.path)
    left = []
    for row in connection.execute(live.with_for_update(of=tasks)).all():
        if row.path.count(UNDO_MARK) > path.count(UNDO_MARK):
            continue
        if not row.undoes:
            cancel_task(connection, run_id, row.path, now)
            continue
        doom(connection, run_id, row.path)
        idle = {"status": "queued", **TAKE_UP}
        connection.execute(
            update(tasks)
            .where(tasks.c.run_id == run_id, tasks.c.path == row.path)
            .values({"halt": CANCEL} if row.status == "running" else idle)
        )
        left.append(row.path)
    return left


def live_paths(connection: Connection, run_id: str) -> list[str]:
    """The run's live tasks below its root, without what only serves another and what undoes."""
    query = select(tasks.c.path).where(
        tasks.c.run_id == run_id,
        tasks.c.path != "",
        tasks.c.status.in_(LIVE),
        tasks.c.hidden.is_(False),
        ~tasks.c.path.contains(UNDO_MARK),
    )
    return list(connection.execute(query).scalars())


def dismiss_task(connection: Connection, row: Row[Any], error: ErrorInfo, now: datetime) -> bool:
    """End the task as failed with ``error``, and what lies idle below it as cancelled; True when
    that is done, False when whoever carries it out, or takes it up to undo, is to do it."""
    mine = (tasks.c.run_id == row.run_id, tasks.c.path == row.path)
    if row.status == "running":
        connection.execute(update(tasks).where(*mine).values(halt=CANCEL, error=error.model_dump()))
        return False
    doom(connection, row.run_id, row.path, error)
    if row.path in give_up(connection, row.run_id, row.path, now):
        return False
    connection.execute(update(tasks).where(*mine).values(status="failed", halt=None))
    return True
