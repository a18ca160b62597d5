"""What clients note of the sessions that they keep as conversations."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("sessions", sa.Column("metadata", sa.Text()))


def downgrade() -> None:
    op.drop_column("sessions", "metadata")
