"""Sessions have a summary of their oldest items, and an index to list them by."""

import sqlalchemy as sa
from alembic import op

from agent_server.storage.tables import JsonText

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("sessions", sa.Column("summary", JsonText()))
    op.create_index(
        op.f("ix_sessions_tenant_created_at_id"), "sessions", ["tenant", "created_at", "id"]
    )


def downgrade() -> None:
    op.drop_index(op.f("ix_sessions_tenant_created_at_id"), "sessions")
    op.drop_column("sessions", "summary")
