"""Memories: their versions, namespaces, uses, embedders and vectors."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from agent_server.storage.tables import JsonText, Moment

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

TABLES = ("memory_vectors", "memory_uses", "memory_spaces", "memory_embedders", "memories")


def upgrade() -> None:
    op.create_table(
        "memories",
        sa.Column("serial", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("space", sa.Integer(), nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("content", JsonText(), nullable=False),
        sa.Column("key", sa.Text()),
        sa.Column("session_id", sa.Text()),
        sa.Column("position", sa.Integer()),
        sa.Column("author", sa.Text()),
        sa.Column("subject", sa.Text()),
        sa.Column("metadata", JsonText(), nullable=False),
        sa.Column("importance", sa.Float()),
        sa.Column("expires_at", Moment()),
        sa.Column("occurred_at", Moment()),
        sa.Column("source", JsonText(), nullable=False),
        sa.Column("run_id", sa.Text()),
        sa.Column("parent_id", sa.Text()),
        sa.Column("part", sa.Integer()),
        sa.Column("heading", JsonText()),
        sa.Column("searchable", sa.Boolean(), nullable=False),
        sa.Column("created_at", Moment(), nullable=False),
        sa.Column("updated_at", Moment(), nullable=False),
        sa.Column("replaced_at", Moment()),
        sa.Column("supersedes", sa.Text()),
        sa.Column("superseded_by", sa.Text()),
        sa.Column("words", sa.Text(), nullable=False),
        sa.Column("length", sa.Integer(), nullable=False),
        sa.Column("lexemes", sa.Text().with_variant(postgresql.TSVECTOR(), "postgresql")),
        sa.PrimaryKeyConstraint("serial", name=op.f("pk_memories")),
    )
    op.create_index(op.f("ix_memories_expires_at"), "memories", ["expires_at"], unique=False)
    op.create_index(op.f("ix_memories_id_version"), "memories", ["id", "version"], unique=True)
    op.create_index(op.f("ix_memories_parent_id"), "memories", ["parent_id"], unique=False)
    op.create_index(
        op.f("ix_memories_space_occurred_at"), "memories", ["space", "occurred_at"], unique=False
    )
    op.create_index(
        op.f("ix_memories_space_session_id_position"),
        "memories",
        ["space", "session_id", "position"],
        unique=False,
    )
    op.create_index(
        op.f("ix_memories_tenant_created_at_id"),
        "memories",
        ["tenant", "created_at", "id"],
        unique=False,
    )
    op.create_index(
        op.f("ix_memories_tenant_subject"), "memories", ["tenant", "subject"], unique=False
    )
    op.create_index(
        "uq_memories_space_key",
        "memories",
        ["space", "key"],
        unique=True,
        sqlite_where=sa.text("replaced_at IS NULL AND key IS NOT NULL"),
        postgresql_where=sa.text("replaced_at IS NULL AND key IS NOT NULL"),
    )
    op.create_table(
        "memory_embedders",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("provider", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("dimension", sa.Integer(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("kept_in", sa.Text(), nullable=False),
        sa.Column("complete", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_memory_embedders")),
    )
    op.create_index(
        op.f("ix_memory_embedders_provider_model_dimension_version_kept_in"),
        "memory_embedders",
        ["provider", "model", "dimension", "version", "kept_in"],
        unique=True,
    )
    op.create_table(
        "memory_spaces",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_memory_spaces")),
    )
    op.create_index(
        op.f("ix_memory_spaces_tenant_name"), "memory_spaces", ["tenant", "name"], unique=True
    )
    op.create_table(
        "memory_uses",
        sa.Column("memory_id", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("step_id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("task_id", sa.Text()),
        sa.Column("query", sa.Text(), nullable=False),
        sa.Column("score", sa.Float(), nullable=False),
        sa.Column("at", Moment(), nullable=False),
        sa.PrimaryKeyConstraint("memory_id", "run_id", "step_id", name=op.f("pk_memory_uses")),
    )
    op.create_table(
        "memory_vectors",
        sa.Column("embedder", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("space", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("serial", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("text_hash", sa.Text(), nullable=False),
        sa.Column("vector", sa.LargeBinary()),
        sa.PrimaryKeyConstraint("embedder", "space", "serial", name=op.f("pk_memory_vectors")),
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_memory_vectors_serial"), "memory_vectors", ["serial"], unique=False)


def downgrade() -> None:
    for table in TABLES:
        op.drop_table(table)
