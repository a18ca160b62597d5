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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

from agent_server.memory.moments import Period
from agent_server.memory.text_index import K1, B
from agent_server.memory.words import stem
from agent_server.storage.tables import EPOCH

Place = tuple[int, str]
"""A conversation: namespace and session."""
Scores = Sequence[float]
"""One for each candidate, in their order."""


@dataclass(frozen=True)
class Weights:
    """What each score counts; ``docs/recall.md`` says on what they were found."""

    text: float = 1.0
    vector: float = 0.6
    neighbours: float = 0.5
    session: float = 0.4
    author: float = 0.2
    date: float = 0.25
    reach: tuple[float, ...] = (0.6, 0.3)
    """What a word counts that stands so many turns away."""
    name: float = 0.3
    """What a word counts that is the name of an author: who is called by it is mostly spoken to,
    and does not speak."""
    latest: float = 0.5
    """Weight of recency when the query says "latest"."""


@dataclass(frozen=True)
class Statistics:
    """Of one namespace."""

    rows: int
    mean_length: float


class Candidate:
    """A memory as far as its place in the order depends on it. Slots, and numbers instead of
    moments: there are hundreds for each query."""

    __slots__ = ("serial", "place", "position", "author", "words", "length", "happened",
                 "importance", "cosine", "total", "scores")  # fmt: skip

    def __init__(
        self,
        serial: int,
        place: Place | None,
        position: int,
        author: frozenset[str],
        words: Mapping[str, int],
        length: int,
        happened: int,
        importance: float,
        cosine: float | None,
    ) -> None:
        self.serial = serial
        self.place = place
        self.position = position
        self.author = author
        """The words of the author's name."""
        self.words = words
        """How often each word of the query occurs."""
        self.length = length
        self.happened = happened
        """Microseconds since 1970."""
        self.importance = importance
        self.cosine = cosine
        self.total = 0.0
        self.scores: tuple[float, ...] = ()


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


def rank(
    sought: Sought, candidates: Sequence[Candidate], weights: Weights
) -> tuple[list[Candidate], list[str]]:
    """``candidates``, best first, with ``scores`` and ``total`` filled in; and what the scores are
    called, in their order."""
    sought = replace(sought, rarity=_names_aside(sought, candidates, weights))
    vector = _vectors(candidates)
    parts: list[tuple[str, float, Callable[[], Iterable[float]]]] = [
        ("text", weights.text, lambda: _text(sought, candidates)),
        ("vector", weights.vector, lambda: vector),
        ("neighbours", weights.neighbours,
         lambda: _neighbours(sought, candidates, vector, weights)),
        ("session", weights.session, lambda: _sessions(sought, candidates)),
        ("author", weights.author, lambda: _author(sought, candidates)),
        ("date", weights.date, lambda: _date(sought, candidates)),
        ("recency", sought.recency, lambda: _recency(candidates)),
        ("importance", sought.importance, lambda: [c.importance for c in candidates]),
    ]  # fmt: skip
    scores = {name: _normal(score(), weight) for name, weight, score in parts if weight > 0}
    names = [name for name, column in scores.items() if column]
    columns = [scores[name] for name in names]
    for candidate, values in zip(candidates, zip(*columns, strict=True), strict=False):
        candidate.scores, candidate.total = values, sum(values)
    return sorted(candidates, key=lambda c: (-c.total, -c.serial)), names


def _names_aside(
    sought: Sought, candidates: Sequence[Candidate], weights: Weights
) -> Mapping[str, float]:
    """The rarity of each word, less for the names of those who speak."""
    names = {stem(word) for author in {c.author for c in candidates} for word in author}
    return {
        word: rare * weights.name if word in names else rare for word, rare in sought.rarity.items()
    }


def _normal(scores: Iterable[float], weight: float) -> Scores:
    """From 0 to ``weight``, by the best of them; none when none is above 0."""
    raw = list(scores)
    best = max(raw, default=0.0)
    return [score * weight / best for score in raw] if best > 0 else ()


def _text(sought: Sought, candidates: Sequence[Candidate]) -> Iterable[float]:
    rare = sought.rarity
    even, by_length = K1 * (1 - B), K1 * B / max(sought.statistics.mean_length, 1.0)
    for candidate in candidates:
        score = 0.0
        if candidate.words:
            room = even + by_length * candidate.length
            for word, count in candidate.words.items():
                score += rare[word] * count * (K1 + 1) / (count + room)
        yield score


def _vectors(candidates: Sequence[Candidate]) -> Scores:
    """From 0 to 1."""
    known = [c.cosine for c in candidates if c.cosine is not None]
    if not known:
        return [0.0] * len(candidates)
    low = min(*known, max(known) / 2)
    return _normal((0.0 if c.cosine is None else c.cosine - low for c in candidates), 1.0) or (
        [0.0] * len(candidates)
    )


def _neighbours(
    sought: Sought, candidates: Sequence[Candidate], vector: Scores, weights: Weights
) -> Iterable[float]:
    talks: dict[Place, dict[int, int]] = {}
    for i, candidate in enumerate(candidates):
        if candidate.place is not None:
            talks.setdefault(candidate.place, {})[candidate.position] = i
    whole = sum(sought.rarity.values()) or 1.0
    steps = [(way * n, share) for n, share in enumerate(weights.reach, 1) for way in (-1, 1)]
    for candidate in candidates:
        said = meant = 0.0
        if candidate.place is not None:
            at = talks[candidate.place].get
            known = set(candidate.words)
            for step, share in steps:  # The nearest first: a word counts as it stands nearest.
                other = at(candidate.position + step)
                if other is None:
                    continue
                if (near := share * vector[other]) > meant:
                    meant = near
                for word in candidates[other].words:
                    if word not in known:
                        known.add(word)
                        said += share * sought.rarity[word]
        yield said / whole + weights.vector * meant


def _sessions(sought: Sought, candidates: Sequence[Candidate]) -> Iterable[float]:
    said: dict[Place, dict[str, int]] = {}
    for candidate in candidates:
        if candidate.place is not None:
            words = said.setdefault(candidate.place, {})
            for word, count in candidate.words.items():
                words[word] = words.get(word, 0) + count
    if len(said) < 2:
        return ()
    of: dict[Place | None, float] = {
        place: sum(sought.rarity[word] * n / (n + K1) for word, n in words.items())
        for place, words in said.items()
    }
    return [of.get(candidate.place, 0.0) for candidate in candidates]


def _author(sought: Sought, candidates: Sequence[Candidate]) -> Iterable[float]:
    named = {author: bool(author & sought.names) for author in {c.author for c in candidates}}
    return () if all(named.values()) else [float(named[c.author]) for c in candidates]


DATE_FADES_DAYS = 10


def _date(sought: Sought, candidates: Sequence[Candidate]) -> Iterable[float]:
    if not sought.periods:
        return ()
    days = [EPOCH + timedelta(microseconds=c.happened) for c in candidates]
    return [
        max(math.exp(-p.days_from(day) / DATE_FADES_DAYS) for p in sought.periods) for day in days
    ]


def _recency(candidates: Sequence[Candidate]) -> Iterable[float]:
    # By order and not by age: "the latest" of things that are all years old is one of them.
    order = sorted({c.happened for c in candidates})
    place = {happened: i / len(order) for i, happened in enumerate(order, 1)}
    return [place[c.happened] for c in candidates]
