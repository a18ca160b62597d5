"""Bringing a database to the present schema, and saying whether it is there.

Leans on the tables for a new database and on ``revisions`` for an older one; a test proves that
both ways end at the same schema. Refuses to run by halves: it is one transaction, and on
PostgreSQL an advisory lock lets one process do it.
"""

from importlib import import_module
from typing import Final

from sqlalchemy import Connection, inspect, text

from agent_server.storage.tables import metadata

HEAD: Final = "0006"
"""The revision of ``tables``: the newest file in ``migrations/``."""
ADVISORY_LOCK = 7_349_002_118
"""Any number, the same in every process: "somebody is migrating"."""


def head_revision() -> str:
    """The newest revision this program knows."""
    return HEAD


def current_revision(connection: Connection) -> str | None:
    """The revision the database is at; None when it is empty."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def upgrade(connection: Connection) -> bool:
    """Bring the database to ``head_revision``; True when that changed anything.

    Raises ``ConfigurationError`` for a database of a newer program.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:n)"), {"n": ADVISORY_LOCK})
    current = current_revision(connection)
    if current == HEAD:
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
    # Not at the top of the file: most starts have nothing to migrate and need no Alembic.
    import_module("agent_server.storage.revisions").run(connection, current)
    return True
