"""Memories: what is kept beyond the call that learned it, how it is asked for, and what is found.

Leans on the domain's base. Refuses to know how a memory is stored, found or ranked.

A memory has a life in time: an edit, or a newer memory under the same key, closes it
(``replaced_at``) and never erases it, so that what was known at any moment can be read again.
Deleting erases every version.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import AwareDatetime, Field, JsonValue, field_validator, model_validator

from agent_server.domain.base import Frozen, JsonObject, UtcDatetime

MemoryKind = Literal[
    "message", "context", "interaction", "outcome", "document", "knowledge", "execution", "result"
]
KINDS: tuple[MemoryKind, ...] = get_args(MemoryKind)
SHORT_TERM = frozenset({"message", "context", "interaction", "outcome"})
SearchMode = Literal["hybrid", "text", "vector"]
DEFAULT_NAMESPACE = "default"
MAX_BATCH = 1_000
MAX_LIMIT = 200


def _half(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _storable(value: str | None) -> str | None:
    if value is not None and ("\0" in value or _half(value)):
        raise ValueError("must not hold a NUL or half a character")
    return value


class MemorySource(Frozen):
    """Who wrote a memory. A person writes as ``principal`` alone."""

    run_id: str | None = None
    task_id: str | None = None
    step_id: str | None = None
    agent: str | None = None
    principal: str | None = None


def _refuse_blank(content: JsonValue) -> None:
    if content is None or (isinstance(content, str) and not content.strip()):
        raise ValueError("content must not be empty")


class MemoryDraft(Frozen):
    """One memory as a caller writes it: the body of ``POST /api/v1/memories``."""

    kind: MemoryKind = Field(description="What it is.")
    content: JsonValue = Field(description="A text, or any JSON value.")
    key: str | None = Field(
        default=None,
        min_length=1,
        max_length=500,
        description="Names one memory of the namespace: writing it again supersedes the one before.",
    )
    namespace: str = Field(default=DEFAULT_NAMESPACE, min_length=1, max_length=200)
    session_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="The conversation it belongs to; its memories are neighbours in their order.",
    )
    author: str | None = Field(default=None, max_length=200, description="Who said or wrote it.")
    subject: str | None = Field(
        default=None, min_length=1, max_length=200, description="The person the data is about."
    )
    metadata: JsonObject = Field(default_factory=dict)
    importance: float | None = Field(default=None, ge=0, le=1, description="From 0 to 1.")
    expires_at: UtcDatetime | None = Field(
        default=None,
        description="From then on it is not found any more; within minutes it is deleted.",
    )
    occurred_at: UtcDatetime | None = Field(
        default=None, description="When it happened, if not when it is written."
    )

    _named = field_validator("key", "namespace", "session_id", "author", "subject")(_storable)

    @model_validator(mode="after")
    def _not_empty(self) -> MemoryDraft:
        _refuse_blank(self.content)
        return self


class MemoryPart(Frozen):
    """Where a piece of a longer memory stands in it."""

    memory_id: str
    """The whole, which is kept as one memory too."""
    index: int
    """0 for the first piece."""
    heading: tuple[str, ...] = ()
    """The headings it stands under, outermost first."""


class NewMemory(MemoryDraft):
    """A draft with what only the server may say.

    A given ``id`` makes the write repeatable: if the tenant has that memory, nothing is written.
    """

    id: str | None = None
    source: MemorySource = MemorySource()
    part_of: MemoryPart | None = None
    searchable: bool = True
    """False for what is found by its parts: a whole document."""
    created_at: UtcDatetime | None = None
    """When it was learnt, for an import; None is now."""
    position: int | None = None
    """Its place in its session, for an import; None is after the last."""
    spares: frozenset[Literal["others", "people"]] = frozenset()
    """Whose memory under the key keeps its place, so that this one is kept without a key: what is
    about another subject, what no run wrote."""


class Memory(Frozen):
    """One version of a memory; ``replaced_at`` is None for the one that holds."""

    id: str
    version: int
    kind: MemoryKind
    content: Any
    key: str | None = None
    namespace: str = DEFAULT_NAMESPACE
    session_id: str | None = None
    author: str | None = None
    subject: str | None = None
    metadata: JsonObject = Field(default_factory=dict)
    importance: float | None = None
    expires_at: AwareDatetime | None = None
    occurred_at: AwareDatetime | None = None
    source: MemorySource = MemorySource()
    part_of: MemoryPart | None = None
    position: int | None = None
    """Its place in the session, from 0."""
    searchable: bool = True
    created_at: AwareDatetime
    updated_at: AwareDatetime
    replaced_at: AwareDatetime | None = None
    """When an edit or a newer memory took its place."""
    supersedes: str | None = None
    superseded_by: str | None = None


ALWAYS_SAID = ("kind", "content", "metadata", "expires_at")
SAID_IF_GIVEN = ("subject", "author", "session_id", "importance", "occurred_at")


def says_nothing_new(new: Mapping[str, Any], held: Mapping[str, Any]) -> bool:
    """Whether a memory says all that a ``new`` one under its key does, and need not make room for
    it. That the new one is kept for ever is said, too: the other may expire."""
    said = [*ALWAYS_SAID, *(name for name in SAID_IF_GIVEN if new[name] is not None)]
    return all(new[name] == held[name] for name in said)


class MemoryChange(Frozen):
    """The body of ``PATCH /api/v1/memories/{id}``: the fields it names are changed."""

    content: JsonValue = None
    author: str | None = Field(default=None, max_length=200)
    subject: str | None = Field(default=None, min_length=1, max_length=200)
    metadata: JsonObject | None = None
    importance: float | None = Field(default=None, ge=0, le=1)
    expires_at: UtcDatetime | None = None
    occurred_at: UtcDatetime | None = None

    _named = field_validator("author", "subject")(_storable)

    @model_validator(mode="after")
    def _says_something(self) -> MemoryChange:
        if not self.model_fields_set:
            raise ValueError("name at least one field to change")
        if "content" in self.model_fields_set:
            _refuse_blank(self.content)
        if "metadata" in self.model_fields_set and self.metadata is None:
            raise ValueError("metadata must be an object; {} empties it")
        return self


class MemoryFilter(Frozen):
    """Which memories a list or an export is about. None means any."""

    kind: MemoryKind | None = None
    namespace: str | None = None
    key: str | None = None
    session_id: str | None = None
    subject: str | None = None
    q: str | None = None
    """Every word of it occurs; of a document that was cut, in one of its pieces."""
    part_of: str | None = None
    """Pieces of that memory."""
    parts: bool = False
    """Also pieces of longer memories, which are left out unless ``part_of`` is named."""
    run_id: str | None = None
    """Written by that run."""
    replaced: bool = False
    """Also what an edit or a newer memory took the place of."""


class MemoryQuery(Frozen):
    """The body of ``POST /api/v1/memories/search``."""

    query: str = Field(description="What is sought, in ordinary words; any text will do.")
    namespace: str | None = Field(
        default=None, max_length=200, description="Only there; by default everywhere."
    )
    kinds: tuple[MemoryKind, ...] | None = Field(default=None, max_length=len(KINDS))
    session_id: str | None = Field(default=None, max_length=200)
    subject: str | None = Field(default=None, max_length=200)
    for_subject: str | None = Field(
        default=None,
        max_length=200,
        description="What a run about this person is given: what is about them, or about nobody.",
    )
    limit: int = Field(default=10, ge=1, le=MAX_LIMIT)
    limits: dict[MemoryKind, Annotated[int, Field(ge=0)]] = Field(
        default_factory=dict, description="At most so many of a kind."
    )
    mode: SearchMode = "hybrid"
    as_of: UtcDatetime | None = Field(
        default=None, description="What was known at that moment, worded as it was then."
    )
    filter: dict[str, JsonValue] = Field(
        default_factory=dict,
        max_length=20,
        description="Values that `metadata` must have, by key; a list means any of its values.",
    )
    recency: float = Field(
        default=0.0, ge=0, le=1, description="Weight of how new a memory is; 0 is none."
    )
    importance: float = Field(
        default=0.0, ge=0, le=1, description="Weight of a memory's importance; 0 is none."
    )

    _named = field_validator("namespace", "session_id", "subject", "for_subject")(_storable)


class Found(Frozen):
    """One memory that a search found."""

    memory: Memory
    score: float
    """Higher is better; comparable within one answer only."""
    matched: dict[str, float]
    """What each part added to the score: ``text``, ``vector``, ``neighbours``, ``session``,
    ``author``, ``date``, ``recency``, ``importance``; only those that added something."""


class MemoryUse(Frozen):
    """One recall of a memory by a run."""

    memory_id: str
    run_id: str
    task_id: str | None = None
    step_id: str
    query: str
    score: float
    at: AwareDatetime


class MemoryStats(Frozen):
    """How much is kept."""

    memories: int
    by_kind: dict[str, int]
    by_namespace: dict[str, int]
    pieces: int = 0
    """How many of them are pieces of a document that is kept whole, too."""
    replaced: int
    """Versions that no longer hold."""
    vectors: int
    """Memories with a vector of the present embedder."""
    waiting: int
    """Memories whose vector is still to come."""
    embedder: str | None
    """``provider/model``, or None when there is none."""
    trouble: str | None = None
    """Why vectors are still to come, if the embedder fails or refuses."""


class MemoriesErased(Frozen):
    """How much of one subject was erased."""

    memories: int
    versions: int
    vectors: int
    uses: int
