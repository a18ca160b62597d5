"""What clients note of the sessions that they keep as conversations; files that they upload."""

import sqlalchemy as sa
from alembic import op

from agent_server.storage.tables import Moment

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("sessions", sa.Column("metadata", sa.Text()))
    op.create_table(
        "files",
        sa.Column("id", sa.Text(), primary_key=True),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("media_type", sa.Text(), nullable=False),
        sa.Column("size", sa.BigInteger()),
        sa.Column("created_at", Moment(), nullable=False),
        sa.Column("expires_at", Moment()),
    )
    op.create_index("ix_files_tenant_created_at_id", "files", ["tenant", "created_at", "id"])
    op.create_table(
        "file_parts",
        sa.Column("file_id", sa.Text(), primary_key=True),
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
    )


def downgrade() -> None:
    op.drop_table("file_parts")
    op.drop_table("files")
    op.drop_column("sessions", "metadata")
