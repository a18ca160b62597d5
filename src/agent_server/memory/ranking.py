"""The order of what was found: a weighted sum of scores, each from 0 to 1, on both databases.

Leans on nothing but numbers that were read for it; refuses to read any itself.

Every candidate gets these scores, of which ``matched`` tells what each added:

- *text*: BM25 of its words, with the statistics of its namespace.
- *vector*: its cosine, from the weakest candidate, or half the best (0), to the best (1).
- *neighbours*: words of the query that stand not in it but one or two turns before or after it in
  its conversation, and its neighbours' vectors. Who asks is found by the question's words; the
  answer stands next to it.
- *session*: how much of the query its whole conversation speaks of.
- *author*: it was said by somebody whom the query names. Soft: a question may name the wrong
  person.
- *date*: it happened when the query says, or within days of it.
- *recency*, *importance*: only when asked for, or when the query says "latest".

A sum of normalised scores and not reciprocal rank fusion: ranks forget how much better the best
is, and a weak list then spoils a strong one.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from agent_server.memory.moments import Period
from agent_server.memory.text_index import K1, B

Place = tuple[int, str]
"""A conversation: namespace and session."""


@dataclass(frozen=True)
class Weights:
    """What each score counts. Found on one part of a made-up set and kept for the other."""

    text: float = 1.0
    vector: float = 1.0
    neighbours: float = 0.4
    session: float = 0.2
    author: float = 0.2
    date: float = 0.25
    reach: tuple[float, ...] = (0.6, 0.3)
    """What a word counts that stands so many turns away."""
    latest: float = 0.5
    """Weight of recency when the query says "latest"."""


@dataclass(frozen=True)
class Statistics:
    """Of one namespace."""

    rows: int
    mean_length: float


@dataclass
class Candidate:
    serial: int
    place: Place | None
    position: int
    author: frozenset[str]
    """The words of the author's name."""
    words: Counter[str]
    """How often each word of the query occurs."""
    length: int
    happened: datetime
    importance: float
    cosine: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    total: float = 0.0


@dataclass(frozen=True)
class Sought:
    """The query as the ranking sees it."""

    rarity: Mapping[str, float]
    """The inverse document frequency of each word."""
    names: frozenset[str]
    """Every plain word of the query: an author may be among them."""
    periods: Sequence[Period]
    statistics: Statistics
    recency: float = 0.0
    importance: float = 0.0


def rarity(count: int, rows: int) -> float:
    """The inverse document frequency of a word that ``count`` of ``rows`` have; above 0.

    The count may include versions that no longer hold, and so be greater."""
    return math.log(1 + (max(rows - count, 0) + 0.5) / (count + 0.5))


def rank(sought: Sought, candidates: Sequence[Candidate], weights: Weights) -> list[Candidate]:
    """``candidates``, best first, with ``scores`` and ``total`` filled in."""
    _text(sought, candidates)
    _vectors(candidates)
    _neighbours(sought, candidates, weights)
    _sessions(sought, candidates)
    _author(sought, candidates)
    _date(sought, candidates)
    _asked(sought, candidates)
    factors = {
        "text": weights.text,
        "vector": weights.vector,
        "neighbours": weights.neighbours,
        "session": weights.session,
        "author": weights.author,
        "date": weights.date,
        "recency": sought.recency,
        "importance": sought.importance,
    }
    for candidate in candidates:
        candidate.scores = {
            name: score * factors[name]
            for name, score in candidate.scores.items()
            if score * factors[name] > 0
        }
        candidate.total = sum(candidate.scores.values())
    return sorted(candidates, key=lambda c: (-c.total, -c.serial))


def _saturated(count: float, length: int, mean: float) -> float:
    return count * (K1 + 1) / (count + K1 * (1 - B + B * length / mean))


def _set(candidates: Iterable[Candidate], name: str, scores: Iterable[float]) -> None:
    """Store ``scores``, brought to 0 to 1 by the best of them."""
    raw = list(scores)
    best = max(raw, default=0.0)
    if best > 0:
        for candidate, score in zip(candidates, raw, strict=True):
            candidate.scores[name] = score / best


def _text(sought: Sought, candidates: Sequence[Candidate]) -> None:
    mean = max(sought.statistics.mean_length, 1.0)
    _set(
        candidates,
        "text",
        (
            sum(
                sought.rarity[word] * _saturated(count, candidate.length, mean)
                for word, count in candidate.words.items()
            )
            for candidate in candidates
        ),
    )


def _vectors(candidates: Sequence[Candidate]) -> None:
    known = [c.cosine for c in candidates if c.cosine is not None]
    low = min([*known, max(known, default=0.0) / 2])
    _set(candidates, "vector", (0.0 if c.cosine is None else c.cosine - low for c in candidates))


def _neighbours(sought: Sought, candidates: Sequence[Candidate], weights: Weights) -> None:
    at = {(c.place, c.position): c for c in candidates if c.place is not None}
    whole = sum(sought.rarity.values()) or 1.0

    def score(candidate: Candidate) -> float:
        if candidate.place is None:
            return 0.0
        near: dict[str, float] = {}
        meant = 0.0
        for distance, share in enumerate(weights.reach, 1):
            for position in (candidate.position - distance, candidate.position + distance):
                other = at.get((candidate.place, position))
                if other is not None:
                    for word in other.words:
                        near[word] = max(near.get(word, 0.0), share)
                    meant = max(meant, share * other.scores.get("vector", 0.0))
        said = sum(
            share * sought.rarity[word]
            for word, share in near.items()
            if word not in candidate.words
        )
        return said / whole + weights.vector * meant

    _set(candidates, "neighbours", [score(c) for c in candidates])


def _sessions(sought: Sought, candidates: Sequence[Candidate]) -> None:
    said: dict[Place, Counter[str]] = defaultdict(Counter)
    for candidate in candidates:
        if candidate.place is not None:
            said[candidate.place].update(candidate.words)
    if len(said) < 2:
        return
    of = {
        place: sum(sought.rarity[word] * n / (n + K1) for word, n in words.items())
        for place, words in said.items()
    }
    _set(candidates, "session", (of[c.place] if c.place else 0.0 for c in candidates))


def _author(sought: Sought, candidates: Sequence[Candidate]) -> None:
    named = [bool(c.author & sought.names) for c in candidates]
    if not all(named):
        _set(candidates, "author", (float(is_named) for is_named in named))


DATE_FADES_DAYS = 10


def _date(sought: Sought, candidates: Sequence[Candidate]) -> None:
    if sought.periods:
        _set(
            candidates,
            "date",
            (
                max(math.exp(-p.days_from(c.happened) / DATE_FADES_DAYS) for p in sought.periods)
                for c in candidates
            ),
        )


def _asked(sought: Sought, candidates: Sequence[Candidate]) -> None:
    if sought.importance:
        _set(candidates, "importance", (c.importance for c in candidates))
    if sought.recency:
        # By order and not by age: "the latest" of things that are all years old is one of them.
        order = sorted({c.happened for c in candidates})
        place = {happened: i for i, happened in enumerate(order, 1)}
        _set(candidates, "recency", (place[c.happened] / len(order) for c in candidates))
