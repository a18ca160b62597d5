"""Asking for approval and settling it: what is written in the one transaction of each.

Leans on the store. Whoever settles first, a person or the clock, writes the decision into the
ledger of the task that waits and nudges it. Refuses to know who may decide.
"""

import json
from datetime import datetime
from hashlib import sha256
from typing import Any, Literal

from sqlalchemy import Connection, Row

from agent_server.domain.approvals import arguments_hash
from agent_server.domain.events import ApprovalDecided, ApprovalRequested
from agent_server.domain.ids import new_id, task_id
from agent_server.domain.runs import WaitingFor
from agent_server.execution import store
from agent_server.execution.attempts import Attempt
from agent_server.execution.events import Told
from agent_server.execution.ports import ApprovalAsk, StepRecord

SHOWN_ARGUMENTS = 1_000
"""Characters of the arguments that ``waiting_for.detail`` repeats."""
CLOCK = "expiry"
"""Who decided where nobody did in time."""


def approval_id(run_id: str, key: str) -> str:
    """The id of what is asked under ``key``: the same at each attempt."""
    return f"appr_{sha256(f'{run_id}{chr(0)}{key}'.encode()).hexdigest()[:32]}"


def waiting(ask: ApprovalAsk, key: str, until: datetime | None) -> WaitingFor:
    """What a run says of itself meanwhile."""
    shown = json.dumps(ask.arguments)[:SHOWN_ARGUMENTS]
    detail = ask.detail or f"{ask.subject!r} needs approval to be called with {shown}."
    return WaitingFor(kind="approval", detail=detail, step=_step(key), until=until)


def ask_once(
    connection: Connection, attempt: Attempt, ask: ApprovalAsk, key: str, now: datetime
) -> tuple[Any, datetime | None, Told]:
    """The decision as the ledger holds it, None while there is none; until when there may be
    one; and what is to be told."""
    run = attempt.local.snapshot
    identity = approval_id(run.id, key)
    row = store.approval_row(connection, identity)
    if row is None:
        store.insert_approval(
            connection,
            {
                "id": identity,
                "tenant": run.tenant,
                "run_id": run.id,
                "task_path": attempt.path,
                "step": key,
                "status": "pending",
                "subject": ask.subject,
                "agent": ask.agent,
                "arguments": ask.arguments,
                "arguments_hash": arguments_hash(ask.arguments),
                "arguments_schema": ask.schema,
                "detail": ask.detail,
                "approvers": None if ask.approvers is None else list(ask.approvers),
                "on_expiry": ask.on_expiry,
                "requested_at": now,
                "expires_at": ask.expires_at,
            },
        )
        event = ApprovalRequested(
            run_id=run.id,
            task_id=task_id(run.id, attempt.path) if attempt.path else None,
            approval_id=identity,
            step=_step(key),
            tool=ask.subject,
            arguments=ask.arguments,
        )
        return None, ask.expires_at, store.tell(connection, run.tenant, run.id, [event])
    if row.status == "pending":
        if row.expires_at is None or row.expires_at > now:
            return None, row.expires_at, []
        decision: Literal["approve", "expired"] = "expired"
        if row.on_expiry == "approve":
            decision = "approve"
        _, told = settle(connection, row, decision, CLOCK, "Nobody decided in time.", now)
        return _output(row, decision, CLOCK, "Nobody decided in time."), None, told
    record = {step.key: step for step in store.task_steps(connection, run.id, attempt.path)}[key]
    return record.output, None, []


def settle(
    connection: Connection,
    row: Row[Any],
    decision: Literal["approve", "reject", "expired"],
    by: str,
    reason: str,
    now: datetime,
    edited: Any = None,
) -> tuple[str, Told]:
    """Decide the pending approval ``row``: its record, the waiting step, the nudge, the event.

    ``edited`` arguments close it as replaced, and make a second record that is approved. Returns
    the id of the record that counts, and what is to be told.
    """
    status = {"approve": "approved", "reject": "rejected", "expired": "expired"}[decision]
    decided = {"decided_at": now, "decided_by": by, "reason": reason}
    counts = row.id
    if edited is None:
        store.set_approval(connection, row.id, status=status, **decided)
    else:
        counts = new_id("appr")
        changed = {
            "id": counts,
            "status": status,
            "arguments": edited,
            "arguments_hash": arguments_hash(edited),
            "requested_at": now,
            "replaces": row.id,
        }
        store.insert_approval(connection, dict(row._mapping) | changed | decided)
        store.set_approval(connection, row.id, status="replaced", replaced_by=counts, **decided)
    output = _output(row, decision, by, reason, counts, edited)
    step = StepRecord(key=row.step, kind="value", name="approval", agent=row.agent).done(output)
    store.upsert_steps(connection, row.tenant, row.run_id, [(row.task_path, step)])
    task = task_id(row.run_id, row.task_path) if row.task_path else None
    event = ApprovalDecided(
        run_id=row.run_id, task_id=task, approval_id=counts, decision=decision, by=by
    )
    return counts, store.tell(connection, row.tenant, row.run_id, [event])


def _output(
    row: Row[Any],
    decision: str,
    by: str,
    reason: str,
    counts: str | None = None,
    edited: Any = None,
) -> dict[str, Any]:
    """The decision as the ledger holds it: the fields of ``ports.ApprovalDecision``."""
    return {
        "decision": decision,
        "arguments": row.arguments if edited is None else edited,
        "reason": reason,
        "by": by,
        "approval_id": counts or row.id,
        "asked_hash": row.arguments_hash,
    }


def _step(key: str) -> str:
    """The step that waits: a call's own key, where the approval stands below it."""
    return key.removesuffix("/approval")
