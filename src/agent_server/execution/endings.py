"""How tasks and runs end: what is written in the last transaction of each.

Leans on the journal's ``Ending`` and on the store. Refuses to write by itself.
"""

from collections.abc import Callable
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import BudgetExceeded, ErrorInfo
from agent_server.domain.events import (
    EventBase,
    RunBudgetExceeded,
    RunCancelled,
    RunFailed,
    RunSucceeded,
    RunWaiting,
    TaskCompleted,
    TaskFailed,
)
from agent_server.domain.ids import Tenant, task_id
from agent_server.domain.runs import RunStatus, Usage
from agent_server.execution import store
from agent_server.execution.attempts import Attempt
from agent_server.execution.commits import Ending
from agent_server.execution.ports import STEER, FinalOutput, RunSnapshot, Suspend
from agent_server.execution.steering import queue_unheard

AppendItems = Callable[[Connection, Tenant, str, str, tuple[JsonObject, ...], datetime], object]
"""Appends a run's items to its session, inside the transaction that ends the run."""


def succeeded(
    attempt: Attempt, final: FinalOutput, append_items: AppendItems, now: datetime
) -> Ending:
    """The task's output is stored; for a root, the run's, and the session's items with it."""
    if attempt.path:
        completed = TaskCompleted(
            run_id=attempt.local.snapshot.id,
            task_id=attempt.identity,
            path=attempt.path,
            node=attempt.node,
            output=final.value,
        )
        return _child_end(attempt, "succeeded", now, completed, output=final.value)
    run = attempt.local.snapshot
    unheard = frozenset(attempt.unheard)

    def spoken_to(connection: Connection) -> bool:
        """Somebody has said something into the run since it last went on to hear what there is."""
        lane = store.lane_of(run.tenant, final.session_id)
        assert lane is not None
        store.hold_lane(connection, lane)  # From here on nobody says any more.
        left = set(store.open_signals(connection, run.id, STEER))
        attempt.unheard = {*unheard, *left}  # Not the last time's: it may be run more than once.
        return bool(left - unheard)

    def also(connection: Connection) -> None:
        if attempt.children or attempt.epoch > 1:
            store.cancel_tasks(connection, run.id, only_idle=False, now=now)
        if final.session_id is not None:
            append_items(connection, run.tenant, final.session_id, run.id, final.session_items, now)
            queue_unheard(connection, run, now)

    return Ending(
        status="succeeded",
        ended_at=now,
        run=store.RunEnd(RunStatus.SUCCEEDED, now, output=final.value),
        count=1,
        events=lambda usage: [RunSucceeded(output=final.value, usage=usage)],
        also=also,
        unless=spoken_to if final.session_id is not None else None,
    )


def partial_result(connection: Connection, run: RunSnapshot, limit: str | None) -> JsonObject:
    """How far a run came that its budget stopped: what its tasks gave, and the last words."""
    said = store.events_of(connection, run.tenant, run.id, ("message.completed",))
    return {
        "partial": True,
        "stopped_by": limit,
        "text": said[-1]["text"] if said else None,
        "tasks": [
            {"path": row.path, "node": row.node, "output": row.output}
            for row in store.task_rows(connection, run.tenant, run.id)
            if row.status == "succeeded"
        ],
    }


def failed(
    attempt: Attempt,
    error: Exception,
    info: ErrorInfo,
    now: datetime,
    partial: JsonObject | None = None,
) -> Ending:
    """``error`` is recorded as ``info``; a root ends its run, by a budget or as failed.

    ``partial`` is the output of a run that its budget stopped.
    """
    stored = info.model_dump()
    if attempt.path:
        event = TaskFailed(path=attempt.path, node=attempt.node, error=info)
        return _child_end(attempt, "failed", now, event, error=stored)
    if isinstance(error, BudgetExceeded):
        return _root_end(
            attempt,
            RunStatus.BUDGET_EXCEEDED,
            now,
            lambda usage: [RunBudgetExceeded(error=info, output=partial, usage=usage)],
            error=stored,
            output=partial,
        )
    return _root_end(
        attempt,
        RunStatus.FAILED,
        now,
        lambda usage: [RunFailed(error=info, usage=usage)],
        error=stored,
    )


def cancelled(attempt: Attempt, now: datetime) -> Ending:
    """Somebody's order is carried out."""
    if attempt.path:
        return Ending(status="cancelled", ended_at=now)
    reason = attempt.local.cancel_reason or ""
    return _root_end(
        attempt,
        RunStatus.CANCELLED,
        now,
        lambda usage: [RunCancelled(reason=reason, usage=usage)],
    )


def dismissed(attempt: Attempt, error: ErrorInfo, now: datetime) -> Ending:
    """Somebody cancelled this task by itself: it has failed, for whoever awaits it."""
    event = TaskFailed(path=attempt.path, node=attempt.node, error=error)
    return _child_end(attempt, "failed", now, event, error=error.model_dump())


def parked(attempt: Attempt, suspend: Suspend, deadline: datetime | None, now: datetime) -> Ending:
    """The task stands still where it can be seen, until it is nudged or its moment has come; a
    root no longer than to the run's ``deadline``."""
    run = attempt.local.snapshot
    waiting_for = suspend.waiting_for
    if attempt.path and waiting_for.task_id is None:
        waiting_for = waiting_for.model_copy(update={"task_id": task_id(run.id, attempt.path)})
    moments = [suspend.wake_at, None if attempt.path else deadline]
    wake_at = min((moment for moment in moments if moment is not None), default=None)
    shown = waiting_for.model_dump(mode="json")
    return Ending(
        status="waiting",
        ended_at=now,
        parked=Suspend(waiting_for, wake_at=wake_at, awaits=suspend.awaits),
        count=1,
        events=lambda usage: [RunWaiting(waiting_for=waiting_for)],
        also=lambda c: store.set_run(c, run.id, status="waiting", waiting_for=shown),
    )


def _child_end(
    attempt: Attempt, status: str, now: datetime, event: EventBase, **values: Any
) -> Ending:
    """The end of a child task; a hidden one says nothing."""
    said = [] if attempt.hidden else [event]
    return Ending(status=status, ended_at=now, count=len(said), events=lambda usage: said, **values)


def _root_end(
    attempt: Attempt,
    status: RunStatus,
    now: datetime,
    events: Callable[[Usage], list[EventBase]],
    error: Any = None,
    output: Any = None,
) -> Ending:
    """The end of a run that did not succeed: whatever of it still lives ends with it."""
    run = attempt.local.snapshot
    was_cancelled = status is RunStatus.CANCELLED

    def also(connection: Connection) -> None:
        store.cancel_tasks(connection, run.id, only_idle=False, now=now)
        if not was_cancelled:
            queue_unheard(connection, run, now)

    return Ending(
        status="cancelled" if was_cancelled else "failed",
        ended_at=now,
        run=store.RunEnd(status, now, output=output, error=error),
        count=1,
        events=events,
        also=also,
    )
