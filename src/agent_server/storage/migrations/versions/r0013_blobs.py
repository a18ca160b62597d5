"""Large values outside the rows that refer to them."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "blobs",
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("wanted_at", sa.BigInteger(), nullable=False),
        sa.Column("doomed", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_blobs")),
    )
    not_doomed = sa.text("NOT doomed")
    op.create_index(
        "uq_blobs_tenant_sha256",
        "blobs",
        ["tenant", "sha256"],
        unique=True,
        sqlite_where=not_doomed,
        postgresql_where=not_doomed,
    )
    op.create_table(
        "blob_uses",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("held_by", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "key", "held_by", name=op.f("pk_blob_uses")),
    )
    op.create_index(op.f("ix_blob_uses_key"), "blob_uses", ["key"])
    op.create_table(
        "blob_bytes",
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.Column("made_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_blob_bytes")),
    )


def downgrade() -> None:
    op.drop_table("blob_bytes")
    op.drop_table("blob_uses")
    op.drop_table("blobs")
