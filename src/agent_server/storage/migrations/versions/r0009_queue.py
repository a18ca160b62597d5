"""The queue of due tasks as an index of its own, priorities, lanes, and the losses of workers."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

PARTS = {
    "ix_tasks_queue": (
        ["tenant", "rank", "run_id", "created_at"],
        "status = 'queued' AND wake_at IS NULL AND halt IS NULL AND NOT behind",
    ),
    "ix_tasks_moments": (["wake_at"], "wake_at IS NOT NULL"),
    "ix_tasks_standing_behind": (["lane"], "behind"),
}


def upgrade() -> None:
    op.add_column("tasks", sa.Column("rank", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("tasks", sa.Column("losses", sa.Integer(), nullable=False, server_default="0"))
    for name in ("behind", "excused"):
        op.add_column(
            "tasks", sa.Column(name, sa.Boolean(), nullable=False, server_default=sa.false())
        )
    op.drop_index("ix_tasks_status_created_at", "tasks")
    op.drop_index("ix_tasks_lane_created_at", "tasks")
    op.create_index("ix_tasks_lane_behind_created_at", "tasks", ["lane", "behind", "created_at"])
    for name, (columns, where) in PARTS.items():
        part = sa.text(where)
        op.create_index(name, "tasks", columns, sqlite_where=part, postgresql_where=part)


def downgrade() -> None:
    for name in PARTS:
        op.drop_index(name, "tasks")
    op.drop_index("ix_tasks_lane_behind_created_at", "tasks")
    op.create_index("ix_tasks_lane_created_at", "tasks", ["lane", "created_at"])
    op.create_index("ix_tasks_status_created_at", "tasks", ["status", "created_at"])
    for name in ("excused", "behind", "losses", "rank"):
        op.drop_column("tasks", name)
