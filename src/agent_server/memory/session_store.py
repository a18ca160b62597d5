"""Chat history in tables: reading sessions, appending a run's items, branching, deleting.

Leans on storage, and on execution for whether a run works on a session. Refuses to know the SDK:
an item is a JSON object.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import (
    Connection,
    Row,
    bindparam,
    case,
    delete,
    func,
    insert,
    literal,
    or_,
    select,
    tuple_,
    update,
)

from agent_server.domain.base import JsonObject, utcnow
from agent_server.domain.errors import Conflict, NotFound
from agent_server.domain.ids import Tenant
from agent_server.domain.memories import MemoryFilter
from agent_server.domain.sessions import Session, SessionDeleted, SessionItem
from agent_server.execution import store
from agent_server.execution.paging import Page, decode_cursor, encode_cursor
from agent_server.memory.ports import Fence, Memories
from agent_server.storage.database import Database
from agent_server.storage.tables import runs, session_items, sessions

_ITEMS = (
    select(session_items.c.data)
    .where(
        session_items.c.tenant == bindparam("tenant"),
        session_items.c.session_id == bindparam("session"),
    )
    .order_by(session_items.c.position)
)


@dataclass(frozen=True)
class Summary:
    """The oldest ``items`` items of a session, told in ``text``."""

    items: int
    text: str


class SessionStore:
    """The sessions of all tenants; each call is for one of them."""

    def __init__(self, database: Database, memories: Memories) -> None:
        """``memories`` is where what was said is remembered."""
        self._database = database
        self._memories = memories

    def of(self, tenant: Tenant) -> "TenantSessions":
        """The sessions of one tenant, as its runs see them."""
        return TenantSessions(self._database, tenant)

    async def list(self, tenant: Tenant, *, limit: int, cursor: str | None) -> Page[Session]:
        """The newest first."""
        query = select(sessions).where(sessions.c.tenant == tenant)
        if cursor is not None:
            query = query.where(
                tuple_(sessions.c.created_at, sessions.c.id) < decode_cursor(cursor)
            )
        query = query.order_by(sessions.c.created_at.desc(), sessions.c.id.desc())
        rows = await self._database.read(lambda c: c.execute(query.limit(limit + 1)).all())
        last = rows[limit - 1] if len(rows) > limit else None
        after = encode_cursor(last.created_at, last.id) if last else None
        return Page([session_of(row) for row in rows[:limit]], after)

    async def get(self, tenant: Tenant, session_id: str) -> Session:
        """Raises ``NotFound``, for another tenant's too."""
        return session_of(await self._database.read(lambda c: session_row(c, tenant, session_id)))

    async def page(
        self, tenant: Tenant, session_id: str, *, after: int, limit: int
    ) -> Page[SessionItem]:
        """``limit`` items from position ``after`` on, oldest first; the cursor is a position."""

        def fetch(connection: Connection) -> Sequence[Row[Any]]:
            session_row(connection, tenant, session_id)
            return connection.execute(
                select(session_items)
                .where(*_of(session_items, tenant, session_id), session_items.c.position >= after)
                .order_by(session_items.c.position)
                .limit(limit + 1)
            ).all()

        rows = await self._database.read(fetch)
        found = [item_of(row) for row in rows[:limit]]
        return Page(found, str(rows[limit].position) if len(rows) > limit else None)

    async def delete(self, tenant: Tenant, session_id: str) -> SessionDeleted:
        """Delete the conversation. Raises ``Conflict`` while a run works on it: its end would
        bring a part of it back."""

        def check(connection: Connection) -> None:
            session_row(connection, tenant, session_id)
            if store.lane_busy(connection, f"{tenant}:{session_id}"):
                raise Conflict(
                    f"A run works on the session {session_id!r}, and would add to it at its end.",
                    hint="Wait for the run's end or cancel it, then delete the session.",
                )

        def transaction(connection: Connection) -> SessionDeleted:
            check(connection)
            return delete_session(connection, tenant, session_id)

        # The memories first: what a crash leaves over can still be deleted by the same call.
        await self._database.write(check)
        filter = MemoryFilter(session_id=session_id, replaced=True)
        memories = await self._memories.delete_where(tenant, filter)
        gone = await self._database.write(transaction)
        await self._database.scrub()
        return gone.model_copy(update={"memories": memories})

    async def branch(
        self, tenant: Tenant, session_id: str, new_id: str, *, before_run: str | None = None
    ) -> Session:
        """A new session that begins as ``session_id`` does; see ``branch_session``."""
        now = utcnow()

        def transaction(connection: Connection) -> Row[Any]:
            store.hold_off(connection, tenant)
            branch_session(connection, tenant, session_id, new_id, before_run=before_run, now=now)
            return session_row(connection, tenant, new_id)

        return session_of(await self._database.write(transaction))


class TenantSessions:
    """See ``memory.sessions.History``."""

    def __init__(self, database: Database, tenant: Tenant) -> None:
        self._database = database
        self._tenant = tenant

    async def items(self, session_id: str) -> list[JsonObject]:
        """Every committed item of the session, oldest first; empty for a new session."""
        values = {"tenant": self._tenant, "session": session_id}

        def fetch(connection: Connection) -> list[JsonObject]:
            # An erasure that did not see the run begin is over when the run reads.
            store.hold_off(connection, self._tenant)
            return list(connection.execute(_ITEMS, values).scalars())

        return await self._database.read(fetch)

    async def summary(self, session_id: str) -> Summary | None:
        """What was written of its oldest items so far."""
        query = select(sessions.c.summary).where(
            sessions.c.tenant == self._tenant, sessions.c.id == session_id
        )
        found = await self._database.read(lambda c: c.execute(query).scalar())
        return Summary(**found) if found else None

    async def keep_summary(
        self, session_id: str, summary: Summary, *, fence: Fence | None = None
    ) -> None:
        """Keep it for the runs to come, unless there is one of more items. ``fence`` is the
        writing run's."""

        def transaction(connection: Connection) -> None:
            if fence is not None:
                fence(connection)
            key = (sessions.c.tenant == self._tenant, sessions.c.id == session_id)
            held = connection.execute(select(sessions.c.summary).where(*key)).scalar()
            if held is None or held["items"] < summary.items:
                values = {"items": summary.items, "text": summary.text}
                connection.execute(update(sessions).where(*key).values(summary=values))

        await self._database.write(transaction)


def heard(connection: Connection, tenant: Tenant, run_ids: Collection[str]) -> set[str]:
    """The runs that were given, as the history of their session, what ``run_ids`` said: those that
    began behind it, in whatever session it stands. A goal is given it when it is submitted."""
    found: set[str] = set()
    s, own = session_items.c, session_items.alias("own").c
    begun = case((runs.c.kind == "agent", runs.c.started_at), else_=runs.c.created_at)
    earlier = select(func.min(own.position)).where(
        own.tenant == tenant, own.session_id == runs.c.session_id, own.run_id == runs.c.id
    )
    for part in store.parts(run_ids):
        said = (
            select(
                s.session_id,
                func.min(s.position).label("place"),
                func.min(s.created_at).label("at"),
            )
            .where(s.tenant == tenant, s.run_id.in_(part))
            .group_by(s.session_id)
            .subquery()
        )
        # A run that said nothing itself had perhaps ended before.
        behind = func.coalesce(
            earlier.scalar_subquery() > said.c.place,
            or_(runs.c.ended_at.is_(None), runs.c.ended_at >= said.c.at),
        )
        query = select(runs.c.id).select_from(
            runs.join(said, runs.c.session_id == said.c.session_id)
        )
        query = query.where(runs.c.tenant == tenant, begun.is_not(None), behind)
        found |= set(connection.execute(query).scalars())
    return found


def append_items(
    connection: Connection,
    tenant: Tenant,
    session_id: str,
    run_id: str,
    items: Sequence[Any],
    now: datetime,
) -> int:
    """Append ``items`` to the session, making it if need be, inside the caller's transaction;
    the position of the first.

    One run at a time works on a session (its lane), but a client may add to it meanwhile: the
    session's row is written first, which keeps everybody else out, and positions are read then.
    """
    count = sessions.c.item_count + len(items)
    held = update(sessions).where(*one(tenant, session_id))
    if not connection.execute(held.values(item_count=count, updated_at=now)).rowcount:
        values = {"tenant": tenant, "id": session_id, "item_count": len(items)}
        connection.execute(insert(sessions).values(**values, created_at=now, updated_at=now))
    # Not their number: some of them may have been erased.
    last = select(func.max(session_items.c.position)).where(*_of(session_items, tenant, session_id))
    found = connection.execute(last).scalar()
    first = 0 if found is None else found + 1
    if items:
        connection.execute(
            insert(session_items),
            [
                {
                    "tenant": tenant,
                    "session_id": session_id,
                    "position": first + i,
                    "run_id": run_id,
                    "data": item,
                    "created_at": now,
                }
                for i, item in enumerate(items)
            ],
        )
    return first


def items_before(
    connection: Connection, tenant: Tenant, session_id: str, run_id: str
) -> list[JsonObject]:
    """The session's items that came before the run ``run_id`` said anything, oldest first."""
    of_session = _of(session_items, tenant, session_id)
    first = (
        select(func.min(session_items.c.position))
        .where(*of_session, session_items.c.run_id == run_id)
        .scalar_subquery()
    )
    query = select(session_items.c.data).where(
        *of_session, func.coalesce(session_items.c.position < first, True)
    )
    return list(connection.execute(query.order_by(session_items.c.position)).scalars())


def branch_session(
    connection: Connection,
    tenant: Tenant,
    session_id: str,
    new_id: str,
    *,
    before_run: str | None,
    now: datetime,
) -> int:
    """Make the session ``new_id`` from the items of ``session_id`` that came before ``before_run``
    said anything (all of them by default), inside the caller's transaction.

    For a fork of that run, which then goes on in a history of its own. Returns how many items it
    has; 0 also when there is no such session yet. Raises ``Conflict`` when ``new_id`` is taken.
    """
    if connection.execute(select(sessions.c.id).where(*one(tenant, new_id))).scalar() is not None:
        raise Conflict(
            f"There is a session {new_id!r} already.", hint="Choose another id for the branch."
        )
    of_source = _of(session_items, tenant, session_id)
    upto = None
    if before_run is not None:
        upto = connection.execute(
            select(func.min(session_items.c.position)).where(
                *of_source, session_items.c.run_id == before_run
            )
        ).scalar()
    wanted = of_source if upto is None else (*of_source, session_items.c.position < upto)
    connection.execute(
        insert(session_items).from_select(
            ["tenant", "session_id", "position", "run_id", "data", "created_at"],
            select(
                session_items.c.tenant,
                literal(new_id),
                session_items.c.position,
                session_items.c.run_id,
                session_items.c.data,
                session_items.c.created_at,
            ).where(*wanted),
        )
    )
    count = connection.execute(
        select(func.count()).select_from(session_items).where(*_of(session_items, tenant, new_id))
    ).scalar_one()
    connection.execute(
        insert(sessions).values(
            tenant=tenant, id=new_id, item_count=count, created_at=now, updated_at=now
        )
    )
    return int(count)


def delete_session(connection: Connection, tenant: Tenant, session_id: str) -> SessionDeleted:
    """Delete the session and all that it said, inside the caller's transaction."""
    items = connection.execute(
        delete(session_items).where(*_of(session_items, tenant, session_id))
    ).rowcount
    connection.execute(delete(sessions).where(*one(tenant, session_id)))
    return SessionDeleted(id=session_id, items=items, memories=0)


def forget_runs(
    connection: Connection, tenant: Tenant, run_ids: Collection[str], session_ids: Collection[str]
) -> dict[str, int]:
    """Delete the sessions ``session_ids`` and, of other sessions, what ``run_ids`` said in them,
    inside the caller's transaction. A summary that told of it goes, and a session left empty."""
    counted = {"sessions": 0, "session_items": 0}
    touched: set[str] = set()
    for part in store.parts(run_ids):
        said = (session_items.c.tenant == tenant, session_items.c.run_id.in_(part))
        touched |= set(
            connection.execute(select(session_items.c.session_id).where(*said).distinct()).scalars()
        )
        counted["session_items"] += connection.execute(delete(session_items).where(*said)).rowcount
    for session_id in {*session_ids, *touched}:
        items = _of(session_items, tenant, session_id)
        left = connection.execute(
            select(func.count()).select_from(session_items).where(*items)
        ).scalar_one()
        if session_id in session_ids or not left:
            gone = delete_session(connection, tenant, session_id)
            counted["session_items"] += gone.items
            counted["sessions"] += 1
        else:
            connection.execute(
                update(sessions)
                .where(*one(tenant, session_id))
                .values(item_count=left, summary=None)
            )
    return counted


def _of(table: Any, tenant: Tenant, session_id: str) -> tuple[Any, ...]:
    return table.c.tenant == tenant, table.c.session_id == session_id


def one(tenant: Tenant, session_id: str) -> tuple[Any, ...]:
    """What names the row of one session."""
    return sessions.c.tenant == tenant, sessions.c.id == session_id


def session_row(connection: Connection, tenant: Tenant, session_id: str) -> Row[Any]:
    """Raises ``NotFound``."""
    row = connection.execute(select(sessions).where(*one(tenant, session_id))).one_or_none()
    if row is None:
        raise NotFound(
            f"There is no session {session_id[:100]!r}.", hint="GET /api/v1/sessions lists them."
        )
    return row


def session_of(row: Row[Any]) -> Session:
    summary = row.summary or {}
    return Session(
        id=row.id,
        item_count=row.item_count,
        summary=summary.get("text"),
        summarised_items=summary.get("items", 0),
        metadata=row.metadata or {},
        created_at=row.created_at,
        updated_at=row.updated_at,
    )


def item_of(row: Row[Any]) -> SessionItem:
    return SessionItem(
        position=row.position, run_id=row.run_id, item=row.data, created_at=row.created_at
    )
