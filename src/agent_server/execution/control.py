"""The door for those who steer runs that are under way: signals and decisions.

Leans on the engine's roster and the store. Refuses to know what a run does with what it is told:
each call writes in one transaction what was said, and nudges the task that may wait for it.
Every call is for one tenant.
"""

from typing import Any

from sqlalchemy import Connection

from agent_server.domain.approvals import Approval, ApprovalStatus, Decide
from agent_server.domain.base import utcnow
from agent_server.domain.errors import (
    AlreadyDecided,
    Conflict,
    Forbidden,
    InvalidRequest,
    NotFound,
    RunEnded,
)
from agent_server.domain.ids import Tenant, new_id
from agent_server.domain.json_schema import faults_in
from agent_server.domain.runs import Reconcile, Reconciled, Run, RunStatus, SignalSent
from agent_server.execution import consent, store
from agent_server.execution.engine import Engine
from agent_server.execution.events import Told
from agent_server.execution.keys import Keyed, answered
from agent_server.execution.paging import Page, decode_cursor, encode_cursor
from agent_server.execution.ports import StepRecord, reconciled_key
from agent_server.execution.waits import signal_awaited
from agent_server.storage.database import Database


class Control:
    """Built once; see the module."""

    def __init__(self, *, database: Database, engine: Engine) -> None:
        self._database = database
        self._engine = engine

    async def signal(
        self,
        tenant: Tenant,
        run_id: str,
        name: str,
        payload: Any,
        *,
        by: str,
        keyed: Keyed | None = None,
    ) -> SignalSent:
        """Send the signal ``name`` to the run, which consumes it once. Kept until it does.

        Raises ``NotFound``, and ``RunEnded`` for a run that nothing can reach any more.
        """
        sent = SignalSent(id=new_id("sig"), run_id=run_id, name=name, by=by, at=utcnow())

        def nudge(connection: Connection) -> None:
            store.nudge_awaiting(connection, run_id, signal_awaited(name))

        def transaction(connection: Connection) -> SignalSent:
            nudge(connection)
            _open_run(connection, tenant, run_id)
            store.insert_signal(
                connection,
                {
                    "id": sent.id,
                    "run_id": run_id,
                    "tenant": tenant,
                    "name": name,
                    "payload": payload,
                    "sent_by": by,
                    "sent_at": sent.at,
                },
            )
            return sent

        answer = await answered(
            self._database, tenant, keyed, SignalSent, lambda one: one.run_id, transaction
        )
        if self._database.dialect == "postgresql":
            # A task begun meanwhile on another node may have looked before this was committed.
            await self._database.write(nudge)
        self._engine.wake()
        return answer

    async def reconcile(
        self, tenant: Tenant, run_id: str, said: Reconcile, *, by: str, keyed: Keyed | None = None
    ) -> Run:
        """Say how a call that is in doubt went; its task goes on with that.

        Raises ``NotFound``, ``RunEnded``, and ``AlreadyDecided`` where the step is in no doubt.
        """
        if said.outcome != "happened" and said.result is not None:
            raise InvalidRequest(
                f"'result' goes with the outcome 'happened', not with {said.outcome!r}.",
                hint="Leave out `result`.",
            )

        def transaction(connection: Connection) -> Run:
            found = store.step_in(connection, tenant, run_id, said.step)
            if found is not None:
                store.nudge_task(connection, run_id, found[0])
            row = _open_run(connection, tenant, run_id)
            if found is None:
                raise NotFound(
                    f"The run {run_id!r} has no step {said.step[:200]!r}.",
                    hint="`waiting_for.step` names the one in doubt.",
                )
            path, doubted = found
            output = Reconciled(outcome=said.outcome, result=said.result, reason=said.reason, by=by)
            record = StepRecord(key=reconciled_key(doubted), kind="value", name="reconciled").done(
                output.model_dump(mode="json")
            )
            known = store.step_in(connection, tenant, run_id, record.key) is not None
            if doubted.status != "in_doubt" or known:
                raise AlreadyDecided(
                    f"The step {said.step!r} is not in doubt: "
                    + ("somebody said how it went." if known else f"it is {doubted.status}."),
                    hint="GET /api/v1/runs/{run_id}/steps shows it.",
                )
            store.upsert_steps(connection, tenant, run_id, [(path, record)])
            return store.run_of(row)

        run = await answered(self._database, tenant, keyed, Run, lambda one: one.id, transaction)
        self._engine.wake()
        return run

    async def approvals(
        self,
        tenant: Tenant,
        *,
        status: ApprovalStatus | None = None,
        run_id: str | None = None,
        subject: str | None = None,
        limit: int,
        cursor: str | None = None,
    ) -> Page[Approval]:
        """Newest first."""
        before = decode_cursor(cursor) if cursor is not None else None
        now = utcnow()
        rows = await self._database.read(
            lambda c: store.list_approval_rows(
                c,
                tenant,
                status=status,
                run_id=run_id,
                subject=subject,
                now=now,
                before=before,
                limit=limit + 1,
            )
        )
        more = len(rows) > limit
        rows = rows[:limit]
        after = encode_cursor(rows[-1].requested_at, rows[-1].id) if more else None
        return Page([store.approval_of(row, now) for row in rows], after)

    async def approval(self, tenant: Tenant, identity: str) -> Approval:
        """One approval; raises ``NotFound``, for another tenant's too."""
        row = await self._database.read(
            lambda c: store.approval_row(c, identity, tenant, lock=False)
        )
        if row is None:
            raise _no_approval(identity)
        return store.approval_of(row, utcnow())

    async def decide(
        self,
        tenant: Tenant,
        identity: str,
        decide: Decide,
        *,
        by: str,
        keyed: Keyed | None = None,
    ) -> Approval:
        """Approve or reject, once. Returns the record that counts: a new one for edited arguments.

        Raises ``NotFound``; ``Forbidden`` for who may not decide; ``AlreadyDecided`` when somebody
        else, the clock or the run's end came first; ``InvalidRequest`` for edited arguments that
        the tool would not take.
        """
        now = utcnow()

        said: Told = []

        def transaction(connection: Connection) -> Approval:
            nonlocal said
            row = store.approval_row(connection, identity, tenant, lock=False)
            if row is None:
                raise _no_approval(identity)
            # Tasks before approvals before runs, by everybody.
            store.nudge_task(connection, row.run_id, row.task_path)
            row = store.approval_row(connection, identity, tenant)
            assert row is not None
            approval = store.approval_of(row, now)
            _refuse(approval, by, decide.arguments_hash)
            edited = _edited(approval, decide, row.arguments_schema)
            counts, said = consent.settle(
                connection, row, decide.decision, by, decide.reason, now, edited
            )
            row = store.approval_row(connection, counts, tenant, lock=False)
            assert row is not None
            return store.approval_of(row, now)

        approval = await answered(
            self._database, tenant, keyed, Approval, lambda one: one.run_id, transaction
        )
        if keyed is None or not keyed.replayed:
            self._engine.roster.tell(approval.run_id, said)
        self._engine.wake()
        return approval


def _open_run(connection: Connection, tenant: Tenant, run_id: str) -> Any:
    """The run, which has not ended."""
    row = store.known_run_row(connection, tenant, run_id)
    if RunStatus(row.status).ended:
        raise RunEnded(
            f"The run {run_id!r} has already ended: {row.status}.",
            hint="Nothing reaches it any more.",
        )
    return row


def _no_approval(identity: str) -> NotFound:
    return NotFound(
        f"There is no approval {identity[:60]!r}.", hint="GET /api/v1/approvals lists them."
    )


def _refuse(approval: Approval, by: str, shown_hash: str | None) -> None:
    """Raise why ``by``, who was shown arguments of that hash, cannot decide about it now."""
    if approval.approvers is not None and by not in approval.approvers:
        raise Forbidden(
            f"{by!r} may not decide about {approval.subject!r}.",
            hint=f"Those who may: {', '.join(approval.approvers) or 'nobody'}.",
        )
    if approval.status == "expired":
        raise AlreadyDecided(
            f"The approval {approval.id!r} expired at {approval.expires_at}.",
            hint="The run went on without a decision; see `on_expiry`.",
        )
    if approval.status == "withdrawn":
        raise AlreadyDecided(
            f"The approval {approval.id!r} is not waited for any more: its run or task has ended.",
        )
    if approval.status != "pending":
        raise AlreadyDecided(
            f"The approval {approval.id!r} was {approval.status} already, by "
            f"{approval.decided_by!r} at {approval.decided_at}.",
            hint="An approval is decided once; GET it to see how.",
        )
    if shown_hash is not None and shown_hash != approval.arguments_hash:
        raise Conflict(
            f"The approval {approval.id!r} is not about these arguments: their hash is "
            f"{approval.arguments_hash}.",
            hint="GET it, and look at the arguments again.",
        )


def _edited(approval: Approval, decide: Decide, schema: Any) -> Any:
    """The arguments to call with instead; None when they are those asked about."""
    if decide.arguments is None or decide.arguments == approval.arguments:
        return None
    if decide.decision == "reject":
        raise InvalidRequest(
            "A rejection takes no arguments.", hint="Leave out `arguments`, or approve."
        )
    faults = faults_in(decide.arguments, schema, at="/arguments") if schema else []
    if faults:
        raise InvalidRequest(
            f"The edited arguments do not fit what {approval.subject!r} takes.",
            errors=tuple(faults),
            hint="GET the approval to see the arguments that were asked about.",
        )
    return decide.arguments
