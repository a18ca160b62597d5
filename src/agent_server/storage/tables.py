"""All tables on one page: one schema for SQLite and PostgreSQL.

Leans on SQLAlchemy Core. Refuses to know who reads them: each package's own store module does.
Payloads are JSON text (ASCII, so that NUL and lone surrogates survive on every database), are
never queried inside, and large parts of some stand outside (``references``). Times are microseconds since the epoch, money is pico-dollars: both
sort, sum and compare exactly on both databases.
"""

import json
from datetime import datetime, timedelta, timezone
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    false,
    text,
)
from sqlalchemy.dialects.postgresql import TSVECTOR
from sqlalchemy.engine import Dialect

from agent_server.storage.references import LEAST, MARK, encode, opened, spilled

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
MICROSECOND = timedelta(microseconds=1)


class Unreadable(dict[str, Any]):
    """Stands in place of a stored JSON value that is none any more, and says why.

    Readers are shown it; the engine sets aside what would have to work with it.
    """


class JsonText(TypeDecorator[Any]):
    """A JSON value as text; SQL NULL is Python's None. What cannot be read is ``Unreadable``, so
    that one such value does not take along the rows around it."""

    impl = Text
    cache_ok = True

    def __init__(self, spills: str | None = None) -> None:
        """``spills`` is the column's table, for one whose large values may be kept outside."""
        super().__init__()
        self.spills = spills

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        if value is None:
            return None
        text = encode(value)
        return text if len(text) <= LEAST or self.spills is None else spilled(text, self.spills)

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        if value is None:
            return None
        try:
            return json.loads(value)
        except ValueError as error:
            if value[:1] != MARK:
                return Unreadable(unreadable=f"not JSON: {error}")
        try:
            return opened(value)
        except ValueError as error:
            return Unreadable(unreadable=str(error))


class JsonDocument(TypeDecorator[str]):
    """JSON that is handed on as it is written, but for large values, which may be kept outside."""

    impl = Text
    cache_ok = True

    def __init__(self, spills: str) -> None:
        """See ``JsonText``."""
        super().__init__()
        self.spills = spills

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return value if value is None or len(value) <= LEAST else spilled(value, self.spills)

    def process_result_value(self, value: str | None, dialect: Dialect) -> str | None:
        try:
            return value if value is None or value[:1] != MARK else encode(opened(value))
        except ValueError:
            return value  # No reference either: whoever reads it finds that it is not JSON.


class Moment(TypeDecorator[datetime]):
    """An aware moment as whole microseconds since 1970-01-01T00:00:00Z."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:
        return None if value is None else (value - EPOCH) // MICROSECOND

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        return None if value is None else EPOCH + timedelta(microseconds=value)


metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _usage() -> list[Column[Any]]:
    return [
        Column("model_calls", Integer, nullable=False, server_default="0"),
        Column("tool_calls", Integer, nullable=False, server_default="0"),
        Column("input_tokens", BigInteger, nullable=False, server_default="0"),
        Column("output_tokens", BigInteger, nullable=False, server_default="0"),
        Column("cost_pico", BigInteger, nullable=False, server_default="0"),
        Column("unpriced_calls", Integer, nullable=False, server_default="0"),
    ]


runs = Table(
    "runs",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("request", JsonText("runs"), nullable=False),
    Column("output", JsonText("runs")),
    Column("error", JsonText),
    Column("waiting_for", JsonText),
    Column("agent", Text),
    Column("workflow", Text),
    Column("session_id", Text),
    Column("subject", Text),
    Column("parent_id", Text),
    Column("forked_from", Text),
    Column("continues", Text),
    Column("principal", Text, nullable=False),
    Column("cancel_reason", Text),
    Column("last_seq", BigInteger, nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("started_at", Moment),
    Column("ended_at", Moment),
    Column("trimmed", Boolean, nullable=False, server_default=false()),
    *_usage(),
    Index(None, "tenant", "created_at", "id"),
    Index(None, "tenant", "session_id"),
    Index(None, "tenant", "subject"),
    Index(None, "ended_at"),
    Index(
        "ix_runs_continues",
        "continues",
        sqlite_where=text("continues IS NOT NULL"),
        postgresql_where=text("continues IS NOT NULL"),
    ),
    Index(
        "ix_runs_forked_from",
        "forked_from",
        sqlite_where=text("forked_from IS NOT NULL"),
        postgresql_where=text("forked_from IS NOT NULL"),
    ),
    Index(
        "ix_runs_whole",
        "ended_at",
        sqlite_where=text("NOT trimmed"),
        postgresql_where=text("NOT trimmed"),
    ),
)
"""``continues``: the run whose words it was given when it was submitted. ``trimmed``: its events and steps were forgotten, or are being."""

tasks = Table(
    "tasks",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("path", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("node", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("description", Text, nullable=False, server_default=""),
    Column("agent", Text),
    Column("payload", JsonText("tasks"), nullable=False),
    Column("hidden", Boolean, nullable=False),
    Column("status", Text, nullable=False),
    Column("output", JsonText("tasks")),
    Column("error", JsonText),
    Column("waiting_for", JsonText),
    Column("owner", Text),
    Column("epoch", Integer, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("losses", Integer, nullable=False, server_default="0"),
    Column("excused", Boolean, nullable=False, server_default=false()),
    Column("wake_at", Moment),
    Column("awaits", Text),
    Column("nudged", Boolean, nullable=False, server_default=false()),
    Column("halt", Text),
    Column("lane", Text),
    Column("behind", Boolean, nullable=False, server_default=false()),
    Column("rank", Integer, nullable=False, server_default="0"),
    Column("created_at", Moment, nullable=False),
    Column("started_at", Moment),
    Column("ended_at", Moment),
    Column("shared", Boolean, nullable=False, server_default=false()),
    Index(None, "owner"),
    Index(None, "lane", "behind", "created_at"),
)
"""``attempts`` are the times it was taken up; ``losses`` those when its worker died, unless it was
``excused``. The lowest ``rank`` begins first: a priority, negated. ``behind``: another task of its lane goes before, and it is not in the queue. ``owner`` is set
while somebody carries the task out."""
IN_QUEUE = text("status = 'queued' AND wake_at IS NULL AND halt IS NULL AND NOT behind")
"""What any worker may take. Written out, since an index on a part of a table is only used for a
condition that says the same."""
IS_BEHIND = text("behind")
for _name, _columns, _where in (
    ("ix_tasks_queue", ("tenant", "rank", "run_id", "created_at"), IN_QUEUE),
    ("ix_tasks_moments", ("wake_at",), text("wake_at IS NOT NULL")),
    ("ix_tasks_standing_behind", ("lane",), IS_BEHIND),
):
    Index(
        _name,
        *(tasks.c[column] for column in _columns),
        sqlite_where=_where,
        postgresql_where=_where,
    )

steps = Table(
    "steps",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("task_path", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("agent", Text),
    Column("status", Text, nullable=False),
    Column("input", JsonText("steps")),
    Column("input_hash", Text),
    Column("output", JsonText("steps")),
    Column("error", JsonText),
    Column("attempts", Integer, nullable=False),
    Column("started_at", Moment, nullable=False),
    Column("ended_at", Moment),
    Column("shared", Boolean, nullable=False, server_default=false()),
    *_usage(),
)

signals = Table(
    "signals",
    metadata,
    Column("id", Text, primary_key=True),
    Column("run_id", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("payload", JsonText),
    Column("sent_by", Text, nullable=False),
    Column("sent_at", Moment, nullable=False),
    Column("taken_by", Text),
    Index(None, "run_id", "name", "id"),
)
"""``taken_by`` is the key of the step that consumed it."""

approvals = Table(
    "approvals",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("run_id", Text, nullable=False),
    Column("task_path", Text, nullable=False),
    Column("step", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("agent", Text),
    Column("arguments", JsonText("approvals")),
    Column("arguments_hash", Text, nullable=False),
    Column("arguments_schema", JsonText),
    Column("detail", Text, nullable=False),
    Column("approvers", JsonText),
    Column("on_expiry", Text, nullable=False),
    Column("requested_at", Moment, nullable=False),
    Column("expires_at", Moment),
    Column("decided_at", Moment),
    Column("decided_by", Text),
    Column("reason", Text),
    Column("replaces", Text),
    Column("replaced_by", Text),
    Index(None, "tenant", "requested_at", "id"),
    Index(None, "run_id"),
)

reservations = Table(
    "reservations",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("task_path", Text, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("kind", Text, nullable=False),
    Column("model_calls", Integer, nullable=False),
    Column("tool_calls", Integer, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("cost_pico", BigInteger, nullable=False),
    Column("under_way", Boolean, nullable=False),
    Column("open_ended", Boolean, nullable=False, server_default=false()),
)
"""What calls under way hold of their run's budget; only runs that have one have rows here.
``open_ended``: it may say as much as it likes."""

permits = Table(
    "permits",
    metadata,
    Column("name", Text, primary_key=True),
    Column("holder", Text, primary_key=True),
    Column("node", Text, nullable=False),
    Column("taken_at", Moment, nullable=False),
    Index(None, "node"),
)
"""Who holds one of what only so many may do at once; they go with their node."""

rates = Table(
    "rates",
    metadata,
    Column("name", Text, primary_key=True),
    Column("state", JsonText, nullable=False),
)
"""What was called in the last minute, and is booked; see ``execution.rates``."""

events = Table(
    "events",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("tenant", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("data", JsonDocument("events"), nullable=False),
)
"""``data`` is the event's JSON without its ``seq``, which is spliced in on the way out."""

sessions = Table(
    "sessions",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("id", Text, primary_key=True),
    Column("item_count", Integer, nullable=False),
    Column("summary", JsonText),
    Column("metadata", JsonText),
    Column("created_at", Moment, nullable=False),
    Column("updated_at", Moment, nullable=False),
    Index(None, "tenant", "created_at", "id"),
)
"""``summary`` is ``{"items": n, "text": …}``: the oldest n items, for models that cannot take all."""

session_items = Table(
    "session_items",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("session_id", Text, primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("run_id", Text, nullable=False),
    Column("data", JsonText, nullable=False),
    Column("created_at", Moment, nullable=False),
)

files = Table(
    "files",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("filename", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("media_type", Text, nullable=False),
    Column("size", BigInteger),
    Column("created_at", Moment, nullable=False),
    Column("expires_at", Moment),
    Index(None, "tenant", "created_at", "id"),
)
"""``size`` is null until every part is there."""

file_parts = Table(
    "file_parts",
    metadata,
    Column("file_id", Text, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("data", LargeBinary, nullable=False),
)

blobs = Table(
    "blobs",
    metadata,
    Column("key", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("sha256", Text, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("wanted_at", Moment, nullable=False),
    Column("doomed", Boolean, nullable=False, server_default=false()),
)
"""Large values that rows refer to. ``wanted_at`` is when somebody last stored such a value;
``doomed``: it is being deleted, and nobody may refer to it any more."""
NOT_DOOMED = text("NOT doomed")
Index(
    "uq_blobs_tenant_sha256",
    blobs.c.tenant,
    blobs.c.sha256,
    unique=True,
    sqlite_where=NOT_DOOMED,
    postgresql_where=NOT_DOOMED,
)

blob_uses = Table(
    "blob_uses",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("held_by", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Index(None, "key"),
)
"""Which runs refer to which blobs, from rows of the table ``held_by``."""

blob_bytes = Table(
    "blob_bytes",
    metadata,
    Column("key", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("data", LargeBinary, nullable=False),
    Column("made_at", Moment, nullable=False),
)
"""The bytes of blobs, where no other place is set for them."""

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("fingerprint", Text, nullable=False),
    Column("run_id", Text, nullable=False),
    Column("response", JsonText, nullable=False),
    Column("created_at", Moment, nullable=False),
)

nodes = Table(
    "nodes",
    metadata,
    Column("id", Text, primary_key=True),
    Column("role", Text, nullable=False),
    Column("started_at", Moment, nullable=False),
    Column("beat_at", Moment, nullable=False),
)

workflows = Table(
    "workflows",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("number", Integer, nullable=False),
    Column("created_at", Moment, nullable=False),
    Index(None, "tenant", "created_at", "name"),
)
"""``number`` is that of the last version ever made; without a version of it, none is left."""

workflow_versions = Table(
    "workflow_versions",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("version", Text, nullable=False),
    Column("digest", Text, nullable=False),
    Column("description", Text, nullable=False),
    Column("definition", JsonText, nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("created_by", Text, nullable=False),
    Index(None, "tenant", "name", "version", unique=True),
)

memory_spaces = Table(
    "memory_spaces",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("name", Text, nullable=False),
    Index(None, "tenant", "name", unique=True),
)
"""A namespace of a tenant. Its number stands before every word in the text index."""


def _index_where_given(given: str, *columns: str) -> Index:
    """An index of the rows that have a ``given``: the others, mostly many, cost a write nothing."""
    there = text(f"{given} IS NOT NULL")
    return Index(None, *columns, sqlite_where=there, postgresql_where=there)


memories = Table(
    "memories",
    metadata,
    Column("serial", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("space", Integer, nullable=False),
    Column("id", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("kind", Text, nullable=False),
    Column("content", JsonText, nullable=False),
    Column("key", Text),
    Column("session_id", Text),
    Column("position", Integer),
    Column("author", Text),
    Column("subject", Text),
    Column("metadata", JsonText, nullable=False),
    Column("importance", Float),
    Column("expires_at", Moment),
    Column("occurred_at", Moment),
    Column("source", JsonText, nullable=False),
    Column("run_id", Text),
    Column("parent_id", Text),
    Column("part", Integer),
    Column("heading", JsonText),
    Column("searchable", Boolean, nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("updated_at", Moment, nullable=False),
    Column("replaced_at", Moment),
    Column("supersedes", Text),
    Column("superseded_by", Text),
    Column("words", Text, nullable=False),
    Column("length", Integer, nullable=False),
    Column("asks", Float),
    Column("lexemes", Text().with_variant(TSVECTOR, "postgresql"), info={"derived": True}),
    Index(None, "tenant", "id", "version", unique=True),
    Index(None, "tenant", "created_at", "id"),
    Index(None, "space", "session_id", "position"),
    _index_where_given("occurred_at", "space", "occurred_at"),
    _index_where_given("subject", "tenant", "subject"),
    _index_where_given("parent_id", "parent_id"),
    _index_where_given("expires_at", "expires_at"),
)
"""One row for each version; the one that holds has no ``replaced_at``. ``words`` are its content
as the text index has it (``memory.words``); ``asks`` is which part of a message is questions, NULL
for none and for what was written before revision 0016. On PostgreSQL the text index is over ``lexemes``; on
SQLite it is the virtual table ``memory_words``, and ``lexemes`` is NULL (``memory.text_index``)."""
HOLDS_ITS_KEY = memories.c.replaced_at.is_(None) & memories.c.key.is_not(None)
Index(
    "uq_memories_space_key",
    memories.c.space,
    memories.c.key,
    unique=True,
    sqlite_where=HOLDS_ITS_KEY,
    postgresql_where=HOLDS_ITS_KEY,
)

memory_uses = Table(
    "memory_uses",
    metadata,
    Column("memory_id", Text, primary_key=True),
    Column("run_id", Text, primary_key=True),
    Column("step_id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("task_id", Text),
    Column("query", Text, nullable=False),
    Column("score", Float, nullable=False),
    Column("at", Moment, nullable=False),
)

memory_embedders = Table(
    "memory_embedders",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("provider", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("dimension", Integer, nullable=False),
    Column("version", Text, nullable=False),
    Column("kept_in", Text, nullable=False),
    Column("complete", Boolean, nullable=False),
    Index(None, "provider", "model", "dimension", "version", "kept_in", unique=True),
)
"""Where vectors came from, and whether every memory has one of it. ``kept_in``: ``blob`` for
``memory_vectors``, or ``vec0`` or ``halfvec`` for a table beside it (``memory.vector_index``)."""

memory_vectors = Table(
    "memory_vectors",
    metadata,
    Column("embedder", Integer, primary_key=True, autoincrement=False),
    Column("space", Integer, primary_key=True, autoincrement=False),
    Column("serial", BigInteger, primary_key=True, autoincrement=False),
    Column("text_hash", Text, nullable=False),
    Column("vector", LargeBinary),
    Index(None, "serial"),
    sqlite_with_rowid=False,
)
"""The vector of one version, 32-bit floats, little-endian, of length 1; NULL when it is kept in a
table beside this one."""
