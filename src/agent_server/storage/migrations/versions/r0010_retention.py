"""Which runs have lost their details, and the indexes by which old runs are found."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "runs", sa.Column("trimmed", sa.Boolean(), nullable=False, server_default=sa.false())
    )
    op.create_index(op.f("ix_runs_ended_at"), "runs", ["ended_at"])
    whole = sa.text("NOT trimmed")
    op.create_index(
        "ix_runs_whole", "runs", ["ended_at"], sqlite_where=whole, postgresql_where=whole
    )


def downgrade() -> None:
    op.drop_index("ix_runs_whole", "runs")
    op.drop_index(op.f("ix_runs_ended_at"), "runs")
    op.drop_column("runs", "trimmed")
