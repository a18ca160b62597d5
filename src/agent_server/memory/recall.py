"""Recall: the memories that answer a query, best first, with the reason for each.

Leans on the text index and the vector index for candidates, and on ``memory.ranking`` for their
order. Refuses to make a query vector itself: whoever can, gives it (``QueryVectors``).

Candidates come from the words, from the vectors, from a period that the query names, and from one or two turns around the best of
both in their conversation. Everything is read in one transaction; nothing but the answer's own
rows is read whole.
"""

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timezone
from functools import lru_cache
from time import monotonic
from typing import Any, Protocol, TypeVar

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Integer,
    Row,
    Select,
    and_,
    bindparam,
    func,
    or_,
    select,
    union,
)

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
from agent_server.memory.rows import JOINED, READ, Scope, found_by, listed, memory_of, narrows
from agent_server.memory.store import MemoryStore
from agent_server.memory.words import (
    MAX_QUERY_CHARS,
    STOP_WORDS,
    facet,
    plain_words,
    query_words,
)
from agent_server.storage.tables import memories as m
from agent_server.storage.tables import memory_spaces

TEXT_CANDIDATES = 120
VECTOR_CANDIDATES = 60
DATE_CANDIDATES = 60
ROOTS, MOST_ROOTS = 16, 40
"""The best of each kind that have their neighbours looked at: twice as many as are asked for, from
the first to the second number."""
VECTORS_ALONE = Weights(text=0, vector=1, neighbours=0, session=0, author=0, date=0)
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
        self._numbers: dict[tuple[str, str], int] = {}
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
        spaces = self._spaces(connection, tenant, query.namespace)
        if not spaces:
            return []
        statistics = _joined([self._statistics(connection, space) for space in spaces])
        words = query_words(query.query) if query.mode != "vector" else []
        counts: Counter[str] = Counter()
        for space in spaces if words else ():
            counts.update(self._store.words.occurrences(connection, space, words))
        rare = {word: rarity(counts[word], statistics.rows) for word in counts}
        if len(rare) > MAX_WORDS:
            rare = dict(sorted(rare.items(), key=lambda pair: -pair[1])[:MAX_WORDS])
        periods = periods_in(query.query[:MAX_QUERY_CHARS], now)
        facets = [self._has_value(spaces, key, value) for key, value in query.filter.items()]
        asked = _Asked(
            spaces, rare, max(statistics.mean_length, 1.0), periods if rare else [],
            () if self._store.vectors is None else vectors, found_by(query, now, *facets),
            max(TEXT_CANDIDATES, query.limit), max(VECTOR_CANDIDATES, 2 * query.limit),
            min(max(ROOTS, 2 * query.limit), MOST_ROOTS) if query.mode != "vector" else 0,
        )  # fmt: skip
        narrow = narrows(query)
        found = self._candidates(connection, asked, asked.scope if narrow else None)
        rows = self._rows(connection, asked, found, query)
        if not narrow and found.crowded_by(rows):
            found = self._candidates(connection, asked, asked.scope)
            rows = self._rows(connection, asked, found, query)
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
        padded = [(word, f" {word} ") for word in rare]
        candidates = [_candidate(row, padded, found.cosines) for row in rows.values()]
        weights = self._weights if query.mode != "vector" else VECTORS_ALONE
        ranked, names = rank(sought, candidates, weights)
        return self._answer(connection, query, ranked, names, rows)

    def _candidates(
        self, connection: Connection, asked: "_Asked", within: Scope | None
    ) -> "_Candidates":
        """The best by text, by vector and by date in each namespace; ``within`` None looks at
        whatever the indexes hold, which costs no look at the rows."""
        found = _Candidates()
        for space in asked.spaces:
            by_text: list[int] = []
            if asked.rare:
                by_text = self._store.words.best(
                    connection, space, asked.rare, asked.mean_length, within, asked.by_text
                )
            by_vector = self._by_vector(connection, space, asked, within)
            found.roots += [*by_text[: asked.roots], *list(by_vector)[: asked.roots]]
            found.cosines |= by_vector
            found.serials.update(dict.fromkeys([*by_text, *by_vector]))
            found.full |= len(by_text) >= asked.by_text or len(by_vector) >= asked.by_vector
            by_date = self._by_date(connection, space, asked.periods, asked.scope)
            found.serials.update(dict.fromkeys(by_date))
        return found

    def _by_vector(
        self,
        connection: Connection,
        space: int,
        asked: "_Asked",
        within: Scope | None,
    ) -> dict[int, float]:
        """Serials with their cosine, the best first. Two embedders are never compared with each
        other: a memory that both have seen counts by the first."""
        index = self._store.vectors
        found: dict[int, float] = {}
        for one in asked.vectors if index is not None else ():
            near = index.nearest(  # type: ignore[union-attr]  # is not None
                connection, one.embedder, space, one.vector, asked.by_vector, within
            )
            for serial, cosine in near:
                found.setdefault(serial, cosine)
        return found

    def _by_date(
        self, connection: Connection, space: int, periods: Sequence[Period], scope: Scope
    ) -> list[int]:
        """What happened in a period that the query names with its year."""
        inside = [
            and_(m.c.occurred_at >= _midnight(p.start), m.c.occurred_at < _midnight(p.end))
            for p in periods
            if not p.yearly
        ]
        if not inside:
            return []
        asked = select(m.c.serial).where(m.c.space == space, or_(*inside), scope.condition)
        rows = connection.execute(asked.limit(DATE_CANDIDATES), scope.values)
        return list(rows.scalars())

    def _rows(
        self, connection: Connection, asked: "_Asked", found: "_Candidates", query: MemoryQuery
    ) -> dict[int, Row[Any]]:
        """The candidates and what stands around the roots, as far as the query may find it."""
        # With a filter the condition is a new one each time, and not worth keeping.
        light = _light.__wrapped__ if query.filter else _light
        values = {
            "serials": list(found.serials),
            "roots": found.roots,
            "spaces": asked.spaces,
        }
        rows = connection.execute(
            light(connection.dialect.name, asked.scope.condition), values | asked.scope.values
        ).all()
        return {row[0]: row for row in rows}

    def _answer(
        self,
        connection: Connection,
        query: MemoryQuery,
        ranked: Sequence[Candidate],
        names: Sequence[str],
        rows: dict[int, Row[Any]],
    ) -> list[Found]:
        """The first ``limit`` without two of the same wording, and no more of a kind than asked."""
        kept: list[Candidate] = []
        seen: set[tuple[str, str | None]] = set()
        kinds: Counter[str] = Counter()
        for candidate in ranked:
            if len(kept) >= query.limit:
                break
            if candidate.total <= 0 and candidate.cosine is None:
                continue
            row = rows[candidate.serial]
            wording = (row.words, row.author)
            if wording in seen or kinds[row.kind] >= query.limits.get(row.kind, query.limit):
                continue
            seen.add(wording)
            kinds[row.kind] += 1
            kept.append(candidate)
        whole = _whole(connection.dialect.name)
        serials = {"serials": [c.serial for c in kept]}
        found = {row.serial: memory_of(row) for row in connection.execute(whole, serials).all()}
        return [
            Found(
                memory=found[c.serial],
                score=round(c.total, 6),
                matched={
                    name: round(score, 6)
                    for name, score in zip(names, c.scores, strict=True)
                    if score > 0
                },
            )
            for c in kept
        ]

    def _spaces(self, connection: Connection, tenant: Tenant, name: str | None) -> list[int]:
        if name is None:
            return list(connection.execute(_SPACES, {"tenant": tenant}).scalars())
        place = (tenant, name)  # A namespace keeps its number for ever.
        if (number := self._numbers.get(place)) is None:
            number = connection.execute(_SPACE, {"tenant": tenant, "name": name}).scalar()
            if number is None:
                return []
            _keep(self._numbers, place, number)
        return [number]

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
        rows, mean = connection.execute(_SAMPLE, {"space": space}).one()
        if rows > FEW:
            rows = connection.execute(_COUNT, {"space": space}).scalar_one()
        found = Statistics(rows, float(mean))
        _keep(self._known, space, (monotonic(), found))
        return found


@dataclass(frozen=True)
class _Asked:
    """A query, made ready for the indexes."""

    spaces: Sequence[int]
    rare: dict[str, float]
    mean_length: float
    periods: Sequence[Period]
    vectors: Sequence[QueryVector]
    scope: Scope
    by_text: int
    by_vector: int
    """So many of the best of each kind are looked at."""
    roots: int
    """So many of the best of each kind have their neighbours looked at."""


@dataclass
class _Candidates:
    serials: dict[int, None] = field(default_factory=dict)
    roots: list[int] = field(default_factory=list)
    cosines: dict[int, float] = field(default_factory=dict)
    full: bool = False
    """Whether there may have been more."""

    def crowded_by(self, rows: Container[int]) -> bool:
        """Whether some took the places of others and may not be found: replaced, or expired."""
        return self.full and any(serial not in rows for serial in self.serials)


_SPACES = select(memory_spaces.c.id).where(memory_spaces.c.tenant == bindparam("tenant"))
_SPACE = _SPACES.where(memory_spaces.c.name == bindparam("name"))
_SPACES = _SPACES.order_by(memory_spaces.c.id)
_sample = (
    select(m.c.length)
    .where(m.c.space == bindparam("space"), m.c.searchable, m.c.replaced_at.is_(None))
    .limit(FEW + 1)
    .subquery()
)
_SAMPLE = select(func.count(), func.coalesce(func.avg(_sample.c.length), 1.0))
_COUNT = select(func.count()).select_from(m).where(m.c.space == bindparam("space"))
REACH = len(Weights.reach)


@lru_cache(maxsize=64)
def _light(dialect: str, condition: ColumnElement[bool]) -> Select[Any]:
    """What the ranking reads of the candidates, and of what stands within ``REACH`` of a root in
    its conversation."""
    root, near = m.alias("root"), m.alias("near")
    around = (
        select(near.c.serial)
        .select_from(
            root.join(
                near,
                and_(
                    near.c.space == root.c.space,
                    near.c.session_id == root.c.session_id,
                    near.c.position.between(root.c.position - REACH, root.c.position + REACH),
                ),
            )
        )
        .where(root.c.serial.in_(listed(dialect, "roots")))
    )
    wanted = union(listed(dialect, "serials"), around)
    return select(
        m.c.serial,
        m.c.space,
        m.c.kind,
        m.c.session_id,
        m.c.position,
        m.c.author,
        m.c.words,
        m.c.length,
        m.c.importance,
        func.coalesce(m.c.occurred_at, m.c.created_at, type_=BigInteger).label("happened"),
    ).where(m.c.serial.in_(wanted), m.c.space.in_(listed(dialect, "spaces", Integer)), condition)


@lru_cache
def _whole(dialect: str) -> Select[Any]:
    whole = select(*READ).select_from(JOINED)
    return whole.where(m.c.serial.in_(listed(dialect, "serials")))


K = TypeVar("K")
V = TypeVar("V")


def _keep(known: dict[K, V], key: K, value: V) -> None:
    if len(known) >= KNOWN_SPACES:
        known.clear()
    known[key] = value


def _midnight(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=timezone.utc)


def _joined(parts: Sequence[Statistics]) -> Statistics:
    rows = sum(part.rows for part in parts)
    words = sum(part.rows * part.mean_length for part in parts)
    return Statistics(rows, words / rows if rows else 1.0)


def _candidate(
    row: Row[Any], padded: Sequence[tuple[str, str]], cosines: Mapping[int, float]
) -> Candidate:
    serial, space, _, session, position, author, words, length, importance, happened = tuple(row)
    text = f" {words} "
    counts: dict[str, int] = {}
    if held := [word for word, inside in padded if inside in text]:
        split = words.split()
        counts = {word: split.count(word) for word in held}
    return Candidate(
        serial,
        (space, session) if session is not None else None,
        position or 0,
        _name_words(author) if author else _NOBODY,
        counts,
        length,
        happened,
        importance or 0.0,
        cosines.get(serial),
    )


_NOBODY: frozenset[str] = frozenset()


@lru_cache(maxsize=10_000)
def _name_words(author: str) -> frozenset[str]:
    return frozenset(plain_words(author)) - STOP_WORDS
