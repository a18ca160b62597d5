"""Recall: the memories that answer a query, best first, with the reason for each.

Leans on the text index and the vector index for candidates, and on ``memory.ranking`` for their
order. Refuses to make a query vector itself: whoever can, gives it (``QueryVectors``).

Candidates come from the words, from the vectors, from a period that the query names, and from one or two turns around the best of
both in their conversation. Everything is read in one transaction; nothing but the answer's own
rows is read whole.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, timezone
from functools import lru_cache
from time import monotonic
from typing import Any, Protocol

from sqlalchemy import ColumnElement, Connection, Row, Select, and_, func, or_, select

from agent_server.domain.base import utcnow
from agent_server.domain.errors import InvalidRequest
from agent_server.domain.ids import Tenant
from agent_server.domain.memories import Found, MemoryQuery
from agent_server.memory.moments import Period, asks_for_latest, periods_in
from agent_server.memory.ranking import (
    Candidate,
    Sought,
    Statistics,
    Weights,
    rank,
    rarity,
)
from agent_server.memory.rows import JOINED, READ, found_by, memory_of, narrows
from agent_server.memory.store import MemoryStore
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

TEXT_CANDIDATES = 150
VECTOR_CANDIDATES = 80
DATE_CANDIDATES = 60
ROOTS = 40
"""So many of the best of each kind have their neighbours looked at."""
VECTORS_ALONE = Weights(text=0, neighbours=0, session=0, author=0, date=0)
MAX_WORDS = 48
"""Of a longer query only its rarest words are looked for."""
STATISTICS_S = 30.0
FEW = 500
"""Namespaces up to this size are counted anew each time."""


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


class NoVectors:
    """Text alone."""

    configured = False

    async def of(self, text: str) -> Sequence[QueryVector]:
        return ()


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
        return await self._store.database.read(lambda c: self._found(c, tenant, query, vectors))

    def _found(
        self,
        connection: Connection,
        tenant: Tenant,
        query: MemoryQuery,
        vectors: Sequence[QueryVector],
    ) -> list[Found]:
        now = utcnow()
        where = found_by(query, now)
        spaces = self._spaces(connection, tenant, query.namespace)
        if not spaces:
            return []
        conditions = {space: self._in(space, where, query) for space in spaces}
        statistics = _joined([self._statistics(connection, space) for space in spaces])
        words = query_words(query.query) if query.mode != "vector" else []
        counts: Counter[str] = Counter()
        for space in spaces if words else ():
            counts.update(self._store.words.occurrences(connection, space, words))
        rare = {word: rarity(counts[word], statistics.rows) for word in counts}
        if len(rare) > MAX_WORDS:
            rare = dict(sorted(rare.items(), key=lambda pair: -pair[1])[:MAX_WORDS])
        periods = periods_in(query.query[:MAX_QUERY_CHARS], now)
        serials: dict[int, None] = {}
        cosines: dict[int, float] = {}
        roots: list[int] = []
        for space, condition in conditions.items():
            by_text = self._by_text(connection, space, rare, statistics, condition)
            by_vector = self._by_vector(connection, space, query, vectors, condition)
            by_date = self._by_date(connection, space, periods, condition) if rare else []
            cosines.update(by_vector)
            serials.update(dict.fromkeys([*by_text, *by_vector, *by_date]))
            roots += [*by_text[:ROOTS], *list(by_vector)[:ROOTS]]
        narrow = or_(*(and_(m.c.space == space, c) for space, c in conditions.items()))
        rows = self._rows(connection, list(serials), roots, narrow)
        if query.mode == "vector":
            rows = [row for row in rows if row.serial in cosines]
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
        candidates = [_candidate(row, rare, cosines.get(row.serial)) for row in rows]
        weights = self._weights if query.mode != "vector" else VECTORS_ALONE
        ranked = rank(sought, candidates, weights)
        return self._answer(connection, query, ranked, {row.serial: row for row in rows})

    def _in(
        self, space: int, where: ColumnElement[bool], query: MemoryQuery
    ) -> ColumnElement[bool]:
        return and_(where, *(self._has_value(space, k, v) for k, v in query.filter.items()))

    def _by_text(
        self,
        connection: Connection,
        space: int,
        rare: dict[str, float],
        statistics: Statistics,
        where: ColumnElement[bool],
    ) -> list[int]:
        if not rare:
            return []
        mean = max(statistics.mean_length, 1.0)
        return self._store.words.best(connection, space, rare, mean, where, TEXT_CANDIDATES)

    def _by_date(
        self,
        connection: Connection,
        space: int,
        periods: Sequence[Period],
        where: ColumnElement[bool],
    ) -> list[int]:
        """What happened in a period that the query names with its year."""
        inside = [
            and_(m.c.occurred_at >= _midnight(p.start), m.c.occurred_at < _midnight(p.end))
            for p in periods
            if not p.yearly
        ]
        if not inside:
            return []
        asked = select(m.c.serial).where(m.c.space == space, or_(*inside), where)
        return list(connection.execute(asked.limit(DATE_CANDIDATES)).scalars())

    def _by_vector(
        self,
        connection: Connection,
        space: int,
        query: MemoryQuery,
        vectors: Sequence[QueryVector],
        where: ColumnElement[bool],
    ) -> dict[int, float]:
        """Serials with their cosine, the best first. Two embedders are never compared with each
        other: a memory that both have seen counts by the first."""
        index = self._store.vectors
        found: dict[int, float] = {}
        if index is None:
            return found
        for one in vectors:
            asked = (connection, one.embedder, space, one.vector, VECTOR_CANDIDATES)
            near = index.nearest(*asked, where if narrows(query) else None)
            live = select(m.c.serial).where(m.c.serial.in_([serial for serial, _ in near]), where)
            if len(connection.execute(live).all()) < len(near):  # Some have expired.
                near = index.nearest(*asked, where)
            for serial, cosine in near:
                found.setdefault(serial, cosine)
        return found

    def _rows(
        self,
        connection: Connection,
        serials: list[int],
        roots: list[int],
        where: ColumnElement[bool],
    ) -> list[Row[Any]]:
        """The candidates and what stands next to the roots, as far as the query may find it."""
        rows: dict[int, Row[Any]] = {
            row.serial: row
            for row in connection.execute(_LIGHT.where(m.c.serial.in_(serials), where))
        }
        places = {
            (row.space, row.session_id, row.position + step)
            for serial in roots
            if (row := rows.get(serial)) is not None and row.session_id is not None
            for step in STEPS
        }
        by_session: dict[tuple[int, str], list[int]] = {}
        for space, session, position in places:
            by_session.setdefault((space, session), []).append(position)
        if by_session:
            around = or_(
                *(
                    and_(m.c.space == space, m.c.session_id == session, m.c.position.in_(positions))
                    for (space, session), positions in by_session.items()
                )
            )
            rows |= {row.serial: row for row in connection.execute(_LIGHT.where(around, where))}
        return list(rows.values())

    def _answer(
        self,
        connection: Connection,
        query: MemoryQuery,
        ranked: Sequence[Candidate],
        rows: dict[int, Row[Any]],
    ) -> list[Found]:
        """The first ``limit`` without two of the same wording, and no more of a kind than asked."""
        kept: list[Candidate] = []
        seen: set[tuple[str, str | None]] = set()
        kinds: Counter[str] = Counter()
        for candidate in ranked:
            if candidate.total <= 0 or len(kept) >= query.limit:
                break
            row = rows[candidate.serial]
            wording = (row.words, row.author)
            if wording in seen or kinds[row.kind] >= query.limits.get(row.kind, query.limit):
                continue
            seen.add(wording)
            kinds[row.kind] += 1
            kept.append(candidate)
        whole = select(*READ).select_from(JOINED).where(m.c.serial.in_([c.serial for c in kept]))
        found = {row.serial: memory_of(row) for row in connection.execute(whole)} if kept else {}
        return [
            Found(
                memory=found[c.serial],
                score=round(c.total, 6),
                matched={name: round(score, 6) for name, score in c.scores.items()},
            )
            for c in kept
        ]

    def _spaces(self, connection: Connection, tenant: Tenant, name: str | None) -> list[int]:
        asked = select(memory_spaces.c.id).where(memory_spaces.c.tenant == tenant)
        if name is not None:
            asked = asked.where(memory_spaces.c.name == name)
        return list(connection.execute(asked.order_by(memory_spaces.c.id)).scalars())

    def _has_value(self, space: int, key: str, value: Any) -> ColumnElement[bool]:
        values = value if isinstance(value, list) else [value]
        if not values:
            return m.c.serial < 0
        return or_(*(self._store.words.having(space, [facet(key, one)]) for one in values))

    def _statistics(self, connection: Connection, space: int) -> Statistics:
        at, known = self._known.get(space, (0.0, Statistics(0, 1.0)))
        if known.rows > FEW and monotonic() - at < STATISTICS_S:
            return known
        rows, mean = connection.execute(
            select(func.count(), func.coalesce(func.avg(m.c.length), 1.0)).where(
                m.c.space == space, m.c.searchable, m.c.replaced_at.is_(None)
            )
        ).one()
        found = Statistics(rows, float(mean))
        self._known[space] = (monotonic(), found)
        return found


_LIGHT: Select[Any] = select(
    m.c.serial,
    m.c.space,
    m.c.kind,
    m.c.session_id,
    m.c.position,
    m.c.author,
    m.c.words,
    m.c.length,
    m.c.importance,
    func.coalesce(m.c.occurred_at, m.c.created_at, type_=Moment()).label("happened"),
)
"""What the ranking reads of a row."""
STEPS = tuple(step for n in range(1, len(Weights.reach) + 1) for step in (-n, n))


def _midnight(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=timezone.utc)


def _joined(parts: Sequence[Statistics]) -> Statistics:
    rows = sum(part.rows for part in parts)
    words = sum(part.rows * part.mean_length for part in parts)
    return Statistics(rows, words / rows if rows else 1.0)


def _candidate(row: Row[Any], rare: dict[str, float], cosine: float | None) -> Candidate:
    counts: Counter[str] = Counter()
    for word in row.words.split():
        if word in rare:
            counts[word] += 1
    return Candidate(
        serial=row.serial,
        place=(row.space, row.session_id) if row.session_id is not None else None,
        position=row.position or 0,
        author=_name_words(row.author) if row.author else frozenset(),
        words=counts,
        length=row.length,
        happened=row.happened,
        importance=row.importance or 0.0,
        cosine=cosine,
    )


@lru_cache(maxsize=10_000)
def _name_words(author: str) -> frozenset[str]:
    return frozenset(plain_words(author)) - STOP_WORDS
