"""Where vectors are kept and how the nearest are found: exactly, whatever narrows the search.

Leans on sqlite-vec or numpy over the rows of a SQLite file, and on pgvector in PostgreSQL. There is
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
    Select,
    Text,
    bindparam,
    cast,
    column,
    delete,
    func,
    select,
    table,
    text,
)
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.types import UserDefinedType

from agent_server.domain.base import JsonObject
from agent_server.domain.errors import AgentServerError
from agent_server.storage.database import Database
from agent_server.storage.migrate import one_at_a_time
from agent_server.storage.sqlite_driver import load_vector_functions
from agent_server.storage.tables import memories as m
from agent_server.storage.tables import memory_vectors as v

READ_AT_ONCE = 4096


class VectorIndex(Protocol):
    """Three implementations: ``SqliteVec``, ``Numpy`` and ``Halfvec``."""

    kept_in: str
    """``memory_embedders.kept_in``."""

    def put(self, connection: Connection, rows: Sequence[JsonObject]) -> None:
        """Store new rows of ``memory_vectors``; ``vector`` is little-endian float32 of length 1."""

    def nearest(
        self,
        connection: Connection,
        embedder: int,
        space: int,
        vector: bytes,
        limit: int,
        where: ColumnElement[bool] | None,
    ) -> list[tuple[int, float]]:
        """The ``limit`` nearest serials with their cosine, best first; ``where`` is about the
        memory, None for any whose vector is there."""


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
        try:
            return Numpy(), None
        except ImportError:
            return None, (
                f"{reason}, and numpy is not installed: memories are searched by their text alone. "
                "Install numpy, or a Python whose sqlite3 loads extensions."
            )
    try:
        await database.write(Halfvec.create)
    except (AgentServerError, SQLAlchemyError) as error:
        try:
            return Numpy(), None
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


def erase_vectors(
    connection: Connection, index: "VectorIndex | None", serials: Sequence[int]
) -> int:
    """Erase the vectors of these rows, wherever they are kept; how many there were."""
    if not serials:
        return 0
    if isinstance(index, Halfvec):
        gone = text("DELETE FROM memory_halfvecs WHERE serial IN :serials")
        connection.execute(
            gone.bindparams(bindparam("serials", expanding=True)), {"serials": list(serials)}
        )
    return connection.execute(delete(v).where(v.c.serial.in_(serials))).rowcount


class _Rows:
    """Vectors as bytes in ``memory_vectors``."""

    kept_in = "blob"

    def put(self, connection: Connection, rows: Sequence[JsonObject]) -> None:
        if rows:
            connection.execute(v.insert(), list(rows))


class SqliteVec(_Rows):
    """sqlite-vec compares inside the database."""

    def nearest(
        self,
        connection: Connection,
        embedder: int,
        space: int,
        vector: bytes,
        limit: int,
        where: ColumnElement[bool] | None,
    ) -> list[tuple[int, float]]:
        distance = func.vec_distance_cosine(v.c.vector, vector).label("distance")
        asked = _within(select(v.c.serial, distance), embedder, space, where)
        rows = connection.execute(asked.order_by(distance).limit(limit))
        return [(serial, 1.0 - far) for serial, far in rows]


class Numpy(_Rows):
    """The rows are read and compared in this process. Raises ``ImportError`` without numpy."""

    def __init__(self) -> None:
        self._numpy: Any = importlib.import_module("numpy")

    def nearest(
        self,
        connection: Connection,
        embedder: int,
        space: int,
        vector: bytes,
        limit: int,
        where: ColumnElement[bool] | None,
    ) -> list[tuple[int, float]]:
        np = self._numpy
        sought = np.frombuffer(vector, dtype="<f4")
        best: list[tuple[int, float]] = []
        asked = _within(select(v.c.serial, v.c.vector), embedder, space, where)
        for rows in connection.execute(asked).partitions(READ_AT_ONCE):
            matrix = np.frombuffer(b"".join(row.vector for row in rows), dtype="<f4")
            cosines = matrix.reshape(len(rows), -1) @ sought
            best += zip((row.serial for row in rows), cosines.tolist(), strict=True)
            best = sorted(best, key=lambda pair: -pair[1])[:limit]
        return best


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

    def put(self, connection: Connection, rows: Sequence[JsonObject]) -> None:
        if not rows:
            return
        connection.execute(v.insert(), [{**row, "vector": None} for row in rows])
        connection.execute(
            text(
                "INSERT INTO memory_halfvecs (embedder, space, serial, vector) "
                "VALUES (:embedder, :space, :serial, CAST(:vector AS text)::halfvec)"
            ),
            [{**row, "vector": _literal(row["vector"])} for row in rows],
        )

    def nearest(
        self,
        connection: Connection,
        embedder: int,
        space: int,
        vector: bytes,
        limit: int,
        where: ColumnElement[bool] | None,
    ) -> list[tuple[int, float]]:
        sought = cast(cast(_literal(vector), Text), _HALFVEC)
        distance = _h.c.vector.op("<=>", return_type=Float())(sought).label("distance")
        near = select(_h.c.serial, distance).where(_h.c.embedder == embedder, _h.c.space == space)
        if where is not None:
            near = near.where(_h.c.serial.in_(select(m.c.serial).where(m.c.space == space, where)))
        # Materialised: with a limit in sight the planner could take an index that filters late.
        found = near.cte("near").prefix_with("MATERIALIZED", dialect="postgresql")
        asked = select(found.c.serial, found.c.distance).order_by(found.c.distance).limit(limit)
        return [(serial, 1.0 - far) for serial, far in connection.execute(asked)]


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


def _literal(vector: bytes) -> str:
    """``vector`` as pgvector writes one."""
    return f"[{','.join(map(repr, array('f', vector)))}]"


def _within(
    asked: Select[Any], embedder: int, space: int, where: ColumnElement[bool] | None
) -> Select[Any]:
    asked = asked.where(v.c.embedder == embedder, v.c.space == space)
    if where is None:
        return asked
    return asked.where(v.c.serial.in_(select(m.c.serial).where(m.c.space == space, where)))
