"""The SQL of runs: insert, read, list, number their events, end them.

Leans on storage. Each function runs inside the caller's transaction and refuses to commit.
Every function that answers a caller takes the tenant; the engine's own work goes by run id.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import ValidationError
from sqlalchemy import Connection, Row, and_, bindparam, func, insert, or_, select, tuple_, update

from agent_server.domain.errors import NotFound
from agent_server.domain.runs import Run, RunRequest, RunStatus, WaitingFor
from agent_server.execution.ports import LostLease
from agent_server.execution.store.columns import ENDED, error_of, usage_of
from agent_server.execution.store.lanes import free_lane, lane_of
from agent_server.storage.tables import Unreadable, runs

_INSERT_RUN = insert(runs)


def insert_run(connection: Connection, values: dict[str, Any]) -> None:
    """``request`` is the run's own; whom it is about is taken from there."""
    connection.execute(_INSERT_RUN, values | {"subject": values["request"].get("subject")})


_RUN = select(runs).where(runs.c.id == bindparam("run"), runs.c.tenant == bindparam("tenant"))
_ENGINE_RUN = select(runs).where(runs.c.id == bindparam("run"))


def run_row(connection: Connection, tenant: str, run_id: str) -> Row[Any] | None:
    return connection.execute(_RUN, {"run": run_id, "tenant": tenant}).one_or_none()


def known_run_row(connection: Connection, tenant: str, run_id: str) -> Row[Any]:
    """The run's row; raises ``NotFound``, for another tenant's too."""
    row = run_row(connection, tenant, run_id)
    if row is None:
        raise NotFound(f"There is no run {run_id!r}.", hint="GET /api/v1/runs lists them.")
    return row


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
    live: bool,
    before: tuple[datetime, str] | None,
    limit: int,
) -> Sequence[Row[Any]]:
    """Newest first; ``before`` is the last row of the page before."""
    query = select(runs).where(runs.c.tenant == tenant)
    if live:
        query = query.where(runs.c.status.not_in(ENDED))
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


def _request_of(row: Row[Any]) -> RunRequest:
    """What was asked for, or as much of it as the other columns know where it cannot be read."""
    try:
        return RunRequest.model_validate(row.request)
    except ValidationError as error:
        why = row.request if isinstance(row.request, Unreadable) else error.errors()[0]["msg"]
        said = {"goal": row.name, "agent": row.agent, "workflow": row.workflow}
        return RunRequest.model_construct(
            **{row.kind: said[row.kind] or row.name},
            session_id=row.session_id,
            metadata={"unreadable": f"The stored request cannot be read: {why}"},
        )


def run_of(row: Row[Any]) -> Run:
    request = _request_of(row)
    return Run(
        id=row.id,
        kind=row.kind,
        status=RunStatus(row.status),
        goal=request.goal,
        agent=row.agent,
        workflow=row.workflow,
        workflow_version=request.workflow_version,
        input=request.input if request.agent is not None else request.variables,
        output=row.output,
        error=error_of(row.error),
        usage=usage_of(row),
        budget=request.budget,
        session_id=row.session_id,
        approach=request.approach,
        model=request.model,
        priority=request.priority,
        parent_id=row.parent_id,
        forked_from=row.forked_from,
        created_at=row.created_at,
        started_at=row.started_at,
        ended_at=row.ended_at,
        waiting_for=_waiting_for(row.waiting_for),
        metadata=request.metadata,
    )


def _waiting_for(value: Any) -> WaitingFor | None:
    if not value or isinstance(value, Unreadable):
        return None
    return WaitingFor.model_validate(value)


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
    .returning(*_TOTALS, runs.c.tenant, runs.c.session_id)
)


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
    With its end, the next run on its session may begin.
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
    if end is not None and (lane := lane_of(row.tenant, row.session_id)) is not None:
        free_lane(connection, lane)
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


def erased_among(connection: Connection, run_ids: Collection[str]) -> set[str]:
    """Those of ``run_ids`` that are not there any more."""
    there = select(func.count()).where(runs.c.id.in_(run_ids))
    if connection.execute(there).scalar() == len(run_ids):
        return set()
    left = connection.execute(select(runs.c.id).where(runs.c.id.in_(run_ids))).scalars()
    return set(run_ids) - set(left)


def heads(connection: Connection, run_ids: Sequence[str]) -> dict[str, int]:
    """How far the event logs of those of ``run_ids`` that there are have come."""
    query = select(runs.c.id, runs.c.last_seq).where(runs.c.id.in_(run_ids))
    return {row.id: row.last_seq for row in connection.execute(query)}
