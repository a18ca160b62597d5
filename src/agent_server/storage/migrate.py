"""Bringing a database to the present schema, and saying whether it is there.

Leans on Alembic, with the revisions in ``migrations/``. Refuses to run by halves: all pending
revisions are one transaction, and on PostgreSQL an advisory lock lets one process do it.
"""

from functools import lru_cache
from pathlib import Path

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, text

from agent_server.domain.errors import ConfigurationError

ADVISORY_LOCK = 7_349_002_118
"""Any number, the same in every process: "somebody is migrating"."""


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    return config


@lru_cache(maxsize=1)
def head_revision() -> str:
    """The newest revision this program knows."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    if head is None:
        raise ConfigurationError("The installation has no migrations; install it again.")
    return head


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
    if current == head_revision():
        return False
    config = _config()
    script = ScriptDirectory.from_config(config)
    if current is not None and current not in {r.revision for r in script.walk_revisions()}:
        raise ConfigurationError(
            f"The database is at revision {current!r}, which this program does not know.",
            hint="It belongs to a newer version: upgrade the program.",
        )
    config.attributes["connection"] = connection
    with EnvironmentContext(
        config, script, fn=lambda revision, _: script._upgrade_revs("head", revision)
    ):
        script.run_env()
    return True
