"""The SQL of signals and approvals: what somebody sends to a run, and what somebody decides.

Leans on storage. Each function runs inside the caller's transaction and refuses to commit.
Every function that answers a caller takes the tenant; the engine's own work goes by run id.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    insert,
    or_,
    select,
    tuple_,
    update,
)

from agent_server.domain.approvals import Approval
from agent_server.domain.ids import task_id
from agent_server.execution.store.columns import INSERTS
from agent_server.storage.tables import approvals, signals


def insert_signal(connection: Connection, values: dict[str, Any]) -> None:
    connection.execute(insert(signals), values)


def take_signal(connection: Connection, run_id: str, name: str, key: str) -> Row[Any] | None:
    """The signal that the step ``key`` consumed, or now consumes: the oldest that is left."""
    found = connection.execute(
        select(signals)
        .where(*_for(run_id, name, key))
        .order_by(signals.c.taken_by.is_(None), signals.c.id)
        .limit(1)
        .with_for_update()
    ).one_or_none()
    if found is not None and found.taken_by is None:
        connection.execute(update(signals).where(signals.c.id == found.id).values(taken_by=key))
    return found


def _for(run_id: str, name: str, key: str | None) -> tuple[ColumnElement[bool], ...]:
    """The signals ``name`` of the run that nobody took, or that the step ``key`` took."""
    open_to: ColumnElement[bool] = signals.c.taken_by.is_(None)
    if key is not None:
        open_to = or_(open_to, signals.c.taken_by == key)
    return signals.c.run_id == run_id, signals.c.name == name, open_to


def open_signals(
    connection: Connection, run_id: str, name: str, key: str | None = None
) -> Sequence[str]:
    """The ids of those that nobody took, or that the step ``key`` took, in order."""
    query = select(signals.c.id).where(*_for(run_id, name, key)).order_by(signals.c.id)
    return connection.execute(query).scalars().all()


def take_signals(connection: Connection, run_id: str, name: str, key: str) -> Sequence[Row[Any]]:
    """The signals that the step ``key`` consumed, or now consumes: all that are left, in order."""
    query = select(signals).where(*_for(run_id, name, key)).order_by(signals.c.id)
    found = connection.execute(query.with_for_update()).all()
    fresh = [row.id for row in found if row.taken_by is None]
    if fresh:
        connection.execute(update(signals).where(signals.c.id.in_(fresh)).values(taken_by=key))
    return found


_INSERT_APPROVAL = {
    name: make(approvals).on_conflict_do_nothing() for name, make in INSERTS.items()
}


def insert_approval(connection: Connection, values: dict[str, Any]) -> bool:
    """Insert the approval unless it was asked for before; True when it was inserted."""
    return bool(connection.execute(_INSERT_APPROVAL[connection.dialect.name], values).rowcount)


def approval_row(
    connection: Connection, identity: str, tenant: str | None = None, *, lock: bool = True
) -> Row[Any] | None:
    """The approval, locked until the transaction ends; only ``tenant``'s, for a caller."""
    query = select(approvals).where(approvals.c.id == identity)
    if lock:
        query = query.with_for_update()
    if tenant is not None:
        query = query.where(approvals.c.tenant == tenant)
    return connection.execute(query).one_or_none()


def set_approval(connection: Connection, identity: str, **values: Any) -> None:
    connection.execute(update(approvals).where(approvals.c.id == identity).values(**values))


def withdraw_approvals(
    connection: Connection, run_id: str, now: datetime, path: str | None = None
) -> None:
    """Nobody waits any more for what the run, or one task of it, had asked."""
    query = update(approvals).where(approvals.c.run_id == run_id, approvals.c.status == "pending")
    if path is not None:
        query = query.where(approvals.c.task_path == path)
    connection.execute(query.values(status="withdrawn", decided_at=now))


def list_approval_rows(
    connection: Connection,
    tenant: str,
    *,
    status: str | None,
    run_id: str | None,
    subject: str | None,
    now: datetime,
    before: tuple[datetime, str] | None,
    limit: int,
) -> Sequence[Row[Any]]:
    """Newest first; ``before`` is the last row of the page before. One that nobody decided in
    time counts as expired, whether or not its run has noticed yet."""
    query = select(approvals).where(approvals.c.tenant == tenant)
    late = approvals.c.expires_at <= now
    if status == "pending":
        query = query.where(
            approvals.c.status == "pending", or_(approvals.c.expires_at.is_(None), ~late)
        )
    elif status == "expired":
        query = query.where(
            or_(approvals.c.status == "expired", (approvals.c.status == "pending") & late)
        )
    elif status is not None:
        query = query.where(approvals.c.status == status)
    if run_id is not None:
        query = query.where(approvals.c.run_id == run_id)
    if subject is not None:
        query = query.where(approvals.c.subject == subject)
    if before is not None:
        query = query.where(tuple_(approvals.c.requested_at, approvals.c.id) < before)
    query = query.order_by(approvals.c.requested_at.desc(), approvals.c.id.desc()).limit(limit)
    return connection.execute(query).all()


def approval_of(row: Row[Any], now: datetime) -> Approval:
    late = row.status == "pending" and row.expires_at is not None and row.expires_at <= now
    return Approval(
        id=row.id,
        run_id=row.run_id,
        task_id=task_id(row.run_id, row.task_path) if row.task_path else None,
        step=row.step.removesuffix("/approval"),
        status="expired" if late else row.status,
        subject=row.subject,
        agent=row.agent,
        arguments=row.arguments,
        arguments_hash=row.arguments_hash,
        detail=row.detail,
        approvers=None if row.approvers is None else tuple(row.approvers),
        on_expiry=row.on_expiry,
        requested_at=row.requested_at,
        expires_at=row.expires_at,
        decided_at=row.decided_at,
        decided_by=row.decided_by,
        reason=row.reason,
        replaces=row.replaces,
        replaced_by=row.replaced_by,
    )
