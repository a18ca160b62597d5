"""The SQL of the queue: which due tasks are taken next, in turn among tenants and among runs.

Leans on the tables and on an index that holds nothing but the queue, so that a claim costs the same
however much waits. Refuses to take a task: ``tasks.claim`` does.

A free slot goes to the next tenant in the circle of those that have something in the queue. Of a
tenant, the highest priority comes first; within it the ``WINDOW`` oldest runs share, one task each
in turn, and younger runs follow as older ones have nothing left to begin. So no tenant and no run,
however large, holds up another, and what has begun ends before much else begins.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain, zip_longest
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    exists,
    func,
    literal,
    or_,
    select,
    text,
    tuple_,
    update,
)

from agent_server.execution.store.columns import LIVE
from agent_server.execution.store.lanes import BLOCKED, free_lane, put_behind
from agent_server.storage.tables import IN_QUEUE, tasks

WINDOW = 16
"""Runs of one tenant and priority that share its slots; the others wait until one of these has
nothing in the queue."""
TENANTS = 64
"""Tenants among whom one claim shares; the circle brings the others to the next."""
REMEMBERED = 10_000
"""Tenants whose turn among their runs is remembered."""
COUNTED = 1_000
"""Tasks in the queue that are counted before it is shared."""
MOMENTS = 500
"""Tasks whose moment has come that one claim puts into the queue."""
CLAIMING = 7_349_002_121
"""Any number, the same in every process: "somebody is claiming"."""

Key = tuple[str, str]
"""Run id and path."""


class Round(NamedTuple):
    """Runs up to ``last`` have their turn in this round; those up to ``served`` had it."""

    served: str = ""
    last: str = ""


@dataclass
class Turns:
    """Whose turn it is at one node. Lost with its process, which costs nobody more than a turn."""

    tenant: str = ""
    """The last one that was served."""
    rounds: "OrderedDict[str, Round]" = field(default_factory=OrderedDict)

    def remember(self, tenant: str, turn: Round) -> None:
        self.rounds[tenant] = turn
        self.rounds.move_to_end(tenant)
        if len(self.rounds) > REMEMBERED:
            self.rounds.popitem(last=False)


class Picked(NamedTuple):
    """The tasks whose turn it is, and whether there were more."""

    keys: list[Key]
    more: bool


def enqueue_due(connection: Connection, now: datetime) -> None:
    """Put tasks whose moment has come into the queue; those that stood still keep what for."""
    due = (
        select(tasks.c.run_id, tasks.c.path, tasks.c.lane, tasks.c.behind)
        .where(
            tasks.c.wake_at <= now,
            tasks.c.status.in_(("queued", "waiting")),
            tasks.c.halt.is_(None),
        )
        .order_by(tasks.c.wake_at)
        .limit(MOMENTS)
    )
    if connection.dialect.name == "postgresql":
        due = due.with_for_update(skip_locked=True)
    found = connection.execute(due).all()
    keys = [(row.run_id, row.path) for row in found]
    if keys:
        connection.execute(
            update(tasks)
            .where(tuple_(tasks.c.run_id, tasks.c.path).in_(keys))
            .values(status="queued", wake_at=None)
        )
    for lane in sorted({row.lane for row in found if row.behind and row.lane is not None}):
        free_lane(connection, lane)


def next_moment(connection: Connection) -> datetime | None:
    """When the first of the tasks that stand still for a moment is due; None when none does."""
    waiting = (tasks.c.wake_at.is_not(None), tasks.c.status.in_(("queued", "waiting")))
    query = select(tasks.c.wake_at).where(*waiting, tasks.c.halt.is_(None))
    found: datetime | None = connection.execute(query.order_by(tasks.c.wake_at).limit(1)).scalar()
    return found


def share(connection: Connection, limit: int, workers: int) -> int:
    """How many of up to ``limit`` one of so many workers takes at once, so that a short queue is
    not one's alone."""
    if workers <= 1:
        return limit
    most = min(limit * workers, COUNTED)
    there = select(tasks.c.rank).where(IN_QUEUE).limit(most).subquery()
    depth = connection.execute(select(func.count()).select_from(there)).scalar() or 0
    return min(limit, max(1, -(-depth // workers)))


def pick(
    connection: Connection, limit: int, turns: Turns, tenant_slots: Mapping[str, int]
) -> Picked:
    """Up to ``limit`` tasks, shared among the tenants that have any; locked on PostgreSQL.

    Of a tenant no more than brings what it has at work to its ``tenant_slots``.
    """
    tenants = _tenants(connection, turns.tenant)
    if not tenants:
        return Picked([], False)
    if connection.dialect.name == "postgresql":
        # One node at a time: two would reach for the same heads of the same queues.
        connection.execute(text("SELECT pg_advisory_xact_lock(:n)"), {"n": CLAIMING})
    chosen: list[Any] = []
    more = False
    for number, tenant in enumerate(tenants):
        if len(chosen) == limit:
            more = True
            break
        share = -(-(limit - len(chosen)) // (len(tenants) - number))
        most = tenant_slots.get(tenant, tenant_slots.get("*"))
        turn = turns.rounds.get(tenant, Round())
        if most is not None and (room := most - _at_work(connection, tenant)) <= share:
            if room > 0:
                chosen += _of_tenant(connection, tenant, room, turn)[0]
            continue  # What it has left is not for now.
        found, left, turn = _of_tenant(connection, tenant, share, turn)
        chosen += found
        more = more or left
        turns.tenant = tenant
        turns.remember(tenant, turn)
    keys = _lock(connection, chosen)
    return Picked(keys, more or len(keys) < len(chosen))


def _at_work(connection: Connection, tenant: str) -> int:
    """Tasks of the tenant that are carried out and do not only await others."""
    other = tasks.alias("other")
    awaits = exists(
        select(literal(1))
        .where(
            other.c.run_id == tasks.c.run_id,
            other.c.status.in_(LIVE),
            other.c.path != tasks.c.path,
            or_(tasks.c.path == "", other.c.path.startswith(tasks.c.path + ".")),
        )
        .correlate(tasks)
    )
    query = select(func.count()).select_from(tasks)
    query = query.where(
        tasks.c.owner > "", tasks.c.tenant == tenant, tasks.c.status == "running", ~awaits
    )
    return connection.execute(query).scalar() or 0


def _tenants(connection: Connection, after: str) -> list[str]:
    """Tenants with something in the queue: those behind ``after`` first, then from the beginning.

    Each is found by one probe of the index, however many tasks it has.
    """
    found = list(connection.execute(_WALK_TENANTS, {"after": after, "n": TENANTS}).scalars())
    if len(found) < TENANTS and after:
        rest = connection.execute(_WALK_TENANTS, {"after": "", "n": TENANTS}).scalars()
        found += [tenant for tenant in rest if tenant <= after]
    return found[:TENANTS]


_WALK_TENANTS = text(f"""
    WITH RECURSIVE walk(tenant) AS (
        SELECT min(tenant) FROM tasks WHERE {IN_QUEUE} AND tenant > :after
        UNION ALL
        SELECT (SELECT min(tenant) FROM tasks WHERE {IN_QUEUE} AND tenant > walk.tenant)
        FROM walk WHERE walk.tenant IS NOT NULL
    )
    SELECT tenant FROM walk WHERE tenant IS NOT NULL LIMIT :n
    """)
_WALK_RUNS = text(f"""
    WITH RECURSIVE walk(run_id) AS (
        SELECT min(run_id) FROM tasks
        WHERE {IN_QUEUE} AND tenant = :tenant AND rank = :rank
        UNION ALL
        SELECT (
            SELECT min(run_id) FROM tasks WHERE {IN_QUEUE}
            AND tenant = :tenant AND rank = :rank AND run_id > walk.run_id
        )
        FROM walk WHERE walk.run_id IS NOT NULL
    )
    SELECT run_id, (
        SELECT path FROM tasks WHERE {IN_QUEUE}
        AND tenant = :tenant AND rank = :rank AND tasks.run_id = walk.run_id
        ORDER BY created_at LIMIT 1
    ) AS path
    FROM walk WHERE run_id IS NOT NULL LIMIT :n
    """)


def _of_tenant(
    connection: Connection, tenant: str, want: int, turn: Round
) -> tuple[list[Any], bool, Round]:
    """Up to ``want`` tasks of the tenant, whether it has more, and its turn from now on."""
    chosen: list[Any] = []
    lower: tuple[ColumnElement[bool], ...] = ()
    while len(chosen) < want:
        missing = want - len(chosen)
        rows = _first(connection, tenant, missing + 1, *lower)
        if len(rows) <= missing:
            return [*chosen, *rows], False, turn
        rank = rows[0].rank
        of_band = [row for row in rows if row.rank == rank]
        if len(of_band) > missing:
            shared, turn = _in_turn(connection, tenant, rank, missing, turn)
            return chosen + shared, True, turn
        chosen += of_band
        lower = (tasks.c.rank > rank,)
    return chosen, True, turn


def _first(
    connection: Connection, tenant: str, limit: int, *which: ColumnElement[bool]
) -> Sequence[Any]:
    query = select(tasks.c.run_id, tasks.c.path, tasks.c.rank)
    query = query.where(IN_QUEUE, tasks.c.tenant == tenant, *which)
    order = (tasks.c.rank, tasks.c.run_id, tasks.c.created_at)
    return connection.execute(query.order_by(*order).limit(limit)).all()


def _in_turn(
    connection: Connection, tenant: str, rank: int, want: int, turn: Round
) -> tuple[list[Any], Round]:
    """``want`` tasks of the oldest runs, one of each in turn; there are as many."""
    values = {"tenant": tenant, "rank": rank, "n": max(WINDOW, want)}
    runs = connection.execute(_WALK_RUNS, values).all()
    left = [row for row in runs if turn.served < row.run_id <= turn.last]
    circle = left + [row for row in runs if row not in left]
    chosen: list[Any] = circle[:want]
    if len(chosen) < want:
        queues = [
            _first(connection, tenant, want, tasks.c.rank == rank, tasks.c.run_id == row.run_id)
            for row in circle
        ]
        chosen = [row for row in chain(*zip_longest(*queues)) if row is not None][:want]
    served = chosen[-1].run_id
    if len(chosen) > len(left):
        turn = Round(last=runs[-1].run_id)  # A new round, which those in the window now share.
    return chosen, turn._replace(served=served)


def _lock(connection: Connection, rows: Iterable[Any]) -> list[Key]:
    """Those of ``rows`` that nobody else is changing and whose lane lets them begin."""
    keys = [(row.run_id, row.path) for row in rows]
    if not keys:
        return []
    query = select(tasks.c.run_id, tasks.c.path, BLOCKED.label("blocked")).where(
        IN_QUEUE, tuple_(tasks.c.run_id, tasks.c.path).in_(keys)
    )
    if connection.dialect.name == "postgresql":
        query = query.with_for_update(of=tasks, skip_locked=True)
    found = connection.execute(query).all()
    put_behind(connection, [(row.run_id, row.path) for row in found if row.blocked])
    free = {(row.run_id, row.path) for row in found if not row.blocked}
    return [key for key in keys if key in free]
