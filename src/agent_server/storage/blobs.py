"""Where blobs are kept: the port, and the stores in the database and in a directory.

Leans on the database's transactions and on files. Refuses to know what a blob is and who uses it:
``outside`` does. A store on S3 is in ``s3``.

A blob has a key of its own each time that it is made, its hash and a random end. So whoever deletes
one cannot hit another one of the same content that somebody makes meanwhile.
"""

import errno
import hashlib
import os
import re
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from anyio import to_thread
from sqlalchemy import ColumnElement, Connection, delete, func, select
from sqlalchemy.dialects import postgresql, sqlite

from agent_server.domain.base import utcnow
from agent_server.domain.errors import (
    ConfigurationError,
    DatabaseUnavailable,
    NotFound,
    StorageFull,
)
from agent_server.storage.tables import EPOCH, blob_bytes, blobs

T = TypeVar("T")
KEY: Final = re.compile(r"[0-9a-f]{64}\.[0-9a-f]{16}")
PROBE: Final = b"agent-server"
"""What ``check`` writes."""
INSERTS: Final[dict[str, Any]] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


def new_key(data: bytes) -> str:
    """The key of a new blob of these bytes."""
    return f"{hashlib.sha256(data).hexdigest()}.{secrets.token_hex(8)}"


def hash_of(key: str) -> str:
    """The SHA-256 of the bytes that ``key`` names."""
    return key.partition(".")[0]


class BlobStore(Protocol):
    """Keeps bytes under a tenant and a key of ``new_key``. Three implementations:
    ``DatabaseBlobs``, ``DirectoryBlobs`` and ``s3.S3Blobs``; ``testing.blobs`` is the suite for more.

    Every call may raise ``DatabaseUnavailable`` when the store cannot be reached.
    """

    name: str
    """For people: where this is."""

    async def put(self, tenant: str, key: str, data: bytes) -> None:
        """Keep ``data``; it is durable when this returns, and nothing of it is there when this
        raises. A second time changes nothing. Raises ``StorageFull``."""

    async def get(self, tenant: str, key: str) -> bytes:
        """The bytes. Raises ``NotFound``."""

    async def exists(self, tenant: str, key: str) -> bool: ...

    async def delete(self, tenant: str, key: str) -> None:
        """Forget the bytes; nothing happens when there are none."""

    def old(self, age: timedelta) -> AsyncIterator[str]:
        """The paths of what was put so long ago or longer. Each ends with its key; what a put left
        behind that was cut off does too."""

    async def discard(self, path: str) -> None:
        """Delete what ``old`` found."""


async def check(store: BlobStore) -> None:
    """Raises what is wrong with the store: it cannot be reached, written, read or cleaned."""
    key = new_key(PROBE)
    await store.put("probe", key, PROBE)
    try:
        if await store.get("probe", key) != PROBE:
            raise DatabaseUnavailable(f"{store.name} answers with other bytes than were put there.")
    finally:
        await store.delete("probe", key)


class Transactions(Protocol):
    """The part of a database that this needs."""

    async def write(self, fn: Callable[[Connection], T]) -> T: ...

    async def read(self, fn: Callable[[Connection], T]) -> T: ...


class DatabaseBlobs:
    """Blobs in a table beside the others: nothing more to set up or to back up."""

    name = "the database"

    def __init__(self, database: Transactions) -> None:
        self._database = database

    async def put(self, tenant: str, key: str, data: bytes) -> None:
        values = {"tenant": tenant, "key": key, "data": data, "made_at": utcnow()}
        await self._database.write(
            lambda c: c.execute(
                INSERTS[c.dialect.name](blob_bytes).values(values).on_conflict_do_nothing()
            )
        )

    async def get(self, tenant: str, key: str) -> bytes:
        query = select(blob_bytes.c.data).where(*_of(tenant, key))
        found = await self._database.read(lambda c: c.execute(query).scalar())
        if found is None:
            raise missing(key)
        return bytes(found)

    async def exists(self, tenant: str, key: str) -> bool:
        query = select(func.count()).select_from(blob_bytes).where(*_of(tenant, key))
        return bool(await self._database.read(lambda c: c.execute(query).scalar()))

    async def delete(self, tenant: str, key: str) -> None:
        gone = delete(blob_bytes).where(*_of(tenant, key))
        await self._database.write(lambda c: c.execute(gone))

    async def old(self, age: timedelta) -> AsyncIterator[str]:
        known = select(blobs.c.key).where(blobs.c.key == blob_bytes.c.key)
        query = select(blob_bytes.c.key).where(
            blob_bytes.c.made_at <= utcnow() - age, ~known.exists()
        )
        for key in await self._database.read(lambda c: c.execute(query).scalars().all()):
            yield key

    async def discard(self, path: str) -> None:
        gone = delete(blob_bytes).where(blob_bytes.c.key == path)
        await self._database.write(lambda c: c.execute(gone))


def _of(tenant: str, key: str) -> tuple[ColumnElement[bool], ...]:
    return blob_bytes.c.tenant == tenant, blob_bytes.c.key == key


class DirectoryBlobs:
    """Blobs as files below one folder, which every node must see: ``tenant/ab/key``.

    A file appears whole or not at all, and survives a power cut once ``put`` has returned.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.name = f"the folder {str(root)!r}"

    async def put(self, tenant: str, key: str, data: bytes) -> None:
        await self._do(lambda: self._write(self._path(tenant, key), data))

    async def get(self, tenant: str, key: str) -> bytes:
        return await self._do(lambda: self._read(self._path(tenant, key), key))

    async def exists(self, tenant: str, key: str) -> bool:
        return await self._do(self._path(tenant, key).is_file)

    async def delete(self, tenant: str, key: str) -> None:
        path = self._path(tenant, key)
        await self._do(lambda: path.unlink(missing_ok=True))

    async def old(self, age: timedelta) -> AsyncIterator[str]:
        before = (utcnow() - age - EPOCH).total_seconds()
        for folder in await self._do(lambda: sorted(self._root.glob("*/*"))):
            for path in await self._do(lambda: _files(folder, before)):  # noqa: B023
                yield path.relative_to(self._root).as_posix()

    async def discard(self, path: str) -> None:
        if _FILE.fullmatch(path) is None:
            raise ValueError(f"{path!r} is not the path of a blob")
        await self._do(lambda: (self._root / path).unlink(missing_ok=True))

    def _path(self, tenant: str, key: str) -> Path:
        if KEY.fullmatch(key) is None:
            raise ValueError(f"{key!r} is not the key of a blob")
        return self._root / folder_of(tenant) / key[:2] / key

    async def _do(self, work: Callable[[], T]) -> T:
        # In threads of anyio's: those of the loop are the tools'.
        try:
            return await to_thread.run_sync(work)
        except OSError as error:
            raise self._told(error) from error

    def _told(self, error: OSError) -> Exception:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return StorageFull(
                f"The disk that holds {self.name} is full.",
                hint="Free some space; what was stored before is intact.",
            )
        return DatabaseUnavailable(
            f"{self.name[0].upper()}{self.name[1:]} cannot be used: {error.strerror or error}.",
            hint="Check AGENT_SERVER_BLOBS and that this user may read and write there.",
        )

    @staticmethod
    def _write(path: Path, data: bytes) -> None:
        _make_folder(path.parent)
        passing = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
        try:
            with open(os.open(passing, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            passing.rename(path)
        except BaseException:
            passing.unlink(missing_ok=True)
            raise
        _sync(path.parent)

    @staticmethod
    def _read(path: Path, key: str) -> bytes:
        try:
            with open(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb") as file:
                return file.read()
        except FileNotFoundError:
            raise missing(key) from None


_NAME: Final = re.compile(r"(\.[0-9a-f]{8})?\.?" + KEY.pattern)
_FILE: Final = re.compile(r"[^/]+/[0-9a-f]{2}/" + _NAME.pattern)


def folder_of(tenant: str) -> str:
    """A name for a tenant's part of a store, whatever the tenant is called."""
    if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", tenant):
        return tenant
    return f"hash.{hashlib.sha256(tenant.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}"


def _make_folder(folder: Path) -> None:
    """``folder`` and those above it, each known to the disk."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
        _sync(folder.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path, before: float) -> list[Path]:
    """The files in ``folder`` that were last written before the moment."""
    found = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            if path.stat().st_mtime <= before and _NAME.fullmatch(path.name):
                found.append(path)
    return found


def missing(key: str) -> NotFound:
    return NotFound(f"There is no blob {key!r}.")


def blob_store(url: str, database: Transactions, timeout_s: float) -> BlobStore:
    """The store that ``AGENT_SERVER_BLOBS``, or an item of ``_BLOBS_ALSO``, names: ``database``,
    ``file:///folder`` or ``s3://bucket/prefix``. Raises ``ConfigurationError``."""
    if url == "database":
        return DatabaseBlobs(database)
    parts = urlsplit(url)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and len(parts.path) > 1:
        return DirectoryBlobs(Path(unquote(parts.path)))
    if parts.scheme == "s3" and parts.netloc:
        # Not at the top of the file: it is an extra.
        try:
            s3 = import_module("agent_server.storage.s3")
        except ImportError as error:
            raise ConfigurationError(
                "Blobs on S3 need the extra 's3', which is not installed.",
                hint="pip install 'agent-server[s3]'",
            ) from error
        made: BlobStore = s3.S3Blobs(parts.netloc, parts.path.strip("/"), timeout_s)
        return made
    raise ConfigurationError(
        f"AGENT_SERVER_BLOBS is {url!r}, which names no place.",
        hint="Use database, file:///absolute/folder or s3://bucket/prefix.",
    )
