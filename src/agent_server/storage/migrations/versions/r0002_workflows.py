"""Stored workflows: a head for each name, and its versions."""

import sqlalchemy as sa
from alembic import op

from agent_server.storage.tables import JsonText, Moment

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "workflows",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("created_at", Moment(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "name", name=op.f("pk_workflows")),
    )
    op.create_index(
        op.f("ix_workflows_tenant_created_at_name"), "workflows", ["tenant", "created_at", "name"]
    )
    op.create_table(
        "workflow_versions",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("definition", JsonText(), nullable=False),
        sa.Column("created_at", Moment(), nullable=False),
        sa.Column("created_by", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "name", "number", name=op.f("pk_workflow_versions")),
    )
    op.create_index(
        op.f("ix_workflow_versions_tenant_name_version"),
        "workflow_versions",
        ["tenant", "name", "version"],
        unique=True,
    )


def downgrade() -> None:
    op.drop_table("workflow_versions")
    op.drop_table("workflows")
