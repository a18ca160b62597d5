"""How well recall finds what is known to answer: questions with their evidence, put to a store.

Leans on the store and the ranking as they are served. Refuses to call a model, and to keep
anything: a set is written into a namespace of its own, in a database that the caller throws away.

Two forms are read. LoCoMo's (Maharana et al., 2024): a JSON list of conversations, with
``session_N``, ``session_N_date_time`` and ``qa``; its fifth category asks about the wrong person.
And a simple one, JSON lines:

    {"conversation": "c", "id": "1.1", "session": "1", "author": "Ana", "at": "…Z", "text": "…"}
    {"conversation": "c", "question": "…", "category": "time", "evidence": ["1.1"]}
"""

import json
import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from agent_server.domain.errors import InvalidRequest
from agent_server.domain.ids import Tenant
from agent_server.domain.memories import MAX_BATCH, MemoryQuery, NewMemory, SearchMode
from agent_server.memory.ports import Memories

DEPTHS = (5, 10, 20)
RESAMPLED = 1_000
TENANT = Tenant("evaluation")
LOCOMO_CATEGORIES = {
    1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop", 5: "wrong-person",
}  # fmt: skip


@dataclass(frozen=True)
class Turn:
    conversation: str
    id: str
    session: str
    author: str | None
    at: datetime | None
    text: str


@dataclass(frozen=True)
class Question:
    conversation: str
    text: str
    category: str
    evidence: frozenset[str]


@dataclass
class Dataset:
    turns: list[Turn] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)


@dataclass(frozen=True)
class Measured:
    """Of one question: each is from 0 to 1."""

    category: str
    scores: dict[str, float]
    """``recall@5``, ``recall@10``, ``recall@20``, ``mrr``, ``ndcg@10``."""


@dataclass(frozen=True)
class Figure:
    """A mean, and the interval that 95 % of resampled means lie in."""

    mean: float
    low: float
    high: float


def read_dataset(path: Path) -> Dataset:
    """The questions and turns of ``path``. Raises ``InvalidRequest`` that names the place."""
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            return _locomo(json.loads(text))
        return _lines(text)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{str(path)!r} cannot be read: {error}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidRequest(
            f"{str(path)!r} is not a set of questions: {_words(error)}.",
            hint="docs/recall.md shows both forms that are read.",
        ) from error


def _lines(text: str) -> Dataset:
    found = Dataset()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name = str(entry.get("conversation", "default"))
            if "question" in entry:
                evidence = frozenset(map(str, entry["evidence"]))
                category = str(entry.get("category", "all"))
                found.questions.append(Question(name, entry["question"], category, evidence))
            else:
                at = entry.get("at")
                moment = datetime.fromisoformat(at.replace("Z", "+00:00")) if at else None
                if moment is not None and moment.tzinfo is None:
                    moment = moment.replace(tzinfo=timezone.utc)
                session = str(entry.get("session", name))
                found.turns.append(
                    Turn(
                        name, str(entry["id"]), session, entry.get("author"), moment, entry["text"]
                    )
                )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"line {number}: {_words(error)}") from error
    known = {(turn.conversation, turn.id) for turn in found.turns}
    for asked in found.questions:
        missing = sorted(e for e in asked.evidence if (asked.conversation, e) not in known)
        if missing or not asked.evidence:
            place = f"which no line of {asked.conversation!r} has"
            told = f"{missing[0]!r} as evidence, {place}" if missing else "no evidence"
            raise ValueError(f"the question {asked.text!r} has {told}")
    return found


def _words(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _locomo(conversations: list[dict[str, Any]]) -> Dataset:
    found = Dataset()
    for index, entry in enumerate(conversations):
        name = str(entry.get("sample_id", index))
        talk = entry["conversation"]
        for key in sorted(talk, key=lambda k: int((re.findall(r"\d+", k) or ["0"])[0])):
            if re.fullmatch(r"session_\d+", key):
                at = _spoken_moment(talk.get(f"{key}_date_time"))
                for turn in talk[key]:
                    text = turn["text"]
                    if turn.get("blip_caption"):
                        text += f" [shares a picture: {turn['blip_caption']}]"
                    found.turns.append(Turn(name, turn["dia_id"], key, turn["speaker"], at, text))
        known = {turn.id for turn in found.turns if turn.conversation == name}
        for asked in entry["qa"]:
            named = re.findall(r"D\d+:\d+", " ".join(map(str, asked.get("evidence") or ())))
            evidence = frozenset(named) & known
            if evidence:
                category = LOCOMO_CATEGORIES.get(asked["category"], str(asked["category"]))
                found.questions.append(Question(name, asked["question"], category, evidence))
    return found


def _spoken_moment(text: str | None) -> datetime | None:
    """``1:56 pm on 8 May, 2023``."""
    if not text:
        return None
    moment = datetime.strptime(text.strip(), "%I:%M %p on %d %B, %Y")
    return moment.replace(tzinfo=timezone.utc)


async def write(store: Memories, dataset: Dataset) -> None:
    """Write the turns, each conversation into a namespace of its own."""
    turns = [
        NewMemory(
            kind="message",
            content=turn.text,
            namespace=turn.conversation,
            session_id=turn.session,
            author=turn.author,
            occurred_at=turn.at,
            metadata={"id": turn.id},
        )
        for turn in dataset.turns
        if turn.text.strip()
    ]
    for start in range(0, len(turns), MAX_BATCH):
        await store.add(TENANT, turns[start : start + MAX_BATCH])


async def measure(
    store: Memories, questions: Iterable[Question], mode: SearchMode = "hybrid"
) -> list[Measured]:
    """Put each question to the store that holds its conversation."""
    found = []
    for question in questions:
        query = MemoryQuery(
            query=question.text, namespace=question.conversation, limit=max(DEPTHS), mode=mode
        )
        answer = await store.search(TENANT, query)
        ids = [one.memory.metadata["id"] for one in answer]
        found.append(Measured(question.category, scores(ids, question.evidence)))
    return found


def scores(found: Sequence[str], evidence: frozenset[str]) -> dict[str, float]:
    """What an answer is worth: ``found`` best first, ``evidence`` what should be in it."""
    hits = [identity in evidence for identity in found]
    result = {f"recall@{depth}": sum(hits[:depth]) / len(evidence) for depth in DEPTHS}
    first = next((place for place, hit in enumerate(hits, 1) if hit), None)
    result["mrr"] = 1 / first if first else 0.0
    gain = sum(1 / math.log2(place + 1) for place, hit in enumerate(hits[:10], 1) if hit)
    ideal = sum(1 / math.log2(place + 1) for place in range(1, min(10, len(evidence)) + 1))
    result["ndcg@10"] = gain / ideal
    return result


def summary(measured: Sequence[Measured]) -> dict[str, dict[str, Figure]]:
    """By category, and for all of them (``all``), each score's mean and interval."""
    groups: dict[str, list[Measured]] = {}
    for one in measured:
        groups.setdefault(one.category, []).append(one)
    ordered = {"all": list(measured), **dict(sorted(groups.items()))}
    return {
        category: {name: bootstrap([one.scores[name] for one in group]) for name in group[0].scores}
        for category, group in ordered.items()
        if group
    }


def difference(one: Sequence[Measured], other: Sequence[Measured]) -> dict[str, Figure]:
    """How much better ``other`` is, question by question; 0 outside the interval is no chance."""
    return {
        name: bootstrap([b.scores[name] - a.scores[name] for a, b in zip(one, other, strict=True)])
        for name in one[0].scores
    }


def bootstrap(values: Sequence[float]) -> Figure:
    """The mean and its 95 % interval, by drawing as many values anew (Efron, 1979); always the
    same for the same values."""
    chance = random.Random(7)
    count = len(values)
    means = sorted(sum(chance.choices(values, k=count)) / count for _ in range(RESAMPLED))
    low, high = means[int(RESAMPLED * 0.025)], means[int(RESAMPLED * 0.975) - 1]
    return Figure(sum(values) / count, low, high)
