"""The SQL of execution: runs, tasks, steps, events, idempotency keys and nodes.

Leans on storage. Each function runs inside the caller's transaction and refuses to commit.
Every function that answers a caller takes the tenant; the engine's own work goes by run id.

Longer than our files should be, because all statements over these tables stand on one page: what
one of them locks, in which order, matters to the others.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Integer,
    Row,
    and_,
    bindparam,
    delete,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
    text,
    tuple_,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from agent_server.domain.base import json_text
from agent_server.domain.errors import ErrorInfo
from agent_server.domain.events import EventBase
from agent_server.domain.runs import Run, RunRequest, RunStatus, Step, Task, Usage, WaitingFor
from agent_server.execution.events import StoredEvent, splice_seq
from agent_server.execution.ports import LostLease, StepRecord
from agent_server.storage.tables import events, idempotency_keys, nodes, runs, steps, tasks

PICO = Decimal(10) ** 12
LIVE = ("queued", "running", "waiting")
ENDED = tuple(status.value for status in RunStatus if status.ended)
REAPING = 7_349_002_119
"""Any number, the same in every process: "somebody is reaping"."""
INSERTS: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
"""``INSERT`` with ``ON CONFLICT``, which the two databases spell in their own dialects."""

_SIBLING = tasks.alias("sibling")
_BLOCKED = exists(
    select(literal(1))
    .where(
        _SIBLING.c.lane == tasks.c.lane,
        _SIBLING.c.status.in_(LIVE),
        _SIBLING.c.run_id != tasks.c.run_id,
        or_(
            _SIBLING.c.status != "queued",
            _SIBLING.c.created_at < tasks.c.created_at,
            and_(_SIBLING.c.created_at == tasks.c.created_at, _SIBLING.c.run_id < tasks.c.run_id),
        ),
    )
    .correlate(tasks)
)
"""Another task of the same lane (session) has begun and not ended, or is older."""


def usage_columns(usage: Usage) -> dict[str, int]:
    """A step's usage as the columns of ``steps`` and the increments of ``runs``."""
    return {
        "model_calls": usage.model_calls,
        "tool_calls": usage.tool_calls,
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cost_pico": int((usage.cost_usd or 0) * PICO),
        "unpriced_calls": usage.model_calls if usage.cost_usd is None else 0,
    }


def usage_of(row: Row[Any]) -> Usage:
    """The usage in a row; ``cost_usd`` is None when any call had no price, or none was made."""
    priced = row.model_calls > 0 and row.unpriced_calls == 0
    return Usage(
        model_calls=row.model_calls,
        tool_calls=row.tool_calls,
        input_tokens=row.input_tokens,
        output_tokens=row.output_tokens,
        cost_usd=(Decimal(row.cost_pico) / PICO).normalize() if priced else None,
    )


# Runs ------------------------------------------------------------------------------------------


_INSERT_RUN = insert(runs)
_INSERT_EVENTS = insert(events)


def insert_run(connection: Connection, values: dict[str, Any]) -> None:
    connection.execute(_INSERT_RUN, values)


_RUN = select(runs).where(runs.c.id == bindparam("run"), runs.c.tenant == bindparam("tenant"))
_ENGINE_RUN = select(runs).where(runs.c.id == bindparam("run"))


def run_row(connection: Connection, tenant: str, run_id: str) -> Row[Any] | None:
    return connection.execute(_RUN, {"run": run_id, "tenant": tenant}).one_or_none()


def engine_run_row(connection: Connection, run_id: str) -> Row[Any]:
    return connection.execute(_ENGINE_RUN, {"run": run_id}).one()


def list_run_rows(
    connection: Connection,
    tenant: str,
    *,
    status: str | None,
    agent: str | None,
    session_id: str | None,
    workflow: str | None,
    created_after: datetime | None,
    q: str | None,
    before: tuple[datetime, str] | None,
    limit: int,
) -> Sequence[Row[Any]]:
    """Newest first; ``before`` is the last row of the page before."""
    query = select(runs).where(runs.c.tenant == tenant)
    if status is not None:
        query = query.where(runs.c.status == status)
    if agent is not None:
        query = query.where(runs.c.agent == agent)
    if session_id is not None:
        query = query.where(runs.c.session_id == session_id)
    if workflow is not None:
        query = query.where(runs.c.workflow == workflow)
    if created_after is not None:
        query = query.where(runs.c.created_at > created_after)
    if q is not None:
        escaped = q.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
        query = query.where(runs.c.name.ilike(f"%{escaped}%", escape="\\"))
    if before is not None:
        query = query.where(tuple_(runs.c.created_at, runs.c.id) < before)
    query = query.order_by(runs.c.created_at.desc(), runs.c.id.desc()).limit(limit)
    return connection.execute(query).all()


def run_of(row: Row[Any]) -> Run:
    request = RunRequest.model_validate(row.request)
    return Run(
        id=row.id,
        kind=row.kind,
        status=RunStatus(row.status),
        goal=request.goal,
        agent=row.agent,
        workflow=row.workflow,
        input=request.input if request.agent is not None else request.variables,
        output=row.output,
        error=ErrorInfo.model_validate(row.error) if row.error else None,
        usage=usage_of(row),
        budget=request.budget,
        session_id=row.session_id,
        approach=request.approach,
        model=request.model,
        parent_id=row.parent_id,
        forked_from=row.forked_from,
        created_at=row.created_at,
        started_at=row.started_at,
        ended_at=row.ended_at,
        waiting_for=WaitingFor.model_validate(row.waiting_for) if row.waiting_for else None,
        metadata=request.metadata,
    )


_GROWTH: dict[str, Any] = {
    "last_seq": runs.c.last_seq + bindparam("n"),
    "model_calls": runs.c.model_calls + bindparam("d_model_calls"),
    "tool_calls": runs.c.tool_calls + bindparam("d_tool_calls"),
    "input_tokens": runs.c.input_tokens + bindparam("d_input_tokens"),
    "output_tokens": runs.c.output_tokens + bindparam("d_output_tokens"),
    "cost_pico": runs.c.cost_pico + bindparam("d_cost_pico"),
    "unpriced_calls": runs.c.unpriced_calls + bindparam("d_unpriced_calls"),
}
_TOTALS = (
    runs.c.last_seq,
    runs.c.model_calls,
    runs.c.tool_calls,
    runs.c.input_tokens,
    runs.c.output_tokens,
    runs.c.cost_pico,
    runs.c.unpriced_calls,
)
_OPEN = and_(runs.c.id == bindparam("run"), runs.c.status.not_in(ENDED))
_ADVANCE = update(runs).where(_OPEN).values(_GROWTH).returning(*_TOTALS)
_END = (
    update(runs)
    .where(_OPEN)
    .values(
        _GROWTH
        | {
            "status": bindparam("b_status"),
            "output": bindparam("b_output"),
            "error": bindparam("b_error"),
            "waiting_for": None,
            "ended_at": bindparam("b_ended_at"),
        }
    )
    .returning(*_TOTALS)
)
NO_USAGE = usage_columns(Usage(cost_usd=Decimal(0)))


@dataclass(frozen=True)
class RunEnd:
    """How a run ends, written together with its last numbers and totals."""

    status: RunStatus
    at: datetime
    output: Any = None
    error: Any = None


def advance(
    connection: Connection,
    run_id: str,
    count: int,
    used: dict[str, int],
    end: RunEnd | None = None,
) -> tuple[int, Row[Any]]:
    """Take the next ``count`` event numbers, add ``used`` to the totals, and perhaps end the run.

    Locks the run's row until the transaction ends, which is what keeps numbers without a gap.
    Returns the first number and the new totals. Raises ``LostLease`` for a run that has ended:
    nothing is said of it after its last event.
    """
    values: dict[str, Any] = {"run": run_id, "n": count}
    values |= {f"d_{name}": amount for name, amount in used.items()}
    if end is None:
        row = connection.execute(_ADVANCE, values).one_or_none()
    else:
        values |= {
            "b_status": end.status.value,
            "b_output": end.output,
            "b_error": end.error,
            "b_ended_at": end.at,
        }
        row = connection.execute(_END, values).one_or_none()
    if row is None:
        raise LostLease(f"the run {run_id} has ended")
    return row.last_seq - count + 1, row


def set_run(connection: Connection, run_id: str, **values: Any) -> None:
    connection.execute(update(runs).where(runs.c.id == run_id).values(**values))


def begin_run(connection: Connection, run_id: str, now: datetime, waiting_for: Any) -> bool:
    """The run's root was taken: it runs, or still waits; False when it has ended meanwhile."""
    return bool(
        connection.execute(
            update(runs)
            .where(runs.c.id == run_id, runs.c.status.not_in(ENDED))
            .values(
                status="running" if waiting_for is None else "waiting",
                waiting_for=waiting_for,
                started_at=func.coalesce(
                    runs.c.started_at, bindparam("now", now, runs.c.started_at.type)
                ),
            )
        ).rowcount
    )


def order_cancel(connection: Connection, run_id: str, reason: str) -> None:
    """Remember that somebody wants the run to stop; the first reason stays."""
    connection.execute(
        update(runs)
        .where(runs.c.id == run_id)
        .values(cancel_reason=func.coalesce(runs.c.cancel_reason, reason))
    )


def orders(connection: Connection, run_ids: Iterable[str]) -> Sequence[Any]:
    """``id, status, cancel_reason`` of those of ``run_ids`` that are to stop, or have ended."""
    return connection.execute(
        select(runs.c.id, runs.c.status, runs.c.cancel_reason).where(
            runs.c.id.in_(list(run_ids)),
            or_(runs.c.cancel_reason.is_not(None), runs.c.status.in_(ENDED)),
        )
    ).all()


# Events ----------------------------------------------------------------------------------------


def insert_events(
    connection: Connection, tenant: str, run_id: str, first: int, items: Sequence[tuple[str, str]]
) -> None:
    """Store ``(type, json without seq)`` from number ``first`` on."""
    connection.execute(
        _INSERT_EVENTS,
        [
            {"run_id": run_id, "seq": first + i, "tenant": tenant, "type": kind, "data": data}
            for i, (kind, data) in enumerate(items)
        ],
    )


def stamped(event: EventBase, run_id: str, task_id: str | None) -> EventBase:
    """``event`` with its run and task filled in."""
    return event.model_copy(
        update={"run_id": event.run_id or run_id, "task_id": event.task_id or task_id}
    )


def encode_event(event: EventBase) -> tuple[str, str]:
    """An event's type and its stored JSON."""
    kind: str = event.type  # type: ignore[attr-defined]  # every member of the union has one
    return kind, json_text(event, exclude={"seq"})


_EVENTS = (
    select(events.c.seq, events.c.type, events.c.data)
    .where(
        events.c.run_id == bindparam("run"),
        events.c.tenant == bindparam("tenant"),
        events.c.seq > bindparam("after"),
    )
    .order_by(events.c.seq)
    .limit(bindparam("most", type_=Integer))
)


def event_rows(
    connection: Connection, tenant: str, run_id: str, after: int, limit: int
) -> list[StoredEvent]:
    rows = connection.execute(
        _EVENTS, {"run": run_id, "tenant": tenant, "after": after, "most": limit}
    )
    return [StoredEvent(row.seq, row.type, splice_seq(row.seq, row.data)) for row in rows]


def event_stored(connection: Connection, run_id: str, data: str) -> bool:
    """Whether the run's log has exactly this event, its moment included."""
    query = select(literal(1)).where(events.c.run_id == run_id, events.c.data == data).limit(1)
    return connection.execute(query).scalar() is not None


def last_event(
    connection: Connection, tenant: str, run_id: str, types: Sequence[str]
) -> dict[str, Any] | None:
    data = connection.execute(
        select(events.c.data)
        .where(events.c.run_id == run_id, events.c.tenant == tenant, events.c.type.in_(types))
        .order_by(events.c.seq.desc())
        .limit(1)
    ).scalar()
    return None if data is None else dict(json.loads(data))


# Tasks -----------------------------------------------------------------------------------------


_INSERT_TASK = {name: make(tasks).on_conflict_do_nothing() for name, make in INSERTS.items()}


def insert_task(connection: Connection, values: dict[str, Any]) -> bool:
    """Insert the task unless its path is taken; True when it was inserted."""
    return bool(connection.execute(_INSERT_TASK[connection.dialect.name], values).rowcount)


def task_row(connection: Connection, run_id: str, path: str) -> Row[Any] | None:
    return connection.execute(
        select(tasks).where(tasks.c.run_id == run_id, tasks.c.path == path)
    ).one_or_none()


def task_rows(connection: Connection, tenant: str, run_id: str) -> Sequence[Row[Any]]:
    """The tasks a caller may see, in the order they were made."""
    return connection.execute(
        select(tasks)
        .where(
            tasks.c.run_id == run_id,
            tasks.c.tenant == tenant,
            tasks.c.path != "",
            tasks.c.hidden.is_(False),
        )
        .order_by(tasks.c.created_at, tasks.c.path)
    ).all()


def ended_tasks(connection: Connection, keys: Sequence[tuple[str, str]]) -> Sequence[Row[Any]]:
    """Those of the tasks ``keys`` (run id, path) that have ended."""
    return connection.execute(
        select(tasks).where(
            tuple_(tasks.c.run_id, tasks.c.path).in_(list(keys)), tasks.c.status.not_in(LIVE)
        )
    ).all()


def task_of(row: Row[Any], identity: str) -> Task:
    return Task(
        id=identity,
        run_id=row.run_id,
        path=row.path,
        node=row.node,
        kind=row.kind,
        description=row.description,
        agent=row.agent,
        status=row.status,
        output=row.output,
        error=ErrorInfo.model_validate(row.error) if row.error else None,
        attempts=row.attempts,
        created_at=row.created_at,
        started_at=row.started_at,
        ended_at=row.ended_at,
    )


_HELD = (
    select(literal(1))
    .select_from(tasks)
    .where(
        tasks.c.run_id == bindparam("run"),
        tasks.c.path == bindparam("path"),
        tasks.c.owner == bindparam("owner"),
        tasks.c.epoch == bindparam("epoch"),
        tasks.c.status == "running",
    )
)
_HELD_LOCKED = _HELD.with_for_update(read=True)


def holds(connection: Connection, run_id: str, path: str, owner: str, epoch: int) -> bool:
    """Whether ``owner`` still has the task at ``epoch``: the fence of every write.

    On PostgreSQL the row stays share-locked until the transaction ends, so that a takeover
    cannot slip between this check and the commit.
    """
    query = _HELD_LOCKED if connection.dialect.name == "postgresql" else _HELD
    found = connection.execute(
        query, {"run": run_id, "path": path, "owner": owner, "epoch": epoch}
    ).scalar()
    return found is not None


def lane_busy(connection: Connection, lane: str) -> bool:
    """Whether a task of the lane has not ended; on PostgreSQL holds the lane until commit."""
    if connection.dialect.name == "postgresql":
        connection.execute(
            text("SELECT pg_advisory_xact_lock(hashtextextended(:lane, 0))"), {"lane": lane}
        )
    query = select(literal(1)).where(tasks.c.lane == lane, tasks.c.status.in_(LIVE)).limit(1)
    return connection.execute(query).scalar() is not None


def claim(connection: Connection, owner: str, limit: int, now: datetime) -> Sequence[Row[Any]]:
    """Take up to ``limit`` due tasks, oldest first: each gets a new epoch and one more attempt."""
    due = (
        select(tasks.c.run_id, tasks.c.path)
        .where(
            or_(
                and_(tasks.c.status == "queued", tasks.c.wake_at.is_(None)),
                and_(tasks.c.status.in_(("queued", "waiting")), tasks.c.wake_at <= now),
            ),
            or_(tasks.c.lane.is_(None), ~_BLOCKED),
        )
        .order_by(tasks.c.created_at, tasks.c.run_id, tasks.c.path)
        .limit(limit)
    )
    if connection.dialect.name == "postgresql":
        due = due.with_for_update(skip_locked=True)
    keys = [(row.run_id, row.path) for row in connection.execute(due)]
    if not keys:
        return []
    return connection.execute(
        update(tasks)
        .where(
            tuple_(tasks.c.run_id, tasks.c.path).in_(keys),
            tasks.c.status.in_(("queued", "waiting")),
        )
        .values(
            status="running",
            owner=owner,
            epoch=tasks.c.epoch + 1,
            attempts=tasks.c.attempts + 1,
            wake_at=None,
            waiting_for=None,
            started_at=func.coalesce(
                tasks.c.started_at, bindparam("now", now, tasks.c.started_at.type)
            ),
        )
        .returning(tasks)
    ).all()


_END_TASK = (
    update(tasks)
    .where(
        tasks.c.run_id == bindparam("run"),
        tasks.c.path == bindparam("b_path"),
        tasks.c.owner == bindparam("b_owner"),
        tasks.c.epoch == bindparam("b_epoch"),
        tasks.c.status == "running",
    )
    .values(
        status=bindparam("b_status"),
        output=bindparam("b_output"),
        error=bindparam("b_error"),
        waiting_for=bindparam("b_waiting_for"),
        wake_at=bindparam("b_wake_at"),
        ended_at=bindparam("b_ended_at"),
        owner=None,
    )
)


def end_task(
    connection: Connection,
    run_id: str,
    path: str,
    owner: str,
    epoch: int,
    *,
    status: str,
    ended_at: datetime | None,
    output: Any = None,
    error: Any = None,
    waiting_for: Any = None,
    wake_at: datetime | None = None,
) -> bool:
    """Let go of the task for good, or until it is woken; False when ``owner`` has lost it."""
    values = {
        "run": run_id,
        "b_path": path,
        "b_owner": owner,
        "b_epoch": epoch,
        "b_status": status,
        "b_output": output,
        "b_error": error,
        "b_waiting_for": waiting_for,
        "b_wake_at": wake_at,
        "b_ended_at": ended_at,
    }
    return bool(connection.execute(_END_TASK, values).rowcount)


def has_ended(connection: Connection, run_id: str, path: str, epoch: int, status: str) -> bool:
    """Whether the task was let go of with ``status`` by whoever took it at ``epoch``."""
    query = select(literal(1)).where(
        tasks.c.run_id == run_id,
        tasks.c.path == path,
        tasks.c.epoch == epoch,
        tasks.c.status == status,
        tasks.c.owner.is_(None),
    )
    return connection.execute(query).scalar() is not None


def cancel_tasks(connection: Connection, run_id: str, *, only_idle: bool, now: datetime) -> None:
    """End the run's tasks as cancelled: those nobody carries out, or all that live."""
    which = ("queued", "waiting") if only_idle else LIVE
    connection.execute(
        update(tasks)
        .where(tasks.c.run_id == run_id, tasks.c.status.in_(which))
        .values(status="cancelled", owner=None, ended_at=now)
    )


def cancel_task(connection: Connection, run_id: str, path: str, now: datetime) -> None:
    """End one task as cancelled, whoever carries it out, and show the run as it then is."""
    connection.execute(
        update(tasks)
        .where(tasks.c.run_id == run_id, tasks.c.path == path, tasks.c.status.in_(LIVE))
        .values(status="cancelled", owner=None, ended_at=now)
    )
    if waiting_for(connection, run_id) is None:
        connection.execute(
            update(runs)
            .where(runs.c.id == run_id, runs.c.status == "waiting")
            .values(status="running", waiting_for=None)
        )


def waiting_for(connection: Connection, run_id: str) -> Any:
    """What a task of the run waits for; None when none does."""
    return connection.execute(
        select(tasks.c.waiting_for)
        .where(tasks.c.run_id == run_id, tasks.c.status == "waiting")
        .order_by(tasks.c.created_at, tasks.c.path)
        .limit(1)
    ).scalar()


def root_status(connection: Connection, run_id: str) -> str | None:
    """How the run's root task stands; it stays so until the transaction ends."""
    query = select(tasks.c.status).where(tasks.c.run_id == run_id, tasks.c.path == "")
    if connection.dialect.name == "postgresql":
        query = query.with_for_update()
    return connection.execute(query).scalar()


def held_tasks(connection: Connection, owner: str) -> set[tuple[str, str, int]]:
    """Run, path and epoch of each task stored as carried out by ``owner``."""
    rows = connection.execute(
        select(tasks.c.run_id, tasks.c.path, tasks.c.epoch).where(
            tasks.c.owner == owner, tasks.c.status == "running"
        )
    )
    return {(row.run_id, row.path, row.epoch) for row in rows}


def reap_all(connection: Connection) -> int:
    """Queue again whatever is carried out: at the start of the only process."""
    connection.execute(delete(nodes))
    return release_tasks(connection, None)


def release_tasks(connection: Connection, owner: str | None, alive: Sequence[str] = ()) -> int:
    """Queue again what ``owner`` carries out; with None, what anyone not in ``alive`` does."""
    condition = tasks.c.owner == owner
    if owner is None:
        condition = or_(tasks.c.owner.is_(None), tasks.c.owner.not_in(list(alive)))
    return _release(connection, condition)


def release_task(connection: Connection, run_id: str, path: str, owner: str, epoch: int) -> None:
    """Let go of one task, still unfinished, so that whoever is free takes it."""
    _release(
        connection,
        and_(
            tasks.c.run_id == run_id,
            tasks.c.path == path,
            tasks.c.owner == owner,
            tasks.c.epoch == epoch,
        ),
    )


def _release(connection: Connection, condition: ColumnElement[bool]) -> int:
    """Queue tasks again; a run whose root is among them is shown as queued."""
    released = connection.execute(
        update(tasks)
        .where(tasks.c.status == "running", condition)
        .values(status="queued", owner=None)
        .returning(tasks.c.run_id, tasks.c.path)
    ).all()
    roots = [row.run_id for row in released if row.path == ""]
    if roots:
        connection.execute(
            update(runs)
            .where(runs.c.id.in_(roots), runs.c.status == "running")
            .values(status="queued")
        )
    return len(released)


def queue_depth(connection: Connection) -> int:
    return (
        connection.execute(
            select(func.count()).select_from(tasks).where(tasks.c.status == "queued")
        ).scalar()
        or 0
    )


# Steps -----------------------------------------------------------------------------------------


def _upsert_steps(make: Any) -> Any:
    statement = make(steps)
    changing = ("status", "input", "input_hash", "output", "error", "attempts", "ended_at")
    changed = {name: statement.excluded[name] for name in (*changing, *NO_USAGE)}
    return statement.on_conflict_do_update(index_elements=["run_id", "key"], set_=changed)


_UPSERT_STEPS = {name: _upsert_steps(make) for name, make in INSERTS.items()}


def upsert_steps(
    connection: Connection, tenant: str, run_id: str, task_path: str, records: Sequence[StepRecord]
) -> None:
    connection.execute(
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
            for record in records
        ],
    )


def task_steps(connection: Connection, run_id: str, task_path: str) -> list[StepRecord]:
    """The task's ledger, oldest first."""
    rows = connection.execute(
        select(steps)
        .where(steps.c.run_id == run_id, steps.c.task_path == task_path)
        .order_by(steps.c.started_at, steps.c.key)
    )
    return [
        StepRecord(
            key=row.key,
            kind=row.kind,
            name=row.name,
            status=row.status,
            agent=row.agent,
            input=row.input,
            input_hash=row.input_hash,
            output=row.output,
            error=ErrorInfo.model_validate(row.error) if row.error else None,
            usage=usage_of(row),
            attempts=row.attempts,
            started_at=row.started_at,
            ended_at=row.ended_at,
        )
        for row in rows
    ]


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
        error=ErrorInfo.model_validate(row.error) if row.error else None,
        attempts=row.attempts,
        usage=usage_of(row),
        started_at=row.started_at,
        ended_at=row.ended_at,
    )


# Idempotency keys and nodes --------------------------------------------------------------------


def take_key(connection: Connection, values: dict[str, Any]) -> bool:
    """Store the key unless it is taken; True when it was free."""
    statement = INSERTS[connection.dialect.name](idempotency_keys).on_conflict_do_nothing()
    return bool(connection.execute(statement, values).rowcount)


def stored_key(connection: Connection, tenant: str, key: str) -> Row[Any] | None:
    return connection.execute(
        select(idempotency_keys).where(
            idempotency_keys.c.tenant == tenant, idempotency_keys.c.key == key
        )
    ).one_or_none()


def beat(connection: Connection, node: str, role: str, now: datetime) -> None:
    statement = INSERTS[connection.dialect.name](nodes)
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["id"], set_={"beat_at": statement.excluded.beat_at}
        ),
        {"id": node, "role": role, "started_at": now, "beat_at": now},
    )


def remove_node(connection: Connection, node: str) -> None:
    connection.execute(delete(nodes).where(nodes.c.id == node))


def beats(connection: Connection) -> dict[str, datetime]:
    """Each node's last beat."""
    return {row.id: row.beat_at for row in connection.execute(select(nodes.c.id, nodes.c.beat_at))}


def reap(connection: Connection, dead: dict[str, datetime]) -> int:
    """Forget the nodes ``dead`` whose beat still is what it was, and queue again what nobody
    living carries out. One reaper at a time; another one answers 0."""
    if connection.dialect.name == "postgresql":
        lock = text("SELECT pg_try_advisory_xact_lock(:n)")
        if not connection.execute(lock, {"n": REAPING}).scalar():
            return 0
    for node, beat_at in dead.items():
        connection.execute(delete(nodes).where(nodes.c.id == node, nodes.c.beat_at == beat_at))
    alive = list(connection.execute(select(nodes.c.id)).scalars())
    return release_tasks(connection, None, alive)
