"""The SQL that erases runs: every row of every table that says whose run it belongs to.

Leans on the page of tables, so that a table added later is not forgotten. Runs inside the
caller's transaction. Refuses to decide which runs those are.
"""

from collections.abc import Collection, Iterable
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, delete, func, select, update

from agent_server.execution.store.retention import OUTLIVING
from agent_server.storage.tables import idempotency_keys, metadata, runs, tasks

_AT_ONCE = 500
_OF_RUNS = [tasks, runs] + [
    table
    for table in metadata.sorted_tables
    if "run_id" in table.c and table not in (tasks, *OUTLIVING)
]


def hold_off(connection: Connection, tenant: str) -> None:
    """Wait till no erasure of the tenant's is under way, and let none begin before this transaction
    ends: as its first statement, since an erasure waits for rows. What is read or noted then is
    seen by the next one. SQLite has one writer anyway.

    In a transaction that only reads, every statement of which stands alone on PostgreSQL, it
    does no more than wait.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock_shared(_erasing(tenant))))


def begin_erasing(connection: Connection, tenant: str) -> None:
    """Wait for whoever holds erasures off, and keep others from it until the transaction ends."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(_erasing(tenant))))


def _erasing(tenant: str) -> ColumnElement[int]:
    return func.hashtextextended(f"erasing {tenant}", 7)


def runs_about(connection: Connection, tenant: str, subject: str) -> dict[str, str | None]:
    """The runs submitted with this subject: id to session. A fork has its run's subject."""
    query = select(runs.c.id, runs.c.session_id).where(
        runs.c.tenant == tenant, runs.c.subject == subject
    )
    return {row.id: row.session_id for row in connection.execute(query)}


def runs_of_sessions(
    connection: Connection, tenant: str, session_ids: Iterable[str]
) -> dict[str, str | None]:
    """The runs of these sessions."""
    found: dict[str, str | None] = {}
    for part in parts(session_ids):
        query = select(runs.c.id, runs.c.session_id).where(
            runs.c.tenant == tenant, runs.c.session_id.in_(part)
        )
        found |= {row.id: row.session_id for row in connection.execute(query)}
    return found


def made_from(connection: Connection, tenant: str, run_ids: Iterable[str], key: str) -> set[str]:
    """The forks of these runs and those that continue them, and the runs that were begun under
    the idempotency key ``key`` and then the id of one of them."""
    found: set[str] = set()
    for part in parts(run_ids):
        for column in (runs.c.forked_from, runs.c.continues):
            made = select(runs.c.id).where(runs.c.tenant == tenant, column.in_(part))
            found |= set(connection.execute(made).scalars())
        k = idempotency_keys.c
        keys = k.key.in_([f"{key}{run_id}" for run_id in part])
        begun = (k.tenant == tenant, keys, k.run_id != "")  # It is empty where no run was begun.
        found |= set(connection.execute(select(k.run_id).where(*begun)).scalars())
    return found


def files_named(connection: Connection, tenant: str, run_ids: Collection[str]) -> set[str]:
    """The ids of uploaded files that the requests of these runs name."""
    asked = select(runs.c.request).where(runs.c.tenant == tenant, runs.c.id.in_(run_ids))
    found: set[str] = set()
    todo: list[Any] = list(connection.execute(asked).scalars())
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            if isinstance(named := value.get("file_id"), str):
                found.add(named)
            todo.extend(value.values())
        elif isinstance(value, list):
            todo.extend(value)
    return found


def continue_before(connection: Connection, tenant: str, run_id: str, before: str | None) -> None:
    """Let what continues or was forked from ``run_id``, which goes, continue ``before``."""
    if before is None:
        return
    left = (runs.c.continues == run_id) | (
        (runs.c.forked_from == run_id) & runs.c.continues.is_(None)
    )
    connection.execute(update(runs).where(runs.c.tenant == tenant, left).values(continues=before))


def erase_runs(connection: Connection, tenant: str, run_ids: Collection[str]) -> dict[str, int]:
    """Delete the runs with all that is stored of them but what outlives them, memories and what
    they said in sessions: rows by table.

    A worker that carries one of them out has lost it: its next write is refused. Tasks and runs go
    first, for whoever adds to a run holds one of these rows: what they add is there to be found.
    """
    gone: dict[str, int] = {}
    for part in parts(run_ids):
        mine = (runs.c.tenant == tenant, runs.c.id.in_(part))
        own = connection.execute(select(runs.c.id).where(*mine)).scalars().all()
        for table in _OF_RUNS:
            column = table.c.id if table is runs else table.c.run_id
            if "tenant" in table.c:
                found = and_(table.c.tenant == tenant, column.in_(part))
            else:
                found = and_(column.in_(own))  # A row is its run's.
            count = connection.execute(delete(table).where(found)).rowcount
            gone[table.name] = gone.get(table.name, 0) + count
    return gone


def parts(values: Iterable[str], most: int = _AT_ONCE) -> Iterable[list[str]]:
    """``values`` in lists that one statement can take."""
    whole = sorted(set(values))
    for start in range(0, len(whole), most):
        yield whole[start : start + most]
