"""Large values of rows, kept outside them: placed before the row is stored, fetched when it is read.

Leans on ``references`` for what a row holds instead, and on a ``BlobStore`` for the bytes. Refuses to
know runs: a row's blobs belong to whoever ``owned`` names.

A blob is made before the row that refers to it. ``blobs`` has a row for each, ``blob_uses`` one for
each run that refers to one; a use is written in the transaction of the row, with the blob's row
locked, and fails it when the blob has gone meanwhile, so that it is made again. Whoever collects locks
blobs before looking whether they are used: so none goes that is, without a word between the two.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Final, TypeVar

import anyio
import structlog
from anyio import to_thread
from sqlalchemy import ColumnElement, Connection, Row, delete, func, select, update

from agent_server.domain.base import utcnow
from agent_server.domain.errors import (
    ConfigurationError,
    DatabaseUnavailable,
    InternalError,
    NotFound,
    StorageFull,
)
from agent_server.settings import Settings
from agent_server.storage.blobs import (
    INSERTS,
    PROBE,
    BlobStore,
    DatabaseBlobs,
    Transactions,
    blob_store,
    hash_of,
    new_key,
)
from agent_server.storage.database import Database, Run
from agent_server.storage.references import (
    LEAST,
    OPENING,
    SPILLING,
    Cut,
    Elsewhere,
    Known,
    NotLoaded,
    Opening,
    Piece,
    Spilling,
)
from agent_server.storage.tables import blob_bytes, blob_uses, blobs

T = TypeVar("T")
log = structlog.get_logger(__name__)
GRACE: Final = timedelta(hours=1)
"""How long a blob that nobody uses is kept for a row that is about to."""
TRIES: Final = 8
"""Times a transaction is run whose blobs come and go."""
AT_ONCE: Final = 8
"""Blobs of one transaction that are fetched or placed side by side."""
COLLECTED: Final = 100
"""Blobs that one transaction of the collector looks at."""

APART: Final = blobs.c.doomed.is_(False) & blobs.c.key.not_in(select(blob_bytes.c.key))
"""The bytes are not in the database."""

Observer = Callable[[str, int], None]
"""Told what happened to a blob (``written``, ``read``, ``deleted``), and its bytes."""


class _NotPlaced(Elsewhere):
    """It stores values that are no blobs yet."""


class _Gone(Elsewhere):
    """It refers to a blob that was collected meanwhile."""


class Owned:
    """A transaction whose large values belong to one run; see ``owned``."""

    def __init__(self, fn: Callable[[Connection], Any], tenant: str, run_id: str) -> None:
        self._fn = fn
        self.tenant = tenant
        self._run_id = run_id
        self.limit: int | None = None
        """None: large values stay in their rows."""
        self.known = Known()
        self.wanted: set[str] = set()
        self._insists = True

    def __call__(self, connection: Connection) -> Any:
        if self.limit is None:
            return self._fn(connection)
        spilling = Spilling(self.limit, self.tenant, self._run_id, self.known)
        token = SPILLING.set(spilling)
        try:
            result = self._fn(connection)
        finally:
            SPILLING.reset(token)
        if spilling.wanted and self._insists:
            self.wanted = spilling.wanted
            raise _NotPlaced
        if spilling.used:
            self._use(connection, spilling.used)
        return result

    def leave(self) -> None:
        """Let large values stay in their rows: they are others each time that this runs, or their
        blobs are collected as fast as they are made."""
        self.known.clear()
        self._insists = False

    def _use(self, connection: Connection, used: set[tuple[str, str, str]]) -> None:
        keys = {key for _, key, _ in used}
        held = select(blobs.c.key).where(blobs.c.key.in_(keys), blobs.c.doomed.is_(False))
        if connection.dialect.name == "postgresql":
            held = held.order_by(blobs.c.key).with_for_update(read=True)
        if set(connection.execute(held).scalars()) != keys:
            self.known.clear()
            raise _Gone
        rows = [
            {"run_id": run_id, "key": key, "held_by": table, "tenant": self.tenant}
            for run_id, key, table in sorted(used)
        ]
        statement = INSERTS[connection.dialect.name](blob_uses).on_conflict_do_nothing()
        connection.execute(statement, rows)


def owned(fn: Callable[[Connection], T], tenant: str, run_id: str) -> Callable[[Connection], T]:
    """``fn`` as a transaction whose large values may be kept outside: it stores rows of this run,
    and of others within ``belonging``."""
    return Owned(fn, tenant, run_id)


class _Opened:
    """A transaction with the blobs that it reads."""

    def __init__(
        self, fn: Callable[[Connection], Any], loaded: dict[str, bytes], lost: dict[str, str]
    ) -> None:
        self._fn = fn
        self._loaded = loaded
        self._lost = lost

    def __call__(self, connection: Connection) -> Any:
        opening = Opening(self._loaded, self._lost)
        token = OPENING.set(opening)
        try:
            result = self._fn(connection)
        except Exception:
            if not opening.missing:
                raise
        finally:
            OPENING.reset(token)
        if opening.missing:
            raise NotLoaded(opening.missing)
        return result


@dataclass
class Moved:
    """What came of moving blobs."""

    blobs: int = 0
    bytes: int = 0
    lost: int = 0
    """Those that are nowhere, or nowhere whole."""


class Outside:
    """What a database asks about large values. Safe to use from any number of tasks."""

    def __init__(
        self,
        database: Transactions,
        store: BlobStore,
        limit: int | None,
        observe: Observer = lambda what, size: None,
        at: Callable[[str], None] = lambda point: None,
        also: Sequence[BlobStore] = (),
    ) -> None:
        """Values over ``limit`` bytes of JSON go to ``store``, if their transaction is owned; with
        None, none does. What is not in the store is looked for in ``also`` and in the database, where
        it may have been before. ``at`` is told of points at which a crash is interesting."""
        self._database = database
        self.store = store
        self._limit = limit
        others = [*also]
        if not any(isinstance(one, DatabaseBlobs) for one in (store, *also)):
            others.append(DatabaseBlobs(database))
        self._others = tuple(others)
        self._observe = observe
        self._at = at

    async def run(self, run: Run[T], fn: Callable[[Connection], T]) -> T:
        """Run the transaction ``fn`` until all is there that it needs. Raises what it raises (then
        nothing is left of its blobs, unless the database was away), and what the store does."""
        mine = fn if isinstance(fn, Owned) else None
        if mine is not None:
            mine.limit = self._limit
        try:
            return await run(fn)
        except Elsewhere as error:
            needed = error
        loaded: dict[str, bytes] = {}
        lost: dict[str, str] = {}
        opened = _Opened(fn, loaded, lost)
        for number in range(TRIES):
            if isinstance(needed, NotLoaded):
                await self._load(needed.keys, loaded, lost)
            elif mine is not None and number < TRIES // 2:
                await self._place(mine)
            elif mine is not None:
                mine.leave()
            try:
                return await run(opened)
            except Elsewhere as error:
                needed = error
            except (DatabaseUnavailable, StorageFull):
                raise  # Perhaps it was stored, and perhaps it is tried again.
            except Exception:
                if mine is not None:
                    with suppress(DatabaseUnavailable, StorageFull):
                        await self.forget(mine.tenant, mine.known.pieces.values())
                raise
        raise InternalError("The blobs that a transaction needs come and go.")

    # Placing -----------------------------------------------------------------------------------

    async def _place(self, transaction: Owned) -> None:
        tenant, known = transaction.tenant, transaction.known
        for text in sorted(transaction.wanted):
            cut = await to_thread.run_sync(Cut, text, transaction.limit or LEAST)

            async def put(piece: Piece) -> None:
                if piece.data not in known.pieces:
                    known.pieces[piece.data] = await self._put(tenant, piece.data)
                piece.key = known.pieces[piece.data]

            await _side_by_side([partial(put, piece) for piece in cut.pieces])
            known.texts[text] = cut.stored(tenant)

    async def _put(self, tenant: str, data: bytes) -> str:
        """Make ``data`` a blob, or find the one that it is: its key."""
        key = await to_thread.run_sync(new_key, data)
        found = await self._database.write(lambda c: _find(c, tenant, hash_of(key)))
        if found is not None:
            return found
        await self.store.put(tenant, key, data)
        self._observe("written", len(data))
        self._at("blob.after_put")
        found = await self._database.write(lambda c: _enter(c, tenant, key, len(data)))
        if found != key:
            await self.store.delete(tenant, key)
        self._at("blob.after_enter")
        return found

    # Fetching ----------------------------------------------------------------------------------

    async def _load(
        self, keys: Collection[tuple[str, str]], loaded: dict[str, bytes], lost: dict[str, str]
    ) -> None:
        async def load(tenant: str, key: str) -> None:
            try:
                loaded[key] = await self.get(tenant, key)
            except NotFound as error:
                log.error("a large value is lost", tenant=tenant, reason=error.detail)
                lost[key] = error.detail

        await _side_by_side([partial(load, *one) for one in sorted(keys) if one[1] not in loaded])

    async def get(self, tenant: str, key: str) -> bytes:
        """The bytes of a blob. Raises ``NotFound``, also when they are not whole."""
        try:
            data = await self._get(tenant, key)
        except NotFound as error:
            raise NotFound(f"The blob {key!r} is not in {self.store.name}.") from error
        self._observe("read", len(data))
        if hash_of(await to_thread.run_sync(new_key, data)) != hash_of(key):
            raise NotFound(f"The blob {key!r} in {self.store.name} is not what was stored.")
        return data

    async def _get(self, tenant: str, key: str) -> bytes:
        # Twice in the first: it may be moved there meanwhile.
        for store in (self.store, *self._others):
            with suppress(NotFound):
                return await store.get(tenant, key)
        return await self.store.get(tenant, key)

    # Collecting --------------------------------------------------------------------------------

    async def collect(self) -> int:
        """Delete the blobs that no row refers to and that nobody wanted within ``GRACE``, and what
        a crash left in the store; how many. Raises when the store does: the rest is found again.
        """
        old = blobs.c.wanted_at <= utcnow() - GRACE
        return await self._collect(old) + await self._discard_strays()

    async def forget(self, tenant: str, keys: Collection[str]) -> int:
        """Delete at once those of these blobs of ``tenant`` that no row refers to any more, and what
        an earlier call could not."""
        gone, every = 0, sorted(keys)
        for start in range(0, max(len(every), 1), COLLECTED):
            some = blobs.c.key.in_(every[start : start + COLLECTED])
            gone += await self._collect((blobs.c.tenant == tenant) & (some | blobs.c.doomed))
        return gone

    async def _collect(self, which: ColumnElement[bool]) -> int:
        gone, after = 0, ""
        while loose := await self._database.read(partial(_loose, which=which, after=after)):
            after = loose[-1]
            doomed = await self._database.write(partial(_doom, which=which, keys=loose))
            await _side_by_side([partial(self._delete, one.tenant, one.key) for one in doomed])
            keys = [one.key for one in doomed]
            await self._database.write(
                lambda c: c.execute(delete(blobs).where(blobs.c.key.in_(keys)))  # noqa: B023
            )
            gone += len(doomed)
            for one in doomed:
                self._observe("deleted", one.size)
        return gone

    async def _delete(self, tenant: str, key: str) -> None:
        for store in (self.store, *self._others):
            await store.delete(tenant, key)

    async def _discard_strays(self) -> int:
        """Delete from the store what a crash left there without a row; how many. Here nothing but
        its age tells it from what is about to have one."""
        gone = 0
        for store in (self.store, *self._others):
            some = []
            async for path in store.old(GRACE):
                some.append(path)
                if len(some) == COLLECTED:
                    gone += await self._discard(store, some)
                    some = []
            gone += await self._discard(store, some)
        return gone

    async def _discard(self, store: BlobStore, paths: Sequence[str]) -> int:
        keys = [path.rpartition("/")[2] for path in paths]
        query = select(blobs.c.key).where(blobs.c.key.in_(keys))
        known = set(await self._database.read(lambda c: c.execute(query).scalars().all()))
        strays = [path for path, key in zip(paths, keys, strict=True) if key not in known]
        await _side_by_side([partial(store.discard, path) for path in strays])
        return len(strays)

    # Moving ------------------------------------------------------------------------------------

    async def move(self, told: Callable[[int], None] = lambda blobs: None) -> Moved:
        """Bring every blob into ``store``, and delete it where else it was. Safe while servers work
        that know all these places, and to be cut off: a second time does the rest. ``told`` hears
        how many were looked at. Raises ``ConfigurationError`` when two of the places are one."""
        await self._check_apart()
        moved, seen = Moved(), 0
        async for rows in self._pages(blobs.c.doomed.is_(False)):
            await _side_by_side([partial(self._move, r.tenant, r.key, r.size, moved) for r in rows])
            seen += len(rows)
            told(seen)
        return moved

    async def _pages(
        self, which: ColumnElement[bool]
    ) -> AsyncIterator[Sequence[Row[str, str, int]]]:
        """``tenant, key, size`` of the blobs."""
        after = ""
        while True:
            query = select(blobs.c.tenant, blobs.c.key, blobs.c.size).where(which)
            query = query.where(blobs.c.key > after).order_by(blobs.c.key).limit(COLLECTED)
            rows = await self._database.read(lambda c: c.execute(query).all())  # noqa: B023
            if not rows:
                return
            yield rows
            after = rows[-1].key

    async def lost(self, *, apart: bool = False) -> AsyncIterator[str]:
        """Which blobs are in none of the places, or not whole, and where their bytes were looked
        for; ``apart``: only of those that are not in the database."""
        found: list[str] = []

        async def look(tenant: str, key: str) -> None:
            try:
                await self.get(tenant, key)
            except NotFound as error:
                if await self._is_held(key):
                    found.append(f"{tenant}/{key}: {error.detail}")

        async for rows in self._pages(APART if apart else blobs.c.doomed.is_(False)):
            await _side_by_side([partial(look, r.tenant, r.key) for r in rows])
            for one in sorted(found):
                yield one
            found.clear()

    async def _move(self, tenant: str, key: str, size: int, moved: Moved) -> None:
        left = [store for store in self._others if await store.exists(tenant, key)]
        there = await self.store.exists(tenant, key)
        if there and not left:
            return
        try:
            data = await self.get(tenant, key)  # Also of one that is there: is it whole?
        except NotFound as error:
            if await self._is_held(key):
                log.error("a large value is lost", tenant=tenant, reason=error.detail)
                moved.lost += 1
            return
        if not there:
            await self.store.put(tenant, key, data)
            self._at("blob.after_move")
        for store in left:
            await store.delete(tenant, key)
        if not await self._is_held(key):  # Whoever deleted it may have been before us there.
            await self.store.delete(tenant, key)
        elif not there:
            moved.blobs, moved.bytes = moved.blobs + 1, moved.bytes + size

    async def _is_held(self, key: str) -> bool:
        query = select(func.count()).where(blobs.c.key == key, blobs.c.doomed.is_(False))
        return bool(await self._database.read(lambda c: c.execute(query).scalar()))

    async def _check_apart(self) -> None:
        key = new_key(PROBE)
        await self.store.put("probe", key, PROBE)
        try:
            for other in self._others:
                if await other.exists("probe", key):
                    raise ConfigurationError(
                        f"{other.name} is {self.store.name}: nothing can be moved.",
                        hint="Name in AGENT_SERVER_BLOBS_ALSO where large values were before.",
                    )
        finally:
            await self.store.delete("probe", key)


def keep_outside(
    database: Database,
    settings: Settings,
    observe: Observer = lambda what, size: None,
    at: Callable[[str], None] = lambda point: None,
) -> Outside:
    """Keep large values of ``database`` where the settings say; before it is opened. Raises
    ``ConfigurationError``."""
    store, *also = [
        blob_store(url.strip(), database, settings.blob_timeout_s)
        for url in (settings.blobs, *settings.blobs_also.split(","))
        if url.strip() or url is settings.blobs
    ]
    limit = max(settings.blob_threshold_bytes, LEAST) if settings.blob_threshold_bytes else None
    database.outside = outside = Outside(database, store, limit, observe, at, also)
    return outside


def blobs_apart(connection: Connection) -> int:
    """How many large values are kept outside the database."""
    return connection.execute(select(func.count()).select_from(blobs).where(APART)).scalar() or 0


def keys_of(connection: Connection, run_ids: Collection[str]) -> set[str]:
    """The blobs that rows of these runs refer to."""
    query = select(blob_uses.c.key).where(blob_uses.c.run_id.in_(run_ids)).distinct()
    return set(connection.execute(query).scalars())


async def forget(database: Database, tenant: str, keys: Collection[str]) -> int:
    """Delete at once what nobody refers to any more of ``keys_of`` runs that were deleted; how many.
    Raises when the store of blobs does: a second time finds the rest."""
    return 0 if database.outside is None else await database.outside.forget(tenant, keys)


async def _side_by_side(work: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """A few at once; the first failure is raised as it is."""
    todo, failures = iter(work), []

    async def some() -> None:
        for one in todo:
            try:
                await one()
            except Exception as error:
                failures.append(error)
                return

    async with anyio.create_task_group() as group:
        for _ in range(min(AT_ONCE, len(work))):
            group.start_soon(some)
    if failures:
        raise failures[0]


def _find(connection: Connection, tenant: str, digest: str) -> str | None:
    """The blob of this content, from now on wanted."""
    return connection.execute(
        update(blobs)
        .where(blobs.c.tenant == tenant, blobs.c.sha256 == digest, blobs.c.doomed.is_(False))
        .values(wanted_at=utcnow())
        .returning(blobs.c.key)
    ).scalar()


def _enter(connection: Connection, tenant: str, key: str, size: int) -> str:
    """Make the row of the new blob; the key of the one that came first."""
    digest = hash_of(key)
    values = {"key": key, "tenant": tenant, "sha256": digest, "size": size, "wanted_at": utcnow()}
    statement = INSERTS[connection.dialect.name](blobs).on_conflict_do_nothing()
    if connection.execute(statement.values(values)).rowcount:
        return key
    return _find(connection, tenant, digest) or key


def _loose(connection: Connection, *, which: ColumnElement[bool], after: str) -> Sequence[str]:
    """The next blobs that seem to be unused."""
    uses = select(blob_uses.c.key).where(blob_uses.c.key == blobs.c.key)
    query = select(blobs.c.key).where(which, ~uses.exists(), blobs.c.key > after)
    return connection.execute(query.order_by(blobs.c.key).limit(COLLECTED)).scalars().all()


def _doom(
    connection: Connection, *, which: ColumnElement[bool], keys: Sequence[str]
) -> Sequence[Row[Any]]:
    """Those of the blobs that really are unused, from now on found by nobody: ``tenant, key, size``."""
    held = select(blobs.c.key).where(blobs.c.key.in_(keys)).order_by(blobs.c.key)
    connection.execute(held.with_for_update()).all()
    # A statement of its own: it sees whoever had the rows locked until now.
    used = select(blob_uses.c.key).where(blob_uses.c.key.in_(keys))
    loose = set(keys) - set(connection.execute(used).scalars())
    return connection.execute(
        update(blobs)
        .where(blobs.c.key.in_(loose), which)
        .values(doomed=True)
        .returning(blobs.c.tenant, blobs.c.key, blobs.c.size)
    ).all()


def sizes(connection: Connection) -> tuple[int, int]:
    """How many blobs there are, and their bytes together."""
    row = connection.execute(select(func.count(), func.coalesce(func.sum(blobs.c.size), 0))).one()
    return int(row[0]), int(row[1])
