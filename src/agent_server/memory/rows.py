"""Memories as rows: made ready before a transaction, read back after it, and chosen by filters.

Leans on the tables and on ``memory.words``. Refuses to run a transaction: ``memory.store`` does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache, lru_cache
from types import SimpleNamespace
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Float,
    Integer,
    Row,
    Select,
    Text,
    and_,
    bindparam,
    func,
    or_,
    select,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeEngine

from agent_server.domain.base import JsonObject, utcnow
from agent_server.domain.ids import Tenant, new_id
from agent_server.domain.memories import (
    Memory,
    MemoryFilter,
    MemoryPart,
    MemoryQuery,
    MemorySource,
    NewMemory,
)
from agent_server.memory.words import asks, facets_of, index_words, text_of
from agent_server.storage.tables import JsonText, Moment
from agent_server.storage.tables import memories as m
from agent_server.storage.tables import memory_spaces

READ = [column for column in m.c if column.name not in {"lexemes", "words", "asks"}] + [
    memory_spaces.c.name.label("namespace")
]
"""What ``memory_of`` needs, from the two tables joined."""
JOINED = m.join(memory_spaces, m.c.space == memory_spaces.c.id)


@dataclass(frozen=True)
class PreparedMemories:
    """See ``ports.Prepared``: each row without what only the transaction can know."""

    rows: list[JsonObject] = field(default_factory=list)
    namespaces: list[str] = field(default_factory=list)
    given: list[str] = field(default_factory=list)
    """The ids that were not made here: they may be there already."""
    dated: frozenset[int] = frozenset()
    """The places of those that were learnt when the caller says, and not now."""
    spares: Mapping[int, frozenset[str]] = field(default_factory=dict)
    """By place, whose key each leaves alone: ``NewMemory.spares``."""


def sizes(connection: Connection) -> tuple[int, tuple[int, str]]:
    """How many memories there are of all tenants, and how many in which largest namespace."""
    counted = (
        select(func.count(m.c.serial).label("rows"), memory_spaces.c.name)
        .select_from(JOINED)
        .group_by(memory_spaces.c.id, memory_spaces.c.name)
        .order_by(func.count(m.c.serial).desc())
    )
    found = connection.execute(counted).all()
    largest = (int(found[0].rows), str(found[0].name)) if found else (0, "")
    return sum(int(row.rows) for row in found), largest


def prepare(memories: Sequence[NewMemory]) -> PreparedMemories:
    now = utcnow()
    return PreparedMemories(
        [_row(new, now) for new in memories],
        [new.namespace for new in memories],
        [new.id for new in memories if new.id is not None],
        frozenset(n for n, new in enumerate(memories) if new.created_at is not None),
        {n: new.spares for n, new in enumerate(memories) if new.spares},
    )


def _row(new: NewMemory, now: datetime) -> JsonObject:
    part = new.part_of
    created = new.created_at or now
    row: JsonObject = {
        "id": new.id or new_id("mem"),
        "version": 1,
        "kind": new.kind,
        "key": new.key,
        "session_id": new.session_id,
        "position": new.position,
        "author": new.author,
        "subject": new.subject,
        "importance": new.importance,
        "expires_at": new.expires_at,
        "occurred_at": new.occurred_at,
        "source": new.source.model_dump(exclude_none=True),
        "run_id": new.source.run_id,
        "parent_id": part.memory_id if part else None,
        "part": part.index if part else None,
        "heading": list(part.heading) if part else None,
        "searchable": new.searchable,
        "created_at": created,
        "updated_at": created,
        "replaced_at": None,
        "supersedes": None,
        "superseded_by": None,
        "content": new.content,
        "metadata": new.metadata,
    }
    return row | indexed(row)


def indexed(row: JsonObject) -> JsonObject:
    """What the index and the ranking hold of the content in ``row``."""
    searchable = row["searchable"]
    text = text_of(row["content"]) if searchable else ""
    words = index_words(" ".join((*(row["heading"] or ()), text))) if searchable else []
    facets = facets_of(row["metadata"])
    return {
        "words": " ".join([*words, *facets]),
        "length": len(words),
        "asks": (asks(text) or None) if row["kind"] == "message" else None,
    }


def edited(old: Row[Any], changed: JsonObject, source: MemorySource, now: datetime) -> JsonObject:
    """The row of the version after ``old``. A piece keeps its text and its page."""
    row = {column.name: getattr(old, column.name) for column in m.c if column.name in old._fields}
    row |= changed
    if old.parent_id is not None and "metadata" in changed:
        page = {name: old.metadata[name] for name in ("page",) if name in old.metadata}
        row["metadata"] = changed["metadata"] | page
    row |= indexed(row)
    return row | {
        "version": old.version + 1,
        "updated_at": now,
        "source": source.model_dump(exclude_none=True),
        "run_id": source.run_id,
    }


class Ready:
    """A query made ready once, past SQLAlchemy's own way, which for a short query takes longer than
    the database does. Values come back as the driver has them."""

    def __init__(self, query: Select[Any]) -> None:
        self._query = query
        self._made: dict[Dialect, tuple[str, list[_Bind]]] = {}

    def rows(self, connection: Connection, values: JsonObject) -> Sequence[Any]:
        """Run it with ``values`` for what it binds, by name; each row is a tuple."""
        made = self._made.get(connection.dialect)
        if made is None:
            self._made.clear()
            made = self._made[connection.dialect] = self._make(connection.dialect)
        statement, binds = made
        bound = [
            values.get(name, fixed) if stored is None else stored(values.get(name, fixed))
            for name, fixed, stored in binds
        ]
        given = tuple(bound)
        cursor = connection.connection.cursor()
        try:
            # Past its result, too, which first learns what each column is called.
            connection.dispatch.before_cursor_execute(
                connection, cursor, statement, given, None, False
            )
            cursor.execute(statement, given)
            return cursor.fetchall()
        except connection.dialect.loaded_dbapi.Error:
            with connection.exec_driver_sql(statement, given) as result:  # It knows what to do.
                return result.fetchall()
        finally:
            cursor.close()

    def _make(self, dialect: Dialect) -> "tuple[str, list[_Bind]]":
        made = self._query.compile(dialect=dialect)
        return str(made), [
            (name, made.binds[name].value, _stored(made.binds[name].type, dialect))
            for name in made.positiontup or ()
        ]


_Stored = Callable[[Any], Any] | None
"""What makes a value one that is stored."""
_Bind = tuple[str, Any, _Stored]
"""Its name, its value if the query has one, and what makes it one that is stored."""


def _stored(kind: TypeEngine[Any], dialect: Dialect) -> _Stored:
    return kind.dialect_impl(dialect).bind_processor(dialect)


def insert_rows(connection: Connection, rows: Sequence[JsonObject]) -> None:
    """Insert finished rows. Past SQLAlchemy's own way, which spends as long on each row as the
    database does; PostgreSQL is given each column as one list, and numbers the rows itself."""
    statement, columns = _insertion(connection.dialect)
    values = [
        [row[name] for row in rows] if stored is None else [stored(row[name]) for row in rows]
        for name, stored in columns
    ]
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql(statement, list(zip(*values, strict=True)))
        return
    # What is NULL in every row takes no list: the shorter ones are filled up with it.
    given = [[] if column.count(None) == len(rows) else column for column in values]
    connection.exec_driver_sql(statement, tuple(given))


@lru_cache(maxsize=8)
def _insertion(dialect: Dialect) -> tuple[str, list[tuple[str, _Stored]]]:
    """The statement, and each column in its order with what makes a value one that is stored."""
    in_rows = dialect.name == "sqlite"
    names = [name for name in m.c.keys() if in_rows or name != m.c.serial.name]
    into = f"INSERT INTO memories ({', '.join(names)})"
    if in_rows:
        statement = f"{into} VALUES ({', '.join('?' * len(names))})"
    else:
        kinds = {name: m.c[name].type.compile(dialect) for name in names} | {"lexemes": "TEXT"}
        lists = ", ".join(f"${n}::{kinds[name]}[]" for n, name in enumerate(names, 1))
        chosen = ", ".join(names).replace("lexemes", "lexemes::tsvector")
        statement = f"{into} SELECT {chosen} FROM unnest({lists}) AS given ({', '.join(names)})"
    return statement, [(name, _stored(m.c[name].type, dialect)) for name in names]


def memories_of(connection: Connection, serials: Sequence[int]) -> dict[int, Memory]:
    """The memories of these rows, as far as they are there, by serial."""
    dialect = connection.dialect
    found: dict[int, Memory] = {}
    for values in _whole(dialect.name).rows(connection, {"serials": serials}):
        read = zip(_readers(dialect), values, strict=True)
        row = SimpleNamespace(
            **{n: v if typed is None or v is None else typed(v) for (n, typed), v in read}
        )
        found[row.serial] = memory_of(row)
    return found


@cache
def _whole(dialect: str) -> Ready:
    whole = select(*READ).select_from(JOINED)
    return Ready(whole.where(m.c.serial.in_(listed(dialect, "serials"))))


@lru_cache(maxsize=8)
def _readers(dialect: Dialect) -> list[tuple[str, _Stored]]:
    """Each column of ``READ``, with what makes a value of one that is stored."""
    kinds = [(column.name, column.type) for column in READ]
    return [
        # A driver gives floats as they are.
        (
            n,
            (
                None
                if isinstance(k, Float)
                else k.dialect_impl(dialect).result_processor(dialect, None)
            ),
        )
        for n, k in kinds
    ]


def memory_of(row: Any) -> Memory:
    """The memory in ``row``, which has all of ``READ``."""
    part = None
    if row.parent_id is not None:
        part = MemoryPart(memory_id=row.parent_id, index=row.part, heading=tuple(row.heading or ()))
    return Memory(
        id=row.id,
        version=row.version,
        kind=row.kind,
        content=row.content,
        key=row.key,
        namespace=row.namespace,
        session_id=row.session_id,
        author=row.author,
        subject=row.subject,
        metadata=row.metadata,
        importance=row.importance,
        expires_at=row.expires_at,
        occurred_at=row.occurred_at,
        source=MemorySource(**row.source),
        part_of=part,
        position=row.position,
        searchable=row.searchable,
        created_at=row.created_at,
        updated_at=row.updated_at,
        replaced_at=row.replaced_at,
        supersedes=row.supersedes,
        superseded_by=row.superseded_by,
    )


def chosen_by(tenant: Tenant, filter: MemoryFilter) -> ColumnElement[bool]:
    """The condition of ``filter``, all but its words."""
    equal = {
        m.c.kind: filter.kind,
        memory_spaces.c.name: filter.namespace,
        m.c.key: filter.key,
        m.c.session_id: filter.session_id,
        m.c.subject: filter.subject,
        m.c.run_id: filter.run_id,
    }
    conditions = [column == value for column, value in equal.items() if value is not None]
    if filter.part_of is not None:
        conditions.append(m.c.parent_id == filter.part_of)
    elif not filter.parts:
        conditions.append(m.c.parent_id.is_(None))
    if not filter.replaced:
        conditions.append(m.c.replaced_at.is_(None))
    return and_(m.c.tenant == tenant, *conditions)


@dataclass(frozen=True)
class Scope:
    """Which rows a query may find, all but its words: a condition and the values it binds."""

    condition: ColumnElement[bool]
    values: JsonObject


def found_by(dialect: str, query: MemoryQuery, now: datetime, *more: ColumnElement[bool]) -> Scope:
    """What ``query`` may find in any namespace, where ``more`` holds too.

    The same kind of query has the same condition, so that its statements are made once.
    """
    given: JsonObject = {
        "kinds": None if query.kinds is None else list(query.kinds),
        "session": query.session_id,
        "subject": query.subject,
        "for_subject": query.for_subject,
    }
    values = {name: value for name, value in given.items() if value is not None}
    condition = _found_by(dialect, frozenset(values), query.as_of is not None)
    return Scope(
        and_(condition, *more) if more else condition, values | {"moment": query.as_of or now}
    )


@cache  # 32 of them for a dialect.
def _found_by(dialect: str, named: frozenset[str], back_then: bool) -> ColumnElement[bool]:
    moment = bindparam("moment", type_=Moment())
    conditions: list[ColumnElement[bool]] = [
        m.c.searchable,
        or_(m.c.expires_at.is_(None), m.c.expires_at > moment),
    ]
    if back_then:
        conditions.append(m.c.updated_at <= moment)
        conditions.append(or_(m.c.replaced_at.is_(None), m.c.replaced_at > moment))
    else:
        conditions.append(m.c.replaced_at.is_(None))
    given = {
        "kinds": m.c.kind.in_(listed(dialect, "kinds", Text)),
        "session": m.c.session_id == bindparam("session"),
        "subject": m.c.subject == bindparam("subject"),
        "for_subject": or_(m.c.subject.is_(None), m.c.subject == bindparam("for_subject")),
    }
    return and_(*conditions, *(given[name] for name in sorted(named)))


def narrows(query: MemoryQuery) -> bool:
    """Whether ``query`` asks for fewer rows than are live in its namespace."""
    return bool(
        query.kinds is not None
        or query.session_id is not None
        or query.subject is not None
        or query.for_subject is not None
        or query.filter
        or query.as_of is not None
    )


def in_spaces(dialect: str, space: ColumnElement[int], many: bool) -> ColumnElement[bool]:
    """That ``space`` is the one that is bound as ``space`` or, with ``many``, one of ``spaces``."""
    if many:
        return space.in_(listed(dialect, "spaces", Integer))
    return space == bindparam("space", type_=Integer)


def listed(dialect: str, name: str, kind: type[TypeEngine[Any]] = BigInteger) -> Select[Any]:
    """The values of the list that is bound as ``name``: one statement for lists of any length."""
    if dialect == "sqlite":
        values = func.json_each(bindparam(name, type_=JsonText())).table_valued("value")
        return select(values.c.value)
    return select(func.unnest(bindparam(name, type_=ARRAY(kind))).column_valued())
