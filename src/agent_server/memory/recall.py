"""Recall: the memories that answer a query, best first, with the reason for each.

Leans on the text index and the vector index for candidates, and on ``memory.ranking`` for their
order. Refuses to make a query vector itself: whoever can, gives it (``QueryVectors``).

Candidates come from the words, from the vectors, from a period that the query names, and from one
or two turns around the best of both in their conversation. They are read in one statement, of however
many namespaces; nothing but the answer's own rows is read whole.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, timezone
from functools import lru_cache
from time import monotonic
from typing import Any, NamedTuple, Protocol, TypeVar

from sqlalchemy import (
    CTE,
    BigInteger,
    ColumnElement,
    Connection,
    Float,
    Integer,
    Select,
    and_,
    bindparam,
    cast,
    exists,
    func,
    literal_column,
    null,
    or_,
    select,
    union,
    union_all,
)

from agent_server.domain.base import JsonObject, utcnow
from agent_server.domain.errors import InvalidRequest, Unavailable
from agent_server.domain.ids import Tenant
from agent_server.domain.memories import KINDS, Found, MemoryKind, MemoryQuery
from agent_server.memory.moments import Period, asks_for_latest, periods_in
from agent_server.memory.ranking import (
    Candidates,
    Ranked,
    Sought,
    Statistics,
    Weights,
    held_in,
    rank,
    rarity,
)
from agent_server.memory.rows import Ready, Scope, found_by, in_spaces, memories_of, narrows
from agent_server.memory.store import MemoryStore
from agent_server.memory.text_index import TextIndex
from agent_server.memory.vector_index import VectorIndex
from agent_server.memory.words import (
    MAX_QUERY_CHARS,
    STOP_WORDS,
    facet,
    plain_words,
    query_words,
)
from agent_server.storage.tables import Moment
from agent_server.storage.tables import memories as m
from agent_server.storage.tables import memory_spaces

TEXT_CANDIDATES = 80
VECTOR_CANDIDATES = 40
DATE_CANDIDATES = 60
ROOTS, MOST_ROOTS = 16, 40
"""The best of each kind that have their neighbours looked at: twice as many as are asked for, from
the first to the second number."""
VECTORS_ALONE = Weights(text=0, vector=1, neighbours=0, session=0, author=0, date=0, question=0)
MAX_WORDS = 48
"""Of a longer query only its rarest words are looked for."""
STATISTICS_S = 30.0
FEW = 500
"""Namespaces up to this size are counted anew each time."""
KNOWN_SPACES = 10_000


@dataclass(frozen=True)
class QueryVector:
    """A query as one embedder sees it; two while memories move from one to the next."""

    embedder: int
    vector: bytes


class QueryVectors(Protocol):
    """Whoever can embed a query."""

    async def of(self, text: str) -> Sequence[QueryVector]:
        """None of them when there is no embedder, or it does not answer."""

    @property
    def configured(self) -> bool:
        """Whether there is an embedder at all."""

    @property
    def because(self) -> str | None:
        """Why there was none for the last query that had none."""


class NoVectors:
    """Text alone."""

    configured = False
    because = None

    async def of(self, text: str) -> Sequence[QueryVector]:
        return ()


class _Read(NamedTuple):
    """What is read of a candidate, in this order."""

    serial: int
    space: int | None
    """None of one that the query may not find: nothing else is told of it."""
    session_id: str | None
    position: int | None
    author: str | None
    words: str
    length: int
    happened: int
    importance: float | None
    asks: float | None
    cosine: float | None
    kind: MemoryKind
    by_text: int
    """1 if it is among the best by text. Of a row whose serial is -n: how many have word n."""


_Wording = tuple[str, str | None]
"""A memory's words, and its author."""
AT_SERIAL, AT_SPACE = _Read._fields.index("serial"), _Read._fields.index("space")
"""Hundreds are read for each query: most stay as the driver gives them."""


class Recall:
    """Searches one store."""

    def __init__(
        self,
        store: MemoryStore,
        vectors: QueryVectors | None = None,
        weights: Weights | None = None,
    ) -> None:
        self._store = store
        self._vectors = vectors or NoVectors()
        self._weights = weights or Weights()
        self._known: dict[int, tuple[float, Statistics]] = {}
        self._known_of_all: dict[str, tuple[float, Statistics]] = {}
        store.search_with = self.search

    async def search(self, tenant: Tenant, query: MemoryQuery) -> list[Found]:
        """See ``ports.Memories.search``."""
        if query.mode == "vector" and not self._vectors.configured:
            raise InvalidRequest(
                "A search by vectors needs an embedder, and none is set.",
                hint="Set AGENT_SERVER_EMBEDDER, or search with mode `text` or `hybrid`.",
            )
        if not query.query.strip():
            return []
        vectors: Sequence[QueryVector] = ()
        if query.mode != "text" and self._store.vectors is not None:
            vectors = await self._vectors.of(query.query)
        if query.mode == "vector" and not vectors:
            because = self._store.no_vectors_because or self._vectors.because or "there is none"
            raise Unavailable(
                f"There is no vector to search by: {because.rstrip('.')}.",
                hint="Search with mode `text` or `hybrid`, which answer by words meanwhile.",
            )
        return await self._store.database.read(lambda c: self._found(c, tenant, query, vectors))

    def _found(
        self,
        connection: Connection,
        tenant: Tenant,
        query: MemoryQuery,
        vectors: Sequence[QueryVector],
    ) -> list[Found]:
        now = utcnow()
        spaces = self._spaces(connection, tenant, query.namespace)
        if not spaces:
            return []
        statistics = (
            self._statistics(connection, spaces[0])
            if len(spaces) == 1
            else self._statistics_of_all(connection, tenant)
        )
        words = query_words(query.query) if query.mode != "vector" else []
        if len(words) > MAX_WORDS:
            words = self._rarest(connection, spaces, words)
        periods = periods_in(query.query[:MAX_QUERY_CHARS], now)
        facets = [self._has_value(spaces, key, value) for key, value in query.filter.items()]
        most = _Most(
            max(TEXT_CANDIDATES, query.limit), max(VECTOR_CANDIDATES, 2 * query.limit),
            min(max(ROOTS, 2 * query.limit), MOST_ROOTS) if query.mode != "vector" else 0,
        )  # fmt: skip

        def candidates(
            query: MemoryQuery, *known: ColumnElement[bool]
        ) -> tuple[list[Sequence[Any]], dict[str, int]]:
            asked = _Asked(
                self._store, words, periods if words else [], vectors,
                found_by(connection.dialect.name, query, now, *facets, *known),
                most,
                bool(query.filter or known),
            )  # fmt: skip
            return asked.rows(connection, spaces, statistics, bool(known) or narrows(query))

        rows, counts = candidates(query)
        rare = {word: rarity(count, statistics.rows) for word, count in counts.items() if count}
        recency = query.recency
        if not recency and asks_for_latest(query.query):
            recency = self._weights.latest
        sought = Sought(
            rarity=rare,
            names=frozenset(plain_words(query.query[:MAX_QUERY_CHARS])) - STOP_WORDS,
            periods=periods,
            statistics=statistics,
            recency=recency,
            importance=query.importance,
        )
        weights = self._weights if query.mode != "vector" else VECTORS_ALONE
        kinds = frozenset(query.kinds or KINDS)
        repeated: set[_Wording] = set()
        more = rows
        while True:
            ranked = rank(sought, _candidates(rows, list(rare)), weights)
            kept, full, repeats = _kept(query, rows, ranked)
            crowded = kinds & full or repeats - repeated
            if len(kept) >= query.limit or not (crowded and kinds - full and most.reached(more)):
                return self._answer(connection, kept, ranked)
            # Of these kinds, and of these wordings, there are enough: they took others' places.
            kinds -= full
            repeated |= repeats
            others = tuple(kind for kind in KINDS if kind in kinds)
            known = [_not_worded(wording) for wording in repeated]
            more, _ = candidates(query.model_copy(update={"kinds": others}), *known)
            there = {row[AT_SERIAL] for row in rows}
            rows = [*rows, *(row for row in more if row[AT_SERIAL] not in there)]

    def _answer(
        self, connection: Connection, kept: Sequence[tuple[int, int]], ranked: Ranked
    ) -> list[Found]:
        found = memories_of(connection, [serial for _, serial in kept])
        return [
            Found(
                memory=found[serial],
                score=round(ranked.totals[i], 6),
                matched={
                    name: round(column[i], 6)
                    for name, column in ranked.scores.items()
                    if column[i] > 0
                },
            )
            for i, serial in kept
            if serial in found  # Else it was deleted meanwhile.
        ]

    def _spaces(self, connection: Connection, tenant: Tenant, name: str | None) -> list[int]:
        if name is None:
            return list(connection.execute(_SPACES, {"tenant": tenant}).scalars())
        if (number := self._store.known_spaces.get((tenant, name))) is None:
            number = connection.execute(_SPACE, {"tenant": tenant, "name": name}).scalar()
            if number is None:
                return []
            self._store.remember_space(tenant, name, number)
        return [number]

    def _rarest(
        self, connection: Connection, spaces: Sequence[int], words: Sequence[str]
    ) -> list[str]:
        """As many of ``words`` as are looked for."""
        counts = self._store.words.occurrences(connection, spaces, words)
        return sorted(counts, key=lambda word: counts[word])[:MAX_WORDS]

    def _has_value(self, spaces: Sequence[int], key: str, value: Any) -> ColumnElement[bool]:
        values = value if isinstance(value, list) else [value]
        if not values:
            return m.c.serial < 0
        return self._store.words.having(spaces, [facet(key, one) for one in values], "OR")

    def _statistics(self, connection: Connection, space: int) -> Statistics:
        """Of few rows as they are now, of many as they were a while ago, from a sample."""
        at, known = self._known.get(space, (0.0, Statistics(0, 1.0)))
        if known.rows > FEW and monotonic() - at < STATISTICS_S:
            return known
        [(every, some, mean)] = _COUNTED.rows(connection, {"space": space})
        rows = every if some > FEW else some
        found = Statistics(rows, float(mean))
        _keep(self._known, space, (monotonic(), found))
        return found

    def _statistics_of_all(self, connection: Connection, tenant: Tenant) -> Statistics:
        """Of all that a tenant has, as they were a while ago where that is much."""
        at, known = self._known_of_all.get(tenant, (0.0, Statistics(0, 1.0)))
        if known.rows > FEW and monotonic() - at < STATISTICS_S:
            return known
        [(rows, mean)] = _COUNTED_OF_ALL.rows(connection, {"tenant": tenant})
        found = Statistics(rows, float(mean))
        _keep(self._known_of_all, tenant, (monotonic(), found))
        return found


class _Most(NamedTuple):
    """How many of the best are looked at."""

    by_text: int
    by_vector: int
    roots: int
    """So many of the best of each kind have their neighbours looked at."""

    def reached(self, read: Sequence[Sequence[Any]]) -> bool:
        """Whether more may have been found than are in ``read``."""
        rows = [_Read._make(row) for row in read]
        return sum(row.by_text for row in rows) >= self.by_text or (
            sum(row.cosine is not None for row in rows) >= self.by_vector
        )


@dataclass(frozen=True)
class _Asked:
    """A query, made ready for the indexes."""

    store: MemoryStore
    words: Sequence[str]
    periods: Sequence[Period]
    vectors: Sequence[QueryVector]
    scope: Scope
    most: _Most
    passing: bool
    """Whether its condition is a new one each time, and not worth keeping."""

    def rows(
        self, connection: Connection, spaces: Sequence[int], statistics: Statistics, narrow: bool
    ) -> tuple[list[Sequence[Any]], dict[str, int]]:
        """The best of the namespaces by text, by vector and by date, and what stands around them, as
        far as the query may find it; and how many memories there have each word.

        Unless it is ``narrow`` the indexes are first asked for whatever they hold, which costs no
        look at the rows; and once more when some took the places of others and may not be found:
        replaced, or expired.
        """
        read = self._read(connection, spaces, statistics, narrow)
        found = [row for row in read if row[AT_SPACE] is not None]
        beside = [_Read._make(row) for row in read if row[AT_SPACE] is None]
        counts = {self.words[-row.serial - 1]: row.by_text for row in beside if row.serial < 0}
        if not narrow and len(counts) < len(beside):
            if self.most.reached([row for row in read if row[AT_SERIAL] > 0]):
                return self.rows(connection, spaces, statistics, True)
        return found, counts

    def _read(
        self, connection: Connection, spaces: Sequence[int], statistics: Statistics, narrow: bool
    ) -> Sequence[Any]:
        words, index = self.store.words, self.store.vectors
        if not self.words and not self.vectors:
            return []
        within = self.scope if narrow else None
        many = len(spaces) > 1
        values: JsonObject = {"spaces": list(spaces)} if many else {"space": spaces[0]}
        values |= self.scope.values
        if self.words:
            mean_length = max(statistics.mean_length, 1.0)
            values |= words.sought(spaces, self.words, statistics.rows, mean_length)
        for n, one in enumerate(self.vectors):
            values |= index.sought(  # type: ignore[union-attr]  # is not None
                connection, one.embedder, n, one.vector, spaces, within, self.most.by_vector
            )
        dates = [p for p in self.periods if not p.yearly]
        for n, period in enumerate(dates):
            values |= {f"from{n}": _midnight(period.start), f"to{n}": _midnight(period.end)}
        shape = (
            connection.dialect.name, words if self.words else None, index,
            tuple(one.embedder for one in self.vectors), len(dates),
            self.scope.condition, narrow, self.most, many,
        )  # fmt: skip
        if self.passing:
            return connection.execute(_around_the_best(*shape), values).all()
        return _ready(*shape).rows(connection, values)  # type: ignore[arg-type]  # a Protocol is not seen as hashable


_SPACES = select(memory_spaces.c.id).where(memory_spaces.c.tenant == bindparam("tenant"))
_SPACE = _SPACES.where(memory_spaces.c.name == bindparam("name"))
_SPACES = _SPACES.order_by(memory_spaces.c.id)
_sample = (
    select(m.c.length)
    .where(m.c.space == bindparam("space"), m.c.searchable, m.c.replaced_at.is_(None))
    .limit(FEW + 1)
    .subquery()
)
_COUNTED = Ready(
    select(
        select(func.count())
        .select_from(m)
        .where(m.c.space == bindparam("space"))
        .scalar_subquery(),
        func.count(),
        func.coalesce(func.avg(_sample.c.length), 1.0),
    ).select_from(_sample)
)
_every = (
    select(m.c.length)
    .where(m.c.tenant == bindparam("tenant"), m.c.searchable, m.c.replaced_at.is_(None))
    .subquery()
)
_counted = select(func.count(), func.coalesce(func.avg(_every.c.length), 1.0))
_COUNTED_OF_ALL = Ready(_counted.select_from(_every))  # type: ignore[arg-type]  # of two kinds
REACH = len(Weights.reach)


def _around_the_best(
    dialect: str,
    words: TextIndex | None,
    vectors: VectorIndex | None,
    embedders: tuple[int, ...],
    dates: int,
    condition: ColumnElement[bool],
    narrow: bool,
    most: _Most,
    many: bool,
) -> Select[Any]:
    """What the ranking reads of the candidates, and of what stands within ``REACH`` of a root in
    its conversation: one row for each, with nothing but its serial where ``condition`` does not
    hold. And a row for each word, see ``_Read.by_text``."""
    within = condition if narrow else None
    no_cosine: ColumnElement[Any] = cast(null(), Float).label("cosine")
    not_by_text: ColumnElement[Any] = cast(0, Integer).label("by_text")
    found: list[Select[Any]] = []
    roots: list[Select[Any]] = []

    def best_of(candidates: CTE, order: ColumnElement[Any]) -> None:
        best = select(candidates.c.serial).order_by(order).limit(literal_column(str(most.roots)))
        roots.append(select(best.subquery().c.serial))

    if words is not None:
        best, counted = words.best(within, most.by_text, many)
        by_text = best.cte("by_text")
        found.append(select(by_text.c.serial, no_cosine, cast(1, Integer).label("by_text")))
        found.append(select(-counted.c.n, no_cosine, counted.c.count))
        best_of(by_text, by_text.c.score)
    seen: list[CTE] = []
    for n, embedder in enumerate(embedders):
        near = vectors.nearest(embedder, n, within, most.by_vector, many).cte(f"by_vector{n}")  # type: ignore[union-attr]  # is not None
        near = near.prefix_with(
            "MATERIALIZED"
        )  # Else SQLite's planner merges the limits of it and of its roots.
        cosines = select(near.c.serial, (1.0 - near.c.distance).label("cosine"), not_by_text)
        # Two embedders are never compared: a memory that both have seen counts by the first.
        found.append(cosines.where(*(near.c.serial.not_in(select(cte.c.serial)) for cte in seen)))
        best_of(near, near.c.distance)
        seen.append(near)
    if words is not None and dates:
        spans = [
            and_(
                m.c.occurred_at >= bindparam(f"from{n}", type_=Moment()),
                m.c.occurred_at < bindparam(f"to{n}", type_=Moment()),
            )
            for n in range(dates)
        ]
        dated = select(m.c.serial).where(
            in_spaces(dialect, m.c.space, many), m.c.occurred_at.is_not(None), or_(*spans), condition,
            exists(select(counted.c.n)),
        )  # fmt: skip
        dated_cte = dated.limit(literal_column(str(DATE_CANDIDATES))).cte("by_date")
        found.append(select(dated_cte.c.serial, no_cosine, not_by_text))
    if most.roots and roots:
        roots_cte = union(*roots).cte("roots")
        root, near_by = m.alias("root"), m.alias("near_by")
        beside = and_(
            near_by.c.space == root.c.space,
            near_by.c.session_id == root.c.session_id,
            near_by.c.position.between(root.c.position - REACH, root.c.position + REACH),
        )
        found.append(
            select(near_by.c.serial, no_cosine, not_by_text).select_from(
                roots_cte.join(root, root.c.serial == roots_cte.c.serial).join(near_by, beside)
            )
        )
    every = union_all(*found).subquery("every")
    wanted = (
        select(
            every.c.serial,
            func.max(every.c.cosine).label("cosine"),
            func.max(every.c.by_text).label("by_text"),
        )
        .group_by(every.c.serial)
        .cte("wanted")
    )
    # Not to be looked for by its namespace, all of which PostgreSQL would else read for each row.
    there = in_spaces(dialect, m.c.space + literal_column("0"), many)
    allowed = and_(m.c.serial == wanted.c.serial, there, condition)
    return select(
        wanted.c.serial,
        m.c.space,
        m.c.session_id,
        m.c.position,
        m.c.author,
        m.c.words,
        m.c.length,
        func.coalesce(m.c.occurred_at, m.c.created_at, type_=BigInteger).label("happened"),
        m.c.importance,
        m.c.asks,
        wanted.c.cosine,
        m.c.kind,
        wanted.c.by_text,
    ).select_from(wanted.outerjoin(m, allowed))


@lru_cache(maxsize=64)
def _ready(*shape: Any) -> Ready:
    return Ready(_around_the_best(*shape))


K = TypeVar("K")
V = TypeVar("V")


def _kept(
    query: MemoryQuery, rows: Sequence[Sequence[Any]], ranked: Ranked
) -> tuple[list[tuple[int, int]], set[MemoryKind], set[_Wording]]:
    """The first ``limit`` without two of the same wording, and no more of a kind than asked: their
    places and serials. And the kinds and the wordings of which there were more."""
    kept: list[tuple[int, int]] = []
    full: set[MemoryKind] = set()
    seen: set[_Wording] = set()
    repeats: set[_Wording] = set()
    kinds: Counter[str] = Counter()
    for i in ranked.order:
        if len(kept) >= query.limit:
            break
        row = _Read._make(rows[i])
        if ranked.totals[i] <= 0 and row.cosine is None:
            continue
        wording = (row.words, row.author)
        if wording in seen:
            repeats.add(wording)
            continue
        if kinds[row.kind] >= query.limits.get(row.kind, query.limit):
            full.add(row.kind)
            continue
        seen.add(wording)
        kinds[row.kind] += 1
        kept.append((i, row.serial))
    return kept, full, repeats


def _not_worded(wording: _Wording) -> ColumnElement[bool]:
    words, author = wording
    return or_(m.c.words != words, m.c.author.is_distinct_from(author))


def _keep(known: dict[K, V], key: K, value: V) -> None:
    if len(known) >= KNOWN_SPACES:
        known.clear()
    known[key] = value


def _midnight(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=timezone.utc)


def _candidates(rows: Sequence[Sequence[Any]], words: Sequence[str]) -> Candidates:
    columns: Sequence[Sequence[Any]] = tuple(zip(*rows, strict=True)) or ((),) * 11
    serials, spaces, sessions, positions, authors, texts, lengths = columns[:7]
    happened, importance, asks, cosines = columns[7:11]
    places = [
        (space, session) if session is not None else None
        for space, session in zip(spaces, sessions, strict=True)
    ]
    return Candidates(
        serials, places, positions, authors, held_in(texts, words), lengths, happened, importance,
        asks, cosines,
    )  # fmt: skip
