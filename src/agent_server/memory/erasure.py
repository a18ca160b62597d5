"""Erasing a person: every row that is about them, or was made from one, in every table.

Leans on the stores of memories, sessions and runs, and on the database to leave nothing in its
files. Refuses to keep anything of what it erased but how much it was.
"""

from collections import Counter
from collections.abc import Awaitable, Callable

from sqlalchemy import ColumnElement, Connection, select

from agent_server.domain.base import utcnow
from agent_server.domain.errors import NotFound, RunEnded
from agent_server.domain.ids import Tenant
from agent_server.domain.memory_api import ErasureReceipt
from agent_server.execution import store as execution
from agent_server.memory.consolidation import CONSOLIDATES
from agent_server.memory.ports import Memories
from agent_server.memory.session_store import forget_runs, heard
from agent_server.storage import outside
from agent_server.storage.database import Database
from agent_server.storage.tables import memories as m
from agent_server.storage.tables import memory_uses

Cancel = Callable[[Tenant, str, str], Awaitable[object]]


class Erasure:
    """Erases what is known of one person. Safe to repeat: a second time finds the rest."""

    def __init__(self, database: Database, store: Memories, cancel: Cancel) -> None:
        """``cancel`` stops a run (tenant, id, reason); it may raise that there is none."""
        self._database = database
        self._store = store
        self._cancel = cancel

    async def erase(self, tenant: Tenant, subject: str) -> ErasureReceipt:
        """Erase the memories about ``subject``; the runs that were submitted about them with
        their sessions and all runs of those; the runs that wrote or recalled such a memory, since
        they hold its words; and whatever was given the words of all these: see ``_given``. What
        of this still runs is stopped.
        """
        doomed, _ = await self._database.read(lambda c: _concerned(c, tenant, subject))
        for run_id in doomed:
            try:
                await self._cancel(tenant, run_id, "Its subject is erased.")
            except (NotFound, RunEnded):
                continue

        def transaction(connection: Connection) -> tuple[Counter[str], set[str]]:
            execution.begin_erasing(connection, tenant)
            # Once more: a run may have come, or recalled something, since.
            found, sessions = _concerned(connection, tenant, subject)
            runs = doomed | found
            keys = [outside.keys_of(connection, part) for part in execution.parts(runs)]
            # The runs first: from then on none of them says or remembers anything more.
            erased = Counter(execution.erase_runs(connection, tenant, runs))
            erased.update(forget_runs(connection, tenant, runs, sessions))
            gone = self._store.erase_subject(
                connection, tenant, subject, run_ids=runs, session_ids=sessions
            )
            erased.update(gone.model_dump())
            return erased, set().union(*keys)

        erased, blobs = await self._database.write(transaction)
        erased["blobs"] += await outside.forget(self._database, tenant, blobs)
        await self._database.scrub()
        overwritten = self._database.dialect == "sqlite"
        return ErasureReceipt(
            subject=subject,
            erased_at=utcnow(),
            erased={name: count for name, count in sorted(erased.items()) if count},
            files="overwritten" if overwritten else "left to vacuum",
        )


def _concerned(connection: Connection, tenant: Tenant, subject: str) -> tuple[set[str], set[str]]:
    """The runs to erase, and the sessions to erase whole."""
    about = execution.runs_about(connection, tenant, subject)
    sessions = {session for session in about.values() if session is not None}
    found = set(about) | set(execution.runs_of_sessions(connection, tenant, sessions))
    wrote = select(m.c.run_id).where(
        m.c.tenant == tenant, m.c.subject == subject, m.c.run_id.is_not(None)
    )
    found |= set(connection.execute(wrote.distinct()).scalars())
    found |= _recalled(connection, tenant, m.c.subject, {subject})
    found |= _recalled(connection, tenant, m.c.session_id, sessions)
    new = found
    while new := _given(connection, tenant, new) - found:
        found |= new
    return found, sessions


def _given(connection: Connection, tenant: Tenant, run_ids: set[str]) -> set[str]:
    """The runs that were given words of these: their forks, their consolidations, later runs of
    sessions that hold what they said, and runs that recalled what they wrote."""
    return (
        execution.made_from(connection, tenant, run_ids, CONSOLIDATES)
        | heard(connection, tenant, run_ids)
        | _recalled(connection, tenant, m.c.run_id, run_ids)
    )


def _recalled(
    connection: Connection, tenant: Tenant, column: ColumnElement[str | None], values: set[str]
) -> set[str]:
    """The runs that recalled memories whose ``column`` has one of ``values``."""
    found: set[str] = set()
    for part in execution.parts(values):
        theirs = select(m.c.id).where(m.c.tenant == tenant, column.in_(part))
        u = memory_uses.c
        used = select(u.run_id).where(u.tenant == tenant, u.memory_id.in_(theirs)).distinct()
        found |= set(connection.execute(used).scalars())
    return found
