"""Bringing a database to the present schema, and saying whether it is there.

Leans on the tables for a new database and on ``revisions`` for an older one; a test proves that
both ways end at the same schema. Refuses to run by halves: it is one transaction, and on
PostgreSQL an advisory lock lets one process do it.
"""

import asyncio
from importlib import import_module
from typing import Final

import structlog
from sqlalchemy import Connection, inspect, text

from agent_server.domain.errors import DatabaseUnavailable
from agent_server.storage.database import LOCKED, Database, PostgresDatabase, sqlstate
from agent_server.storage.tables import metadata

log = structlog.get_logger(__name__)

HEAD: Final = "0018"
"""The revision of ``tables``: the newest file in ``migrations/``."""
LOCK_S = 2
"""How long a migration waits for a table that somebody holds: whoever comes to the table meanwhile
waits behind it."""
TRIES = 30
PAUSE_S = 1.0
"""Between two tries, in which the others go on."""
ADVISORY_LOCK = 7_349_002_118
"""Any number, the same in every process: "somebody is changing the schema"."""


def head_revision() -> str:
    """The newest revision this program knows."""
    return HEAD


def current_revision(connection: Connection) -> str | None:
    """The revision the database is at; None when it is empty."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def serves(found: str | None) -> bool:
    """Whether this program may work on a database at revision ``found``.

    A newer one will do while revisions only add (tables, columns with defaults, indexes): so that
    old and new programs work side by side during an upgrade. A revision that takes something
    away says in its id from which on programs can do without: ``0012-9``, and those after it
    carry that on.
    """
    if found is None:
        return False
    number, _, oldest = found.partition("-")
    ours = HEAD.partition("-")[0]
    if not (number.isdigit() and (oldest or "0").isdigit()):
        return False
    return int(number) >= int(ours) and int(oldest or 0) <= int(ours)


def one_at_a_time(connection: Connection) -> None:
    """Let no other process change the schema until this transaction ends: ``IF NOT EXISTS`` does
    not keep two that begin at once from making the same thing."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:n)"), {"n": ADVISORY_LOCK})


async def migrate(database: Database) -> bool:
    """``upgrade`` of a database that servers may be working on; True when that changed anything.

    On PostgreSQL over a connection of its own, on which a statement may take any time. Raises
    ``DatabaseUnavailable`` where somebody holds a table all the while.
    """
    if not isinstance(database, PostgresDatabase):
        return await database.write(upgrade)
    if serves(await database.read(current_revision)):
        return False
    patient = PostgresDatabase(database.url, pool_size=1, patient=True)
    try:
        for left in reversed(range(TRIES)):
            try:
                return await patient.write(upgrade)
            except DatabaseUnavailable as error:
                if not left or error.__cause__ is None or sqlstate(error.__cause__) != LOCKED:
                    raise
                log.warning("somebody holds a table that is to be changed", tries_left=left)
                await asyncio.sleep(PAUSE_S)
        raise AssertionError("unreachable")
    finally:
        await patient.close()


def upgrade(connection: Connection) -> bool:
    """Bring the database to ``head_revision``; True when that changed anything.

    A newer database that this program may serve is left as it is. Raises ``ConfigurationError``
    for any other.
    """
    one_at_a_time(connection)
    current = current_revision(connection)
    if serves(current):
        return False
    if current is None:
        metadata.create_all(connection)
        connection.execute(
            text(
                "CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL, "
                "CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num))"
            )
        )
        connection.execute(text("INSERT INTO alembic_version VALUES (:head)"), {"head": HEAD})
        return True
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_S}s'"))
    # Not at the top of the file: most starts have nothing to migrate and need no Alembic.
    import_module("agent_server.storage.revisions").run(connection, current)
    return True
