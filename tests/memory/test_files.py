"""Uploaded files in tables, on both databases."""

from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from sqlalchemy import func, select, update

from agent_server.domain.base import utcnow
from agent_server.domain.errors import Conflict, NotFound
from agent_server.domain.files import StoredFile
from agent_server.domain.ids import Tenant
from agent_server.storage.database import Database
from agent_server.storage.files import Files
from agent_server.storage.tables import file_parts, files

US, THEM = Tenant("us"), Tenant("them")


async def _parts(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def _cut_off() -> AsyncIterator[bytes]:
    yield b"begun"
    raise ConnectionError("the client went away")


async def put(
    kept: Files, *parts: bytes, tenant: Tenant = US, for_s: float | None = None
) -> StoredFile:
    until = utcnow() + timedelta(seconds=for_s) if for_s is not None else None
    return await kept.add(tenant, "f.txt", "user_data", "text/plain", _parts(*parts), until)


async def left(database: Database) -> tuple[int, int]:
    def count(connection: object) -> tuple[int, int]:
        found = [
            connection.execute(select(func.count()).select_from(table)).scalar_one()  # type: ignore[attr-defined]
            for table in (files, file_parts)
        ]
        return found[0], found[1]

    return await database.read(count)


async def test_a_file_is_its_tenants_alone(database: Database) -> None:
    kept = Files(database, 100)
    made = await put(kept, b"one ", b"two")
    assert await kept.whole(US, made.id) == (made, b"one two") and made.size == 7
    for asked in (kept.get(THEM, made.id), kept.whole(THEM, made.id), kept.delete(THEM, made.id)):
        with pytest.raises(NotFound):
            await asked
    assert (await kept.page(THEM, purpose=None, behind=None, newest=True, limit=9))[0] == []
    await kept.delete(US, made.id)
    assert await left(database) == (0, 0)


async def test_what_is_too_much_or_cut_off_leaves_nothing(database: Database) -> None:
    kept = Files(database, 10)
    await put(kept, b"12345678")
    with pytest.raises(Conflict, match="10 bytes"):
        await put(kept, b"123")
    await put(kept, b"123", tenant=THEM)
    with pytest.raises(ConnectionError):
        await kept.add(US, "f", "user_data", "text/plain", _cut_off(), None)
    assert await left(database) == (2, 2)


async def test_what_expired_or_was_lost_is_gone_with_the_next_upload(database: Database) -> None:
    kept = Files(database, 100)
    old, lost = await put(kept, b"old", for_s=-1), await put(kept, b"lost")
    with pytest.raises(NotFound):
        await kept.get(US, old.id)
    long_ago = {"size": None, "created_at": utcnow() - timedelta(hours=2)}
    await database.write(
        lambda c: c.execute(update(files).where(files.c.id == lost.id).values(long_ago))
    )
    made = await put(kept, b"new")
    assert await left(database) == (1, 1)
    found, more = await kept.page(US, purpose=None, behind=None, newest=False, limit=1)
    assert found == [made] and not more
