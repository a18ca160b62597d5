"""The database: whole transactions as functions, on SQLite or PostgreSQL.

``write(fn)`` and ``read(fn)`` run ``fn(connection)`` as one transaction and return its result;
``fn`` is ordinary synchronous SQLAlchemy, so each statement is written once for both. Leans on
SQLAlchemy; refuses to know any table.

On SQLite there is one writer thread: it takes every transaction that waits, runs each inside a
savepoint of one ``BEGIN IMMEDIATE``, commits once, and only then answers, so that many callers
share one sync to disk. Nothing is acknowledged before it is durable (WAL, ``synchronous=FULL``).

A little longer than our files should be: both databases stand here side by side, because what one
promises of a transaction the other must.
"""

import asyncio
import os
import queue
import threading
from collections.abc import Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol, TypeVar

import asyncpg  # type: ignore[import-untyped]  # ships no types
from sqlalchemy import Connection, Engine, create_engine, event, make_url, pool, text
from sqlalchemy.exc import (
    DataError,
    DBAPIError,
    IntegrityError,
    NotSupportedError,
    ProgrammingError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.util import greenlet_spawn

from agent_server.domain.errors import (
    AgentServerError,
    ConfigurationError,
    DatabaseUnavailable,
    DataDirLocked,
    StorageFull,
)
from agent_server.storage.references import Elsewhere
from agent_server.storage.sqlite_driver import add_functions, driver

try:
    import fcntl
except ImportError:  # Windows has no advisory locks of this kind; SQLite's own still hold there.
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")
Transaction = Callable[[Connection], T]
Run = Callable[[Transaction[T]], Awaitable[T]]
"""One try at a transaction."""
Observer = Callable[[str, float, bool], None]
"""Told of each transaction: ``"read"`` or ``"write"``, its seconds, and whether it succeeded."""

MAX_BATCH = 256
READERS = 2
TRIES = 4
"""Times a transaction is run on PostgreSQL when each time it was rolled back by circumstance."""
PREPARED = 512
"""Statements that SQLite need not read anew. One of many rows is another for each number of them, and
reading it takes longer than carrying it out."""
BUSY_TIMEOUT_MS = 10_000
SCRUB_TRIES = 5
JOURNAL_SIZE_LIMIT = 64 * 1024 * 1024
COMMAND_S = 60
"""How long a statement may take."""
IDLE = "idle_in_transaction_session_timeout"
IDLE_MS = 5_000
"""How long PostgreSQL lets a transaction stand in which nothing is asked."""
READER_CACHE_KIB = 16_384
"""How much of the log, which is not mapped, a reader keeps between two transactions, at most."""
MAPPED = 2**31 - 2**16
"""So much of the file readers see as memory, without a copy: as much as SQLite maps at most."""
NETWORK_FILE_SYSTEMS = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph"})


class LargeValues(Protocol):
    """Keeps what rows only refer to: ``outside.Outside``."""

    async def run(self, run: Run[T], fn: Transaction[T]) -> T:
        """Run the transaction ``fn`` until all is there that it needs."""

    async def collect(self) -> int:
        """Delete what no row refers to any more."""

    async def forget(self, tenant: str, keys: Collection[str]) -> int:
        """Delete what of ``keys`` no row refers to any more, at once."""


class Database(Protocol):
    """Two implementations: ``SqliteDatabase`` and ``PostgresDatabase``."""

    dialect: str
    outside: LargeValues | None
    """Where large values of rows are kept; None: in the rows."""

    async def open(self) -> None:
        """Connect. Raises ``DataDirLocked`` when another process has the SQLite file open,
        ``DatabaseUnavailable`` when it cannot be opened, ``ConfigurationError`` when it must
        not be."""

    async def write(self, fn: Transaction[T]) -> T:
        """Run ``fn`` in a transaction that may write; it is durable when this returns.

        ``fn`` may be run more than once, when the database rolled it back. Cancelling the
        caller does not undo it. Raises ``StorageFull``, ``DatabaseUnavailable``,
        or whatever ``fn`` raised, after rolling back.
        """

    async def read(self, fn: Transaction[T]) -> T:
        """Run ``fn`` in a transaction that only reads, beside writers; again where it finds that
        it needs large values that are kept outside."""

    async def scrub(self) -> None:
        """Return when nothing of what was deleted before can be read in the file or its log.

        Nothing to do on PostgreSQL, where a deleted row's bytes stay until its vacuum.
        """

    async def close(self) -> None:
        """Finish what is queued and let go of the database."""


def translate(error: Exception) -> Exception:
    """A driver's error as one of ours, where it is about the database and not the statement."""
    if isinstance(error, AgentServerError) or not isinstance(error, _DRIVER_ERRORS):
        return error
    message = str(getattr(error, "orig", None) or error) or type(error).__name__
    lowered = message.lower()
    state = sqlstate(error)
    if state == "53100" or any(words in lowered for words in _FULL):
        return StorageFull(
            f"The disk that holds the database is full ({message}).",
            hint="Free some space; what was stored before is intact.",
        )
    if state == LOCKED:
        return DatabaseUnavailable(
            f"Somebody holds a table of the database for long ({message}).",
            hint="pg_stat_activity shows who: end the transaction that has been open longest.",
        )
    if state == "53300":
        return DatabaseUnavailable(
            f"PostgreSQL has no connection left ({message}).",
            hint="Each process takes AGENT_SERVER_DATABASE_POOL_SIZE and 2 more: lower that, run fewer "
            "processes, or raise max_connections.",
        )
    if "unsupported startup parameter" in lowered:
        return pooled()
    if _about_the_statement(error, state):
        return error
    return DatabaseUnavailable(
        f"The database cannot be used: {message}.",
        hint="Check that it runs and that AGENT_SERVER_DATABASE_URL is right.",
    )


LOCKED = "55P03"
"""SQLSTATE: a lock was not to be had in time."""


def pooled() -> ConfigurationError:
    """A pooler stands between this process and PostgreSQL, and keeps what it is told to itself."""
    return ConfigurationError(
        "A pooler (pgbouncer?) stands before PostgreSQL: the settings of a connection do not arrive.",
        hint="Name PostgreSQL itself in AGENT_SERVER_DATABASE_URL: LISTEN, prepared statements and "
        "time limits do not pass a pooler. The server has a pool of its own "
        "(AGENT_SERVER_DATABASE_POOL_SIZE).",
    )


_FULL = ("disk is full", "no space left", "disk full")
_DRIVER_ERRORS = (
    SQLAlchemyError,
    OSError,
    driver.Error,
    asyncio.TimeoutError,  # An OSError only from Python 3.11 on.
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
)
_STATEMENT_STATES = ("21", "22", "23", "42")
"""Classes of SQLSTATE that a statement or its values are to blame for."""
_RETRIED_STATES = frozenset({"40001", "40P01", "23505"})
"""Serialisation failure, deadlock, and a row that somebody else was quicker to write: rolled back,
and right to run again, which sees what the other wrote."""


def sqlstate(error: BaseException) -> str:
    """PostgreSQL's code of what went wrong, of its driver's error or SQLAlchemy's; or ``""``."""
    return str(getattr(getattr(error, "orig", None) or error, "sqlstate", None) or "")


def _about_the_statement(error: Exception, state: str) -> bool:
    """Whether the same transaction would fail on a healthy database too."""
    if state:
        return state.startswith(_STATEMENT_STATES)
    if isinstance(getattr(getattr(error, "orig", None), "__cause__", None), ValueError):
        return True  # asyncpg could not encode a value.
    if isinstance(error, DBAPIError):
        return not error.connection_invalidated and isinstance(
            error, (DataError, IntegrityError, NotSupportedError, ProgrammingError)
        )
    lost = (OSError, driver.OperationalError, asyncio.TimeoutError, PoolTimeout)
    return not isinstance(error, (*lost, asyncpg.InterfaceError, asyncpg.PostgresError))


def database_at(
    url: str, *, pool_size: int = 10, observer: Observer | None = None, patient: bool = False
) -> Database:
    """The database at ``url`` (``sqlite:///path`` or ``postgresql://…``), not yet opened.

    ``patient``: a statement may take any time, as one does that builds an index.

    Raises ``ConfigurationError`` for another kind of URL.
    """
    try:
        parsed = make_url(url)
    except SQLAlchemyError as error:
        raise ConfigurationError(
            "The database URL cannot be parsed.",
            hint="Use sqlite:///path/to/file.db or postgresql://user:password@host:5432/name.",
        ) from error
    backend = parsed.get_backend_name()
    if backend == "sqlite":
        if not parsed.database or parsed.database == ":memory:":
            raise ConfigurationError(
                "An in-memory SQLite database would lose every run.",
                hint="Name a file: sqlite:///path/to/file.db.",
            )
        return SqliteDatabase(Path(parsed.database), observer=observer)
    if backend in {"postgresql", "postgres"}:
        async_url = parsed.set(drivername="postgresql+asyncpg").render_as_string(
            hide_password=False
        )
        return PostgresDatabase(async_url, pool_size=pool_size, observer=observer, patient=patient)
    raise ConfigurationError(
        f"The database kind {backend!r} is not supported.",
        hint="Use sqlite:///path/to/file.db or postgresql://user:password@host:5432/name.",
    )


class FileLock:
    """One process per SQLite file, said clearly to the second. Released by the kernel on death."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        if fcntl is None:
            return
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(self._fd, 32).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            raise DataDirLocked(
                f"Another Agent Server (process {holder}) uses {str(path.parent)!r}.",
                hint="Stop it, talk to it with --server, set AGENT_SERVER_DATA_DIR to another "
                "folder, or use PostgreSQL for several processes.",
            ) from error
        os.ftruncate(self._fd, 0)
        os.write(self._fd, str(os.getpid()).encode())

    def release(self) -> None:
        os.close(self._fd)


def network_file_system(path: Path) -> str | None:
    """The kind of network file system that holds ``path``, or None on a local disk."""
    best, kind = "", None
    try:
        mounts = Path("/proc/mounts").read_text(encoding="utf-8")
    except OSError:
        return None
    resolved = str(path.resolve())
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        point = fields[1].replace("\\040", " ")
        inside = resolved == point or resolved.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, fields[2]
    return kind if kind in NETWORK_FILE_SYSTEMS else None


class SqliteDatabase:
    """One writer thread that commits in groups, a few reader threads, one process per file."""

    dialect = "sqlite"

    def __init__(self, path: Path, *, observer: Observer | None = None) -> None:
        self.outside: LargeValues | None = None
        self._path = path
        self._observer = observer
        self._writer = _sqlite_engine(path, writer=True)
        self._reader = _sqlite_engine(path, writer=False)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = True
        self._lock: FileLock | None = None
        self._thread = threading.Thread(target=self._write_loop, name="sqlite-writer", daemon=True)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="sqlite-reader")
        self._local = threading.local()
        self._reader_connections: list[Connection] = []

    async def open(self) -> None:
        folder = self._path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            kind = network_file_system(folder)
            if kind is not None:
                raise ConfigurationError(
                    f"{str(folder)!r} is on a network file system ({kind}), where SQLite's "
                    "write-ahead log can lose data.",
                    hint="Put AGENT_SERVER_DATA_DIR on a local disk, or use PostgreSQL.",
                )
            self._lock = FileLock(self._path.with_name(self._path.name + ".lock"))
        except OSError as error:
            raise DatabaseUnavailable(
                f"The folder {str(folder)!r} cannot be used: {error.strerror or error}.",
                hint="Set AGENT_SERVER_DATA_DIR to a folder this user may write.",
            ) from error
        try:
            with self._writer.begin() as connection:
                connection.exec_driver_sql("SELECT count(*) FROM sqlite_master")
        except Exception as error:
            self._lock.release()
            raise DatabaseUnavailable(
                f"The database file {str(self._path)!r} cannot be opened: "
                f"{getattr(error, 'orig', error)}.",
                hint="Check its permissions and that it is an SQLite file of this server.",
            ) from error
        self._thread.start()
        self._closed = False

    async def write(self, fn: Transaction[T]) -> T:
        if self.outside is None:
            return await self._write(fn)
        return await self.outside.run(self._write, fn)

    async def _write(self, fn: Transaction[T]) -> T:
        if self._closed:
            raise DatabaseUnavailable("The database is closed.", hint="The server is stopping.")
        loop = asyncio.get_running_loop()
        job = _Job(fn, loop, loop.create_future())
        self._jobs.put(job)
        # Shielded: the writer answers the future even when this caller has been cancelled.
        result: T = await asyncio.shield(job.future)
        return result

    async def scrub(self) -> None:
        # Deleted bytes are overwritten as they are deleted; the log may hold the pages before.
        for _ in range(SCRUB_TRIES):
            if await asyncio.get_running_loop().run_in_executor(self._readers, self._truncate_log):
                return
        raise DatabaseUnavailable(
            "What was deleted may still be read in the database's log, which is in use.",
            hint="It is overwritten with the next checkpoint, or when the server stops.",
        )

    def _truncate_log(self) -> bool:
        with closing(driver.connect(self._path, isolation_level=None)) as connection:
            connection.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS // SCRUB_TRIES}")
            busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        return not busy

    async def read(self, fn: Transaction[T]) -> T:
        if self.outside is None:
            return await self._read(fn)
        return await self.outside.run(self._read, fn)

    async def _read(self, fn: Transaction[T]) -> T:
        if self._closed:
            raise DatabaseUnavailable("The database is closed.", hint="The server is stopping.")
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._readers, self._read_here, fn)
        except Exception as error:
            raise translate(error) from error

    def _read_here(self, fn: Transaction[T]) -> T:
        connection: Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = self._reader.connect()
            self._reader_connections.append(connection)
        started = perf_counter()
        with connection.begin():
            result = fn(connection)
        _observed(self._observer, "read", started, True)
        return result

    def _write_loop(self) -> None:
        connection = self._writer.connect()
        while True:
            job = self._jobs.get()
            batch: list[_Job] = []
            while job is not None:
                batch.append(job)
                if len(batch) >= MAX_BATCH:
                    break
                try:
                    job = self._jobs.get_nowait()
                except queue.Empty:
                    break
            if batch:
                self._commit(connection, batch)
            if job is None:
                connection.close()
                return

    def _commit(self, connection: Connection, batch: "list[_Job]") -> None:
        started = perf_counter()
        succeeded = True
        try:
            with connection.begin():
                for job in batch:
                    job.run(connection, alone=len(batch) == 1)
        except Exception as error:
            succeeded = isinstance(error, Elsewhere)
            for job in batch:
                if job.error is None:
                    job.error = translate(error)
        _observed(self._observer, "write", started, succeeded)
        by_loop: dict[asyncio.AbstractEventLoop, list[_Job]] = {}
        for job in batch:
            by_loop.setdefault(job.loop, []).append(job)
        for loop, jobs in by_loop.items():
            with suppress(RuntimeError):  # The loop is gone, and with it whoever waited.
                loop.call_soon_threadsafe(_answer, jobs)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._jobs.put(None)
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)
        self._readers.shutdown(wait=True)
        for connection in self._reader_connections:
            connection.close()
        self._reader.dispose()
        self._writer.dispose()
        if self._lock is not None:
            self._lock.release()


class _Job:
    """One transaction on its way through the writer thread."""

    __slots__ = ("fn", "loop", "future", "result", "error")

    def __init__(
        self,
        fn: Transaction[Any],
        loop: asyncio.AbstractEventLoop,
        future: "asyncio.Future[Any]",
    ) -> None:
        self.fn = fn
        self.loop = loop
        self.future = future
        self.result: Any = None
        self.error: Exception | None = None

    def run(self, connection: Connection, *, alone: bool) -> None:
        """Run inside the batch; alone, a failure rolls everything back, else to a savepoint (the
        driver's own: SQLAlchemy's costs as much as a statement)."""
        if alone:
            try:
                self.result = self.fn(connection)
            except Exception as error:
                self.error = translate(error)
                raise
            return
        driver: Any = connection.connection.driver_connection
        driver.execute("SAVEPOINT job")
        try:
            self.result = self.fn(connection)
        except Exception as error:
            self.error = translate(error)
            driver.execute("ROLLBACK TO job")
        driver.execute("RELEASE job")


def _observed(observer: Observer | None, mode: str, started: float, succeeded: bool) -> None:
    """Tell the observer; what it does wrong is not the transaction's fault."""
    if observer is not None:
        with suppress(Exception):
            observer(mode, perf_counter() - started, succeeded)


def _answer(jobs: list[_Job]) -> None:
    for job in jobs:
        if job.future.cancelled():
            continue
        if job.error is not None:
            job.future.set_exception(job.error)
            job.future.exception()  # Retrieved, in case whoever waited was cancelled.
        else:
            job.future.set_result(job.result)


def _sqlite_engine(path: Path, *, writer: bool) -> Engine:
    engine = create_engine(
        f"sqlite:///{path}",
        module=driver,
        poolclass=pool.NullPool,
        connect_args={"check_same_thread": False, "cached_statements": PREPARED},
    )

    @event.listens_for(engine, "connect")
    def _connect(dbapi_connection: Any, _record: Any) -> None:
        dbapi_connection.isolation_level = None
        cursor = dbapi_connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
        if writer:
            cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute(f"PRAGMA journal_size_limit={JOURNAL_SIZE_LIMIT}")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.execute("PRAGMA temp_store=MEMORY")
        cursor.execute("PRAGMA secure_delete=ON")
        if not writer:
            cursor.execute("PRAGMA query_only=ON")
            cursor.execute(f"PRAGMA mmap_size={MAPPED}")
            cursor.execute(f"PRAGMA cache_size=-{READER_CACHE_KIB}")
        cursor.close()
        add_functions(dbapi_connection)

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writer else "BEGIN")

    return engine


class _Again(Exception):
    """The transaction was rolled back by circumstance and may be run again."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class PostgresDatabase:
    """asyncpg behind a small pool; each transaction runs in the caller's task."""

    dialect = "postgresql"

    def __init__(
        self,
        url: str,
        *,
        pool_size: int = 10,
        observer: Observer | None = None,
        patient: bool = False,
    ) -> None:
        """``patient``: a statement may take any time, for one that changes the schema."""
        self.outside: LargeValues | None = None
        self.url = url
        self._idle_ms = 0 if patient else IDLE_MS
        self._observer = observer
        self._engine: AsyncEngine = create_async_engine(
            url,
            pool_size=pool_size,
            max_overflow=0,
            # Whoever waits here waits for transactions of ours, each of which has its own bound.
            pool_timeout=None,
            pool_pre_ping=False,
            connect_args={
                "timeout": 10,
                "command_timeout": None if patient else COMMAND_S,
                # What a process that froze or was cut off has locked keeps nobody from its tasks.
                # To compile a statement takes longer than any of these runs.
                "server_settings": {IDLE: str(self._idle_ms), "jit": "off"},
            },
        )
        # Reads see each statement's own snapshot in a transaction too; without one they are
        # one round trip instead of three.
        self._reader = self._engine.execution_options(isolation_level="AUTOCOMMIT")

    async def open(self) -> None:
        """Raises ``ConfigurationError`` behind a pooler."""
        asked = text("SELECT setting FROM pg_settings WHERE name = :name")
        if await self.read(lambda c: c.execute(asked, {"name": IDLE}).scalar()) != str(
            self._idle_ms
        ):
            raise pooled()

    async def write(self, fn: Transaction[T]) -> T:
        if self.outside is None:
            return await self._write(fn)
        return await self.outside.run(self._write, fn)

    async def _write(self, fn: Transaction[T]) -> T:
        # Shielded, so that a cancelled caller cannot leave a commit half-known.
        task: asyncio.Future[T] = asyncio.ensure_future(self._run("write", fn))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            with suppress(Exception):
                await asyncio.shield(task)
            raise

    async def read(self, fn: Transaction[T]) -> T:
        if self.outside is None:
            return await self._read(fn)
        return await self.outside.run(self._read, fn)

    async def _read(self, fn: Transaction[T]) -> T:
        return await self._run("read", fn)

    async def _run(self, mode: str, fn: Transaction[T]) -> T:
        started = perf_counter()
        succeeded = False
        engine = self._engine if mode == "write" else self._reader
        try:
            for _ in range(TRIES - 1):
                try:
                    result = await self._once(engine, fn)
                    break
                except _Again:
                    pass
            else:
                result = await self._once(engine, fn)
            succeeded = True
            return result
        except Elsewhere:
            succeeded = True
            raise
        except Exception as error:
            cause = error.cause if isinstance(error, _Again) else error
            raise translate(cause) from cause
        finally:
            _observed(self._observer, mode, started, succeeded)

    async def _once(self, engine: AsyncEngine, fn: Transaction[T]) -> T:
        """Raises ``_Again`` for a failure after which surely nothing was committed: a lost race,
        or a pooled connection that turned out to be gone before the commit was sent."""
        done = False

        def transaction() -> T:
            nonlocal done
            with engine.sync_engine.begin() as connection:
                result = fn(connection)
                done = True
            return result

        try:
            # In one go: AsyncEngine's own way starts anew for each step of it, which takes as long
            # again as a short statement.
            return await greenlet_spawn(transaction)
        except DBAPIError as error:
            if sqlstate(error) in _RETRIED_STATES or (error.connection_invalidated and not done):
                raise _Again(error) from error
            raise

    async def scrub(self) -> None:
        pass

    async def close(self) -> None:
        await self._engine.dispose()


def ping(connection: Connection) -> None:
    """The least a database must be able to answer."""
    connection.execute(text("SELECT 1"))


def room(connection: Connection) -> int | None:
    """How many more connections PostgreSQL takes from anybody; None for SQLite."""
    if connection.dialect.name != "postgresql":
        return None
    found: int = connection.execute(text("""
            SELECT current_setting('max_connections')::int
                - current_setting('superuser_reserved_connections')::int
                - (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend')
            """)).scalar_one()
    return found
