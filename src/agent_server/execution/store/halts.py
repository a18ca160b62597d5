"""The SQL of halts: runs and tasks that are to stand still, or to stop, wherever they are.

Leans on storage. Each function runs inside the caller's transaction and refuses to commit. A halt
is a mark on the task's row: nobody takes a task that has one, and whoever carries it out sees it.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, or_, select, update

from agent_server.execution.store.columns import LIVE
from agent_server.storage.tables import tasks

PAUSE = "pause"
CANCEL = "cancel"


def subtree(run_id: str, path: str) -> ColumnElement[bool]:
    """The task and all that it began; every task of the run for its root, ``""``."""
    inside = tasks.c.run_id == run_id
    if not path:
        return inside
    below = tasks.c.path.startswith(f"{path}.", autoescape=True)
    return inside & or_(tasks.c.path == path, below)


def pause_tasks(connection: Connection, run_id: str, path: str) -> None:
    """Mark the live tasks of the subtree; one that is to be cancelled stays so."""
    connection.execute(
        update(tasks)
        .where(subtree(run_id, path), tasks.c.status.in_(LIVE), tasks.c.halt.is_(None))
        .values(halt=PAUSE)
    )


def unpause_tasks(connection: Connection, run_id: str, path: str) -> int:
    """Take the marks off; answers of how many tasks."""
    return connection.execute(
        update(tasks)
        .where(subtree(run_id, path), tasks.c.status.in_(LIVE), tasks.c.halt == PAUSE)
        .values(halt=None)
    ).rowcount


def forget_halts(connection: Connection, run_id: str) -> None:
    """The run ends: nothing of it stands still for a mark any more."""
    connection.execute(
        update(tasks).where(tasks.c.run_id == run_id, tasks.c.halt.is_not(None)).values(halt=None)
    )


def locked_task(connection: Connection, run_id: str, path: str) -> Row[Any] | None:
    """The task's row, locked until the transaction ends."""
    return connection.execute(
        select(tasks).where(tasks.c.run_id == run_id, tasks.c.path == path).with_for_update()
    ).one_or_none()


def awaits(connection: Connection, run_id: str, what: str) -> bool:
    """Whether a task of the run stands still for ``what``."""
    query = select(tasks.c.path).where(
        tasks.c.run_id == run_id, tasks.c.status == "waiting", tasks.c.awaits == what
    )
    return connection.execute(query.limit(1)).one_or_none() is not None


def task_paths(connection: Connection, tenant: str, run_id: str) -> Sequence[str]:
    """The places of all the run's tasks."""
    query = select(tasks.c.path).where(tasks.c.run_id == run_id, tasks.c.tenant == tenant)
    return connection.execute(query).scalars().all()


def halted_here(connection: Connection, owner: str) -> Sequence[Any]:
    """``run_id, path, epoch, halt, error`` of the halted tasks that ``owner`` carries out."""
    return connection.execute(
        select(tasks.c.run_id, tasks.c.path, tasks.c.epoch, tasks.c.halt, tasks.c.error).where(
            tasks.c.owner == owner, tasks.c.status == "running", tasks.c.halt.is_not(None)
        )
    ).all()
