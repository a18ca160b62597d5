"""Children: how a task runs others as tasks of their own, skips them, and gives them up.

Leans on the roster and the store. Refuses to carry a task out: it hands it to ``launch``, or
leaves it queued for whichever worker comes.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import anyio
from sqlalchemy import Connection, Row

from agent_server.domain.base import utcnow
from agent_server.domain.errors import WorkflowLimit
from agent_server.domain.events import TaskSkipped
from agent_server.domain.ids import task_id
from agent_server.execution import store
from agent_server.execution.attempts import Attempt, LocalRun, outcome_of
from agent_server.execution.crash import crash_point
from agent_server.execution.events import Told
from agent_server.execution.giving_up import GivenUp
from agent_server.execution.journal import DurableJournal
from agent_server.execution.ports import UNDO_MARK, TaskOutcome, TaskSpec
from agent_server.execution.roster import Roster
from agent_server.storage.outside import owned


class Children:
    """The children of every task that is carried out here."""

    def __init__(
        self,
        roster: Roster,
        launch: Callable[[Attempt], None],
        most: int,
        undoes: Callable[[str], bool],
    ) -> None:
        """``most``: how many tasks one run may begin. ``undoes``: whether a task of that kind may
        have something to undo."""
        self._roster = roster
        self._launch = launch
        self._most = most
        self._given_up = GivenUp(roster, undoes)

    async def run(self, parent: Attempt, journal: DurableJournal, spec: TaskSpec) -> TaskOutcome:
        """See ``TaskContext.child``. Cancelled, it cancels the child, unless the parent is only let
        go of, to be taken up again, or the run itself is being ended, which reaches the child."""
        await self._bound(parent.local, spec)
        parent.had_children = True
        begun = asyncio.ensure_future(self._begin(parent, journal, spec))
        self._roster.yield_slot(parent)
        try:
            future = await asyncio.shield(begun)
            outcome = await asyncio.shield(future)
            if parent.excused:
                await self._accuse(parent)
            return outcome
        except asyncio.CancelledError:
            # Shielded: a cancelled scope of anyio cancels every wait inside it anew.
            with anyio.CancelScope(shield=True):
                await asyncio.wait([begun])
                let_go = parent.lost or parent.held or self._roster.draining
                if not (let_go or journal.let_go or parent.local.stops or _goes_on(parent, spec)):
                    await self._given_up.one(parent, spec.path)
            raise
        except Exception as error:
            journal.break_off(error)
            raise
        finally:
            self._roster.take_slot_back(parent)

    async def _bound(self, local: LocalRun, spec: TaskSpec) -> None:
        """Raises ``WorkflowLimit`` for one task too many. What is hidden belongs to another task,
        and what undoes may be as much again. A run that several nodes carry out is counted by each
        when it takes it up, so that it may pass the limit by what they begin meanwhile."""
        if spec.hidden:
            return
        if local.begun is None:
            run_id = local.snapshot.id
            found = await self._roster.database.read(lambda c: store.begun_tasks(c, run_id))
            local.begun = found if local.begun is None else local.begun
        most = self._most * (2 if UNDO_MARK in spec.path else 1)
        if spec.path not in local.begun and len(local.begun) >= most:
            raise WorkflowLimit(
                f"The run would begin more than {most} tasks, its sub-workflows' included.",
                hint="Lower the bounds of its loops, map over fewer items, split it, or raise "
                "AGENT_SERVER_MAX_RUN_NODES.",
            )
        local.begun.add(spec.path)

    async def _accuse(self, parent: Attempt) -> None:
        """The parent, which only stood above what waits, is at work again."""
        parent.excused = False
        run_id, node = parent.local.snapshot.id, self._roster.node
        await self._roster.database.write(lambda c: store.accuse(c, node, run_id, parent.path))

    async def _begin(
        self, parent: Attempt, journal: DurableJournal, spec: TaskSpec
    ) -> "asyncio.Future[TaskOutcome]":
        """Insert the task, or find it; the future answers when it has ended."""
        await journal.flush()
        run = parent.local.snapshot
        future: asyncio.Future[TaskOutcome] = asyncio.get_running_loop().create_future()
        crowded = self._roster.crowded(parent)
        here = self._roster.free_slot(run.tenant) and not crowded
        # Reserved across the transaction; the attempt below takes its own.
        self._roster.busy += here
        parent.local.reserved += here
        try:
            crash_point("child.before_insert")
            fresh, row = await self._roster.database.write(
                owned(lambda c: self._insert(c, parent, spec, here), run.tenant, run.id)
            )
            crash_point("child.after_insert")
        finally:
            self._roster.busy -= here
            parent.local.reserved -= here
        if row is not None and row.status not in store.LIVE:
            future.set_result(outcome_of(row, found=True))
            return future
        self._roster.waiters.setdefault((run.id, spec.path), []).append(future)
        if fresh and here and not self._roster.draining:
            self._launch(
                Attempt(
                    local=parent.local,
                    path=spec.path,
                    node=spec.node,
                    kind=spec.kind,
                    description=spec.description,
                    agent=spec.agent,
                    payload=spec.payload,
                    hidden=spec.hidden,
                    epoch=1,
                    number=1,
                )
            )
        else:
            parent.local.elsewhere.add(spec.path)
            self._roster.hub.rouse(run.id)
            if crowded:
                self._roster.share()
            else:
                self._roster.offer()
        return future

    def _insert(
        self, connection: Connection, parent: Attempt, spec: TaskSpec, here: bool
    ) -> tuple[bool, Row[Any] | None]:
        halt = store.inherited_halt(
            connection,
            parent.local.snapshot.id,
            parent.path,
            self._roster.node,
            parent.epoch,
        )
        now = utcnow()
        values = _task_values(parent, spec) | {
            "halt": halt,
            "status": "running" if here else "queued",
            "owner": self._roster.node if here else None,
            "epoch": 1 if here else 0,
            "attempts": 1 if here else 0,
            "started_at": now if here else None,
            "created_at": now,
        }
        if store.insert_task(connection, values):
            return True, None
        return False, store.task_row(connection, parent.local.snapshot.id, spec.path)

    async def skip(
        self, parent: Attempt, journal: DurableJournal, spec: TaskSpec, reason: str
    ) -> None:
        """See ``TaskContext.skip``: the row and its event are one transaction, once."""
        await journal.flush()
        run = parent.local.snapshot
        event = TaskSkipped(
            run_id=run.id,
            task_id=task_id(run.id, spec.path),
            path=spec.path,
            node=spec.node,
            reason=reason,
        )

        def transaction(connection: Connection) -> Told:
            self._roster.fence(connection, parent)
            now = utcnow()
            values = _task_values(parent, spec) | {
                "status": "skipped",
                "owner": None,
                "epoch": 0,
                "attempts": 0,
                "started_at": None,
                "created_at": now,
                "ended_at": now,
            }
            if not store.insert_task(connection, values) or spec.hidden:
                return []
            return store.tell(connection, run.tenant, run.id, [event])

        try:
            published = await self._roster.database.write(transaction)
        except Exception as error:
            journal.break_off(error)
            raise
        self._roster.tell(run.id, published)

    async def left_behind(self, parent: Attempt, scopes: tuple[str, ...]) -> None:
        """See ``TaskContext.give_up``."""
        if parent.epoch > 1:
            await self._given_up.below(parent, scopes)


def _goes_on(parent: Attempt, spec: TaskSpec) -> bool:
    """Whether the child undoes what a parent has done that is told to stop: it is awaited again by
    the undoing that follows."""
    undoes = spec.path.count(UNDO_MARK) > parent.path.count(UNDO_MARK)
    return undoes and parent.ordered and not parent.undoes


def _task_values(parent: Attempt, spec: TaskSpec) -> dict[str, Any]:
    run = parent.local.snapshot
    return {
        "run_id": run.id,
        "path": spec.path,
        "tenant": run.tenant,
        "node": spec.node,
        "kind": spec.kind,
        "description": spec.description,
        "agent": spec.agent,
        "payload": spec.payload,
        "hidden": spec.hidden,
        "rank": -run.request.priority,
    }
