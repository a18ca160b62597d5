"""Four indexes of memories hold only the rows that have what is looked for."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

INDEXES = (
    ("occurred_at", ["space", "occurred_at"]),
    ("subject", ["tenant", "subject"]),
    ("parent_id", ["parent_id"]),
    ("expires_at", ["expires_at"]),
)


def upgrade() -> None:
    for given, columns in INDEXES:
        _again(columns, sa.text(f"{given} IS NOT NULL"))


def downgrade() -> None:
    for _, columns in INDEXES:
        _again(columns, None)


def _again(columns: list[str], where: sa.TextClause | None) -> None:
    name = op.f(f"ix_memories_{'_'.join(columns)}")
    op.drop_index(name, "memories")
    op.create_index(name, "memories", columns, sqlite_where=where, postgresql_where=where)
