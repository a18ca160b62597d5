"""An id of a memory is its tenant's own: two tenants may import the same file of memories.

Programs of the revision before serve on beside this one, but go by bare ids: they refuse an id that
another tenant has, and delete memories of that id at every tenant that has come to share it. So end
them before anybody imports the same ids for a second tenant. The way back fails where two share one.
"""

from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

NEW = "ix_memories_tenant_id_version"
OLD = "ix_memories_id_version"


def upgrade() -> None:
    op.create_index(op.f(NEW), "memories", ["tenant", "id", "version"], unique=True)
    op.drop_index(op.f(OLD), "memories")


def downgrade() -> None:
    op.create_index(op.f(OLD), "memories", ["id", "version"], unique=True)
    op.drop_index(op.f(NEW), "memories")
