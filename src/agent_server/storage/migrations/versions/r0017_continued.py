"""Which run a run continues or looks through: who erases the one erases the other.

Of runs from before, those are filled in that continue a response. Programs of the revision before
serve on beside this one, and write NULL: what they continue meanwhile is not found by an erasure.
"""

import json
from collections.abc import Iterator

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    connection = op.get_bind()
    # Before the table is taken: on PostgreSQL nobody comes to it from then on till the end.
    found = list(_continuing(connection))
    op.add_column("runs", sa.Column("continues", sa.Text))
    given = sa.text("continues IS NOT NULL")
    op.create_index(
        "ix_runs_continues", "runs", ["continues"], sqlite_where=given, postgresql_where=given
    )
    if found:
        connection.execute(sa.text("UPDATE runs SET continues = :of WHERE id = :run"), found)


def _continuing(connection: sa.Connection) -> Iterator[dict[str, str]]:
    some = sa.text(
        "SELECT id, CASE WHEN request LIKE '%\"previous\"%' THEN request END AS request FROM runs"
        " WHERE id > :last ORDER BY id LIMIT 2000"
    )
    last = ""
    while rows := connection.execute(some, {"last": last}).all():
        last = rows[-1].id
        for row in rows:
            if row.request is not None and (of := _continued(row.request)) is not None:
                yield {"run": row.id, "of": of}


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
