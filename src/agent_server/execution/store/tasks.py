"""The SQL of tasks: take, fence, end, wake, cancel and release them.

Leans on storage. Each function runs inside the caller's transaction and refuses to commit.
Tasks are locked before their run's row, by everybody.
"""

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Any

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Connection,
    Row,
    Text,
    and_,
    any_,
    bindparam,
    case,
    delete,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
    tuple_,
    update,
)

from agent_server.domain.base import utcnow
from agent_server.domain.runs import Task
from agent_server.execution.ports import UNDO_MARK, Holder, LostLease
from agent_server.execution.store import queue
from agent_server.execution.store.blame import AWAITS_ONE_THAT_WAITS, Rule, put_off
from agent_server.execution.store.columns import INSERTS, LIVE, error_of
from agent_server.execution.store.halts import CANCEL, PAUSE
from agent_server.execution.store.limits import void_permits_of_others
from agent_server.execution.store.waits import withdraw_approvals
from agent_server.storage.bulk import insert_rows, update_rows
from agent_server.storage.tables import EPOCH, IN_QUEUE, JsonText, nodes, runs, steps, tasks

NO_LIMITS: Mapping[str, int] = MappingProxyType({})
AT_ONCE = EPOCH
"""The moment of a task that was nudged: past by the clock of whichever machine takes it up."""
_INSERT_TASKS = insert(tasks)
_INSERT_TASK = {name: make(tasks).on_conflict_do_nothing() for name, make in INSERTS.items()}


def insert_task(connection: Connection, values: dict[str, Any]) -> bool:
    """Insert the task unless its path is taken; True when it was inserted."""
    return bool(connection.execute(_INSERT_TASK[connection.dialect.name], values).rowcount)


def insert_tasks(connection: Connection, rows: Sequence[dict[str, Any]]) -> None:
    """Insert tasks at paths that are free."""
    insert_rows(connection, _INSERT_TASKS, rows)


def tasks_at(connection: Connection, run_id: str, paths: Sequence[str]) -> dict[str, Row[Any]]:
    """Those of the run's tasks that stand at ``paths``, by path."""
    rows = connection.execute(
        select(tasks).where(tasks.c.run_id == run_id, tasks.c.path.in_(list(paths)))
    )
    return {row.path: row for row in rows}


def task_row(connection: Connection, run_id: str, path: str) -> Row[Any] | None:
    return connection.execute(
        select(tasks).where(tasks.c.run_id == run_id, tasks.c.path == path)
    ).one_or_none()


def task_rows(connection: Connection, tenant: str, run_id: str) -> Sequence[Row[Any]]:
    """The tasks a caller may see, in the order they were made."""
    return connection.execute(
        select(tasks)
        .where(
            tasks.c.run_id == run_id,
            tasks.c.tenant == tenant,
            tasks.c.path != "",
            tasks.c.hidden.is_(False),
        )
        .order_by(tasks.c.created_at, tasks.c.path)
    ).all()


def begun_tasks(connection: Connection, run_id: str) -> set[str]:
    """The places of the tasks that the run began, without what only serves another task."""
    query = select(tasks.c.path).where(
        tasks.c.run_id == run_id,
        tasks.c.path != "",
        tasks.c.status != "skipped",
        tasks.c.hidden.is_(False),
    )
    return set(connection.execute(query).scalars())


def ended_tasks(connection: Connection, keys: Sequence[tuple[str, str]]) -> Sequence[Row[Any]]:
    """Those of the tasks ``keys`` (run id, path) that have ended."""
    return connection.execute(
        select(tasks).where(
            tuple_(tasks.c.run_id, tasks.c.path).in_(list(keys)), tasks.c.status.not_in(LIVE)
        )
    ).all()


def task_of(row: Row[Any], identity: str) -> Task:
    return Task(
        id=identity,
        run_id=row.run_id,
        path=row.path,
        node=row.node,
        kind=row.kind,
        description=row.description,
        agent=row.agent,
        status=row.status,
        output=row.output,
        error=error_of(row.error),
        attempts=row.attempts,
        created_at=row.created_at,
        started_at=row.started_at,
        ended_at=row.ended_at,
        shared=row.shared,
    )


_HELD = select(tasks.c.epoch, tasks.c.halt).where(
    tasks.c.run_id == bindparam("run"),
    tasks.c.path == bindparam("path"),
    tasks.c.owner == bindparam("owner"),
    tasks.c.epoch == bindparam("epoch"),
    tasks.c.status == "running",
)
_HELD_LOCKED = _HELD.with_for_update(read=True)


def holds(connection: Connection, run_id: str, path: str, owner: str, epoch: int) -> bool:
    """Whether ``owner`` still has the task at ``epoch``: the fence of every write.

    On PostgreSQL the row stays share-locked until the transaction ends, so that a takeover
    cannot slip between this check and the commit.
    """
    return _held(connection, run_id, path, owner, epoch) is not None


def _held(connection: Connection, run_id: str, path: str, owner: str, epoch: int) -> Any:
    query = _HELD_LOCKED if connection.dialect.name == "postgresql" else _HELD
    values = {"run": run_id, "path": path, "owner": owner, "epoch": epoch}
    return connection.execute(query, values).one_or_none()


def inherited_halt(
    connection: Connection, run_id: str, path: str, owner: str, epoch: int
) -> str | None:
    """The mark that a child of the task begins with. Raises ``LostLease`` as ``holds`` is False."""
    row = _held(connection, run_id, path, owner, epoch)
    if row is None:
        raise LostLease(f"task {path!r} of {run_id} was taken over")
    return PAUSE if row.halt == PAUSE else None


_HELD_AMONG = (
    select(tasks.c.path, tasks.c.epoch, tasks.c.halt)
    .where(
        tasks.c.run_id == bindparam("run"),
        tasks.c.owner == bindparam("owner"),
        tasks.c.status == "running",
    )
    .order_by(tasks.c.path)
)
# The paths are one value, so that the statement is the same however many there are.
_HELD_AMONG_BY = {
    "sqlite": _HELD_AMONG.where(
        tasks.c.path.in_(
            select(func.json_each(bindparam("paths", type_=JsonText)).table_valued("value").c.value)
        )
    ),
    "postgresql": _HELD_AMONG.where(
        tasks.c.path == any_(bindparam("paths", type_=ARRAY(Text)))
    ).with_for_update(),
}


def hold_all(connection: Connection, holders: Collection[Holder]) -> set[str]:
    """Fence writes of several tasks of one run that one node carries out: on PostgreSQL their rows
    stay locked, in the order of their paths. Returns the paths of those that are to pause. Raises
    ``LostLease`` unless it has them all."""
    some = next(iter(holders))
    values = {"run": some.run_id, "owner": some.owner, "paths": [h.path for h in holders]}
    found = connection.execute(_HELD_AMONG_BY[connection.dialect.name], values).all()
    epochs = {path: epoch for path, epoch, _ in found}
    for holder in holders:
        if epochs.get(holder.path) != holder.epoch:
            raise LostLease(f"task {holder.path!r} of {holder.run_id} was taken over")
    return {path for path, _, halt in found if halt == PAUSE}


def claim(
    connection: Connection,
    owner: str,
    limit: int,
    now: datetime,
    turns: queue.Turns,
    rule: Rule,
    *,
    tries: bool = False,
    workers: int = 1,
    tenant_slots: Mapping[str, int] = NO_LIMITS,
) -> tuple[list[tuple[Row[Any], str | None]], bool]:
    """Take up to ``limit`` due tasks, as ``queue`` says whose turn it is: each gets a new epoch
    and, unless it stood still, one more attempt. With each comes the kind of what it stood still
    for, if it did; then, whether there were more. Of suspects one is taken if ``owner`` now
    ``tries`` one, and none else; see ``blame``. Of several ``workers`` each takes its share.
    """
    queue.enqueue_due(connection, now)
    limit = queue.share(connection, limit, workers)
    keys, more = queue.pick(connection, limit, turns, tenant_slots)
    if not keys:
        return [], more
    special = connection.execute(
        select(tasks.c.run_id, tasks.c.path, tasks.c.waiting_for, tasks.c.losses).where(
            tuple_(tasks.c.run_id, tasks.c.path).in_(keys),
            or_(tasks.c.waiting_for.is_not(None), tasks.c.losses >= rule.suspect),
        )
    ).all()
    stood_for = {
        (row.run_id, row.path): str(row.waiting_for.get("kind", ""))
        for row in special
        if row.waiting_for is not None
    }
    suspects = [(row.run_id, row.path) for row in special if rule.tried(row.losses)]
    if suspects:
        left = suspects[1:] if tries else suspects
        put_off(connection, left, now)
        keys = [key for key in keys if key not in left]
        if not keys:
            return [], more
    taken = connection.execute(
        update(tasks)
        .where(tuple_(tasks.c.run_id, tasks.c.path).in_(keys), tasks.c.status == "queued")
        .values(
            status="running",
            owner=owner,
            epoch=tasks.c.epoch + 1,
            attempts=tasks.c.attempts
            + case((or_(tasks.c.waiting_for.is_not(None), AWAITS_ONE_THAT_WAITS), 0), else_=1),
            wake_at=None,
            awaits=None,
            nudged=False,
            excused=False,
            waiting_for=None,
            started_at=func.coalesce(
                tasks.c.started_at, bindparam("now", now, tasks.c.started_at.type)
            ),
        )
        .returning(tasks)
    ).all()
    return [(row, stood_for.get((row.run_id, row.path))) for row in taken], more


_OWNED = and_(
    tasks.c.run_id == bindparam("run"),
    tasks.c.path == bindparam("b_path"),
    tasks.c.owner == bindparam("b_owner"),
    tasks.c.epoch == bindparam("b_epoch"),
    tasks.c.status == "running",
)
_LEASE = ("run_id", "path", "owner", "epoch")
_CLEARED_AT_END = ("waiting_for", "wake_at", "owner", "lane")
_END_TASK = (
    update(tasks)
    .where(_OWNED)
    .values(
        status=bindparam("b_status"),
        output=bindparam("b_output"),
        error=bindparam("b_error"),
        ended_at=bindparam("b_ended_at"),
        **dict.fromkeys(_CLEARED_AT_END),
    )
)
_PARK_TASK = (
    update(tasks)
    .where(_OWNED)
    .values(
        status="waiting",
        waiting_for=bindparam("b_waiting_for"),
        awaits=bindparam("b_awaits"),
        wake_at=case(
            (tasks.c.nudged, literal(AT_ONCE, tasks.c.wake_at.type)),
            else_=bindparam("b_wake_at", type_=tasks.c.wake_at.type),
        ),
        owner=None,
    )
)


def end_task(
    connection: Connection,
    run_id: str,
    path: str,
    owner: str,
    epoch: int,
    *,
    status: str,
    ended_at: datetime | None,
    output: Any = None,
    error: Any = None,
) -> bool:
    """Let go of the task for good; False when ``owner`` has lost it."""
    values = {
        "run": run_id,
        "b_path": path,
        "b_owner": owner,
        "b_epoch": epoch,
        "b_status": status,
        "b_output": output,
        "b_error": error,
        "b_ended_at": ended_at,
    }
    return bool(connection.execute(_END_TASK, values).rowcount)


def end_tasks(connection: Connection, ends: Sequence[dict[str, Any]]) -> None:
    """Let go of several tasks for good; whoever calls this has just fenced them. Each of ``ends``
    has the names that ``end_task`` takes."""
    if connection.dialect.name == "sqlite":
        update_rows(connection, tasks, ends, by=_LEASE, clears=_CLEARED_AT_END)
        return
    connection.execute(
        _END_TASK,
        [
            {"run" if name == "run_id" else f"b_{name}": value for name, value in end.items()}
            for end in ends
        ],
    )


def park_task(
    connection: Connection,
    run_id: str,
    path: str,
    owner: str,
    epoch: int,
    *,
    waiting_for: Any,
    awaits: str | None,
    wake_at: datetime | None,
) -> bool:
    """Let go of the task until it is nudged or ``wake_at`` has come; False when ``owner`` has
    lost it. Nudged since it was taken, it is due at once."""
    values = {
        "run": run_id,
        "b_path": path,
        "b_owner": owner,
        "b_epoch": epoch,
        "b_waiting_for": waiting_for,
        "b_awaits": awaits,
        "b_wake_at": wake_at,
    }
    return bool(connection.execute(_PARK_TASK, values).rowcount)


def nudge(connection: Connection, run_id: str, which: ColumnElement[bool]) -> None:
    """Let the run's live tasks ``which`` look again: those that stand still, and those that might
    be about to."""
    connection.execute(
        update(tasks)
        .where(tasks.c.run_id == run_id, tasks.c.status.in_(LIVE), which)
        .values(
            nudged=True,
            wake_at=case(
                (tasks.c.status == "waiting", literal(AT_ONCE, tasks.c.wake_at.type)),
                else_=tasks.c.wake_at,
            ),
        )
    )


def nudge_task(connection: Connection, run_id: str, path: str) -> None:
    """Something about a step of the task was decided."""
    nudge(connection, run_id, tasks.c.path == path)


def nudge_awaiting(connection: Connection, run_id: str, awaits: str) -> None:
    """What tasks of the run may await has come."""
    nudge(connection, run_id, or_(tasks.c.awaits == awaits, tasks.c.status != "waiting"))


def has_ended(connection: Connection, run_id: str, path: str, epoch: int, status: str) -> bool:
    """Whether the task was let go of with ``status`` by whoever took it at ``epoch``."""
    query = select(literal(1)).where(
        tasks.c.run_id == run_id,
        tasks.c.path == path,
        tasks.c.epoch == epoch,
        tasks.c.status == status,
        tasks.c.owner.is_(None),
    )
    return connection.execute(query).scalar() is not None


UNDOES = exists(
    select(literal(1))
    .where(
        steps.c.run_id == tasks.c.run_id,
        steps.c.task_path == tasks.c.path,
        steps.c.name.like("%/undo"),
    )
    .correlate(tasks)
)
"""The task has done something that it can undo."""


def cancel_tasks(
    connection: Connection, run_id: str, *, only_idle: bool, now: datetime, spare: bool = False
) -> None:
    """End the run's tasks as cancelled: those nobody carries out, or all that live. With ``spare``
    those live on that are to undo something, and those that are the undoing of something: whoever
    takes one up ends it in order."""
    which = ("queued", "waiting") if only_idle else LIVE
    query = update(tasks).where(tasks.c.run_id == run_id, tasks.c.status.in_(which))
    if spare:
        query = query.where(~UNDOES, ~tasks.c.path.contains(UNDO_MARK))
    connection.execute(query.values(status="cancelled", owner=None, ended_at=now, behind=False))
    withdraw_approvals(connection, run_id, now)


def undoing_tasks(connection: Connection, run_id: str) -> bool:
    """Whether a task below the run's root lives that has done something that it can undo."""
    query = select(literal(1)).where(
        tasks.c.run_id == run_id, tasks.c.path != "", tasks.c.status.in_(LIVE), UNDOES
    )
    return connection.execute(query.limit(1)).scalar() is not None


TAKE_UP = {"owner": None, "ended_at": None, "wake_at": None, "waiting_for": None, "halt": None}
"""What is set where a task that nobody carries out is queued."""


def can_undo(connection: Connection, run_id: str) -> bool:
    """Whether the run has done something that it can undo."""
    query = select(literal(1)).where(steps.c.run_id == run_id, steps.c.name.like("%/undo"))
    return connection.execute(query.limit(1)).scalar() is not None


def take_up_root(connection: Connection, run_id: str) -> None:
    """Queue the run's root task, which nobody carries out, so that somebody ends it in order."""
    connection.execute(
        update(tasks)
        .where(tasks.c.run_id == run_id, tasks.c.path == "")
        .values(status="queued", **TAKE_UP)
    )


def cancel_task(connection: Connection, run_id: str, path: str, now: datetime) -> None:
    """End one task as cancelled, whoever carries it out, and show the run as it then is."""
    connection.execute(
        update(tasks)
        .where(tasks.c.run_id == run_id, tasks.c.path == path, tasks.c.status.in_(LIVE))
        .values(status="cancelled", owner=None, ended_at=now)
    )
    withdraw_approvals(connection, run_id, now, path)
    if waiting_for(connection, run_id) is None:
        connection.execute(
            update(runs)
            .where(runs.c.id == run_id, runs.c.status == "waiting")
            .values(status="running", waiting_for=None)
        )


def waiting_for(connection: Connection, run_id: str) -> Any:
    """What a task of the run waits for; None when none does."""
    return connection.execute(
        select(tasks.c.waiting_for)
        .where(tasks.c.run_id == run_id, tasks.c.status == "waiting")
        .order_by(tasks.c.created_at, tasks.c.path)
        .limit(1)
    ).scalar()


def root_status(connection: Connection, run_id: str) -> str | None:
    """How the run's root task stands; it stays so until the transaction ends."""
    query = select(tasks.c.status).where(tasks.c.run_id == run_id, tasks.c.path == "")
    if connection.dialect.name == "postgresql":
        query = query.with_for_update()
    return connection.execute(query).scalar()


def held_tasks(connection: Connection, owner: str) -> set[tuple[str, str, int]]:
    """Run, path and epoch of each task stored as carried out by ``owner``."""
    rows = connection.execute(
        select(tasks.c.run_id, tasks.c.path, tasks.c.epoch).where(
            tasks.c.owner == owner, tasks.c.status == "running"
        )
    )
    return {(row.run_id, row.path, row.epoch) for row in rows}


def reap_all(connection: Connection) -> int:
    """Queue again whatever is carried out: at the start of the only process."""
    connection.execute(delete(nodes))
    void_permits_of_others(connection, ())
    return release_tasks(connection, None)


def release_tasks(connection: Connection, owner: str | None, alive: Sequence[str] = ()) -> int:
    """Queue again what ``owner`` lets go of; with None, what those not in ``alive`` left behind,
    which counts as a loss of a worker for each."""
    if owner is not None:
        return _release(connection, tasks.c.owner == owner, lost=False)
    left = and_(tasks.c.owner > "", tasks.c.owner.not_in(list(alive)))
    return _release(connection, left, lost=True)


def release_task(
    connection: Connection, run_id: str, path: str, owner: str, epoch: int, *, lost: bool
) -> None:
    """Let go of one task, still unfinished, so that whoever is free takes it.

    ``lost``: whether this counts as the loss of a worker, of which a task may cause so many.
    """
    _release(
        connection,
        and_(
            tasks.c.run_id == run_id,
            tasks.c.path == path,
            tasks.c.owner == owner,
            tasks.c.epoch == epoch,
        ),
        lost=lost,
    )


def _release(connection: Connection, condition: ColumnElement[bool], *, lost: bool) -> int:
    """Queue tasks again; a run whose root is among them is shown as queued."""
    # Cancelled by itself while nobody could be told: its error is on the row.
    ends = and_(tasks.c.halt == CANCEL, ~UNDOES)
    released = connection.execute(
        update(tasks)
        .where(tasks.c.status == "running", condition)
        .values(
            status=case((ends, "failed"), else_="queued"),
            halt=case((tasks.c.halt == CANCEL, None), else_=tasks.c.halt),
            losses=tasks.c.losses + case((tasks.c.excused, 0), else_=int(lost)),
            ended_at=case((ends, bindparam("now", utcnow(), tasks.c.ended_at.type)), else_=None),
            owner=None,
        )
        .returning(tasks.c.run_id, tasks.c.path)
    ).all()
    roots = [row.run_id for row in released if row.path == ""]
    if roots:
        connection.execute(
            update(runs)
            .where(runs.c.id.in_(roots), runs.c.status == "running")
            .values(status="queued")
        )
    return len(released)


def queue_depth(connection: Connection) -> int:
    """Tasks that any worker may take."""
    query = select(func.count()).select_from(tasks).where(IN_QUEUE)
    return connection.execute(query).scalar() or 0
