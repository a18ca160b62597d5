"""Sessions have a summary of their oldest items and an index to list them by; runs say whom they
are about, so that they can be erased."""

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
    op.add_column("runs", sa.Column("subject", sa.Text()))
    op.create_index(op.f("ix_runs_tenant_subject"), "runs", ["tenant", "subject"])
    runs = sa.table("runs", sa.column("id"), sa.column("request", JsonText), sa.column("subject"))
    connection = op.get_bind()
    named = sa.select(runs.c.id, runs.c.request).where(
        sa.cast(runs.c.request, sa.Text).contains('"subject"')
    )
    for run_id, request in connection.execute(named).all():
        connection.execute(
            sa.update(runs).where(runs.c.id == run_id).values(subject=request.get("subject"))
        )


def downgrade() -> None:
    op.drop_index(op.f("ix_runs_tenant_subject"), "runs")
    op.drop_column("runs", "subject")
    op.drop_index(op.f("ix_sessions_tenant_created_at_id"), "sessions")
    op.drop_column("sessions", "summary")
