"""Looking for stored values that cannot be read: what a bad disk or a hand in the database left.

Leans on the tables as they are stored. Refuses to mend: what a value was
cannot be known; and to look at blobs: ``outside.lost`` does.
"""

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from agent_server.storage.copy import batches, raw_table
from agent_server.storage.database import Database
from agent_server.storage.references import rest_of
from agent_server.storage.tables import JsonText, metadata

Fault = Callable[[Any], str | None]
"""Why a row as it is stored cannot be read, beyond its JSON columns."""


@dataclass(frozen=True)
class BadValue:
    """One value that cannot be read, and where it stands."""

    table: str
    key: tuple[Any, ...]
    column: str
    reason: str


async def unreadable(
    database: Database, more: dict[tuple[str, str], Fault]
) -> AsyncIterator[BadValue]:
    """Every value of ``database`` (open) that cannot be read, table by table. ``more`` says it of
    columns, by table and name, that hold something else than JSON."""
    for table in metadata.sorted_tables:
        columns = [c.name for c in table.columns if isinstance(c.type, JsonText)]
        others = {column: fault for (of, column), fault in more.items() if of == table.name}
        if not columns and not others:
            continue
        keys = [column.name for column in table.primary_key.columns]
        async for rows in batches(database, raw_table(table)):
            for row in rows:
                found = {column: _not_json(getattr(row, column)) for column in columns}
                found |= {column: fault(row) for column, fault in others.items()}
                for column, reason in found.items():
                    if reason is not None:
                        key = tuple(getattr(row, name) for name in keys)
                        yield BadValue(table.name, key, column, reason)


def _not_json(value: str | None) -> str | None:
    try:
        json.loads(rest_of(value or "null"))
    except ValueError as error:
        return f"not JSON: {error}"
    return None
