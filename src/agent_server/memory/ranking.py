"""The order of what was found: a weighted sum of scores, each from 0 to 1, on both databases.

Leans on nothing but numbers that were read for it; refuses to read any itself.

Every candidate gets these scores, of which ``matched`` tells what each added:

- *text*: BM25 of its words, with the statistics of its namespace.
- *vector*: its cosine, from the weakest candidate, or half the best (0), to the best (1). Of both a
  message loses a part as far as it only asks: who asks is not who answers.
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
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache
from itertools import accumulate
from operator import mul

from agent_server.memory.moments import Period
from agent_server.memory.text_index import K1, B
from agent_server.memory.words import STOP_WORDS, plain_words, stem
from agent_server.storage.tables import EPOCH

Place = tuple[int, str]
"""A conversation: namespace and session."""
Scores = Sequence[float]
"""One for each candidate, in their order; none at all when each is 0."""
Held = Mapping[str, Mapping[int, int]]
"""How often each word stands in which candidate, by its number; 0 is left out."""


@dataclass(frozen=True)
class Weights:
    """What each score counts; ``docs/recall.md`` says on what they were found."""

    text: float = 1.0
    vector: float = 0.6
    neighbours: float = 0.5
    session: float = 0.4
    author: float = 0.2
    date: float = 0.5
    reach: tuple[float, ...] = (0.6, 0.3)
    """What a word counts that stands so many turns away."""
    name: float = 0.3
    """What a word counts that is the name of an author: who is called by it is mostly spoken to,
    and does not speak."""
    question: float = 0.5
    """What a message of nothing but questions loses of its text and vector score."""
    latest: float = 0.5
    """Weight of recency when the query says "latest"."""


@dataclass(frozen=True)
class Statistics:
    """Of one namespace."""

    rows: int
    mean_length: float


@dataclass(frozen=True)
class Candidates:
    """Memories as far as their order depends on them: column by column, since there are hundreds
    for each query, and few of them have any of its words."""

    serials: Sequence[int]
    places: Sequence[Place | None]
    positions: Sequence[int | None]
    authors: Sequence[str | None]
    held: Held
    lengths: Sequence[int]
    happened: Sequence[int]
    """Microseconds since 1970."""
    importance: Sequence[float | None]
    asks: Sequence[float | None]
    """Which part of each is questions."""
    cosines: Sequence[float | None]

    def talks(self) -> dict[Place, dict[int, int]]:
        """The candidates of each conversation by their position in it."""
        found: dict[Place, dict[int, int]] = {}
        for i, place in enumerate(self.places):
            if place is not None:
                found.setdefault(place, {})[self.positions[i] or 0] = i
        return found


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


@dataclass(frozen=True)
class Ranked:
    """The numbers of the candidates, best first, and what each was given."""

    order: Sequence[int]
    totals: Scores
    scores: Mapping[str, Scores]
    """By what they are called; those that gave nobody anything are left out."""


def rarity(count: int, rows: int) -> float:
    """The inverse document frequency of a word that ``count`` of ``rows`` have; above 0.

    The count may include versions that no longer hold, and so be greater."""
    return math.log(1 + (max(rows - count, 0) + 0.5) / (count + 0.5))


def held_in(texts: Sequence[str], words: Sequence[str]) -> Held:
    """Where ``words`` stand in ``texts``, whose words have one space between them."""
    starts = list(accumulate((len(text) + 3 for text in texts), initial=1))
    whole = " " + " \n ".join(texts) + " "
    found: dict[str, dict[int, int]] = {}
    for word in words:
        counts = found[word] = {}
        # Found by its letters, which are rare, and not by the spaces around it.
        long, at = len(word), whole.find(word)
        while at >= 0:
            if whole[at - 1] == " " == whole[at + long]:
                i = bisect_right(starts, at) - 1
                counts[i] = counts.get(i, 0) + 1
            at = whole.find(word, at + long)
    return found


def rank(sought: Sought, candidates: Candidates, weights: Weights) -> Ranked:
    sought = replace(sought, rarity=_names_aside(sought, candidates, weights))
    vector = _vectors(candidates)
    talks = candidates.talks()
    parts: list[tuple[str, float, Callable[[], Scores]]] = [
        ("text", weights.text, lambda: _text(sought, candidates)),
        ("vector", weights.vector, lambda: vector),
        ("neighbours", weights.neighbours,
         lambda: _neighbours(sought, candidates, talks, vector, weights)),
        ("session", weights.session, lambda: _sessions(sought, candidates, talks)),
        ("author", weights.author, lambda: _author(sought, candidates)),
        ("date", weights.date, lambda: _date(sought, candidates)),
        ("recency", sought.recency, lambda: _recency(candidates)),
        ("importance", sought.importance, lambda: [n or 0.0 for n in candidates.importance]),
    ]  # fmt: skip
    columns = {name: _normal(score(), weight) for name, weight, score in parts if weight > 0}
    if weights.question and any(candidates.asks):
        left = [1 - weights.question * (asks or 0.0) for asks in candidates.asks]
        for name in ("text", "vector"):
            columns[name] = list(map(mul, columns.get(name, ()), left))
    scores = {name: column for name, column in columns.items() if column}
    totals: Scores = list(map(sum, zip(*scores.values(), strict=True)))
    totals = totals or [0.0] * len(candidates.serials)
    # The highest total first, and of equal ones the newest.
    order = sorted(range(len(totals)), key=candidates.serials.__getitem__, reverse=True)
    order.sort(key=totals.__getitem__, reverse=True)
    return Ranked(order, totals, scores)


@lru_cache(maxsize=10_000)
def _name_words(author: str | None) -> frozenset[str]:
    """The words of an author's name."""
    return frozenset(plain_words(author)) - STOP_WORDS if author else frozenset()


def _names_aside(sought: Sought, candidates: Candidates, weights: Weights) -> Mapping[str, float]:
    """The rarity of each word, less for the names of those who speak."""
    names = {stem(word) for author in set(candidates.authors) for word in _name_words(author)}
    return {
        word: rare * weights.name if word in names else rare for word, rare in sought.rarity.items()
    }


def _normal(raw: Scores, weight: float) -> Scores:
    """From 0 to ``weight``, by the best of them; none when none is above 0."""
    best = max(raw, default=0.0)
    return [score * weight / best for score in raw] if best > 0 else ()


def _text(sought: Sought, candidates: Candidates) -> Scores:
    even, by_length = K1 * (1 - B), K1 * B / max(sought.statistics.mean_length, 1.0)
    scores = [0.0] * len(candidates.serials)
    for word, rare in sought.rarity.items():
        for i, count in candidates.held[word].items():
            room = even + by_length * candidates.lengths[i]
            scores[i] += rare * count * (K1 + 1) / (count + room)
    return scores


def _vectors(candidates: Candidates) -> Scores:
    """From 0 to 1."""
    known = [cosine for cosine in candidates.cosines if cosine is not None]
    if not known:
        return ()
    low = min(*known, max(known) / 2)
    return _normal([0.0 if c is None else c - low for c in candidates.cosines], 1.0)


def _neighbours(
    sought: Sought,
    candidates: Candidates,
    talks: Mapping[Place, Mapping[int, int]],
    vector: Scores,
    weights: Weights,
) -> Scores:
    count = len(candidates.serials)
    vector = vector or [0.0] * count
    rare = list(sought.rarity.values())
    words = [0] * count
    """The words of each candidate, as bits."""
    for bit, word in enumerate(sought.rarity):
        for i in candidates.held[word]:
            words[i] |= 1 << bit
    counted: dict[int, float] = {}

    def rarity_of(bits: int) -> float:
        if bits not in counted:
            counted[bits] = math.fsum(r for bit, r in enumerate(rare) if bits >> bit & 1)
        return counted[bits]

    whole = sum(rare) or 1.0
    steps = [(way * n, share) for n, share in enumerate(weights.reach, 1) for way in (-1, 1)]
    scores = [0.0] * count
    for talk in talks.values():
        for position, i in talk.items() if len(talk) > 1 else ():
            said = meant = 0.0
            known = words[i]
            for step, share in steps:  # The nearest first: a word counts as it stands nearest.
                other = talk.get(position + step)
                if other is None:
                    continue
                if (near := share * vector[other]) > meant:
                    meant = near
                if new := words[other] & ~known:
                    known |= new
                    said += share * rarity_of(new)
            scores[i] = said / whole + weights.vector * meant
    return scores


def _sessions(
    sought: Sought, candidates: Candidates, talks: Mapping[Place, Mapping[int, int]]
) -> Scores:
    if len(talks) < 2:
        return ()
    of: dict[Place | None, float] = dict.fromkeys(talks, 0.0)
    for word, rare in sought.rarity.items():
        said: dict[Place, int] = {}
        for i, count in candidates.held[word].items():
            if (place := candidates.places[i]) is not None:
                said[place] = said.get(place, 0) + count
        for place, count in said.items():
            of[place] += rare * count / (count + K1)
    return [of.get(place, 0.0) for place in candidates.places]


def _author(sought: Sought, candidates: Candidates) -> Scores:
    named = {
        author: float(not sought.names.isdisjoint(_name_words(author)))
        for author in set(candidates.authors)
    }
    return () if all(named.values()) else [named[author] for author in candidates.authors]


DATE_FADES_DAYS = 10


def _date(sought: Sought, candidates: Candidates) -> Scores:
    if not sought.periods:
        return ()
    days = [EPOCH + timedelta(microseconds=happened) for happened in candidates.happened]
    return [
        max(math.exp(-p.days_from(day) / DATE_FADES_DAYS) for p in sought.periods) for day in days
    ]


def _recency(candidates: Candidates) -> Scores:
    # By order and not by age: "the latest" of things that are all years old is one of them.
    order = sorted(set(candidates.happened))
    place = {happened: i / len(order) for i, happened in enumerate(order, 1)}
    return [place[happened] for happened in candidates.happened]
