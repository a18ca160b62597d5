"""Sessions that a client keeps by hand: made, labelled, added to and cut, item by item.

Leans on the tables of sessions, beside ``session_store``, where runs read and append. Refuses to
know which protocol calls an item what: an item is a JSON object at a position.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select, update

from agent_server.domain.base import JsonObject, utcnow
from agent_server.domain.errors import NotFound
from agent_server.domain.ids import Tenant
from agent_server.domain.sessions import Session, SessionItem
from agent_server.memory.session_store import append_items, item_of, one, session_of, session_row
from agent_server.storage.database import Database
from agent_server.storage.tables import session_items, sessions

BY_CLIENT = ""
"""The ``run_id`` of an item that no run said."""


class Conversations:
    """The conversations of all tenants; each call is for one of them, and raises ``NotFound``."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(
        self,
        tenant: Tenant,
        session_id: str,
        metadata: dict[str, str],
        items: Sequence[JsonObject],
    ) -> Session:
        """A new session ``session_id`` that begins with ``items``."""
        now = utcnow()

        def transaction(connection: Connection) -> Row[Any]:
            values = {"tenant": tenant, "id": session_id, "metadata": metadata}
            connection.execute(
                insert(sessions).values(**values, item_count=0, created_at=now, updated_at=now)
            )
            append_items(connection, tenant, session_id, BY_CLIENT, items, now)
            return session_row(connection, tenant, session_id)

        return session_of(await self._database.write(transaction))

    async def label(self, tenant: Tenant, session_id: str, metadata: dict[str, str]) -> Session:
        """The session with ``metadata`` in place of what it had."""

        def transaction(connection: Connection) -> Row[Any]:
            connection.execute(
                update(sessions).where(*one(tenant, session_id)).values(metadata=metadata)
            )
            return session_row(connection, tenant, session_id)

        return session_of(await self._database.write(transaction))

    async def add(
        self, tenant: Tenant, session_id: str, items: Sequence[JsonObject]
    ) -> list[SessionItem]:
        """Append ``items``, also while a run works on the session: it says its own at its end."""
        now = utcnow()

        def transaction(connection: Connection) -> int:
            session_row(connection, tenant, session_id)
            return append_items(connection, tenant, session_id, BY_CLIENT, items, now)

        first = await self._database.write(transaction)
        return [
            SessionItem(position=first + n, run_id=BY_CLIENT, item=item, created_at=now)
            for n, item in enumerate(items)
        ]

    async def item(self, tenant: Tenant, session_id: str, position: int) -> SessionItem:
        query = select(session_items).where(*_at(tenant, session_id, position))
        row = await self._database.read(lambda c: c.execute(query).one_or_none())
        if row is None:
            raise _no_item(session_id, position)
        return item_of(row)

    async def cut(self, tenant: Tenant, session_id: str, position: int) -> Session:
        """Delete one item. A summary that may tell of it goes too."""

        def transaction(connection: Connection) -> Row[Any]:
            count = sessions.c.item_count - 1
            changed = {"item_count": count, "summary": None, "updated_at": utcnow()}
            gone = delete(session_items).where(*_at(tenant, session_id, position))
            if not connection.execute(gone).rowcount:
                raise _no_item(session_id, position)
            connection.execute(update(sessions).where(*one(tenant, session_id)).values(**changed))
            return session_row(connection, tenant, session_id)

        return session_of(await self._database.write(transaction))

    async def page(
        self, tenant: Tenant, session_id: str, *, behind: int | None, newest: bool, limit: int
    ) -> tuple[list[SessionItem], bool]:
        """``limit`` items, the ``newest`` or the oldest first, behind the position ``behind`` in
        that order; and whether there are more."""
        place = session_items.c.position
        query = select(session_items).where(
            session_items.c.tenant == tenant, session_items.c.session_id == session_id
        )
        if behind is not None:
            query = query.where(place < behind if newest else place > behind)
        query = query.order_by(place.desc() if newest else place).limit(limit + 1)

        def fetch(connection: Connection) -> Sequence[Row[Any]]:
            session_row(connection, tenant, session_id)
            return connection.execute(query).all()

        rows = await self._database.read(fetch)
        return [item_of(row) for row in rows[:limit]], len(rows) > limit


def _at(tenant: Tenant, session_id: str, position: int) -> tuple[Any, ...]:
    c = session_items.c
    return c.tenant == tenant, c.session_id == session_id, c.position == position


def _no_item(session_id: str, position: int) -> NotFound:
    return NotFound(f"The session {session_id[:100]!r} has no item {position}.")
