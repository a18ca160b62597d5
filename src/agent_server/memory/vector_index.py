"""Where vectors are kept and how the nearest are found: exactly, whatever narrows the search.

Leans on sqlite-vec in a SQLite file, on pgvector in PostgreSQL, and on numpy where they are missing. There is
no graph and no list to tune: the vectors of one namespace lie together and are all compared, so
that the answer has exactly as many rows as asked for whenever the namespace has them, and an
erased vector is gone. That is fast enough to about 100,000 in one namespace (docs/recall.md).
"""

import importlib.util
from array import array
from collections.abc import Sequence
from typing import Any, Protocol

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Float,
    Integer,
    LargeBinary,
    Select,
    TableClause,
    and_,
    bindparam,
    cast,
    column,
    delete,
    func,
    literal_column,
    select,
    table,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSON, REAL
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.types import UserDefinedType

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import AgentServerError
from agent_server.memory.rows import Scope, in_spaces
from agent_server.storage.database import Database
from agent_server.storage.migrate import one_at_a_time
from agent_server.storage.sqlite_driver import load_vector_functions
from agent_server.storage.tables import JsonText
from agent_server.storage.tables import memories as m
from agent_server.storage.tables import memory_embedders as e
from agent_server.storage.tables import memory_vectors as v

READ_AT_ONCE = 4096
CHUNK = 16
"""Vectors that sqlite-vec lays down at once: a namespace takes at least so much room (24 KB of 384
numbers each), and one of 100,000 is searched as fast as with larger ones."""


class VectorIndex(Protocol):
    """Three implementations: ``SqliteVec``, ``Numpy`` and ``Halfvec``."""

    kept_in: str
    """``memory_embedders.kept_in``."""

    def make_room(self, connection: Connection, embedder: int, dimension: int) -> None:
        """Before the first vector of a new embedder."""

    def put(self, connection: Connection, embedder: int, rows: Sequence[JsonObject]) -> None:
        """Store new rows of ``memory_vectors``; ``vector`` is little-endian float32 of length 1."""

    def nearest(
        self,
        embedder: int,
        n: int,
        within: ColumnElement[bool] | None,
        limit: int,
        many: bool,
    ) -> Select[Any]:
        """The query for the ``limit`` nearest serials with their ``distance``, 1 less the cosine,
        in the ``space`` that is bound, or with ``many`` in ``spaces``; ``within`` None for any whose vector is there. ``n`` tells
        the values of several embedders apart."""

    def sought(
        self,
        connection: Connection,
        embedder: int,
        n: int,
        vector: bytes,
        spaces: Sequence[int],
        within: Scope | None,
        limit: int,
    ) -> JsonObject:
        """The values that such a query binds, beside ``space`` or ``spaces`` and those of ``within``."""

    def erase(self, connection: Connection, serials: Sequence[int]) -> None:
        """Erase what is kept beside ``memory_vectors``, of every embedder, before that is."""

    def forget(self, connection: Connection, embedders: Sequence[int]) -> None:
        """Erase all that these embedders made, beside ``memory_vectors``."""


async def vector_index(database: Database) -> tuple[VectorIndex | None, str | None]:
    """The way this database searches vectors, or None and why there is none."""
    if database.dialect == "sqlite":
        try:
            await database.read(lambda c: c.exec_driver_sql("SELECT vec_version()").scalar())
            return SqliteVec(), None
        except (AgentServerError, SQLAlchemyError):
            reason = await database.read(
                lambda c: load_vector_functions(c.connection.driver_connection)
            )
        await database.write(SqliteVec.erase_without_it)
        try:
            return Numpy(database.dialect), None
        except ImportError:
            return None, (
                f"{reason}, and numpy is not installed: memories are searched by their text alone. "
                "Install numpy, or a Python whose sqlite3 loads extensions."
            )
    try:
        await database.write(Halfvec.create)
    except (AgentServerError, SQLAlchemyError) as error:
        try:
            return Numpy(database.dialect), None
        except ImportError:
            return None, (
                f"PostgreSQL has no pgvector ({error}), and numpy is not installed: memories are "
                "searched by their text alone. Have an administrator run CREATE EXTENSION vector."
            )
    return Halfvec(), None


def way_of(connection: Connection) -> str | None:
    """How vectors would be searched here, found out without a change; None for by no way."""
    try:
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql("SELECT vec_version()")
            return "sqlite-vec"
        known = "SELECT 1 FROM pg_available_extensions WHERE name = 'vector'"
        if connection.exec_driver_sql(known).scalar():
            return "pgvector"
    except SQLAlchemyError:
        pass
    return "numpy" if importlib.util.find_spec("numpy") else None


def erase_vectors(connection: Connection, index: VectorIndex | None, serials: Sequence[int]) -> int:
    """Erase the vectors of these rows, wherever they are kept; how many there were."""
    if not serials:
        return 0
    if index is not None:
        index.erase(connection, serials)
    return connection.execute(delete(v).where(v.c.serial.in_(serials))).rowcount


def let_go(connection: Connection) -> None:
    """Forget what was noted of vectors that are kept beside ``memory_vectors`` and did not come
    along, as after a copy from another database: they are made anew."""
    beside = e.c.kept_in != Numpy.kept_in
    connection.execute(delete(v).where(v.c.embedder.in_(select(e.c.id).where(beside))))
    connection.execute(delete(e).where(beside))


def _note(connection: Connection, rows: Sequence[JsonObject]) -> None:
    """Note in ``memory_vectors`` whose vectors are kept beside it."""
    connection.execute(v.insert(), [{**row, "vector": None} for row in rows])


class SqliteVec:
    """sqlite-vec: a virtual table for each embedder, parted by namespace, all of one compared."""

    kept_in = "vec0"

    @staticmethod
    def erase_without_it(connection: Connection) -> None:
        """Erase all of it without sqlite-vec, in a process that cannot load it: else a memory that
        is deleted here would leave its vector behind. They are made anew."""
        kept = "SELECT name FROM sqlite_master WHERE sql LIKE 'CREATE VIRTUAL TABLE memory_vec0%'"
        for name in connection.exec_driver_sql(kept).scalars().all():
            for part in ("chunks", "rowids", "vector_chunks00"):
                connection.exec_driver_sql(f'DELETE FROM "{name}_{part}"')
        let_go(connection)

    def make_room(self, connection: Connection, embedder: int, dimension: int) -> None:
        name = _vec0(embedder).name
        connection.exec_driver_sql(f"DROP TABLE IF EXISTS {name}")
        connection.exec_driver_sql(
            f"CREATE VIRTUAL TABLE {name} USING vec0(space integer partition key, "
            f"vector float[{dimension}] distance_metric=cosine, chunk_size={CHUNK})"
        )
        # Without it each search would walk over the chunks of every namespace.
        connection.exec_driver_sql(f"CREATE INDEX ix_{name} ON {name}_chunks (partition00)")

    def put(self, connection: Connection, embedder: int, rows: Sequence[JsonObject]) -> None:
        if rows:
            _note(connection, rows)
            connection.exec_driver_sql(
                f"INSERT INTO {_vec0(embedder).name} (rowid, space, vector) VALUES (?, ?, ?)",
                [(row["serial"], row["space"], row["vector"]) for row in rows],
            )

    def nearest(
        self,
        embedder: int,
        n: int,
        within: ColumnElement[bool] | None,
        limit: int,
        many: bool,
    ) -> Select[Any]:
        near = _vec0(embedder)
        asked = select(near.c.rowid.label("serial"), near.c.distance)
        sought = and_(
            near.c.vector.op("MATCH")(bindparam(f"vector{n}")),
            near.c.k == literal_column(str(limit)),
        )
        if not many:
            asked = asked.where(near.c.space == bindparam("space"), sought)
            return _allowed(asked, near.c.rowid, within).order_by(near.c.distance)
        given = func.json_each(bindparam("spaces", type_=JsonText()))
        space = given.table_valued("value", name="given_spaces")
        sought = and_(near.c.space == space.c.value, sought)
        if within is not None:
            allowed = select(m.c.serial).where(m.c.space == space.c.value, within)
            sought = and_(sought, near.c.rowid.in_(allowed.correlate(space)))
        # To the left of an outer join: each namespace is asked for its own. By a plainer condition
        # SQLite sees that it is an inner one, and asks for the nearest of all.
        found = func.coalesce(near.c.rowid, 0) > 0
        asked = asked.select_from(space.outerjoin(near, sought)).where(found)
        return asked.order_by(near.c.distance).limit(literal_column(str(limit)))

    def sought(
        self,
        connection: Connection,
        embedder: int,
        n: int,
        vector: bytes,
        spaces: Sequence[int],
        within: Scope | None,
        limit: int,
    ) -> JsonObject:
        return {f"vector{n}": vector}

    def erase(self, connection: Connection, serials: Sequence[int]) -> None:
        there = select(v.c.embedder, v.c.serial).where(v.c.serial.in_(serials))
        for embedder, serial in connection.execute(there).all():
            connection.exec_driver_sql(
                f"DELETE FROM {_vec0(embedder).name} WHERE rowid = ?", (serial,)
            )

    def forget(self, connection: Connection, embedders: Sequence[int]) -> None:
        for embedder in embedders:
            connection.exec_driver_sql(f"DROP TABLE IF EXISTS {_vec0(embedder).name}")


def _vec0(embedder: int) -> TableClause:
    return table(
        f"memory_vec0_{embedder:d}",
        column("rowid", Integer),
        column("space", Integer),
        column("vector", LargeBinary),
        column("k", Integer),
        column("distance", Float),
    )


class Numpy:
    """Vectors as bytes in ``memory_vectors``, read and compared in this process. Raises
    ``ImportError`` without numpy."""

    kept_in = "blob"

    def __init__(self, dialect: str) -> None:
        self._dialect = dialect
        self._numpy: Any = importlib.import_module("numpy")

    def make_room(self, connection: Connection, embedder: int, dimension: int) -> None:
        pass

    def put(self, connection: Connection, embedder: int, rows: Sequence[JsonObject]) -> None:
        if rows:
            connection.execute(v.insert(), list(rows))

    def nearest(
        self,
        embedder: int,
        n: int,
        within: ColumnElement[bool] | None,
        limit: int,
        many: bool,
    ) -> Select[Any]:
        given = bindparam(f"near{n}", type_=JsonText())
        if self._dialect == "sqlite":
            pair: ColumnElement[Any] = func.json_each(given).table_valued("value").c.value
            ends: list[Any] = [func.json_extract(pair, f"$[{i}]") for i in (0, 1)]
        else:
            pair = func.json_array_elements(cast(given, JSON)).table_valued("value").c.value
            ends = [pair.op("->>")(literal_column(str(i))) for i in (0, 1)]
        return select(
            cast(ends[0], BigInteger).label("serial"), cast(ends[1], Float).label("distance")
        )

    def sought(
        self,
        connection: Connection,
        embedder: int,
        n: int,
        vector: bytes,
        spaces: Sequence[int],
        within: Scope | None,
        limit: int,
    ) -> JsonObject:
        np = self._numpy
        sought = np.frombuffer(vector, dtype="<f4")
        best: list[tuple[int, float]] = []
        asked = select(v.c.serial, v.c.vector).where(
            v.c.embedder == bindparam("embedder"),
            in_spaces(self._dialect, v.c.space, many=True),
        )
        values: JsonObject = {"embedder": embedder, "spaces": list(spaces)}
        if within is not None:
            there = in_spaces(self._dialect, m.c.space, many=True)
            allowed = select(m.c.serial).where(there, within.condition)
            asked, values = asked.where(v.c.serial.in_(allowed)), values | within.values
        for rows in connection.execute(asked, values).partitions(READ_AT_ONCE):
            matrix = np.frombuffer(b"".join(row.vector for row in rows), dtype="<f4")
            cosines = matrix.reshape(len(rows), -1) @ sought
            best += zip((row.serial for row in rows), cosines.tolist(), strict=True)
            best = sorted(best, key=lambda pair: -pair[1])[:limit]
        return {f"near{n}": [(serial, 1.0 - cosine) for serial, cosine in best]}

    def erase(self, connection: Connection, serials: Sequence[int]) -> None:
        pass

    def forget(self, connection: Connection, embedders: Sequence[int]) -> None:
        pass


class Halfvec:
    """pgvector's 16-bit vectors: half the pages to read, and nothing measurable lost."""

    kept_in = "halfvec"

    @staticmethod
    def create(connection: Connection) -> None:
        one_at_a_time(connection)
        connection.execute(text("CREATE EXTENSION IF NOT EXISTS vector"))
        connection.execute(
            text(
                "CREATE TABLE IF NOT EXISTS memory_halfvecs (embedder integer NOT NULL, "
                "space integer NOT NULL, serial bigint NOT NULL, vector halfvec NOT NULL, "
                "PRIMARY KEY (embedder, space, serial))"
            )
        )
        # In the row and not beside it, as PostgreSQL would have it from 2 KB on.
        connection.execute(
            text("ALTER TABLE memory_halfvecs ALTER COLUMN vector SET STORAGE PLAIN")
        )
        connection.execute(
            text("CREATE INDEX IF NOT EXISTS ix_memory_halfvecs_serial ON memory_halfvecs (serial)")
        )

    def make_room(self, connection: Connection, embedder: int, dimension: int) -> None:
        pass

    def put(self, connection: Connection, embedder: int, rows: Sequence[JsonObject]) -> None:
        if not rows:
            return
        _note(connection, rows)
        connection.execute(
            text(
                "INSERT INTO memory_halfvecs (embedder, space, serial, vector) "
                "VALUES (:embedder, :space, :serial, CAST(:vector AS real[])::halfvec)"
            ),
            [{**row, "vector": _numbers(row["vector"])} for row in rows],
        )

    def nearest(
        self,
        embedder: int,
        n: int,
        within: ColumnElement[bool] | None,
        limit: int,
        many: bool,
    ) -> Select[Any]:
        # In a query of its own the vector is read once; a plan that serves any vector would read
        # it anew for each row. There is no index by distance that could be taken, and filter late.
        given = cast(bindparam(f"vector{n}", type_=ARRAY(REAL)), _HALFVEC)
        far = _h.c.vector.op("<=>", return_type=Float())(select(given).scalar_subquery())
        asked = select(_h.c.serial, far.label("distance")).where(
            _h.c.embedder == literal_column(str(embedder)),
            in_spaces("postgresql", _h.c.space, many),
        )
        if within is not None:
            there = in_spaces("postgresql", m.c.space, many)
            asked = asked.where(_h.c.serial.in_(select(m.c.serial).where(there, within)))
        return asked.order_by(far).limit(literal_column(str(limit)))

    def sought(
        self,
        connection: Connection,
        embedder: int,
        n: int,
        vector: bytes,
        spaces: Sequence[int],
        within: Scope | None,
        limit: int,
    ) -> JsonObject:
        return {f"vector{n}": _numbers(vector)}

    def erase(self, connection: Connection, serials: Sequence[int]) -> None:
        connection.execute(delete(_h).where(_h.c.serial.in_(serials)))

    def forget(self, connection: Connection, embedders: Sequence[int]) -> None:
        connection.execute(delete(_h).where(_h.c.embedder.in_(embedders)))


class _HalfvecType(UserDefinedType[Any]):
    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "halfvec"


_HALFVEC = _HalfvecType()
_h = table(
    "memory_halfvecs",
    column("embedder", Integer),
    column("space", Integer),
    column("serial", BigInteger),
    column("vector", _HALFVEC),
)


def _numbers(vector: bytes) -> list[float]:
    return array("f", vector).tolist()


def _allowed(
    asked: Select[Any], serial: ColumnElement[int], within: ColumnElement[bool] | None
) -> Select[Any]:
    if within is None:
        return asked
    return asked.where(
        serial.in_(select(m.c.serial).where(m.c.space == bindparam("space"), within))
    )
