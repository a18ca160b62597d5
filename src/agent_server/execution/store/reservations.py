"""The SQL of budgets: what calls under way have reserved.

Leans on storage. Each function runs inside the caller's transaction and refuses to commit. Whoever
decides by these rows has locked the run's row first.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, Row, and_, bindparam, delete, select, update

from agent_server.execution.store.columns import INSERTS
from agent_server.storage.tables import reservations, runs, tasks

_RUN = select(runs).where(runs.c.id == bindparam("run"))
_LOCKED_RUN = _RUN.with_for_update()
_OF_RUN = (
    select(
        reservations,
        and_(
            reservations.c.under_way,
            tasks.c.status == "running",
            tasks.c.epoch == reservations.c.epoch,
        ).label("live"),
    )
    .select_from(
        reservations.join(
            tasks,
            and_(tasks.c.run_id == reservations.c.run_id, tasks.c.path == reservations.c.task_path),
        )
    )
    .where(reservations.c.run_id == bindparam("run"))
)


def _upsert(make: Any) -> Any:
    statement = make(reservations)
    key = ("run_id", "key", "task_path")
    changed = [column.name for column in reservations.c if column.name not in key]
    return statement.on_conflict_do_update(
        index_elements=["run_id", "key"],
        set_={name: statement.excluded[name] for name in changed},
    )


_UPSERT = {name: _upsert(make) for name, make in INSERTS.items()}


def locked_run_row(connection: Connection, run_id: str) -> Row[Any]:
    """The run's row, which nobody else changes until the transaction ends."""
    query = _LOCKED_RUN if connection.dialect.name == "postgresql" else _RUN
    return connection.execute(query, {"run": run_id}).one()


def reservations_of(connection: Connection, run_id: str) -> Sequence[Row[Any]]:
    """The run's reservations; ``live`` is true while the call may still be under way."""
    return connection.execute(_OF_RUN, {"run": run_id}).all()


def reserve(connection: Connection, values: dict[str, Any]) -> None:
    connection.execute(_UPSERT[connection.dialect.name], values)


def settle(connection: Connection, run_id: str, keys: Iterable[str]) -> None:
    """The calls ended, and what they used is in the run's totals."""
    connection.execute(
        delete(reservations).where(
            reservations.c.run_id == run_id, reservations.c.key.in_(list(keys))
        )
    )


def cut_off(connection: Connection, run_id: str, keys: Iterable[str]) -> None:
    """Nothing will be heard of the calls any more: they count, and hold nothing back."""
    connection.execute(
        update(reservations)
        .where(reservations.c.run_id == run_id, reservations.c.key.in_(list(keys)))
        .values(under_way=False)
    )


def forget_reservations(connection: Connection, run_id: str) -> None:
    connection.execute(delete(reservations).where(reservations.c.run_id == run_id))
