"""The SQL of a run's events, and how one is written down.

Leans on storage. Each function runs inside the caller's transaction and refuses to commit.
"""

import json
from collections.abc import Sequence
from typing import Any

from pydantic_core import from_json
from sqlalchemy import Connection, Integer, bindparam, insert, literal, select

from agent_server.domain.base import json_text
from agent_server.domain.errors import InternalError
from agent_server.domain.events import EventBase, EventUnreadable
from agent_server.execution.events import StoredEvent, Told, splice_seq
from agent_server.execution.store.columns import NO_USAGE
from agent_server.execution.store.reservations import forget_reservations
from agent_server.execution.store.runs import RunEnd, advance
from agent_server.storage.bulk import insert_rows
from agent_server.storage.tables import EPOCH, events

_INSERT_EVENTS = insert(events)


def insert_events(
    connection: Connection, tenant: str, run_id: str, first: int, items: Sequence[tuple[str, str]]
) -> None:
    """Store ``(type, json without seq)`` from number ``first`` on."""
    insert_rows(
        connection,
        _INSERT_EVENTS,
        [
            {"run_id": run_id, "seq": first + i, "tenant": tenant, "type": kind, "data": data}
            for i, (kind, data) in enumerate(items)
        ],
    )


def stamped(event: EventBase, run_id: str, task_id: str | None) -> EventBase:
    """``event`` with its run and task filled in."""
    if event.run_id == run_id and (task_id is None or event.task_id is not None):
        return event
    return event.model_copy(
        update={"run_id": event.run_id or run_id, "task_id": event.task_id or task_id}
    )


def encode_event(event: EventBase) -> tuple[str, str]:
    """An event's type and its stored JSON."""
    kind: str = event.type  # type: ignore[attr-defined]  # every member of the union has one
    return kind, json_text(event, exclude={"seq"})


def tell(
    connection: Connection,
    tenant: str,
    run_id: str,
    said: Sequence[EventBase],
    end: RunEnd | None = None,
) -> Told:
    """Store ``said`` as the run's next events, and perhaps end it: for what no journal writes.

    Raises ``LostLease`` for a run that has ended.
    """
    said = [stamped(event, run_id, None) for event in said]
    encoded = [encode_event(event) for event in said]
    first, _ = advance(connection, run_id, len(encoded), NO_USAGE, end)
    if end is not None:
        forget_reservations(connection, run_id)
    insert_events(connection, tenant, run_id, first, encoded)
    return [
        (StoredEvent(first + i, kind, splice_seq(first + i, data)), event)
        for i, ((kind, data), event) in enumerate(zip(encoded, said, strict=True))
    ]


_EVENTS = (
    select(events.c.seq, events.c.type, events.c.data)
    .where(
        events.c.run_id == bindparam("run"),
        events.c.tenant == bindparam("tenant"),
        events.c.seq > bindparam("after"),
    )
    .order_by(events.c.seq)
    .limit(bindparam("most", type_=Integer))
)


def event_rows(
    connection: Connection, tenant: str, run_id: str, after: int, limit: int
) -> list[StoredEvent]:
    rows = connection.execute(
        _EVENTS, {"run": run_id, "tenant": tenant, "after": after, "most": limit}
    )
    return [_as_stored(run_id, row) for row in rows]


def _as_stored(run_id: str, row: Any) -> StoredEvent:
    fault = event_fault(row.type, row.data)
    if fault is None:
        return StoredEvent(row.seq, row.type, splice_seq(row.seq, row.data))
    lost = EventUnreadable(run_id=run_id, at=EPOCH, was=row.type, reason=fault)
    kind, data = encode_event(lost)
    return StoredEvent(row.seq, kind, splice_seq(row.seq, data))


def _parsed(data: str) -> Any:
    try:
        return from_json(data)
    except ValueError:
        return json.loads(data)  # It takes half a character (a lone surrogate), too.


def event_fault(kind: str, data: str) -> str | None:
    """Why the stored ``data`` of an event of type ``kind`` cannot be read; None when it can."""
    try:
        found = _parsed(data)
    except ValueError as error:
        return f"not JSON: {error}"
    if not isinstance(found, dict) or found.get("type") != kind:
        return f"not an event of type {kind!r}"
    return None


def _read(run_id: str, row: Any) -> dict[str, Any]:
    """What the event says. Raises ``InternalError`` where that cannot be read."""
    fault = event_fault(row.type, row.data)
    if fault is not None:
        raise InternalError(
            f"The stored event {row.seq} ({row.type}) of the run {run_id!r} cannot be read: {fault}.",
            hint="`agent-server db check` lists whatever cannot be read.",
        )
    return dict(json.loads(row.data))


def all_events(connection: Connection, run_id: str) -> list[dict[str, Any]]:
    """Everything the run said, its numbers included."""
    query = select(events.c.seq, events.c.type, events.c.data).where(events.c.run_id == run_id)
    rows = connection.execute(query.order_by(events.c.seq))
    return [json.loads(_as_stored(run_id, row).data) for row in rows]


def event_stored(connection: Connection, run_id: str, data: str) -> bool:
    """Whether the run's log has exactly this event, its moment included."""
    query = select(literal(1)).where(events.c.run_id == run_id, events.c.data == data).limit(1)
    return connection.execute(query).scalar() is not None


def last_event(
    connection: Connection, tenant: str, run_id: str, types: Sequence[str]
) -> dict[str, Any] | None:
    """The run's last event of these types. Raises ``InternalError`` where it cannot be read."""
    row = connection.execute(
        select(events.c.seq, events.c.type, events.c.data)
        .where(events.c.run_id == run_id, events.c.tenant == tenant, events.c.type.in_(types))
        .order_by(events.c.seq.desc())
        .limit(1)
    ).one_or_none()
    return None if row is None else _read(run_id, row)


def events_of(
    connection: Connection, tenant: str, run_id: str, types: Sequence[str]
) -> list[dict[str, Any]]:
    """The run's events of these types, in order, as far as they can be read."""
    rows = connection.execute(
        select(events.c.type, events.c.data)
        .where(events.c.run_id == run_id, events.c.tenant == tenant, events.c.type.in_(types))
        .order_by(events.c.seq)
    )
    return [json.loads(row.data) for row in rows if event_fault(row.type, row.data) is None]
