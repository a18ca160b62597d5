"""The SQL of stored workflows: a head for each name, and its versions, which never change.

Leans on storage and on the idempotency keys of execution. Each function runs inside the caller's
transaction and takes the tenant. Refuses to look into a definition.

A head outlives its workflow: it remembers the last number, so that ``name@2`` never comes to mean
something else. Whoever changes a workflow locks its head first.
"""

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, and_, delete, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from agent_server.domain.base import JsonObject, utcnow
from agent_server.domain.errors import Conflict, IdempotencyMismatch, NotFound, PreconditionFailed
from agent_server.domain.ids import Tenant
from agent_server.domain.stored_workflows import Saved, SaveMode, StoredWorkflow, WorkflowVersion
from agent_server.execution.runs import Idempotency
from agent_server.execution.store import stored_key, take_key
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


@dataclass(frozen=True)
class Saving:
    """What is to be stored, and how the workflow must stand for that."""

    tenant: Tenant
    principal: str
    name: str
    label: str | None
    """The version that the definition names."""
    definition: JsonObject
    """Without its version."""
    mode: SaveMode
    if_match: Collection[str] | None
    if_none_match: Collection[str] | None
    idempotency: Idempotency | None


def save(connection: Connection, wanted: Saving) -> Saved:
    """Store a version, unless it equals the newest one. See ``Library.save``."""
    tenant, name, key = wanted.tenant, wanted.name, wanted.idempotency
    now = utcnow()
    number = _lock_head(connection, tenant, name, now).number + 1
    if key is not None and (known := _replayed(connection, tenant, key)) is not None:
        return known
    newest = _latest(connection, tenant, name)
    _expect(name, newest, wanted.mode, wanted.if_match, wanted.if_none_match)
    text = json.dumps(wanted.definition, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    if newest is not None and newest.digest == digest and wanted.label in (None, newest.version):
        saved = Saved(_stored(newest), made=False)
    else:
        _add_version(
            connection,
            {
                "tenant": tenant,
                "name": name,
                "number": number,
                "version": _free_version(connection, tenant, name, wanted.label, number),
                "digest": digest,
                # PostgreSQL's texts hold no NUL; the definition has the words as they are.
                "description": wanted.definition.get("description", "").replace("\0", ""),
                "definition": wanted.definition,
                "created_at": now,
                "created_by": wanted.principal,
            },
            first=newest is None,
        )
        made = _latest(connection, tenant, name)
        assert made is not None
        saved = Saved(_stored(made), made=True)
    if key is not None:
        _remember(connection, tenant, key, saved, now)
    return saved


def fetch(
    connection: Connection, tenant: str, name: str, label: str | None
) -> StoredWorkflow | None:
    """A version; None is the newest, unless the workflow is deleted or never was."""
    row = _latest(connection, tenant, name) if label is None else None
    if label is not None:
        row = _labelled(connection, tenant, name, label)
    return None if row is None else _stored(row)


def remove(connection: Connection, tenant: str, name: str, if_match: Collection[str] | None) -> int:
    """Delete what there is of ``name`` but its head; how many versions that were."""
    connection.execute(_head(tenant, name))
    if if_match is not None:
        _expect(name, _latest(connection, tenant, name), "put", if_match, None)
    return connection.execute(
        delete(versions).where(versions.c.tenant == tenant, versions.c.name == name)
    ).rowcount


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


def _lock_head(connection: Connection, tenant: str, name: str, now: datetime) -> Row[Any]:
    """The head of ``name``, made if there is none, locked until the transaction ends."""
    values = {"tenant": tenant, "name": name, "number": 0, "created_at": now}
    connection.execute(_INSERT[connection.dialect.name], values)
    return connection.execute(_head(tenant, name)).one()


def _head(tenant: str, name: str) -> Select[Any]:
    return select(heads).where(heads.c.tenant == tenant, heads.c.name == name).with_for_update()


def _latest(connection: Connection, tenant: str, name: str) -> Row[Any] | None:
    """The newest version, unless the workflow is deleted or never was."""
    return connection.execute(
        _VERSION.where(heads.c.tenant == tenant, heads.c.name == name, _LATEST)
    ).one_or_none()


def _labelled(connection: Connection, tenant: str, name: str, label: str) -> Row[Any] | None:
    return connection.execute(
        _VERSION.where(heads.c.tenant == tenant, heads.c.name == name, versions.c.version == label)
    ).one_or_none()


def _add_version(connection: Connection, values: dict[str, Any], *, first: bool) -> None:
    """Insert a version and make it the latest. ``first``: none of its name is left."""
    connection.execute(versions.insert(), values)
    key = (heads.c.tenant == values["tenant"], heads.c.name == values["name"])
    changed: dict[str, Any] = {"number": values["number"]}
    if first:
        changed["created_at"] = values["created_at"]
    connection.execute(update(heads).where(*key).values(**changed))


def _expect(
    name: str,
    newest: Row[Any] | None,
    mode: SaveMode,
    if_match: Collection[str] | None,
    if_none_match: Collection[str] | None,
) -> None:
    """Raise unless the workflow stands as the caller thinks it does."""
    tags = set() if newest is None else {_etag(newest), "*"}
    if if_match is not None and not tags & set(if_match):
        raise PreconditionFailed(
            f"The workflow {name!r} is not what `If-Match` names: "
            + ("there is none." if newest is None else f"it is at version {newest.version!r}."),
            hint="Read it again, make the change on what is there now, and send its ETag.",
        )
    if if_none_match is not None and tags & set(if_none_match):
        raise PreconditionFailed(
            f"The workflow {name!r} is there already.", hint="Leave `If-None-Match` out."
        )
    if mode == "create" and newest is not None:
        raise Conflict(
            f"There is a workflow {name!r} already, at version {newest.version!r}.",
            hint=f"PUT /api/v1/workflows/{name} stores a new version of it.",
        )
    if mode == "add" and newest is None:
        raise NotFound(
            f"There is no stored workflow {name!r}.", hint="POST /api/v1/workflows stores it."
        )


def _free_version(
    connection: Connection, tenant: str, name: str, label: str | None, number: int
) -> str:
    """The label that the definition names, or the first number from ``number`` on."""
    if label is not None:
        if _labelled(connection, tenant, name, label) is not None:
            raise Conflict(
                f"The workflow {name!r} has a version {label!r} already, and versions do not "
                "change.",
                hint="Give the definition another 'version', or leave it out to have one counted.",
            )
        return label
    while _labelled(connection, tenant, name, str(number)) is not None:
        number += 1
    return str(number)


def _etag(row: Row[Any]) -> str:
    return f'"{row.number}-{row.digest}"'


def version_of(row: Row[Any]) -> WorkflowVersion:
    return WorkflowVersion(
        name=row.name,
        version=row.version,
        number=row.number,
        latest=row.number == row.latest_number,
        description=row.description,
        created_at=row.created_at,
        created_by=row.created_by,
    )


def _stored(row: Row[Any]) -> StoredWorkflow:
    return StoredWorkflow(
        **version_of(row).model_dump(), definition=row.definition, etag=_etag(row)
    )


def _replayed(connection: Connection, tenant: str, idempotency: Idempotency) -> Saved | None:
    row = stored_key(connection, tenant, idempotency.key)
    if row is None:
        return None
    if row.fingerprint != idempotency.fingerprint:
        raise IdempotencyMismatch(
            f"The Idempotency-Key {idempotency.key!r} was used with another request.",
            hint="Use a new key for a new request; send the same body to repeat one.",
        )
    answer: JsonObject = row.response
    return Saved(StoredWorkflow.model_validate(answer["workflow"]), answer["made"], replayed=True)


def _remember(
    connection: Connection, tenant: str, idempotency: Idempotency, saved: Saved, now: datetime
) -> None:
    values = {
        "tenant": tenant,
        "key": idempotency.key,
        "fingerprint": idempotency.fingerprint,
        "run_id": "",
        "response": {"workflow": saved.workflow.model_dump(mode="json"), "made": saved.made},
        "created_at": now,
    }
    if not take_key(connection, values):  # Taken meanwhile, for something else.
        _replayed(connection, tenant, idempotency)
