"""The SQL of forgetting: what ended long ago is deleted, a few thousand rows at a time.

Leans on the tables. Refuses to decide what is old, to touch a run that has not ended, and to touch
what outlives runs: sessions, memories, workflows.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Table, delete, func, select, text, tuple_, update

from agent_server.storage.tables import (
    blob_uses,
    events,
    memories,
    metadata,
    runs,
    session_items,
    steps,
)

DETAILS: tuple[Table, ...] = (events, steps)
"""What may be forgotten of a run before the run itself: the many rows."""
OUTLIVING = (memories, session_items)
VACUUMING = 7_349_002_122
"""Any number, the same in every process: "somebody is deleting"."""


def _old(statuses: Sequence[str], before: datetime, detailed: bool) -> list[Any]:
    found: list[Any] = [runs.c.ended_at < before, runs.c.status.in_(statuses)]
    return [*found, text("NOT trimmed")] if detailed else found


def count_old(
    connection: Connection, statuses: Sequence[str], before: datetime, *, detailed: bool
) -> int:
    """Runs that ended with one of ``statuses`` before the moment; ``detailed``: only those that
    still have their details."""
    query = select(func.count()).select_from(runs).where(*_old(statuses, before, detailed))
    return connection.execute(query).scalar() or 0


def mark_old(
    connection: Connection, statuses: Sequence[str], before: datetime, limit: int, *, detailed: bool
) -> list[str]:
    """Up to ``limit`` such runs, the oldest first, from now on shown as without details.

    One process at a time; another one finds none.
    """
    if not _alone(connection):
        return []
    query = select(runs.c.id).where(*_old(statuses, before, detailed)).order_by(runs.c.ended_at)
    found = list(connection.execute(query.limit(limit)).scalars())
    if found:
        connection.execute(update(runs).where(runs.c.id.in_(found)).values(trimmed=True))
    return found


def delete_details(connection: Connection, run_ids: Sequence[str], limit: int) -> bool:
    """Delete up to ``limit`` rows of the details of these runs; True when there may be more."""
    for table in DETAILS:
        key = tuple_(*table.primary_key.columns)
        some = select(*table.primary_key.columns).where(table.c.run_id.in_(run_ids)).limit(limit)
        if connection.execute(delete(table).where(key.in_(some))).rowcount == limit:
            return True
    held_by = [table.name for table in DETAILS]
    uses = (blob_uses.c.run_id.in_(run_ids), blob_uses.c.held_by.in_(held_by))
    connection.execute(delete(blob_uses).where(*uses))
    return False


def delete_runs(connection: Connection, run_ids: Sequence[str]) -> None:
    """Delete these runs, with whatever else is theirs alone."""
    for table in reversed(metadata.sorted_tables):
        if "run_id" in table.c and table not in OUTLIVING:
            connection.execute(delete(table).where(table.c.run_id.in_(run_ids)))
    connection.execute(delete(runs).where(runs.c.id.in_(run_ids)))


def _alone(connection: Connection) -> bool:
    """Whether nobody else is deleting, until this transaction ends."""
    if connection.dialect.name != "postgresql":
        return True
    lock = text("SELECT pg_try_advisory_xact_lock(:n)")
    return bool(connection.execute(lock, {"n": VACUUMING}).scalar())
