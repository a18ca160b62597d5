"""Long-term memory in tables: written, read, edited, superseded, erased. See ``memory.ports``.

Leans on storage, on ``memory.intake`` for new versions, and on ``memory.recall`` for searches.
Refuses to know who embeds: vectors follow on their own (``memory.embedding``); here they are only
ever erased.

A version is a row. What is deleted goes from every table and index in one transaction, and then
from the log of the file.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from datetime import datetime
from typing import Any, NamedTuple, cast

import anyio
from sqlalchemy import (
    ColumnElement,
    CompoundSelect,
    Connection,
    Row,
    Select,
    and_,
    delete,
    func,
    or_,
    select,
    union,
    update,
)

from agent_server.domain.base import utcnow
from agent_server.domain.errors import Conflict, InvalidRequest, NotFound, PreconditionFailed
from agent_server.domain.ids import Tenant
from agent_server.domain.memories import (
    MAX_BATCH,
    Found,
    MemoriesErased,
    Memory,
    MemoryChange,
    MemoryFilter,
    MemoryQuery,
    MemorySource,
    MemoryStats,
    MemoryUse,
    NewMemory,
)
from agent_server.execution.paging import decode_cursor, encode_cursor, unknown_cursor
from agent_server.execution.store import parts
from agent_server.memory.intake import Intake, insert_new, parts_of, with_ids
from agent_server.memory.ports import Added, Fence, MemoryPage, Prepared
from agent_server.memory.rows import (
    JOINED,
    READ,
    PreparedMemories,
    chosen_by,
    edited,
    memory_of,
    prepare,
)
from agent_server.memory.text_index import Fts5, Lexemes, TextIndex
from agent_server.memory.vector_index import VectorIndex, erase_vectors, vector_index
from agent_server.memory.words import query_words
from agent_server.storage.database import Database
from agent_server.storage.tables import memories as m
from agent_server.storage.tables import memory_spaces, memory_uses, memory_vectors

ERASED_AT_ONCE = 500
KNOWN_SPACES = 10_000
IN_LOOP = 20
"""So many memories are made ready on the event loop; more in a thread."""
Search = Callable[[Tenant, MemoryQuery], Awaitable[list[Found]]]


class Embeds(NamedTuple):
    """Who makes vectors for a store."""

    name: str | None = None
    number: int | None = None
    """None before it gave its first."""
    trouble: str | None = None
    """Why memories wait for theirs, if it does not make them."""


class MemoryStore:
    """``ports.Memories`` on SQLite and PostgreSQL."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.words: TextIndex = Fts5() if database.dialect == "sqlite" else Lexemes()
        self.vectors: VectorIndex | None = None
        """How vectors are searched; None when this process cannot."""
        self.no_vectors_because: str | None = None
        self.written: list[Callable[[], None]] = []
        """Called after each ``add`` and ``edit``: somebody may have vectors to make."""
        self.known_spaces: dict[tuple[str, str], int] = {}
        """Numbers of namespaces, by tenant and name; see ``remember_space``."""
        self.search_with: Search | None = None
        self.describe_embedder: Callable[[], Awaitable[Embeds]] | None = None

    async def open(self) -> None:
        """Make the indexes that the schema lacks, and see what this database can do."""
        self.vectors, self.no_vectors_because = await vector_index(self.database)
        await self.database.write(self.words.create)

    async def add(self, tenant: Tenant, memories: Sequence[NewMemory]) -> list[Added]:
        if len(memories) > MAX_BATCH:
            raise InvalidRequest(
                f"{len(memories)} memories are too many at once.",
                hint=f"Write at most {MAX_BATCH} in one batch.",
            )
        if len(memories) <= IN_LOOP:
            prepared = prepare(memories)
        else:
            prepared = await anyio.to_thread.run_sync(prepare, memories)
        added, spaces = await self.database.write(
            lambda c: self._intake(c, tenant).insert(prepared)
        )
        for name, number in spaces.items():
            self.remember_space(tenant, name, number)
        self._was_written()
        return added

    def prepare(self, memories: Sequence[NewMemory]) -> PreparedMemories:
        return prepare(memories)

    def insert(self, connection: Connection, tenant: Tenant, prepared: Prepared) -> list[Added]:
        return self._intake(connection, tenant).insert(cast(PreparedMemories, prepared))[0]

    def _intake(self, connection: Connection, tenant: Tenant) -> Intake:
        return Intake(connection, tenant, self.words, self.vectors, self.known_spaces)

    def remember_space(self, tenant: Tenant, name: str, number: int) -> None:
        """Note the number of a namespace whose row is committed; it keeps that for ever."""
        if len(self.known_spaces) >= KNOWN_SPACES:
            self.known_spaces.clear()
        self.known_spaces[tenant, name] = number

    def _was_written(self) -> None:
        for tell in self.written:
            tell()

    async def get(self, tenant: Tenant, memory_id: str) -> Memory:
        row = await self.database.read(lambda c: _newest(c, tenant, memory_id))
        return memory_of(row)

    async def history(self, tenant: Tenant, memory_id: str) -> list[Memory]:
        mine = (m.c.tenant == tenant, m.c.id == memory_id)
        versions = select(*READ).select_from(JOINED).where(*mine).order_by(m.c.version)
        rows = await self.database.read(lambda c: c.execute(versions).all())
        if not rows:
            raise _unknown(memory_id)
        return [memory_of(row) for row in rows]

    async def page(
        self, tenant: Tenant, filter: MemoryFilter, *, limit: int, cursor: str | None
    ) -> MemoryPage:
        pieces = filter.part_of is not None
        order = _IN_THEIR_ORDER if pieces else _NEWEST
        after = _after(cursor, pieces) if cursor is not None else None

        def rows_of(connection: Connection) -> Sequence[Row[Any]]:
            condition = self._condition(connection, tenant, filter)
            if after is not None:
                condition = and_(condition, after)
            asked = select(*READ).select_from(JOINED).where(condition).order_by(*order)
            return connection.execute(asked.limit(limit + 1)).all()

        rows = await self.database.read(rows_of)
        more = len(rows) > limit
        rows = rows[:limit]
        return MemoryPage(
            tuple(memory_of(row) for row in rows), _cursor_at(rows[-1], pieces) if more else None
        )

    def _condition(
        self, connection: Connection, tenant: Tenant, filter: MemoryFilter
    ) -> ColumnElement[bool]:
        condition = chosen_by(tenant, filter)
        if filter.q is None:
            return condition
        words = query_words(filter.q)
        spaces = select(memory_spaces.c.id).where(memory_spaces.c.tenant == tenant)
        if filter.namespace is not None:
            spaces = spaces.where(memory_spaces.c.name == filter.namespace)
        inside = list(connection.execute(spaces).scalars()) if words else []
        if not inside:
            return and_(condition, m.c.serial < 0)
        having = and_(m.c.tenant == tenant, self.words.having(inside, words, "AND"))
        hits: Select[Any] | CompoundSelect[Any] = select(m.c.serial).where(having)
        if filter.part_of is None and not filter.parts:
            # A document that was cut has its words in its pieces.
            whole = m.alias("whole")
            of_it = and_(whole.c.tenant == m.c.tenant, whole.c.id == m.c.parent_id)
            hits = union(hits, select(whole.c.serial).join(m, of_it).where(having))
        return and_(condition, m.c.space.in_(inside), m.c.serial.in_(hits))

    async def edit(
        self,
        tenant: Tenant,
        memory_id: str,
        change: MemoryChange,
        *,
        source: MemorySource,
        expected_version: int | None = None,
        fence: Fence | None = None,
    ) -> Memory:
        def transaction(connection: Connection) -> Memory:
            if fence is not None:
                fence(connection)
            old = _newest(connection, tenant, memory_id, lock=True)
            _expect(old, expected_version)
            if old.superseded_by is not None:
                raise Conflict(
                    f"Memory {memory_id!r} was superseded by {old.superseded_by!r}.",
                    hint="Edit the one that took its place; this one is history.",
                )
            changed = {name: getattr(change, name) for name in change.model_fields_set}
            now = max(utcnow(), old.updated_at)
            rows = [edited(old, changed, source, now)]
            serials = [old.serial]
            if changed.keys() - {"content"} and not old.searchable:
                of_it = and_(parts_of(tenant, [memory_id]), m.c.replaced_at.is_(None))
                pieces = connection.execute(select(*READ).select_from(JOINED).where(of_it)).all()
                rows += [edited(piece, changed, source, now) for piece in pieces]
                serials += [piece.serial for piece in pieces]
            held = update(m).where(m.c.serial.in_(serials))
            connection.execute(held.values(replaced_at=now))
            erase_vectors(connection, self.vectors, serials)
            self._intake(connection, tenant).write(rows)
            return memory_of(_newest(connection, tenant, memory_id))

        written = await self.database.write(transaction)
        self._was_written()
        return written

    async def delete(
        self, tenant: Tenant, memory_ids: Sequence[str], *, expected_version: int | None = None
    ) -> int:
        def transaction(connection: Connection) -> int:
            if expected_version is not None:
                for memory_id in memory_ids:
                    _expect(_newest(connection, tenant, memory_id, lock=True), expected_version)
            return self._erase(connection, tenant, with_ids(tenant, memory_ids)).memories

        return await self._scrubbed(transaction)

    async def delete_where(self, tenant: Tenant, filter: MemoryFilter) -> int:
        everything = filter.model_copy(update={"replaced": True})

        def transaction(connection: Connection) -> int:
            condition = self._condition(connection, tenant, everything)
            ids = select(m.c.id).select_from(JOINED).where(condition)
            return self._erase(connection, tenant, with_ids(tenant, ids)).memories

        return await self._scrubbed(transaction)

    def erase_subject(
        self,
        connection: Connection,
        tenant: Tenant,
        subject: str,
        *,
        run_ids: Collection[str] = (),
        session_ids: Collection[str] = (),
    ) -> MemoriesErased:
        of_runs = [m.c.run_id.in_(part) for part in parts(run_ids)]
        of_sessions = [m.c.session_id.in_(part) for part in parts(session_ids)]
        gone = MemoriesErased(memories=0, versions=0, vectors=0, uses=0)
        for theirs in (m.c.subject == subject, *of_runs, *of_sessions):
            some = self._erase(connection, tenant, and_(m.c.tenant == tenant, theirs))
            gone = MemoriesErased(**{n: count + getattr(some, n) for n, count in gone})
        return gone

    async def sweep(self, now: datetime) -> int:
        # Of what was edited, the version that holds says when it expires.
        last = or_(m.c.replaced_at.is_(None), m.c.superseded_by.is_not(None))
        expired = and_(m.c.expires_at <= now, last)
        asked = select(m.c.tenant).where(expired).distinct()
        tenants = await self.database.read(lambda c: c.execute(asked).scalars().all())
        return sum([await self._swept(Tenant(one), expired) for one in tenants])

    async def _swept(self, tenant: Tenant, expired: ColumnElement[bool]) -> int:
        theirs = and_(m.c.tenant == tenant, expired)
        return await self._scrubbed(lambda c: self._erase(c, tenant, theirs).memories)

    async def _scrubbed(self, transaction: Callable[[Connection], int]) -> int:
        count = await self.database.write(transaction)
        if count:
            await self.database.scrub()
        return count

    def _erase(
        self, connection: Connection, tenant: Tenant, condition: ColumnElement[bool]
    ) -> MemoriesErased:
        """Every version of the tenant's memories that have one with ``condition``, and of their
        pieces."""
        ids = sorted(set(connection.execute(select(m.c.id).where(condition)).scalars()))
        versions = vectors = uses = 0
        for start in range(0, len(ids), ERASED_AT_ONCE):
            some = ids[start : start + ERASED_AT_ONCE]
            parts = connection.execute(select(m.c.id).where(parts_of(tenant, some)).distinct())
            some += parts.scalars()
            theirs = with_ids(tenant, some)
            rows = connection.execute(select(m.c.serial, m.c.space, m.c.words).where(theirs)).all()
            self.words.remove(connection, [(r.serial, r.space, r.words) for r in rows if r.words])
            vectors += erase_vectors(connection, self.vectors, [row.serial for row in rows])
            versions += connection.execute(delete(m).where(theirs)).rowcount
            used = (memory_uses.c.tenant == tenant, memory_uses.c.memory_id.in_(some))
            uses += connection.execute(delete(memory_uses).where(*used)).rowcount
        return MemoriesErased(memories=len(ids), versions=versions, vectors=vectors, uses=uses)

    async def search(self, tenant: Tenant, query: MemoryQuery) -> list[Found]:
        assert self.search_with is not None, "memory.recall.Recall was not joined to the store"
        return await self.search_with(tenant, query)

    async def neighbours(
        self, tenant: Tenant, memory_id: str, *, before: int = 2, after: int = 2
    ) -> list[Memory]:
        def rows_of(connection: Connection) -> Sequence[Row[Any]]:
            own = _newest(connection, tenant, memory_id)
            if own.session_id is None:
                return []
            near = and_(
                m.c.space == own.space,
                m.c.session_id == own.session_id,
                m.c.position.between(own.position - before, own.position + after),
                m.c.replaced_at.is_(None),
                m.c.id != memory_id,
            )
            asked = select(*READ).select_from(JOINED).where(near).order_by(m.c.position)
            return connection.execute(asked).all()

        return [memory_of(row) for row in await self.database.read(rows_of)]

    async def used(
        self, tenant: Tenant, uses: Sequence[MemoryUse], *, fence: Fence | None = None
    ) -> set[str]:
        def transaction(connection: Connection) -> set[str]:
            if fence is not None:
                fence(connection)
            # Held: whoever deletes one meanwhile finds its use, and deletes that too.
            held = select(m.c.id).where(with_ids(tenant, [use.memory_id for use in uses]))
            held = held.order_by(m.c.serial).with_for_update(read=True, key_share=True)
            there = set(connection.execute(held).scalars())
            noted = [{"tenant": tenant, **dict(use)} for use in uses if use.memory_id in there]
            insert_new(connection, memory_uses, noted)
            return there

        return await self.database.write(transaction)

    async def used_by(self, tenant: Tenant, memory_id: str, *, limit: int = 100) -> list[MemoryUse]:
        def rows_of(connection: Connection) -> Sequence[Row[Any]]:
            _newest(connection, tenant, memory_id)
            u = memory_uses
            asked = select(u).where(u.c.memory_id == memory_id, u.c.tenant == tenant)
            return connection.execute(asked.order_by(u.c.at.desc()).limit(limit)).all()

        rows = await self.database.read(rows_of)
        return [MemoryUse(**{n: getattr(row, n) for n in MemoryUse.model_fields}) for row in rows]

    async def export(
        self, tenant: Tenant, filter: MemoryFilter, *, batch: int = 500
    ) -> AsyncIterator[Memory]:
        everything = filter.model_copy(update={"parts": True})
        last = 0
        while True:

            def rows_of(connection: Connection, last: int = last) -> Sequence[Row[Any]]:
                condition = and_(self._condition(connection, tenant, everything), m.c.serial > last)
                asked = select(*READ).select_from(JOINED).where(condition).order_by(m.c.serial)
                return connection.execute(asked.limit(batch)).all()

            rows = await self.database.read(rows_of)
            for row in rows:
                yield memory_of(row)
            if len(rows) < batch:
                return
            last = rows[-1].serial

    async def stats(self, tenant: Tenant) -> MemoryStats:
        embedder, number, trouble = Embeds()
        if self.describe_embedder is not None:
            embedder, number, trouble = await self.describe_embedder()
        counted = (
            select(m.c.kind, memory_spaces.c.name, m.c.replaced_at.is_(None), func.count(),
                   func.count(memory_vectors.c.serial),
                   func.count().filter(m.c.searchable),
                   func.count().filter(m.c.parent_id.is_not(None)))
            .select_from(JOINED.outerjoin(
                memory_vectors,
                and_(memory_vectors.c.serial == m.c.serial, memory_vectors.c.embedder == number),
            ))
            .where(m.c.tenant == tenant)
            .group_by(m.c.kind, memory_spaces.c.name, m.c.replaced_at.is_(None))
        )  # fmt: skip
        by_kind: dict[str, int] = {}
        by_namespace: dict[str, int] = {}
        replaced = vectors = searchable = pieces = 0
        rows = await self.database.read(lambda c: c.execute(counted).all())
        for kind, name, holds, count, embedded, found, cut in rows:
            if not holds:
                replaced += count
                continue
            by_kind[kind] = by_kind.get(kind, 0) + count
            by_namespace[name] = by_namespace.get(name, 0) + count
            vectors += embedded
            searchable += found
            pieces += cut
        return MemoryStats(
            memories=sum(by_kind.values()),
            by_kind=by_kind,
            by_namespace=by_namespace,
            pieces=pieces,
            replaced=replaced,
            vectors=vectors,
            waiting=searchable - vectors if embedder else 0,
            embedder=embedder,
            trouble=trouble,
        )


_NEWEST = (m.c.created_at.desc(), m.c.id.desc(), m.c.version.desc())
_IN_THEIR_ORDER = (m.c.part, m.c.version.desc())
"""Of the pieces of one document."""


def _cursor_at(row: Row[Any], pieces: bool) -> str:
    return encode_cursor(row.created_at, f"{row.part if pieces else row.id} {row.version}")


def _after(cursor: str, pieces: bool) -> ColumnElement[bool]:
    """What comes after ``cursor``. Raises ``InvalidCursor``."""
    at, identity = decode_cursor(cursor)
    last, _, version = identity.partition(" ")
    # Earlier servers named no version, and went on with the next memory.
    numbers = [version or "0", *([last] if pieces else [])]
    if not all(number.isdecimal() and len(number) < 10 for number in numbers):
        raise unknown_cursor(cursor)
    older = m.c.version < int(version or 0)
    if pieces:
        return or_(m.c.part > int(last), and_(m.c.part == int(last), older))
    same = or_(m.c.id < last, and_(m.c.id == last, older))
    return or_(m.c.created_at < at, and_(m.c.created_at == at, same))


def _newest(
    connection: Connection, tenant: Tenant, memory_id: str, *, lock: bool = False
) -> Row[Any]:
    mine = (m.c.tenant == tenant, m.c.id == memory_id)
    if lock:
        # The first version, which stays the same row: whoever waited for it reads the newest after.
        first = select(m.c.serial).where(*mine).order_by(m.c.version).limit(1)
        connection.execute(first.with_for_update())
    asked = select(*READ).select_from(JOINED).where(*mine).order_by(m.c.version.desc()).limit(1)
    row = connection.execute(asked).first()
    if row is None:
        raise _unknown(memory_id)
    return row


def _unknown(memory_id: str) -> NotFound:
    return NotFound(
        f"There is no memory {memory_id!r}.", hint="GET /api/v1/memories lists those there are."
    )


def _expect(row: Row[Any], version: int | None) -> None:
    if version is not None and row.version != version:
        raise PreconditionFailed(
            f"Memory {row.id!r} is at version {row.version}, not {version}.",
            hint="Read it again, and make the change to what it says now.",
        )
