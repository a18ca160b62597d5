"""Steering: a message for a session whose run is under way is said into that run.

Leans on the store. A message is a signal of the run until the run takes it at its next turn; a
run does not succeed while one is left, and one that is left by a run that failed becomes a run
of its own. Each function runs inside the caller's transaction. Refuses to know what a turn is.
"""

from datetime import datetime

from sqlalchemy import Connection

from agent_server.domain.errors import NotSteerable
from agent_server.domain.ids import Tenant, new_id, new_run_id
from agent_server.domain.runs import Run, RunRequest
from agent_server.execution import store
from agent_server.execution.ports import STEER, RunSnapshot
from agent_server.execution.submitting import NewRun


def say(connection: Connection, new: NewRun) -> tuple[Run, int] | None:
    """Say ``new`` into the run that works on its session; that run, and its last event's number.

    None where none does: it has just ended, or is being cancelled. Raises ``NotSteerable``.
    The caller holds the lane.
    """
    assert new.lane is not None
    holder = store.lane_holder(connection, new.lane)
    if holder is None:
        return None
    row = store.engine_run_row(connection, holder)
    if row.cancel_reason is not None:
        return None
    run = store.run_of(row)
    request = new.request
    if run.kind != "agent" or run.agent != request.agent:
        what = f"the agent {run.agent!r}" if run.kind == "agent" else f"a {run.kind}"
        raise NotSteerable(
            f"On the session {request.session_id!r} a run of {what} is under way ({run.id}), which "
            f"takes no message for the agent {request.agent!r}.",
            hint='Send it with "on_busy": "queue" or "interrupt", or to the same agent.',
        )
    if request.subject is not None and request.subject != row.subject:
        raise NotSteerable(
            f"The run under way on the session {request.session_id!r} is about somebody else.",
            hint='Send it with "on_busy": "queue": then it is a run of its own subject.',
        )
    store.insert_signal(
        connection,
        {
            "id": new_id("sig"),
            "run_id": holder,
            "tenant": new.tenant,
            "name": STEER,
            "payload": {"request": request.model_dump(mode="json", exclude_defaults=True)},
            "sent_by": new.principal,
            "sent_at": new.now,
        },
    )
    return run, row.last_seq


def queue_unheard(connection: Connection, run: RunSnapshot, now: datetime) -> None:
    """What was said into ``run`` and not taken before it failed becomes runs of their own."""
    lane = store.lane_of(run.tenant, run.request.session_id)
    if lane is None:
        return
    store.hold_lane(connection, lane)  # From here on nobody says any more.
    for row in store.take_signals(connection, run.id, STEER, "@failed"):
        new = NewRun(
            id=new_run_id(),
            tenant=Tenant(row.tenant),
            principal=row.sent_by,
            request=RunRequest.model_validate(row.payload["request"]),
            now=now,
        )
        new.insert(connection, None, behind=True)
