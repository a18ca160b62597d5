"""Copying a whole database into another, SQLite or PostgreSQL, and proving that it arrived.

Leans on the tables alone: whatever stands in ``metadata`` is copied as it is stored, in batches
along the primary key. Refuses a source that is in use or at another revision, and a target that
holds anything, unless a copy that was cut off is gone on with.
"""

import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Integer,
    MetaData,
    Table,
    TypeDecorator,
    func,
    literal,
    select,
    text,
    tuple_,
)
from sqlalchemy.dialects import postgresql, sqlite

from agent_server.domain.base import utcnow
from agent_server.domain.errors import ConfigurationError, InternalError
from agent_server.storage.database import Database
from agent_server.storage.migrate import current_revision, head_revision, upgrade
from agent_server.storage.tables import blob_bytes, file_parts, metadata, nodes

BATCH = 500
BULKY = {blob_bytes.name: 8, file_parts.name: 100}
"""Rows at once of tables whose rows may be megabytes each."""
ALIVE = timedelta(seconds=60)
"""A node that beat within so long counts as alive."""
NOT_COPIED = frozenset({nodes.name})
"""Belongs to processes, not to data."""
DERIVED = "derived"
"""Key in a column's ``info``: made from others by the database's own package, not copied."""

Derive = Callable[[Connection], None]
"""Makes what a package keeps beside its rows (an index of words, …) after they were copied."""


@dataclass(frozen=True)
class Copied:
    """One table, as it arrived."""

    table: str
    rows: int


async def copy(
    source: Database,
    target: Database,
    *,
    resume: bool = False,
    derive: Sequence[Derive] = (),
    told: Callable[[str, int], None] = lambda table, rows: None,
) -> list[Copied]:
    """Copy every table of ``source`` (open) into ``target`` (open), and compare both row by row.

    ``told`` hears how many rows of a table there are so far. With ``resume``, rows that are in
    the target already stay, and must be those of the source. Raises ``ConfigurationError`` when
    it refuses, ``InternalError`` when what arrived is not what was sent.
    """
    await source.read(_check_source)
    await target.write(upgrade)
    tables = [table for table in metadata.sorted_tables if table.name not in NOT_COPIED]
    if not resume:
        await target.read(lambda c: _check_empty(c, tables))
    done = []
    for table in tables:
        raw = raw_table(table)
        sent = await _pour(source, target, raw, told)
        await target.write(lambda c: _set_sequence(c, table))  # noqa: B023  # awaited here
        arrived = await _digest(target, raw)
        if arrived != sent:
            raise InternalError(
                f"{table.name}: {arrived.rows} rows arrived of {sent.rows}, or some differ.",
                hint="Stop every server on both databases, empty the target and copy again.",
            )
        done.append(Copied(table.name, sent.rows))
    for make in derive:
        await target.write(make)
    return done


def _check_source(connection: Connection) -> None:
    found = current_revision(connection)
    if found != head_revision():
        raise ConfigurationError(
            f"The source is at revision {found!r}, not {head_revision()!r}.",
            hint="Start this version's server on it once, or run `agent-server db upgrade`.",
        )
    alive = select(nodes.c.id).where(nodes.c.beat_at > utcnow() - ALIVE)
    if connection.dialect.name == "postgresql" and (node := connection.execute(alive).scalar()):
        raise ConfigurationError(
            f"The server {node!r} works on the source: what it writes would be missed.",
            hint="Stop every server on it; one that was killed is forgotten within a minute.",
        )


def _check_empty(connection: Connection, tables: Sequence[Table]) -> None:
    for table in tables:
        if connection.execute(select(literal(1)).select_from(table).limit(1)).scalar():
            raise ConfigurationError(
                f"The target is not empty: {table.name!r} has rows.",
                hint="Name an empty database; --resume goes on with a copy that was cut off.",
            )


def raw_table(table: Table) -> Table:
    """``table`` with its columns as they are stored, without our types' conversions."""
    return Table(
        table.name,
        MetaData(),
        *(
            Column(
                column.name,
                column.type.impl if isinstance(column.type, TypeDecorator) else column.type,
                primary_key=column.primary_key,
                autoincrement=False,
            )
            for column in table.columns
            if DERIVED not in column.info
        ),
    )


class _Digest:
    """How many rows there were, and a sum over them in which order does not count."""

    def __init__(self) -> None:
        self.rows = 0
        self._sum = 0

    def add(self, rows: Sequence[Any]) -> None:
        for row in rows:
            self.rows += 1
            seen = repr(tuple(_plain(value) for value in row)).encode("utf-8", "surrogatepass")
            self._sum += int.from_bytes(hashlib.sha256(seen).digest(), "big")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Digest) and (self.rows, self._sum) == (other.rows, other._sum)


def _plain(value: Any) -> Any:
    return bytes(value) if isinstance(value, memoryview | bytearray) else value


async def _pour(
    source: Database, target: Database, table: Table, told: Callable[[str, int], None]
) -> _Digest:
    digest = _Digest()
    async for rows in batches(source, table):
        await target.write(lambda c: _insert(c, table, rows))  # noqa: B023  # awaited here
        digest.add(rows)
        told(table.name, digest.rows)
    return digest


async def _digest(database: Database, table: Table) -> _Digest:
    digest = _Digest()
    async for rows in batches(database, table):
        digest.add(rows)
    return digest


async def batches(database: Database, table: Table) -> AsyncIterator[Sequence[Any]]:
    """The rows of ``table`` along its primary key."""
    keys = list(table.primary_key.columns)
    after: tuple[Any, ...] | None = None
    most = BULKY.get(table.name, BATCH)
    while True:
        query = select(table).order_by(*keys).limit(most)
        if after is not None:
            query = query.where(tuple_(*keys) > after)
        rows = await database.read(lambda c: c.execute(query).all())  # noqa: B023
        if rows:
            yield rows
        if len(rows) < most:
            return
        after = tuple(getattr(rows[-1], key.name) for key in keys)


def _insert(connection: Connection, table: Table, rows: Sequence[Any]) -> None:
    make: Any = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[connection.dialect.name]
    statement = make(table).on_conflict_do_nothing()
    connection.execute(statement, [dict(row._mapping) for row in rows])


def _set_sequence(connection: Connection, table: Table) -> None:
    """A key that the database counts itself goes on after the highest that was copied."""
    key = table.autoincrement_column
    if connection.dialect.name != "postgresql" or key is None:
        return
    if not isinstance(key.type, Integer | BigInteger):
        return
    sequence = connection.execute(
        text("SELECT pg_get_serial_sequence(:t, :c)"), {"t": table.name, "c": key.name}
    ).scalar()
    highest = connection.execute(select(func.max(key))).scalar()
    if sequence is not None and highest is not None:
        connection.execute(text("SELECT setval(:s, :n)"), {"s": sequence, "n": highest})
