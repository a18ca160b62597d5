"""``agent-server db …``: the schema of the database.

Leans on the storage floor. Refuses to touch rows.
"""

import sys

import anyio

from agent_server.settings import Settings, load_settings
from agent_server.storage.database import database_at
from agent_server.storage.migrate import current_revision, head_revision, upgrade


async def upgrade_database() -> None:
    """Bring the database to the newest revision, and say whether that changed anything."""
    database = database_at(load_settings().database)
    await database.open()
    try:
        changed = await database.write(upgrade)
    finally:
        await database.close()
    word = "is now" if changed else "was already"
    sys.stdout.write(f"The database {word} at revision {head_revision()}.\n")


async def revision(settings: Settings, timeout_s: float) -> tuple[str | None, str]:
    """The revision that the database is at, and the newest. Raises ``TimeoutError``."""
    with anyio.fail_after(timeout_s):
        database = database_at(settings.database)
        await database.open()
        try:
            return await database.read(current_revision), head_revision()
        finally:
            await database.close()
