"""The text index of memories: FTS5 on SQLite, a ``tsvector`` with GIN on PostgreSQL.

Leans on ``memory.words``: both are given finished words, each with the number of its namespace
before it, so that a query can only ever meet words of that namespace and its cost does not grow
with the others. Refuses to rank: it hands out candidates by a rough score, of which
``memory.ranking`` makes the order, the same on both.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Protocol

from sqlalchemy import (
    TEXT,
    ColumnElement,
    Connection,
    Float,
    Integer,
    bindparam,
    cast,
    column,
    func,
    literal,
    select,
    table,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, TSQUERY

from agent_server.memory.rows import Scope, listed
from agent_server.memory.words import FACET
from agent_server.storage.migrate import one_at_a_time
from agent_server.storage.sqlite_driver import SECURE_TEXT_INDEX
from agent_server.storage.tables import memories

K1, B = 1.2, 0.75
"""The usual constants of BM25 (Robertson and Zaragoza, 2009)."""


Joint = Literal["AND", "OR"]


class TextIndex(Protocol):
    """Two implementations: ``Fts5`` and ``Lexemes``."""

    def create(self, connection: Connection) -> None:
        """Make what the tables of the schema lack, once."""

    def lexemes(self, space: int, words: str) -> str | None:
        """The value of the column ``lexemes`` for a row with these ``words``."""

    def add(self, connection: Connection, rows: Sequence[tuple[int, int, str]]) -> None:
        """Index rows that are in the table: serial, namespace, words."""

    def remove(self, connection: Connection, rows: Sequence[tuple[int, int, str]]) -> None:
        """Take out rows, which must be as they were added, before the table loses them."""

    def occurrences(
        self, connection: Connection, space: int, words: Sequence[str]
    ) -> dict[str, int]:
        """How many rows of the namespace have each word; those of none are left out."""

    def best(
        self,
        connection: Connection,
        space: int,
        weights: Mapping[str, float],
        mean_length: float,
        within: Scope | None,
        limit: int,
    ) -> list[int]:
        """The serials with any of the words, roughly the best first; ``within`` None for any
        version that there is."""

    def having(
        self, spaces: Sequence[int], words: Sequence[str], joint: Joint
    ) -> ColumnElement[bool]:
        """The condition that a row of one of the namespaces has all, or any, of the words."""


def placed(space: int, word: str) -> str:
    """``word`` as it stands in the index."""
    return f"{space}_{word}"


def _placed_all(space: int, words: str) -> str:
    prefix = f"{space}_"
    return prefix + words.replace(" ", " " + prefix) if words else ""


_fts = table("memory_words", column("rowid", Integer), column("memory_words"), column("rank"))
_vocabulary = table("memory_words_vocabulary", column("term"), column("doc", Integer))


class Fts5:
    """Contentless: the words are in the row of the memory, and given again to take it out."""

    def create(self, connection: Connection) -> None:
        connection.exec_driver_sql(
            "CREATE VIRTUAL TABLE IF NOT EXISTS memory_words USING fts5("
            f"words, content='', tokenize=\"ascii tokenchars '_{FACET}'\")"
        )
        connection.exec_driver_sql(
            "CREATE VIRTUAL TABLE IF NOT EXISTS memory_words_vocabulary "
            "USING fts5vocab(memory_words, row)"
        )
        if SECURE_TEXT_INDEX:
            connection.exec_driver_sql(
                "INSERT INTO memory_words(memory_words, rank) VALUES ('secure-delete', 1)"
            )

    def lexemes(self, space: int, words: str) -> str | None:
        return None

    def add(self, connection: Connection, rows: Sequence[tuple[int, int, str]]) -> None:
        if rows:
            connection.exec_driver_sql(
                "INSERT INTO memory_words(rowid, words) VALUES (?, ?)",
                [(serial, _placed_all(space, words)) for serial, space, words in rows],
            )

    def remove(self, connection: Connection, rows: Sequence[tuple[int, int, str]]) -> None:
        if not rows:
            return
        connection.exec_driver_sql(
            "INSERT INTO memory_words(memory_words, rowid, words) VALUES ('delete', ?, ?)",
            [(serial, _placed_all(space, words)) for serial, space, words in rows],
        )
        if not SECURE_TEXT_INDEX:  # Written anew, without what was marked as deleted.
            connection.exec_driver_sql("INSERT INTO memory_words(memory_words) VALUES ('optimize')")

    def occurrences(
        self, connection: Connection, space: int, words: Sequence[str]
    ) -> dict[str, int]:
        asked = {placed(space, word): word for word in words}
        rows = connection.execute(_COUNTED, {"terms": list(asked)})
        return {asked[row.term]: row.doc for row in rows}

    def best(
        self,
        connection: Connection,
        space: int,
        weights: Mapping[str, float],
        mean_length: float,
        within: Scope | None,
        limit: int,
    ) -> list[int]:
        values = {"sought": _sought([space], list(weights), "OR"), "most": limit}
        asked = _MATCHING
        if within is not None:
            asked = asked.join(memories, memories.c.serial == _fts.c.rowid)
            asked = asked.where(memories.c.space == space, within.condition)
            values |= within.values
        return list(connection.execute(asked, values).scalars().all())

    def having(
        self, spaces: Sequence[int], words: Sequence[str], joint: Joint
    ) -> ColumnElement[bool]:
        rows = select(_fts.c.rowid).where(
            _fts.c.memory_words.op("MATCH")(_sought(spaces, words, joint))
        )
        return memories.c.serial.in_(rows)


_COUNTED = select(_vocabulary).where(_vocabulary.c.term.in_(listed("sqlite", "terms")))
_MATCHING = (
    select(_fts.c.rowid)
    .where(_fts.c.memory_words.op("MATCH")(bindparam("sought")))
    .order_by(_fts.c.rank)
    .limit(bindparam("most"))
)


def _sought(spaces: Sequence[int], words: Sequence[str], joint: Joint) -> str:
    """The words as FTS5 takes them; each is quoted, so that nothing in it is syntax."""
    return " OR ".join(f"({f' {joint} '.join(_quoted(space, words, chr(34)))})" for space in spaces)


def _quoted(space: int, words: Iterable[str], mark: str) -> list[str]:
    return [f"{mark}{placed(space, word)}{mark}" for word in words]


class Lexemes:
    """A GIN index over the words. PostgreSQL's own ranking knows neither how rare a word is nor,
    usefully, how long a text: the rough score is spelt out in SQL."""

    def create(self, connection: Connection) -> None:
        one_at_a_time(connection)
        connection.execute(
            text(
                "CREATE INDEX IF NOT EXISTS ix_memories_lexemes ON memories "
                "USING gin (lexemes) WITH (fastupdate = off)"
            )
        )

    def lexemes(self, space: int, words: str) -> str | None:
        return " ".join(f"'{placed(space, word)}'" for word in dict.fromkeys(words.split()))

    def add(self, connection: Connection, rows: Sequence[tuple[int, int, str]]) -> None:
        pass  # The column is the index.

    def remove(self, connection: Connection, rows: Sequence[tuple[int, int, str]]) -> None:
        pass

    def occurrences(
        self, connection: Connection, space: int, words: Sequence[str]
    ) -> dict[str, int]:
        asked = func.unnest(literal(list(words), ARRAY(TEXT))).column_valued("word")
        query = func.concat("'", f"{space}_", asked, "'").cast(TSQUERY)
        count = (
            select(func.count())
            .select_from(memories)
            .where(memories.c.lexemes.op("@@")(query))
            .scalar_subquery()
        )
        rows = connection.execute(select(asked.label("word"), count.label("rows")))
        return {row.word: row.rows for row in rows if row.rows}

    def best(
        self,
        connection: Connection,
        space: int,
        weights: Mapping[str, float],
        mean_length: float,
        within: Scope | None,
        limit: int,
    ) -> list[int]:
        values = {
            "words": _quoted(space, weights, "'"),
            "weights": list(weights.values()),
            "space": space,
            "even": K1 * (1 - B),
            "by_length": K1 * B / mean_length,
            "most": limit,
        }
        asked = _WEIGHED
        if within is not None:
            asked = asked.where(within.condition)
            values |= within.values
        return list(connection.execute(asked, values).scalars().all())

    def having(
        self, spaces: Sequence[int], words: Sequence[str], joint: Joint
    ) -> ColumnElement[bool]:
        sign = " & " if joint == "AND" else " | "
        query = " | ".join(f"({sign.join(_quoted(space, words, chr(39)))})" for space in spaces)
        found: ColumnElement[bool] = memories.c.lexemes.op("@@")(cast(query, TSQUERY))
        return found


_given = (
    func.unnest(bindparam("words", type_=ARRAY(TEXT)), bindparam("weights", type_=ARRAY(Float)))
    .table_valued(column("word", TEXT), column("weight", Float), joins_implicitly=True)
    .render_derived(name="given")
)
_WEIGHED = (
    select(memories.c.serial)
    .where(
        memories.c.lexemes.op("@@")(cast(_given.c.word, TSQUERY)),
        memories.c.space == bindparam("space"),
    )
    .group_by(memories.c.serial, memories.c.length)
    .order_by(
        (
            func.sum(_given.c.weight)
            / (
                1
                + bindparam("even", type_=Float)
                + bindparam("by_length", type_=Float) * memories.c.length
            )
        ).desc(),
        memories.c.serial,
    )
    .limit(bindparam("most"))
)
"""Each word is looked up once, and the weights of those that a row has are added up."""


def rebuild(connection: Connection) -> None:
    """Make the index anew from the words in the rows: after these were copied from elsewhere."""
    index: TextIndex = Fts5() if connection.dialect.name == "sqlite" else Lexemes()
    index.create(connection)
    if isinstance(index, Fts5):
        connection.exec_driver_sql("INSERT INTO memory_words(memory_words) VALUES ('delete-all')")
    last = 0
    while rows := _next_rows(connection, last):
        index.add(connection, rows)
        for serial, space, words in rows if isinstance(index, Lexemes) else ():
            lexemes = index.lexemes(space, words)
            change = update(memories).where(memories.c.serial == serial)
            connection.execute(change.values(lexemes=lexemes))
        last = rows[-1][0]


def _next_rows(connection: Connection, last: int) -> list[tuple[int, int, str]]:
    asked = select(memories.c.serial, memories.c.space, memories.c.words)
    asked = asked.where(memories.c.serial > last, memories.c.words != "")
    rows = connection.execute(asked.order_by(memories.c.serial).limit(1000))
    return [(row.serial, row.space, row.words) for row in rows]
