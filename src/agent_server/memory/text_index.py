"""The text index of memories: FTS5 on SQLite, a ``tsvector`` with GIN on PostgreSQL.

Leans on ``memory.words``: both are given finished words, each with the number of its namespace
before it, so that a query can only ever meet words of that namespace and its cost does not grow
with the others. Refuses to rank: it hands out candidates by a rough score, spelt out in SQL and the
same on both, of which ``memory.ranking`` makes the order.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol

from sqlalchemy import (
    CTE,
    TEXT,
    BigInteger,
    ColumnElement,
    Connection,
    Float,
    Integer,
    Select,
    bindparam,
    case,
    cast,
    column,
    func,
    literal_column,
    select,
    table,
    text,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, TSQUERY
from sqlalchemy.types import TypeEngine

from agent_server.domain.base import JsonObject
from agent_server.memory.rows import Ready, listed
from agent_server.memory.words import FACET
from agent_server.storage.migrate import one_at_a_time
from agent_server.storage.sqlite_driver import SECURE_TEXT_INDEX
from agent_server.storage.tables import JsonText, memories

K1, B = 1.2, 0.75
"""The usual constants of BM25 (Robertson and Zaragoza, 2009)."""


Joint = Literal["AND", "OR"]


class TextIndex(Protocol):
    """Two implementations: ``Fts5`` and ``Lexemes``."""

    beside: bool
    """Whether it stands beside the table, and is given each row with its serial."""

    def create(self, connection: Connection) -> None:
        """Make what the tables of the schema lack, once."""

    def lexemes(self, space: int, words: str) -> str | None:
        """The value of the column ``lexemes`` for a row with these ``words``."""

    def add(self, connection: Connection, rows: Sequence[tuple[int, int, str]]) -> None:
        """Index rows that are in the table: serial, namespace, words."""

    def remove(self, connection: Connection, rows: Sequence[tuple[int, int, str]]) -> None:
        """Take out rows, which must be as they were added, before the table loses them."""

    def occurrences(
        self, connection: Connection, spaces: Sequence[int], words: Sequence[str]
    ) -> Counter[str]:
        """How many rows of the namespaces have each word; those of none are left out."""

    def best(
        self, within: ColumnElement[bool] | None, limit: int, many: bool
    ) -> tuple[Select[Any], CTE]:
        """The query for the ``serial`` of rows with any of the words, with a rough ``score`` of
        which the least is the best; ``within`` None for any version that there is. And, as
        ``occurrences``, for how many rows (``count``) have the ``n``-th word, from 1.

        ``many``: of several namespaces, as if their rows were in one."""

    def sought(
        self, spaces: Sequence[int], words: Sequence[str], rows: int, mean_length: float
    ) -> JsonObject:
        """The values that ``best`` binds: ``rows`` are in the namespaces, of that length."""

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

    beside = True

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
        self, connection: Connection, spaces: Sequence[int], words: Sequence[str]
    ) -> Counter[str]:
        asked = {placed(space, word): word for space in spaces for word in words}
        found: Counter[str] = Counter()
        for term, count in _COUNTED.rows(connection, {"terms": list(asked)}):
            found[asked[term]] += count
        return found

    def best(
        self, within: ColumnElement[bool] | None, limit: int, many: bool
    ) -> tuple[Select[Any], CTE]:
        given = func.json_each(bindparam("words", type_=JsonText()))
        word = given.table_valued(column("key", Integer), column("value", TEXT), name="word")
        match = _fts.c.memory_words.op("MATCH")(word.c.value)
        hits = (
            select((_number(word.c.key, many) + 1).label("n"), _fts.c.rowid.label("serial"))
            .select_from(word.join(_fts, match))
            .cte("hits")
        )
        counted = _counted(hits)
        summed = (
            select(hits.c.serial, func.sum(counted.c.rare).label("rare"))
            # The few words are looked up for each hit, and not the hits for each word.
            .select_from(hits.join(counted, counted.c.n == hits.c.n + literal_column("0")))
            .group_by(hits.c.serial)
            .cte("summed")
        )
        score = (-summed.c.rare / _room(memories.c.length)).label("score")
        best = select(summed.c.serial, score).join(memories, memories.c.serial == summed.c.serial)
        if within is not None:
            best = best.where(within)
        best = best.order_by(score, summed.c.serial).limit(literal_column(str(limit)))
        return best, counted

    def sought(
        self, spaces: Sequence[int], words: Sequence[str], rows: int, mean_length: float
    ) -> JsonObject:
        placed_all = [one for space in spaces for one in _quoted(space, words, chr(34))]
        return _sought_by(placed_all, len(words), rows, mean_length)

    def having(
        self, spaces: Sequence[int], words: Sequence[str], joint: Joint
    ) -> ColumnElement[bool]:
        rows = select(_fts.c.rowid).where(
            _fts.c.memory_words.op("MATCH")(_sought(spaces, words, joint))
        )
        return memories.c.serial.in_(rows)


_COUNTED = Ready(select(_vocabulary).where(_vocabulary.c.term.in_(listed("sqlite", "terms"))))


def _sought(spaces: Sequence[int], words: Sequence[str], joint: Joint) -> str:
    """The words as FTS5 takes them; each is quoted, so that nothing in it is syntax."""
    return " OR ".join(f"({f' {joint} '.join(_quoted(space, words, chr(34)))})" for space in spaces)


def _quoted(space: int, words: Iterable[str], mark: str) -> list[str]:
    return [f"{mark}{placed(space, word)}{mark}" for word in words]


def _number(place: ColumnElement[int], many: bool) -> ColumnElement[int]:
    """Which word, from 0, stands at the ``place`` in the list of them all: with ``many``
    namespaces, all words of the first stand before those of the second."""
    return place % bindparam("each", type_=BigInteger) if many else place


def _counted(hits: CTE) -> CTE:
    """How many rows have the ``n``-th word (``count``), and how ``rare`` that makes it."""
    count = func.count()
    more = bindparam("rows", type_=Float) - count
    others = case((more > 0, more), else_=0.0)
    rare = func.ln(1 + (others + 0.5) / (count + 0.5)).label("rare")
    return select(hits.c.n, count.label("count"), rare).group_by(hits.c.n).cte("counted")


def _room(length: ColumnElement[int]) -> ColumnElement[float]:
    """What the rarity of a row's words is divided by: a long text has some of them by chance. How
    often a word stands in a row is left to the ranking."""
    return 1 + K1 * (1 - B) + bindparam("by_length", type_=Float) * length


def _sought_by(words: Sequence[str], each: int, rows: int, mean_length: float) -> JsonObject:
    return {"words": words, "each": each, "rows": rows, "by_length": K1 * B / mean_length}


class Lexemes:
    """A GIN index over the words."""

    beside = False

    def create(self, connection: Connection) -> None:
        one_at_a_time(connection)
        connection.execute(
            text(
                "CREATE INDEX IF NOT EXISTS ix_memories_lexemes ON memories "
                "USING gin (lexemes) WITH (fastupdate = off)"
            )
        )

    def lexemes(self, space: int, words: str) -> str | None:
        placed_all = f"' '{placed(space, '')}".join(dict.fromkeys(words.split()))
        return f"'{placed(space, '')}{placed_all}'" if words else ""

    def add(self, connection: Connection, rows: Sequence[tuple[int, int, str]]) -> None:
        pass  # The column is the index.

    def remove(self, connection: Connection, rows: Sequence[tuple[int, int, str]]) -> None:
        pass

    def occurrences(
        self, connection: Connection, spaces: Sequence[int], words: Sequence[str]
    ) -> Counter[str]:
        asked = [(word, placed(space, word)) for space in spaces for word in words]
        rows = _HELD.rows(connection, {"words": [f"'{one}'" for _, one in asked]})
        found: Counter[str] = Counter()
        for (word, _), (_, count) in zip(asked, rows, strict=True):
            if count:
                found[word] += count
        return found

    def best(
        self, within: ColumnElement[bool] | None, limit: int, many: bool
    ) -> tuple[Select[Any], CTE]:
        # Each word is looked up once, and how rare those are that a row has is added up. The
        # namespace is in the words: asked for beside them, it makes the planner read the table.
        word = (
            func.unnest(_given_list("words", TEXT))
            .table_valued(column("word", TEXT), with_ordinality="n", joins_implicitly=True)
            .render_derived(name="given")
        )
        hits = (
            select(
                (_number(word.c.n - 1, many) + 1).label("n") if many else word.c.n,
                memories.c.serial,
                memories.c.length,
                (true() if within is None else within).label("allowed"),
            )
            .where(memories.c.lexemes.op("@@")(cast(word.c.word, TSQUERY)))
            .cte("hits")
        )
        counted = _counted(hits)
        score = (-func.sum(counted.c.rare) / _room(hits.c.length)).label("score")
        best = (
            select(hits.c.serial, score)
            .join(counted, counted.c.n == hits.c.n)
            .where(hits.c.allowed)
            .group_by(hits.c.serial, hits.c.length)
            .order_by(score, hits.c.serial)
        )
        return best.limit(literal_column(str(limit))), counted

    def sought(
        self, spaces: Sequence[int], words: Sequence[str], rows: int, mean_length: float
    ) -> JsonObject:
        placed_all = [one for space in spaces for one in _quoted(space, words, "'")]
        return _sought_by(placed_all, len(words), rows, mean_length)

    def having(
        self, spaces: Sequence[int], words: Sequence[str], joint: Joint
    ) -> ColumnElement[bool]:
        sign = " & " if joint == "AND" else " | "
        query = " | ".join(f"({sign.join(_quoted(space, words, chr(39)))})" for space in spaces)
        found: ColumnElement[bool] = memories.c.lexemes.op("@@")(cast(query, TSQUERY))
        return found


def _given_list(name: str, kind: type[TypeEngine[Any]]) -> ColumnElement[Any]:
    """A list in a query of its own, where the planner does not see how long it is: else it would
    plan anew for each."""
    return select(bindparam(name, type_=ARRAY(kind))).scalar_subquery()


_word = func.unnest(_given_list("words", TEXT)).column_valued("word")
_HELD = Ready(
    select(
        _word,
        select(func.count())
        .select_from(memories)
        .where(memories.c.lexemes.op("@@")(cast(_word, TSQUERY)))
        .scalar_subquery(),
    )
)
"""How many rows have each of ``words``, in their order."""


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
