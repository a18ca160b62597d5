"""Chat history in tables: reading a session's items, appending a run's items to it.

Leans on storage. Refuses to know the SDK: an item is a JSON object.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, bindparam, insert, select, update

from agent_server.domain.base import JsonObject
from agent_server.domain.ids import Tenant
from agent_server.storage.database import Database
from agent_server.storage.tables import session_items, sessions

_ITEMS = (
    select(session_items.c.data)
    .where(
        session_items.c.tenant == bindparam("tenant"),
        session_items.c.session_id == bindparam("session"),
    )
    .order_by(session_items.c.position)
)


class SessionStore:
    """The items of each session, in the order they came."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def of(self, tenant: Tenant) -> "TenantSessions":
        """The sessions of one tenant."""
        return TenantSessions(self._database, tenant)


class TenantSessions:
    """See ``memory.sessions.SessionStore``."""

    def __init__(self, database: Database, tenant: Tenant) -> None:
        self._database = database
        self._tenant = tenant

    async def items(self, session_id: str) -> list[JsonObject]:
        """Every committed item of the session, oldest first; empty for a new session."""
        values = {"tenant": self._tenant, "session": session_id}
        return await self._database.read(lambda c: list(c.execute(_ITEMS, values).scalars()))


def append_items(
    connection: Connection,
    tenant: Tenant,
    session_id: str,
    run_id: str,
    items: Sequence[Any],
    now: datetime,
) -> None:
    """Append ``items`` to the session, making it if need be, inside the caller's transaction.

    One run at a time writes to a session (its lane), so positions cannot collide.
    """
    key = (sessions.c.tenant == tenant, sessions.c.id == session_id)
    count = connection.execute(select(sessions.c.item_count).where(*key)).scalar()
    if count is None:
        count = 0
        connection.execute(
            insert(sessions).values(
                tenant=tenant, id=session_id, item_count=0, created_at=now, updated_at=now
            )
        )
    if items:
        connection.execute(
            insert(session_items),
            [
                {
                    "tenant": tenant,
                    "session_id": session_id,
                    "position": count + i,
                    "run_id": run_id,
                    "data": item,
                    "created_at": now,
                }
                for i, item in enumerate(items)
            ],
        )
    connection.execute(
        update(sessions).where(*key).values(item_count=count + len(items), updated_at=now)
    )
