"""Uploaded files in tables: a row each, and their bytes in parts of at most 256 KiB.

Leans on the database. Refuses to show a file that is not whole or has expired. Each part is
a transaction of its own, so that a large file keeps no other writer waiting; the row gets its size
last, and what a crash left without one is swept by the uploads that follow.
"""

from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Final

from sqlalchemy import Connection, Row, delete, func, insert, or_, select, tuple_, update

from agent_server.domain.base import utcnow
from agent_server.domain.errors import Conflict, NotFound
from agent_server.domain.files import StoredFile
from agent_server.domain.ids import Tenant, new_id
from agent_server.storage.database import Database
from agent_server.storage.tables import file_parts, files

PART_BYTES: Final = 262_144
LOST_AFTER: Final = timedelta(hours=1)
"""An upload that is not whole after so long has nobody who goes on with it."""


class Files:
    """The files of all tenants; each call is for one of them."""

    def __init__(self, database: Database, max_total_bytes: int) -> None:
        """``max_total_bytes`` is what one tenant's files may be together."""
        self._database = database
        self._max_total = max_total_bytes

    async def add(
        self,
        tenant: Tenant,
        filename: str,
        purpose: str,
        media_type: str,
        content: AsyncIterator[bytes],
        expires_at: datetime | None,
    ) -> StoredFile:
        """Keep the file; ``content`` comes in parts of at most ``PART_BYTES``.

        Raises ``Conflict`` where that is too much, and keeps nothing then, or when ``content`` raises.
        """
        await self._database.write(_sweep)
        made = StoredFile(
            id=new_id("file"),
            filename=filename,
            purpose=purpose,
            media_type=media_type,
            size=0,
            created_at=utcnow(),
            expires_at=expires_at,
        )
        row = {**made.model_dump(), "tenant": tenant, "size": None}
        await self._database.write(lambda c: c.execute(insert(files).values(row)))
        file_id, size, number = made.id, 0, 0
        try:
            async for data in content:
                part = {"file_id": file_id, "number": number, "data": data}
                await self._database.write(partial(_put, part=part))
                size, number = size + len(data), number + 1
            await self._database.write(lambda c: self._complete(c, tenant, file_id, size))
        except BaseException:
            await self._database.write(lambda c: _delete(c, tenant, file_id))
            raise
        return made.model_copy(update={"size": size})

    def _complete(self, connection: Connection, tenant: Tenant, file_id: str, size: int) -> None:
        held = select(func.coalesce(func.sum(files.c.size), 0)).where(files.c.tenant == tenant)
        if connection.execute(held).scalar_one() + size > self._max_total:
            raise Conflict(
                f"The files of this tenant would be more than {self._max_total:,} bytes together.",
                hint="Delete some, or raise AGENT_SERVER_MAX_FILES_BYTES.",
            )
        connection.execute(update(files).where(files.c.id == file_id).values(size=size))

    async def get(self, tenant: Tenant, file_id: str) -> StoredFile:
        """Raises ``NotFound``, for another tenant's too."""
        query = select(files).where(*_whole(tenant), files.c.id == file_id)
        row = await self._database.read(lambda c: c.execute(query).one_or_none())
        if row is None:
            raise _no_file(file_id)
        return _file_of(row)

    async def content(self, tenant: Tenant, file_id: str) -> AsyncIterator[bytes]:
        """Its bytes, in parts. Raises ``NotFound`` for a file that goes meanwhile."""
        size, read, number = (await self.get(tenant, file_id)).size, 0, 0
        while read < size:
            part = await self._database.read(partial(_part, file_id=file_id, number=number))
            if part is None:
                raise _no_file(file_id)
            read, number = read + len(part), number + 1
            yield part

    async def whole(self, tenant: Tenant, file_id: str) -> tuple[StoredFile, bytes]:
        """The file and all its bytes. Raises ``NotFound``."""
        found = await self.get(tenant, file_id)
        return found, b"".join([part async for part in self.content(tenant, file_id)])

    async def page(
        self,
        tenant: Tenant,
        *,
        purpose: str | None,
        behind: StoredFile | None,
        newest: bool,
        limit: int,
    ) -> tuple[list[StoredFile], bool]:
        """``limit`` files, the ``newest`` or the oldest first, and whether there are more."""
        order = (files.c.created_at, files.c.id)
        query = select(files).where(*_whole(tenant))
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        if behind is not None:
            place, last = tuple_(*order), (behind.created_at, behind.id)
            query = query.where(place < last if newest else place > last)
        query = query.order_by(*(c.desc() if newest else c for c in order)).limit(limit + 1)
        rows = await self._database.read(lambda c: c.execute(query).all())
        return [_file_of(row) for row in rows[:limit]], len(rows) > limit

    async def delete(self, tenant: Tenant, file_id: str) -> None:
        """Raises ``NotFound``."""
        if not await self._database.write(lambda c: _delete(c, tenant, file_id)):
            raise _no_file(file_id)
        await self._database.scrub()


def _whole(tenant: Tenant) -> tuple[Any, ...]:
    live = or_(files.c.expires_at.is_(None), files.c.expires_at > utcnow())
    return files.c.tenant == tenant, files.c.size.is_not(None), live


def _put(connection: Connection, part: dict[str, Any]) -> None:
    connection.execute(insert(file_parts).values(part))


def _part(connection: Connection, file_id: str, number: int) -> bytes | None:
    place = file_parts.c.file_id == file_id, file_parts.c.number == number
    return connection.execute(select(file_parts.c.data).where(*place)).scalar()


def _delete(connection: Connection, tenant: Tenant, file_id: str) -> int:
    gone = connection.execute(
        delete(files).where(files.c.tenant == tenant, files.c.id == file_id)
    ).rowcount
    if gone:
        connection.execute(delete(file_parts).where(file_parts.c.file_id == file_id))
    return gone


def _sweep(connection: Connection) -> None:
    """Delete what has expired, and what never became whole."""
    now = utcnow()
    lost = files.c.size.is_(None) & (files.c.created_at < now - LOST_AFTER)
    dead = select(files.c.id).where(or_(files.c.expires_at <= now, lost)).limit(100)
    ids = list(connection.execute(dead).scalars())
    if ids:
        connection.execute(delete(file_parts).where(file_parts.c.file_id.in_(ids)))
        connection.execute(delete(files).where(files.c.id.in_(ids)))


def _no_file(file_id: str) -> NotFound:
    return NotFound(f"There is no file {file_id[:100]!r}.", hint="GET /v1/files lists them.")


def _file_of(row: Row[Any]) -> StoredFile:
    return StoredFile(
        id=row.id,
        filename=row.filename,
        purpose=row.purpose,
        media_type=row.media_type,
        size=row.size,
        created_at=row.created_at,
        expires_at=row.expires_at,
    )
