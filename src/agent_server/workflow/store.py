"""The SQL of stored workflows: a head for each name, and its versions, which never change.

Leans on storage. Each function runs inside the caller's transaction and takes the tenant. Refuses
to look into a definition.

A head outlives its workflow: it remembers the last number, so that ``name@2`` never comes to mean
something else. Whoever changes a workflow locks its head first.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, and_, delete, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from agent_server.storage.tables import workflow_versions as versions
from agent_server.storage.tables import workflows as heads

_INSERT: dict[str, Any] = {
    "sqlite": sqlite.insert(heads).on_conflict_do_nothing(),
    "postgresql": postgresql.insert(heads).on_conflict_do_nothing(),
}
_VERSION = (
    select(versions, heads.c.number.label("latest_number"), heads.c.created_at.label("begun_at"))
    .select_from(versions)
    .join(heads, and_(heads.c.tenant == versions.c.tenant, heads.c.name == versions.c.name))
)
_LATEST = versions.c.number == heads.c.number


def lock_head(connection: Connection, tenant: str, name: str, now: datetime) -> Row[Any]:
    """The head of ``name``, made if there is none, locked until the transaction ends."""
    values = {"tenant": tenant, "name": name, "number": 0, "created_at": now}
    connection.execute(_INSERT[connection.dialect.name], values)
    return connection.execute(
        select(heads).where(heads.c.tenant == tenant, heads.c.name == name).with_for_update()
    ).one()


def latest(connection: Connection, tenant: str, name: str) -> Row[Any] | None:
    """The newest version, unless the workflow is deleted or never was."""
    return connection.execute(
        _VERSION.where(heads.c.tenant == tenant, heads.c.name == name, _LATEST)
    ).one_or_none()


def version(connection: Connection, tenant: str, name: str, label: str) -> Row[Any] | None:
    return connection.execute(
        _VERSION.where(heads.c.tenant == tenant, heads.c.name == name, versions.c.version == label)
    ).one_or_none()


def add_version(connection: Connection, values: dict[str, Any], *, first: bool) -> None:
    """Insert a version and make it the latest. ``first``: none of its name is left."""
    connection.execute(versions.insert(), values)
    key = (heads.c.tenant == values["tenant"], heads.c.name == values["name"])
    changed: dict[str, Any] = {"number": values["number"]}
    if first:
        changed["created_at"] = values["created_at"]
    connection.execute(update(heads).where(*key).values(**changed))


def list_latest(
    connection: Connection,
    tenant: str,
    *,
    q: str | None,
    before: tuple[datetime, str] | None,
    limit: int,
) -> Sequence[Row[Any]]:
    """The newest version of each workflow, the youngest workflow first."""
    where: list[ColumnElement[bool]] = [heads.c.tenant == tenant, _LATEST]
    if q:
        where.append(heads.c.name.contains(q, autoescape=True))
    if before is not None:
        at, name = before
        where.append(
            or_(
                heads.c.created_at < at,
                and_(heads.c.created_at == at, heads.c.name > name),
            )
        )
    return connection.execute(
        _VERSION.where(*where).order_by(heads.c.created_at.desc(), heads.c.name).limit(limit)
    ).all()


def list_versions(
    connection: Connection, tenant: str, name: str, *, below: int | None, limit: int
) -> Sequence[Row[Any]]:
    """The newest first."""
    query = _VERSION.where(heads.c.tenant == tenant, heads.c.name == name)
    if below is not None:
        query = query.where(versions.c.number < below)
    return connection.execute(query.order_by(versions.c.number.desc()).limit(limit)).all()


def delete_versions(connection: Connection, tenant: str, name: str) -> int:
    """Delete what there is of ``name`` but its head; how many versions that were."""
    return connection.execute(
        delete(versions).where(versions.c.tenant == tenant, versions.c.name == name)
    ).rowcount
