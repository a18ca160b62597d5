"""Which run a run continues or looks through: who erases the one erases the other.

Of runs from before, those are filled in that continue a response. Programs of the revision before
serve on beside this one, and write NULL: what they continue meanwhile is not found by an erasure.
"""

import json

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("runs", sa.Column("continues", sa.Text))
    given = sa.text("continues IS NOT NULL")
    op.create_index(
        "ix_runs_continues", "runs", ["continues"], sqlite_where=given, postgresql_where=given
    )
    connection = op.get_bind()
    some = "SELECT id, request FROM runs WHERE request LIKE '%\"previous\"%' AND id > :last "
    last = ""
    while rows := connection.execute(sa.text(some + "ORDER BY id LIMIT 500"), {"last": last}).all():
        last = rows[-1].id
        found = [{"run": row.id, "of": of} for row in rows if (of := _continued(row.request))]
        if found:
            connection.execute(sa.text("UPDATE runs SET continues = :of WHERE id = :run"), found)


def _continued(request: str) -> str | None:
    try:  # Where a part stands outside, there is a mark before the JSON.
        told = json.loads(request[request.index("{") :])
    except ValueError:
        return None
    options = told.get("options") if isinstance(told, dict) else None
    found = options.get("previous") if isinstance(options, dict) else None
    return found if isinstance(found, str) else None


def downgrade() -> None:
    op.drop_index("ix_runs_continues", "runs")
    op.drop_column("runs", "continues")
