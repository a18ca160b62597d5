"""Tasks that are paused, or that somebody cancelled by themselves."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("tasks", sa.Column("halt", sa.Text()))


def downgrade() -> None:
    op.drop_column("tasks", "halt")
