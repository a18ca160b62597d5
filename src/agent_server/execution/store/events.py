"""The SQL of a run's events, and how one is written down.

Leans on storage. Each function runs inside the caller's transaction and refuses to commit.
"""

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Integer, bindparam, insert, literal, select

from agent_server.domain.base import json_text
from agent_server.domain.events import EventBase
from agent_server.execution.events import StoredEvent, Told, splice_seq
from agent_server.execution.store.columns import NO_USAGE
from agent_server.execution.store.reservations import forget_reservations
from agent_server.execution.store.runs import RunEnd, advance
from agent_server.storage.bulk import insert_rows
from agent_server.storage.tables import events

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
    return [StoredEvent(row.seq, row.type, splice_seq(row.seq, row.data)) for row in rows]


def event_stored(connection: Connection, run_id: str, data: str) -> bool:
    """Whether the run's log has exactly this event, its moment included."""
    query = select(literal(1)).where(events.c.run_id == run_id, events.c.data == data).limit(1)
    return connection.execute(query).scalar() is not None


def last_event(
    connection: Connection, tenant: str, run_id: str, types: Sequence[str]
) -> dict[str, Any] | None:
    data = connection.execute(
        select(events.c.data)
        .where(events.c.run_id == run_id, events.c.tenant == tenant, events.c.type.in_(types))
        .order_by(events.c.seq.desc())
        .limit(1)
    ).scalar()
    return None if data is None else dict(json.loads(data))


def events_of(
    connection: Connection, tenant: str, run_id: str, types: Sequence[str]
) -> list[dict[str, Any]]:
    """The run's events of these types, in order."""
    rows = connection.execute(
        select(events.c.data)
        .where(events.c.run_id == run_id, events.c.tenant == tenant, events.c.type.in_(types))
        .order_by(events.c.seq)
    ).scalars()
    return [json.loads(data) for data in rows]
