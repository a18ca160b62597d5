"""The revisions of the schema, one after another, by Alembic.

Leans on Alembic, with the revisions in ``migrations/``. Refuses to run by halves: all pending
revisions are one transaction, the caller's. Loaded only for a database that has some to go:
Alembic and what it brings are a twentieth of the server's start.
"""

from pathlib import Path

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from agent_server.domain.errors import ConfigurationError


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    return config


def newest() -> str | None:
    """The revision that the last file in ``migrations/`` makes."""
    return ScriptDirectory.from_config(_config()).get_current_head()


def run(connection: Connection, current: str | None) -> None:
    """Bring the database from ``current`` (None: empty) to ``newest``.

    Raises ``ConfigurationError`` for a revision of a newer program.
    """
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
