"""The SQL of whole runs: everything of one, and the copies that a fork shares with its origin.

Leans on storage. Each function runs inside the caller's transaction and refuses to commit.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, insert, select

from agent_server.domain.base import JsonObject
from agent_server.execution.store.columns import NO_USAGE
from agent_server.execution.store.events import all_events
from agent_server.storage.tables import steps, tasks


@dataclass(frozen=True)
class Whole:
    """The tasks (the hidden ones and the root too), steps and events of a run, oldest first."""

    run: Row[Any]
    tasks: Sequence[Row[Any]]
    steps: Sequence[Row[Any]]
    events: Sequence[JsonObject]


def whole(connection: Connection, run: Row[Any]) -> Whole:
    """Everything that is stored of ``run``."""
    of_tasks = connection.execute(
        select(tasks).where(tasks.c.run_id == run.id).order_by(tasks.c.created_at, tasks.c.path)
    ).all()
    of_steps = connection.execute(
        select(steps).where(steps.c.run_id == run.id).order_by(steps.c.started_at, steps.c.key)
    ).all()
    return Whole(run, of_tasks, of_steps, all_events(connection, run.id))


def copy_tasks(connection: Connection, run_id: str, rows: Iterable[Row[Any]]) -> None:
    """The ended tasks ``rows`` become ended tasks of ``run_id``."""
    copies = [
        {**row._mapping, "run_id": run_id, "owner": None, "lane": None, "shared": True}
        for row in rows
    ]
    if copies:
        connection.execute(insert(tasks), copies)


def copy_steps(
    connection: Connection, run_id: str, rows: Iterable[Row[Any]], outputs: dict[str, Any]
) -> None:
    """The steps ``rows`` become steps of ``run_id``, which are not paid for twice; ``outputs``
    are the outputs that are changed, by key."""
    copies = [
        {
            **row._mapping,
            "run_id": run_id,
            "shared": True,
            "output": outputs.get(row.key, row.output),
            **NO_USAGE,
        }
        for row in rows
    ]
    if copies:
        connection.execute(insert(steps), copies)
