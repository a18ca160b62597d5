"""The SQL of lanes: runs of one session, of which one is under way and the others stand behind it.

Leans on the tables. Refuses to take a task: what stands behind is not in the queue, and comes into
it when what went before has ended.
"""

from collections.abc import Sequence

from sqlalchemy import (
    Connection,
    and_,
    exists,
    func,
    literal,
    not_,
    or_,
    select,
    tuple_,
    update,
)

from agent_server.execution.store.columns import LIVE
from agent_server.storage.tables import IS_BEHIND, tasks

_SIBLING = tasks.alias("sibling")
BLOCKED = and_(
    tasks.c.lane.is_not(None),
    exists(
        select(literal(1))
        .where(
            _SIBLING.c.lane == tasks.c.lane,
            _SIBLING.c.behind.is_(False),
            _SIBLING.c.status.in_(LIVE),
            _SIBLING.c.run_id != tasks.c.run_id,
            or_(
                _SIBLING.c.status != "queued",
                _SIBLING.c.epoch > 0,
                _SIBLING.c.created_at < tasks.c.created_at,
                and_(
                    _SIBLING.c.created_at == tasks.c.created_at,
                    _SIBLING.c.run_id < tasks.c.run_id,
                ),
            ),
        )
        .correlate(tasks)
    ),
)
"""Another task of the same lane has begun and not ended, or is older."""


def lane_of(tenant: str, session_id: str | None) -> str | None:
    """The lane of a run on that session; None for one on no session."""
    return None if session_id is None else f"{tenant}:{session_id}"


_ENTERED = not_(and_(tasks.c.status == "queued", tasks.c.wake_at.is_not(None)))
"""What is to begin later is on no lane until then."""


def lane_busy(connection: Connection, lane: str) -> bool:
    """Whether a task of the lane has not ended; on PostgreSQL holds the lane until commit."""
    hold_lane(connection, lane)
    return lane_holder(connection, lane) is not None


def lane_holder(connection: Connection, lane: str) -> str | None:
    """The run that works on the lane, or will as the next."""
    query = (
        select(tasks.c.run_id)
        .where(tasks.c.lane == lane, tasks.c.status.in_(LIVE), _ENTERED)
        .order_by(tasks.c.behind, tasks.c.created_at, tasks.c.run_id)
        .limit(1)
    )
    found: str | None = connection.execute(query).scalar()
    return found


def lane_runs(connection: Connection, lane: str, but: str) -> Sequence[str]:
    """The runs that hold the lane or wait for it, the oldest first, without the run ``but``."""
    query = select(tasks.c.run_id).where(
        tasks.c.lane == lane, tasks.c.status.in_(LIVE), tasks.c.run_id != but
    )
    return connection.execute(query.order_by(tasks.c.created_at, tasks.c.run_id)).scalars().all()


def put_behind(connection: Connection, keys: Sequence[tuple[str, str]]) -> None:
    """Take the tasks ``keys`` (run id, path), which may not begin yet, out of the queue."""
    if keys:
        connection.execute(
            update(tasks)
            .where(tuple_(tasks.c.run_id, tasks.c.path).in_(list(keys)))
            .values(behind=True)
        )


def free_lane(connection: Connection, lane: str) -> None:
    """Let the oldest that stands behind in the lane into the queue, if nothing goes before."""
    hold_lane(connection, lane)
    ahead = select(literal(1)).where(
        tasks.c.lane == lane, tasks.c.behind.is_(False), tasks.c.status.in_(LIVE)
    )
    if connection.execute(ahead.limit(1)).scalar() is not None:
        return
    oldest = (
        select(tasks.c.run_id, tasks.c.path)
        .where(tasks.c.lane == lane, IS_BEHIND, tasks.c.status.in_(LIVE), _ENTERED)
        .order_by(tasks.c.created_at, tasks.c.run_id)
        .limit(1)
    )
    found = connection.execute(oldest).one_or_none()
    if found is not None:
        connection.execute(
            update(tasks)
            .where(tasks.c.run_id == found.run_id, tasks.c.path == found.path)
            .values(behind=False)
        )


def free_lanes(connection: Connection) -> int:
    """Do so in each lane where nothing goes before: its end was not noticed. How many."""
    lanes = select(tasks.c.lane).where(IS_BEHIND, _ENTERED).distinct().subquery()
    ahead = exists(
        select(literal(1)).where(
            _SIBLING.c.lane == lanes.c.lane,
            _SIBLING.c.behind.is_(False),
            _SIBLING.c.status.in_(LIVE),
        )
    )
    stuck = connection.execute(select(lanes.c.lane).where(~ahead)).scalars().all()
    for lane in stuck:
        free_lane(connection, lane)
    return len(stuck)


def hold_lane(connection: Connection, lane: str) -> None:
    """Let nobody else in on the lane until the transaction ends. SQLite has one writer anyway."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(lane, 0))))
