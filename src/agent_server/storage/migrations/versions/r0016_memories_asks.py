"""Which part of a message is questions: who asks is found by the question's words, and does not answer.

Messages from before have NULL, as if they asked nothing; programs of the revision before serve on
beside this one, and write NULL.
"""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("memories", sa.Column("asks", sa.Float))


def downgrade() -> None:
    op.drop_column("memories", "asks")
