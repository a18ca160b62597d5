"""The SQL of the ledger: a run's steps.

Leans on storage. Each function runs inside the caller's transaction and refuses to commit.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, false, select, tuple_

from agent_server.domain.errors import InternalError
from agent_server.domain.runs import Step
from agent_server.execution.ports import StepRecord
from agent_server.execution.store.columns import (
    INSERTS,
    NO_USAGE,
    error_of,
    usage_columns,
    usage_of,
)
from agent_server.storage.bulk import insert_rows
from agent_server.storage.tables import Unreadable, steps


def _upsert_steps(make: Any) -> Any:
    statement = make(steps)
    changing = ("status", "input", "input_hash", "output", "error", "attempts", "ended_at")
    changed: dict[str, Any] = {name: statement.excluded[name] for name in (*changing, *NO_USAGE)}
    changed["shared"] = false()  # whatever is written to a copy was done, and is paid for, here
    return statement.on_conflict_do_update(index_elements=["run_id", "key"], set_=changed)


_UPSERT_STEPS = {name: _upsert_steps(make) for name, make in INSERTS.items()}


def upsert_steps(
    connection: Connection, tenant: str, run_id: str, records: Sequence[tuple[str, StepRecord]]
) -> None:
    """``records``: each with the path of its task."""
    insert_rows(
        connection,
        _UPSERT_STEPS[connection.dialect.name],
        [
            {
                "run_id": run_id,
                "key": record.key,
                "tenant": tenant,
                "task_path": task_path,
                "kind": record.kind,
                "name": record.name,
                "agent": record.agent,
                "status": record.status,
                "input": record.input,
                "input_hash": record.input_hash,
                "output": record.output,
                "error": record.error.model_dump() if record.error else None,
                "attempts": record.attempts,
                "started_at": record.started_at,
                "ended_at": record.ended_at,
                **usage_columns(record.usage),
            }
            for task_path, record in records
        ],
    )


def task_steps(connection: Connection, run_id: str, task_path: str) -> list[StepRecord]:
    """The task's ledger, oldest first."""
    rows = connection.execute(
        select(steps)
        .where(steps.c.run_id == run_id, steps.c.task_path == task_path)
        .order_by(steps.c.started_at, steps.c.key)
    )
    return [_record(row) for row in rows]


def step_in(
    connection: Connection, tenant: str, run_id: str, key: str
) -> tuple[str, StepRecord] | None:
    """The path of the task that the step belongs to, and the step."""
    row = connection.execute(
        select(steps).where(steps.c.run_id == run_id, steps.c.tenant == tenant, steps.c.key == key)
    ).one_or_none()
    return None if row is None else (row.task_path, _record(row))


def _record(row: Row[Any]) -> StepRecord:
    """Raises ``InternalError`` for one that cannot be read: nothing may be built upon it."""
    if isinstance(row.output, Unreadable) or isinstance(row.error, Unreadable):
        raise InternalError(
            f"The stored step {row.key!r} cannot be read: {row.output or row.error}."
        )
    return StepRecord(
        key=row.key,
        kind=row.kind,
        name=row.name,
        status=row.status,
        agent=row.agent,
        input=row.input,
        input_hash=row.input_hash,
        output=row.output,
        error=error_of(row.error),
        usage=usage_of(row),
        attempts=row.attempts,
        started_at=row.started_at,
        ended_at=row.ended_at,
    )


def step_rows(
    connection: Connection,
    tenant: str,
    run_id: str,
    after: tuple[datetime, str] | None,
    limit: int,
) -> Sequence[Row[Any]]:
    """The run's steps, oldest first; values that only serve replay are left out."""
    query = select(steps).where(
        steps.c.run_id == run_id, steps.c.tenant == tenant, steps.c.kind != "value"
    )
    if after is not None:
        query = query.where(tuple_(steps.c.started_at, steps.c.key) > after)
    return connection.execute(query.order_by(steps.c.started_at, steps.c.key).limit(limit)).all()


def step_of(row: Row[Any], task: str | None) -> Step:
    return Step(
        key=row.key,
        run_id=row.run_id,
        task_id=task,
        kind=row.kind,
        name=row.name,
        status=row.status,
        input=row.input,
        output=row.output,
        error=error_of(row.error),
        attempts=row.attempts,
        usage=usage_of(row),
        started_at=row.started_at,
        ended_at=row.ended_at,
        shared=row.shared,
    )
