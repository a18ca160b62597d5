"""The bodies and answers of the memory API that are more than one memory.

Leans on the memories themselves. Refuses to know how they are stored.
"""

from __future__ import annotations

from datetime import datetime

from pydantic import Field, model_validator

from agent_server.domain.base import Frozen, UtcDatetime
from agent_server.domain.memories import MAX_BATCH, Found, Memory, MemoryDraft, MemoryUse

_NAMES = ("key", "namespace", "session_id", "author", "subject")


class MemoryInput(MemoryDraft):
    """One memory as the API takes it. A long document is cut into pieces that are found by
    themselves; the whole is kept as one memory, too."""

    media_type: str | None = Field(
        default=None,
        max_length=100,
        description="With `kind: document`: `text/plain` (the default), `text/markdown`, "
        "`text/html`, or `application/pdf`, whose `content` is base64.",
    )
    id: str | None = Field(
        default=None,
        pattern="^mem_[0-9a-f]{32}$",
        description="Makes the write repeatable: a memory that is there already is left as it is.",
    )
    created_at: UtcDatetime | None = Field(
        default=None, description="When it was learnt, if not now: for imports."
    )
    position: int | None = Field(
        default=None,
        ge=0,
        le=1_000_000_000,
        description="Its place in the session, if not behind all others: for imports.",
    )

    @model_validator(mode="after")
    def _fits(self) -> MemoryInput:
        for name in _NAMES:
            if "\0" in (getattr(self, name) or ""):
                raise ValueError(f"'{name}' holds a NUL character; leave it out")
        if self.media_type is not None and self.kind != "document":
            raise ValueError("'media_type' goes with kind 'document'")
        if self.position is not None and self.session_id is None:
            raise ValueError("'position' goes with 'session_id'")
        if self.kind == "document" and not isinstance(self.content, str):
            raise ValueError("the content of a document is a text; write JSON as 'knowledge'")
        return self


class MemoryBatch(Frozen):
    """Many memories in one call: all are written, or none."""

    memories: tuple[MemoryInput, ...] = Field(min_length=1, max_length=MAX_BATCH)


class MemoryWrite(Frozen):
    """The body of ``POST /api/v1/memories``: the fields of one memory, or ``memories``."""

    model_config = {"extra": "allow"}

    memories: tuple[MemoryInput, ...] | None = None


class MemoryList(Frozen):
    data: tuple[Memory, ...]
    next_cursor: str | None = None


class MemoriesWritten(MemoryList):
    """What a batch wrote, in its order, with what was there already as it is there."""

    new: int
    """How many were not there before."""


class MemoryUses(Frozen):
    """Which runs recalled a memory, the newest first."""

    data: tuple[MemoryUse, ...]


class SearchAnswer(Frozen):
    data: tuple[Found, ...]


class MemoryDeleted(Frozen):
    id: str
    deleted: bool = True


class ErasureReceipt(Frozen):
    """What was erased of one person, counted by table. A repeated call finds nothing."""

    subject: str
    erased_at: datetime
    erased: dict[str, int]
    """Rows by what they were: ``runs``, ``steps``, ``events``, ``memories``, ``vectors``, …"""
    files: str
    """What became of the space they took: ``overwritten`` (SQLite), or ``left to vacuum``."""
    uploads: tuple[str, ...] = ()
    """Uploaded files that the erased runs named. They are kept, since others may name them, too."""
