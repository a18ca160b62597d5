"""The SQL that erases runs: every row of every table that says whose run it belongs to.

Leans on the page of tables, so that a table added later is not forgotten. Runs inside the
caller's transaction. Refuses to decide which runs those are.
"""

from collections.abc import Collection, Iterable

from sqlalchemy import Connection, delete, select

from agent_server.storage.tables import memories, metadata, runs

_AT_ONCE = 500


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


def erase_runs(connection: Connection, tenant: str, run_ids: Collection[str]) -> dict[str, int]:
    """Delete the runs with all that is stored of them but their memories, which are in indexes
    too: rows by table.

    A worker that carries one of them out has lost it: its next write is refused.
    """
    gone: dict[str, int] = {}
    for table in reversed(metadata.sorted_tables):
        column = table.c.id if table is runs else table.c.get("run_id")
        if column is None or table is memories or "tenant" not in table.c:
            continue
        for part in parts(run_ids):
            found = (table.c.tenant == tenant, column.in_(part))
            count = connection.execute(delete(table).where(*found)).rowcount
            gone[table.name] = gone.get(table.name, 0) + count
    return gone


def parts(values: Iterable[str]) -> Iterable[list[str]]:
    """``values`` in lists that one statement can take."""
    whole = sorted(set(values))
    for start in range(0, len(whole), _AT_ONCE):
        yield whole[start : start + _AT_ONCE]
