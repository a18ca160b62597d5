"""``agent-server db …``: the schema of the database, and its move to another.

Leans on the storage floor. Refuses to know what is in the rows.
"""

import sys
from dataclasses import dataclass
from typing import Any

import anyio

from agent_server.domain.base import utcnow
from agent_server.domain.errors import ConfigurationError, InternalError
from agent_server.execution import retention
from agent_server.execution.store import clock
from agent_server.execution.store.events import event_fault
from agent_server.memory.rows import sizes
from agent_server.memory.text_index import rebuild
from agent_server.memory.vector_index import let_go, way_of
from agent_server.settings import Settings, load_settings
from agent_server.storage.blobs import blob_store, check
from agent_server.storage.check import unreadable
from agent_server.storage.copy import Derive, copy
from agent_server.storage.database import Database, database_at, room
from agent_server.storage.migrate import current_revision, head_revision, migrate, serves
from agent_server.storage.outside import blobs_apart, keep_outside
from agent_server.storage.references import rest_of

DERIVED: tuple[Derive, ...] = (rebuild, let_go)
"""What packages keep beside their rows, made anew in the target."""


async def upgrade_database() -> None:
    """Bring the database to the newest revision, and say whether that changed anything."""
    database = database_at(load_settings().database)
    await database.open()
    try:
        changed = await migrate(database)
    finally:
        await database.close()
    word = "is now" if changed else "was already"
    sys.stdout.write(f"The database {word} at revision {head_revision()}.\n")


@dataclass(frozen=True)
class State:
    """How a database stands."""

    revision: str | None
    newest: str
    room: int | None
    """Connections that are left; None where they are not counted."""
    off_s: float
    """By how much this machine's clock is before the database's."""


async def state(settings: Settings, timeout_s: float) -> State:
    """How the database stands. Raises ``TimeoutError``."""
    with anyio.fail_after(timeout_s):
        database = database_at(settings.database)
        await database.open()
        try:
            return await database.read(
                lambda c: State(
                    current_revision(c),
                    head_revision(),
                    room(c),
                    (utcnow() - clock(c)).total_seconds(),
                )
            )
        finally:
            await database.close()


@dataclass(frozen=True)
class MemorySizes:
    """How much is remembered: in all, and in the largest namespace, with its name."""

    rows: int
    largest: int
    name: str
    vectors: str | None
    """How vectors are searched here; None when they are not."""


async def memory_sizes(settings: Settings, timeout_s: float) -> MemorySizes:
    """What the memory of this database holds. Raises ``TimeoutError``."""
    with anyio.fail_after(timeout_s):
        database = database_at(settings.database)
        await database.open()
        try:
            rows, (largest, name) = await database.read(sizes)
            return MemorySizes(rows, largest, name, await database.read(way_of))
        finally:
            await database.close()


async def try_blobs(settings: Settings) -> str:
    """Where large values are kept, after one was put there, read and deleted again."""
    store = blob_store(settings.blobs, database_at(settings.database), settings.blob_timeout_s)
    await check(store)
    return store.name


async def _open(database: Database) -> None:
    """Open one whose tables are those of this program. Raises ``ConfigurationError``."""
    await database.open()
    found = await database.read(current_revision)
    if not serves(found):
        await database.close()
        raise ConfigurationError(
            f"The database is at revision {found or 'none'}, not {head_revision()}.",
            hint="Run `agent-server db upgrade`, if AGENT_SERVER_DATABASE_URL names the right one.",
        )


async def vacuum_database(
    days: int | None, failed_days: int | None, detail_days: int | None, dry_run: bool
) -> None:
    """Forget old runs by the settings, or by the days given, and say how many."""
    given = {
        "retention_days": days,
        "retention_failed_days": failed_days,
        "retention_detail_days": detail_days,
    }
    settings = load_settings({k: v for k, v in given.items() if v is not None})
    found = list(retention.rules(settings))
    if not found:
        raise ConfigurationError(
            "Nothing says how old a run may become.",
            hint="Give --days, --failed-days or --detail-days, or set AGENT_SERVER_RETENTION_DAYS.",
        )
    database = database_at(settings.database)
    outside = keep_outside(database, settings)
    await _open(database)
    try:
        for rule in found:
            number = await (retention.count if dry_run else retention.forget)(database, rule)
            verb = "would be deleted" if dry_run else "deleted"
            of = f"{rule.what}, older than {rule.age.days} days"
            sys.stdout.write(f"{number:,} {verb}: {of}.\n")
        if not dry_run:
            gone = await outside.collect()
            sys.stdout.write(f"{gone:,} deleted: large values that no run refers to.\n")
    finally:
        await database.close()


async def move_blobs() -> None:
    """Bring every large value to the place that is set. Raises ``InternalError`` if one is lost."""
    settings = load_settings()
    database = database_at(settings.database)
    outside = keep_outside(database, settings)
    await _open(database)
    try:
        moved = await outside.move(lambda seen: _tell("large values", seen))
    finally:
        await database.close()
    if sys.stderr.isatty():
        sys.stderr.write("\n")
    sys.stdout.write(
        f"{moved.blobs:,} large values ({moved.bytes:,} bytes) moved to {outside.store.name}.\n"
    )
    if moved.lost:
        raise InternalError(
            f"{moved.lost:,} large values are in none of the places, or not whole.",
            hint="Restore them from a backup, or name their place in AGENT_SERVER_BLOBS_ALSO.",
        )


async def check_database() -> None:
    """Name every stored value that cannot be read, and every large one that is lost. Raises
    ``InternalError`` if there is one."""
    settings = load_settings()
    database = database_at(settings.database)
    outside = keep_outside(database, settings)
    await _open(database)
    number = 0
    try:
        async for bad in unreadable(database, {("events", "data"): _event_fault}):
            number += 1
            key = "/".join(str(part) for part in bad.key)
            sys.stdout.write(f"{bad.table} {key}: {bad.column}: {bad.reason}\n")
        async for lost in outside.lost():
            number += 1
            sys.stdout.write(f"blobs {lost}\n")
    finally:
        await database.close()
    if number:
        raise InternalError(
            f"{number:,} stored values cannot be read.",
            hint="Readers are shown markers in their place; a backup has what they were.",
        )
    sys.stdout.write("Every stored value can be read.\n")


def _event_fault(row: Any) -> str | None:
    try:
        return event_fault(row.type, rest_of(row.data))
    except ValueError as error:
        return f"not a reference: {error}"


async def copy_database(source_url: str, target_url: str, resume: bool) -> None:
    """Copy everything from one database into another, and say what arrived."""
    if source_url == target_url:
        raise ConfigurationError("Source and target are the same database.")
    source, target = database_at(source_url), database_at(target_url, patient=True)
    outside = keep_outside(target, load_settings())
    await source.open()
    try:
        await target.open()
        try:
            done = await copy(source, target, resume=resume, derive=DERIVED, told=_tell)
            apart = await target.read(blobs_apart)
            lost = [one async for one in outside.lost(apart=True)] if apart else []
        finally:
            await target.close()
    finally:
        await source.close()
    sys.stderr.write("\n")
    for table in done:
        sys.stdout.write(f"{table.table:<24}{table.rows:>12,}\n")
    sys.stdout.write("Every row arrived as it was. Start the servers on the target.\n")
    if apart:
        sys.stdout.write(
            f"{apart:,} large values are not in the database and stay where they are: give those "
            "servers AGENT_SERVER_BLOBS and AGENT_SERVER_BLOBS_ALSO as before.\n"
        )
    if lost:
        raise InternalError(
            f"{len(lost):,} of them are in none of the places that are set here: {lost[0]}",
            hint="Set AGENT_SERVER_BLOBS and AGENT_SERVER_BLOBS_ALSO as the servers on the source "
            "have them, and look again: --resume.",
        )


def _tell(table: str, rows: int) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{table}: {rows:,}")
