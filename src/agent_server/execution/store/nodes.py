"""The SQL of idempotency keys and of the nodes that beat.

Leans on storage. Each function runs inside the caller's transaction and refuses to commit.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, delete, func, select, text, update

from agent_server.execution.store.columns import INSERTS
from agent_server.execution.store.limits import void_permits_of_others
from agent_server.execution.store.tasks import release_tasks
from agent_server.storage.tables import idempotency_keys, nodes

REAPING = 7_349_002_119
"""Any number, the same in every process: "somebody is reaping"."""


def take_key(connection: Connection, values: dict[str, Any]) -> bool:
    """Store the key unless it is taken; True when it was free."""
    statement = INSERTS[connection.dialect.name](idempotency_keys).on_conflict_do_nothing()
    return bool(connection.execute(statement, values).rowcount)


def answer_key(connection: Connection, tenant: str, key: str, response: Any) -> None:
    """Store what is answered to whoever comes with this key again."""
    k = idempotency_keys.c
    mine = update(idempotency_keys).where(k.tenant == tenant, k.key == key)
    connection.execute(mine.values(response=response))


def stored_key(connection: Connection, tenant: str, key: str) -> Row[Any] | None:
    return connection.execute(
        select(idempotency_keys).where(
            idempotency_keys.c.tenant == tenant, idempotency_keys.c.key == key
        )
    ).one_or_none()


def beat(connection: Connection, node: str, role: str, now: datetime) -> None:
    statement = INSERTS[connection.dialect.name](nodes)
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["id"], set_={"beat_at": statement.excluded.beat_at}
        ),
        {"id": node, "role": role, "started_at": now, "beat_at": now},
    )


def remove_node(connection: Connection, node: str) -> None:
    connection.execute(delete(nodes).where(nodes.c.id == node))


def beats(connection: Connection) -> dict[str, datetime]:
    """Each node's last beat."""
    return {row.id: row.beat_at for row in connection.execute(select(nodes.c.id, nodes.c.beat_at))}


def workers(connection: Connection) -> int:
    """Nodes that carry out tasks, this one included."""
    query = select(func.count()).select_from(nodes).where(nodes.c.role != "api")
    return connection.execute(query).scalar() or 0


def reap(connection: Connection, dead: dict[str, datetime]) -> int:
    """Forget the nodes ``dead`` whose beat still is what it was, and queue again what nobody
    living carries out. One reaper at a time; another one answers 0."""
    if connection.dialect.name == "postgresql":
        lock = text("SELECT pg_try_advisory_xact_lock(:n)")
        if not connection.execute(lock, {"n": REAPING}).scalar():
            return 0
    for node, beat_at in dead.items():
        connection.execute(delete(nodes).where(nodes.c.id == node, nodes.c.beat_at == beat_at))
    alive = list(connection.execute(select(nodes.c.id)).scalars())
    void_permits_of_others(connection, alive)
    return release_tasks(connection, None, alive)
