"""Signals and approvals; tasks that can be nudged while they stand still."""

import sqlalchemy as sa
from alembic import op

from agent_server.storage.tables import JsonText, Moment

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("tasks", sa.Column("awaits", sa.Text()))
    op.add_column(
        "tasks", sa.Column("nudged", sa.Boolean(), nullable=False, server_default=sa.false())
    )
    op.create_table(
        "signals",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("payload", JsonText()),
        sa.Column("sent_by", sa.Text(), nullable=False),
        sa.Column("sent_at", Moment(), nullable=False),
        sa.Column("taken_by", sa.Text()),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_signals")),
    )
    op.create_index(op.f("ix_signals_run_id_name_id"), "signals", ["run_id", "name", "id"])
    op.create_table(
        "approvals",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("task_path", sa.Text(), nullable=False),
        sa.Column("step", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("agent", sa.Text()),
        sa.Column("arguments", JsonText()),
        sa.Column("arguments_hash", sa.Text(), nullable=False),
        sa.Column("arguments_schema", JsonText()),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("approvers", JsonText()),
        sa.Column("on_expiry", sa.Text(), nullable=False),
        sa.Column("requested_at", Moment(), nullable=False),
        sa.Column("expires_at", Moment()),
        sa.Column("decided_at", Moment()),
        sa.Column("decided_by", sa.Text()),
        sa.Column("reason", sa.Text()),
        sa.Column("replaces", sa.Text()),
        sa.Column("replaced_by", sa.Text()),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_approvals")),
    )
    op.create_index(
        op.f("ix_approvals_tenant_requested_at_id"), "approvals", ["tenant", "requested_at", "id"]
    )
    op.create_index(op.f("ix_approvals_run_id"), "approvals", ["run_id"])


def downgrade() -> None:
    op.drop_table("approvals")
    op.drop_table("signals")
    op.drop_column("tasks", "nudged")
    op.drop_column("tasks", "awaits")
