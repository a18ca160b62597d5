"""How memories come into the tables: their namespaces, their places in conversations, and whose
place they take under a key.

Leans on ``memory.rows`` for the rows and on the indexes of words and vectors. Runs inside the
caller's transaction, and refuses to begin one.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, cast

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    Table,
    and_,
    func,
    select,
    text,
    tuple_,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from agent_server.domain.base import JsonObject
from agent_server.domain.ids import Tenant
from agent_server.domain.memories import ALWAYS_SAID, SAID_IF_GIVEN, Memory, says_nothing_new
from agent_server.memory.ports import Added
from agent_server.memory.rows import JOINED, READ, PreparedMemories, insert_rows, memory_of
from agent_server.memory.text_index import TextIndex
from agent_server.memory.vector_index import VectorIndex, erase_vectors
from agent_server.storage.tables import memories as m
from agent_server.storage.tables import memory_spaces


class Intake:
    """Inserts versions of memories in one transaction of a tenant, and closes those whose place
    they take."""

    def __init__(
        self,
        connection: Connection,
        tenant: Tenant,
        words: TextIndex,
        vectors: VectorIndex | None,
        known_spaces: Mapping[tuple[str, str], int],
    ) -> None:
        """``known_spaces`` has numbers of namespaces, by tenant and name."""
        self._connection = connection
        self._tenant = tenant
        self._words = words
        self._vectors = vectors
        self._known_spaces = known_spaces

    def insert(self, ready: PreparedMemories) -> tuple[list[Added], dict[str, int]]:
        """What was added, and the numbers of its namespaces."""
        if not ready.rows:
            return [], {}
        spaces = self._spaces(set(ready.namespaces))
        rows: list[JsonObject] = [
            {**row, "tenant": self._tenant, "space": spaces[namespace]}
            for row, namespace in zip(ready.rows, ready.namespaces, strict=True)
        ]
        self._lock(rows)
        known = self._known(ready.given)
        named: dict[tuple[int, str], JsonObject] = self._holders(rows)
        fresh: list[JsonObject] = []
        closed: dict[int, JsonObject] = {}
        ids: list[tuple[str, bool]] = []
        for n, row in enumerate(rows):
            if row["id"] in known:
                ids.append((row["id"], False))
                continue
            place = (row["space"], row["key"])
            holder = named.get(place) if row["key"] is not None else None
            if holder is not None and _spared(holder, row, ready.spares.get(n, frozenset())):
                row["key"] = holder = None
            if holder is not None:
                if says_nothing_new(row, holder):
                    ids.append((holder["id"], False))
                    continue
                if n in ready.dated and row["updated_at"] < holder["updated_at"]:
                    there = [one for one in fresh if (one["space"], one["key"]) == place]
                    self._into_the_past(row, there, closed)
                    known.add(row["id"])
                    fresh.append(row)
                    ids.append((row["id"], True))
                    continue
                row["supersedes"] = holder["id"]
                at = max(row["updated_at"], holder["updated_at"])
                change = {"replaced_at": at, "superseded_by": row["id"]}
                if "serial" in holder:
                    closed[holder["serial"]] = change
                    pieces = and_(parts_of(self._tenant, [holder["id"]]), m.c.replaced_at.is_(None))
                    found = self._connection.execute(select(m.c.serial).where(pieces)).scalars()
                    closed |= dict.fromkeys(found, change)
                else:
                    holder.update(change)
            if row["key"] is not None:
                named[place] = row
            known.add(row["id"])
            fresh.append(row)
            ids.append((row["id"], True))
        for serial, change in closed.items():
            self._connection.execute(update(m).where(m.c.serial == serial).values(**change))
        erase_vectors(self._connection, self._vectors, list(closed))
        self.write(fresh)
        names = {number: name for name, number in spaces.items()}
        return self._added(names, ids, fresh), spaces

    def _into_the_past(
        self,
        row: JsonObject,
        fresh: Sequence[JsonObject],
        closed: dict[int, JsonObject],
    ) -> None:
        """Let ``row``, which was learnt before the memory that has its key, hold until the next one
        under the key was learnt. ``fresh`` are those of this batch, ``closed`` is what becomes of
        rows that are there."""
        names = ("serial", "id", "updated_at", "replaced_at", "superseded_by")
        asked = select(*(m.c[name] for name in names)).where(
            m.c.space == row["space"], m.c.key == row["key"], m.c.parent_id.is_(None)
        )
        stored = [dict(r._mapping) for r in self._connection.execute(asked)]
        there = [one | closed.get(one["serial"], {}) for one in stored] + list(fresh)
        later = [one for one in there if one["updated_at"] > row["updated_at"]]
        after = min(later, key=lambda one: one["updated_at"])
        row |= {"replaced_at": after["updated_at"], "superseded_by": after["id"]}
        if "serial" in after:
            held = update(m).where(m.c.serial == after["serial"])
            self._connection.execute(held.values(supersedes=row["id"]))
        else:
            after["supersedes"] = row["id"]
        for one in there:
            if one["updated_at"] > row["updated_at"]:
                continue
            if one["replaced_at"] is None or one["replaced_at"] > row["updated_at"]:
                row["supersedes"] = one["id"]
                change = {"replaced_at": row["updated_at"]}
                # A version of what was edited later stays one of it.
                if one["superseded_by"] is not None:
                    change["superseded_by"] = row["id"]
                if "serial" in one:
                    closed[one["serial"]] = closed.get(one["serial"], {}) | change
                else:
                    one.update(change)

    def _spaces(self, names: set[str]) -> dict[str, int]:
        known = {name: self._known_spaces.get((self._tenant, name)) for name in names}
        if None not in known.values():
            return cast(dict[str, int], known)
        asked = select(memory_spaces.c.name, memory_spaces.c.id).where(
            memory_spaces.c.tenant == self._tenant, memory_spaces.c.name.in_(names)
        )
        found: dict[str, int] = {name: number for name, number in self._connection.execute(asked)}
        if missing := sorted(names - found.keys()):
            rows = [{"tenant": self._tenant, "name": name} for name in missing]
            insert_new(self._connection, memory_spaces, rows)
            found = {name: number for name, number in self._connection.execute(asked)}
        return found

    def _lock(self, rows: list[JsonObject]) -> None:
        """Let nobody else write under these keys or into these sessions till the commit."""
        if self._connection.dialect.name == "sqlite":
            return  # One writer at a time anyway.
        places = {f"k {r['space']} {r['key']}" for r in rows if r["key"] is not None}
        places |= {f"s {r['space']} {r['session_id']}" for r in rows if r["session_id"] is not None}
        if places:
            self._connection.execute(_LOCK, {"places": list(places)})

    def _known(self, ids: list[str]) -> set[str]:
        if not ids:
            return set()
        return set(
            self._connection.execute(select(m.c.id).where(with_ids(self._tenant, ids))).scalars()
        )

    def _holders(self, rows: list[JsonObject]) -> dict[tuple[int, str], JsonObject]:
        places = {(row["space"], row["key"]) for row in rows if row["key"] is not None}
        if not places:
            return {}
        found = self._connection.execute(
            select(
                *(m.c[name] for name in ("serial", "space", "key", "id", "run_id", "updated_at")),
                *(m.c[name] for name in (*ALWAYS_SAID, *SAID_IF_GIVEN)),
            ).where(tuple_(m.c.space, m.c.key).in_(sorted(places)), m.c.replaced_at.is_(None))
        )
        return {(row.space, row.key): dict(row._mapping) for row in found}

    def write(self, rows: list[JsonObject]) -> None:
        """Insert finished rows: each gets its serial and, where it has none, its position."""
        if not rows:
            return
        homeless = [r for r in rows if r["position"] is None and r["session_id"] is not None]
        next_place = self._next_places(homeless)
        for row in homeless:
            home = (row["space"], row["session_id"])
            row["position"] = next_place.get(home, 0)
            next_place[home] = row["position"] + 1
        if self._words.beside:
            last = self._connection.execute(
                select(func.coalesce(func.max(m.c.serial), 0))
            ).scalar_one()
            for serial, row in enumerate(rows, last + 1):
                row["serial"], row["lexemes"] = serial, None
            insert_rows(self._connection, rows)
            indexed_rows = [(r["serial"], r["space"], r["words"]) for r in rows if r["words"]]
            self._words.add(self._connection, indexed_rows)
        else:
            for row in rows:
                row["lexemes"] = self._words.lexemes(row["space"], row["words"])
            insert_rows(self._connection, rows)

    def _next_places(self, rows: list[JsonObject]) -> dict[tuple[int, str], int]:
        homes = {(row["space"], row["session_id"]) for row in rows}
        if not homes:
            return {}
        asked = _LAST_PLACES[self._connection.dialect.name]
        found = self._connection.execute(asked, {"homes": json.dumps(list(homes))})
        return {(space, session): place + 1 for space, session, place in found if place is not None}

    def _added(
        self,
        names: dict[int, str],
        ids: list[tuple[str, bool]],
        fresh: list[JsonObject],
    ) -> list[Added]:
        found: dict[str, Callable[[], Memory]] = {
            row["id"]: partial(memory_of, _AsRow(row, names[row["space"]])) for row in fresh
        }
        if old := [identity for identity, _ in ids if identity not in found]:
            versions = select(*READ).select_from(JOINED).where(with_ids(self._tenant, old))
            rows = self._connection.execute(versions.order_by(m.c.version))
            found.update((row.id, partial(memory_of, row)) for row in rows)
        return [Added(new, found[identity]) for identity, new in ids]


def _spared(holder: JsonObject, row: JsonObject, spares: Collection[str]) -> bool:
    """Whether ``holder`` keeps its key although ``row`` came with it."""
    return ("others" in spares and holder["subject"] not in (None, row["subject"])) or (
        "people" in spares and holder["run_id"] is None
    )


def with_ids(tenant: Tenant, ids: Sequence[str] | Select[Any]) -> ColumnElement[bool]:
    """An id is its tenant's own: another may have the same."""
    return and_(m.c.tenant == tenant, m.c.id.in_(ids))


def parts_of(tenant: Tenant, ids: Sequence[str]) -> ColumnElement[bool]:
    return and_(m.c.tenant == tenant, m.c.parent_id.in_(ids))


def insert_new(connection: Connection, into: Table, rows: Sequence[JsonObject]) -> None:
    """Insert those that break no uniqueness; the others are there already."""
    make = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    if rows:
        connection.execute(make(into).on_conflict_do_nothing(), list(rows))


_LOCK = text(
    "SELECT pg_advisory_xact_lock(place) FROM (SELECT DISTINCT hashtextextended(given, 7) AS place "
    "FROM unnest(CAST(:places AS text[])) AS given ORDER BY 1) AS ordered"
)
"""In one order, so that two batches cannot hold each other up."""
_LAST = (
    "SELECT {0}, {1}, (SELECT max(position) FROM memories WHERE space = {0} AND session_id = {1}) "
)
_LAST_PLACES = {
    "sqlite": text(
        _LAST.format("json_extract(value, '$[0]')", "json_extract(value, '$[1]')")
        + "FROM json_each(:homes)"
    ),
    "postgresql": text(
        _LAST.format("CAST(value ->> 0 AS integer)", "(value ->> 1)")
        + "FROM json_array_elements(CAST(:homes AS json))"
    ),
}
"""Of each conversation in ``homes``, pairs of namespace and session, its last position."""


class _AsRow:
    """A row that was just written, as if it had been read."""

    def __init__(self, row: JsonObject, namespace: str) -> None:
        self._row = row
        self.namespace = namespace

    def __getattr__(self, name: str) -> Any:
        return self._row[name]
