"""Children: how a task runs others as tasks of their own, skips them, and gives them up.

Leans on the roster and the store. Refuses to carry a task out: it hands it to ``launch``, or
leaves it queued for whichever worker comes.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import anyio
from sqlalchemy import Connection, Row

from agent_server.domain.base import utcnow
from agent_server.domain.errors import WorkflowLimit
from agent_server.domain.events import TaskSkipped
from agent_server.domain.ids import task_id
from agent_server.execution import store
from agent_server.execution.attempts import Attempt, LocalRun, outcome_of
from agent_server.execution.commits import Birth
from agent_server.execution.events import Told
from agent_server.execution.giving_up import GivenUp
from agent_server.execution.journal import DurableJournal
from agent_server.execution.ports import UNDO_MARK, Holder, LostLease, TaskOutcome, TaskSpec
from agent_server.execution.roster import Roster


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
        call = _Call(parent, journal, spec, asyncio.get_running_loop().create_future())
        self._begin(call)
        self._roster.yield_slot(parent)
        try:
            outcome = await call.outcome
            if parent.excused:
                await self._accuse(parent)
            return outcome
        except asyncio.CancelledError:
            # Shielded: a cancelled scope of anyio cancels every wait inside it anew.
            with anyio.CancelScope(shield=True):
                await call.born.wait()
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

    def _begin(self, call: "_Call") -> None:
        """Have the task inserted, or found; ``call.outcome`` answers when it has ended.

        In the first attempt of a parent nothing can stand at a new path, so the child is carried
        out at once: whatever it stores is stored behind its own row, or not at all.
        """
        parent, spec, roster = call.parent, call.spec, self._roster
        run = parent.local.snapshot
        first = parent.epoch == 1 and run.forked_from is None and spec.path not in parent.children
        call.crowded = roster.crowded(parent)
        here = roster.free_slot(run.tenant) and not call.crowded
        birth = Birth(
            parent=Holder(run.id, parent.path, roster.node, parent.epoch),
            values=self._row(parent, spec, here),
            sure=first,
            told=partial(self._told, call),
        )
        call.journal.bear(birth)
        parent.children.add(spec.path)
        roster.waiters.setdefault((run.id, spec.path), []).append(call.outcome)
        if here and first:
            call.attempt = self._start(parent.local, spec, unborn=True)
        elif here:
            call.reserved = True
            roster.busy += 1
            parent.local.reserved += 1

    def _told(self, call: "_Call", row: Row[Any] | None, error: Exception | None) -> None:
        """The task was inserted; or it was there, as ``row``; or nothing can be inserted."""
        roster, parent, attempt = self._roster, call.parent, call.attempt
        roster.busy -= call.reserved
        parent.local.reserved -= call.reserved
        call.born.set()
        if attempt is not None and (row is not None or error is not None):
            # It was taken for new, and is not, or has no parent any more.
            attempt.lost = True
            if attempt.journal is not None:
                reason = error or LostLease(f"task {attempt.path!r} was there before")
                attempt.journal.break_off(reason)
            if attempt.task is not None:
                attempt.task.cancel()
        elif attempt is not None:
            attempt.unborn = False
            if attempt.journal is not None:
                attempt.journal.born()
            return
        if error is not None:
            call.fail(error)
        elif row is not None and row.status not in store.LIVE:
            call.answer(outcome_of(row, found=True))
        elif row is None and call.reserved and not roster.draining:
            self._start(parent.local, call.spec, unborn=False)
        elif not roster.carries_out(parent.local.snapshot.id, call.spec.path):
            parent.local.elsewhere.add(call.spec.path)
            roster.hub.rouse(parent.local.snapshot.id)
            if call.crowded:
                roster.share()
            else:
                roster.offer()

    def _start(self, local: LocalRun, spec: TaskSpec, *, unborn: bool) -> Attempt:
        attempt = Attempt(
            local=local,
            path=spec.path,
            node=spec.node,
            kind=spec.kind,
            description=spec.description,
            agent=spec.agent,
            payload=spec.payload,
            hidden=spec.hidden,
            epoch=1,
            number=1,
            unborn=unborn,
        )
        self._launch(attempt)
        return attempt

    def _row(self, parent: Attempt, spec: TaskSpec, here: bool) -> dict[str, Any]:
        now = utcnow()
        return _task_values(parent, spec) | {
            "status": "running" if here else "queued",
            "owner": self._roster.node if here else None,
            "epoch": 1 if here else 0,
            "attempts": 1 if here else 0,
            "started_at": now if here else None,
            "created_at": now,
        }

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


@dataclass
class _Call:
    """A parent that awaits a child."""

    parent: Attempt
    journal: DurableJournal
    spec: TaskSpec
    outcome: "asyncio.Future[TaskOutcome]"
    attempt: Attempt | None = None
    """Where it was begun before its row was there."""
    reserved: bool = False
    """A slot is held for it."""
    crowded: bool = False
    """Others are to share in the run's work."""
    born: asyncio.Event = field(default_factory=asyncio.Event)

    def answer(self, outcome: TaskOutcome) -> None:
        if not self.outcome.done():
            self.outcome.set_result(outcome)

    def fail(self, error: Exception) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(error)


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
