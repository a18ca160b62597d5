"""Durable waits: how a task stands still for a signal, a moment or a person's decision.

Leans on the roster and the store. Each wait is a step of the ledger, so that what ended it is
replayed the same. Refuses to decide anything: ``control.py`` is the door for those who do.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row

from agent_server.domain.base import utcnow
from agent_server.domain.errors import ApprovalExpired
from agent_server.domain.events import RunSteered
from agent_server.domain.runs import WaitingFor
from agent_server.execution import consent, store
from agent_server.execution.attempts import Attempt
from agent_server.execution.events import Told
from agent_server.execution.journal import DurableJournal
from agent_server.execution.ports import (
    STEER,
    ApprovalAsk,
    ApprovalDecision,
    SignalReceived,
    StepRecord,
    Suspend,
)
from agent_server.execution.roster import Roster
from agent_server.storage.outside import owned


def signal_awaited(name: str) -> str:
    """What a task ``awaits`` while it stands still for the signal ``name``."""
    return f"signal:{name}"


class Waits:
    """The waits of every task that is carried out here."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster

    async def signal(
        self,
        attempt: Attempt,
        journal: DurableJournal,
        name: str,
        key: str,
        until: datetime | None,
        waiting_for: WaitingFor | None,
    ) -> SignalReceived | None:
        """See ``TaskContext.wait_signal``."""
        whole = journal.key(key)
        found = journal.step(whole)
        if found is None:
            await journal.flush()
            run_id = attempt.local.snapshot.id

            def take(connection: Connection) -> Row[Any] | None:
                self._roster.fence(connection, attempt)
                return store.take_signal(connection, run_id, name, whole)

            row = await self._roster.database.write(take)
            if row is None and (until is None or until > utcnow()):
                detail = f"Waits for the signal {name!r}."
                shown = waiting_for or WaitingFor(kind="signal", detail=detail, until=until)
                if shown.kind == "signal":
                    shown = shown.model_copy(update={"signal": name})
                raise Suspend(shown, wake_at=until, awaits=signal_awaited(name))
            got = None
            if row is not None:
                at = row.sent_at.isoformat()
                got = {"payload": row.payload, "by": row.sent_by, "at": at}
            found = StepRecord(key=whole, kind="value", name=f"signal {name}").done(got)
            await journal.finish(found)
        return None if found.output is None else SignalReceived.read(found.output)

    async def steers(
        self, attempt: Attempt, journal: DurableJournal, key: str
    ) -> list[SignalReceived]:
        """See ``TaskContext.take_steers``."""
        whole = journal.key(key)
        found = journal.step(whole)
        if found is None:
            run_id = attempt.local.snapshot.id
            if not await self._roster.database.read(
                lambda c: store.open_signals(c, run_id, STEER, whole)
            ):
                return []

            def take(connection: Connection) -> Sequence[Row[Any]]:
                self._roster.fence(connection, attempt)
                return store.take_signals(connection, run_id, STEER, whole)

            rows = await self._roster.database.write(take)
            said = [(row.payload["request"]["input"], row.sent_by, row.sent_at) for row in rows]
            for (given, by, at), row in zip(said, rows, strict=True):
                identity = row.payload.get("steer_id")
                journal.emit(RunSteered(input=given, steer_id=identity, by=by, sent_at=at))
            got = [{"payload": given, "by": by, "at": at.isoformat()} for given, by, at in said]
            found = StepRecord(key=whole, kind="value", name="steers").done(got)
            await journal.finish(found)
        return [SignalReceived.read(one) for one in found.output]

    async def sleep(self, journal: DurableJournal, moment: datetime, key: str) -> None:
        """See ``TaskContext.sleep_until``."""
        whole = journal.key(key)
        if journal.step(whole) is not None:
            return
        if moment > utcnow():
            detail = f"Sleeps until {moment.isoformat()}."
            raise Suspend(WaitingFor(kind="timer", detail=detail, until=moment), wake_at=moment)
        record = StepRecord(key=whole, kind="value", name="timer")
        await journal.finish(record.done(moment.isoformat()))

    async def approval(
        self, attempt: Attempt, journal: DurableJournal, ask: ApprovalAsk, key: str
    ) -> ApprovalDecision:
        """See ``TaskContext.ask_approval``."""
        whole = journal.key(key)
        found = journal.step(whole)
        if found is None:
            await journal.flush()
            run_id = attempt.local.snapshot.id

            def ask_once(connection: Connection) -> tuple[Any, datetime | None, Told]:
                self._roster.fence(connection, attempt)
                return consent.ask_once(connection, attempt, ask, whole, utcnow())

            decision, until, told = await self._roster.database.write(
                owned(ask_once, attempt.local.snapshot.tenant, run_id)
            )
            self._roster.tell(run_id, told)
            if decision is None:
                raise Suspend(consent.waiting(ask, whole, until), wake_at=until)
            found = StepRecord(key=whole, kind="value", name="approval").done(decision)
            await journal.finish(found)
        given = ApprovalDecision(**found.output)
        if given.decision == "expired" and ask.on_expiry == "fail":
            raise ApprovalExpired(
                f"Nobody decided about {ask.subject!r} in time.",
                hint="Submit the run again, or give people more time to decide.",
            )
        return given
