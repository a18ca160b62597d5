"""The SQL of what all nodes share a little of: permits that are held, and rates a minute.

Leans on the tables. Refuses to know what is limited: a limit has a name. Each function runs inside
the caller's transaction, in which the name is its alone.
"""

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, text

from agent_server.domain.base import utcnow
from agent_server.execution.store.columns import INSERTS
from agent_server.storage.tables import permits, rates


def take_permit(connection: Connection, name: str, holder: str, node: str, most: int) -> bool:
    """Whether ``holder`` has one of the ``most`` permits of that name from now on."""
    _alone(connection, name)
    held = select(func.count()).select_from(permits).where(permits.c.name == name)
    if (connection.execute(held).scalar() or 0) >= most:
        return False
    values = {"name": name, "holder": holder, "node": node, "taken_at": utcnow()}
    connection.execute(insert(permits), values)
    return True


def give_permit_back(connection: Connection, name: str, holder: str) -> None:
    connection.execute(delete(permits).where(permits.c.name == name, permits.c.holder == holder))


def void_permits(connection: Connection, node: str) -> None:
    """The node holds none any more."""
    connection.execute(delete(permits).where(permits.c.node == node))


def void_permits_of_others(connection: Connection, alive: Sequence[str]) -> None:
    """Only the nodes ``alive`` hold any."""
    connection.execute(delete(permits).where(permits.c.node.not_in(list(alive))))


def rate(connection: Connection, name: str) -> tuple[Any, datetime]:
    """What is stored of that rate, if anything, and the moment: on PostgreSQL by its own clock,
    which is the same for every node."""
    _alone(connection, name)
    state = connection.execute(select(rates.c.state).where(rates.c.name == name)).scalar()
    return state, clock(connection)


def clock(connection: Connection) -> datetime:
    """The moment by PostgreSQL's own clock, which is the same for every node."""
    if connection.dialect.name != "postgresql":
        return utcnow()
    now: datetime = connection.execute(text("SELECT clock_timestamp()")).scalar_one()
    return now.astimezone(timezone.utc)


def store_rate(connection: Connection, name: str, state: Any) -> None:
    statement = INSERTS[connection.dialect.name](rates)
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["name"], set_={"state": statement.excluded.state}
        ),
        {"name": name, "state": state},
    )


def _alone(connection: Connection, name: str) -> None:
    if connection.dialect.name == "postgresql":
        lock = func.pg_advisory_xact_lock(func.hashtextextended(f"limit {name}", 0))
        connection.execute(select(lock))
