"""The forks of a run are found by an index: a run that is deleted, or erased, asks for them."""

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    given = sa.text("forked_from IS NOT NULL")
    op.create_index(
        "ix_runs_forked_from", "runs", ["forked_from"], sqlite_where=given, postgresql_where=given
    )


def downgrade() -> None:
    op.drop_index("ix_runs_forked_from", "runs")
