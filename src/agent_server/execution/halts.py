"""The door for those who make runs stand still or stop: pause, resume, one task, many runs.

Leans on the engine's roster and the store. Refuses to stop anything itself: each call leaves a mark
on the tasks' rows in one transaction, and whoever carries them out, here or on another node, sees
it. Every call is for one tenant.
"""

from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from typing import Any, Literal

import anyio
from sqlalchemy import Connection, Row

from agent_server.domain.base import utcnow
from agent_server.domain.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    PreconditionFailed,
    RunEnded,
    TaskCancelled,
)
from agent_server.domain.events import EventBase, PlanRevised, RunResumed, RunWaiting, TaskFailed
from agent_server.domain.ids import Tenant, new_id, task_id
from agent_server.domain.plans import Plan, PlanDifference, PlanEdit, difference
from agent_server.domain.runs import HaltedRuns, Run, RunRequest, RunStatus, Task, WaitingFor
from agent_server.execution import store
from agent_server.execution.events import Told
from agent_server.execution.ports import REVIEWED, LostLease
from agent_server.execution.runs import RunFilters, Runs
from agent_server.execution.waits import signal_awaited

Verb = Literal["cancel", "pause", "resume"]
BATCH = 200
ABREAST = 20
"""Runs that are stopped side by side."""
MOST = 1_000


class Halts:
    """Built once; see the module."""

    def __init__(
        self,
        runs: Runs,
        check_plan: Callable[[RunRequest, Plan], None] = lambda request, plan: None,
    ) -> None:
        """``check_plan`` raises ``InvalidRequest`` for a plan that cannot be carried out."""
        self._runs = runs
        self._check_plan = check_plan
        self._database = runs.database
        self._roster = runs.engine.roster

    async def pause(self, tenant: Tenant, run_id: str, *, by: str, task: str | None = None) -> Run:
        """Let the run, or the subtree of one task, stand still until it is resumed.

        A model call in flight is broken off and made again later; a tool that must not be
        repeated has its grace time to finish. Pausing what is paused changes nothing. Raises
        ``NotFound`` and ``RunEnded``.
        """
        path = await self._path(tenant, run_id, task)

        def transaction(connection: Connection) -> Told:
            root = store.locked_task(connection, run_id, "")
            _open(store.known_run_row(connection, tenant, run_id))
            if root is None or root.halt == store.PAUSE:
                return []
            store.pause_tasks(connection, run_id, path)
            if path:
                return []
            shown = WaitingFor(
                kind="signal",
                paused_by=by,
                detail=f"Paused by {by}: POST /api/v1/runs/{run_id}/resume lets it go on.",
            )
            told = store.tell(connection, tenant, run_id, [RunWaiting(waiting_for=shown)])
            stored = shown.model_dump(mode="json")
            store.set_run(connection, run_id, status="waiting", waiting_for=stored)
            return told

        await self._order(run_id, transaction)
        return await self._runs.get(tenant, run_id)

    async def resume(self, tenant: Tenant, run_id: str, *, by: str, task: str | None = None) -> Run:
        """Let what is paused go on; of a run that waits for the review of its plan, the plan.

        Raises ``NotFound``, ``RunEnded``, and ``Conflict`` for what is not paused.
        """
        path = await self._path(tenant, run_id, task)

        def transaction(connection: Connection) -> Told:
            root = store.locked_task(connection, run_id, "")
            row = _open(store.known_run_row(connection, tenant, run_id))
            freed = store.unpause_tasks(connection, run_id, path)
            if not freed:
                if path or not store.awaits(connection, run_id, signal_awaited(REVIEWED)):
                    what = f"task {task!r}" if path else f"run {run_id!r}"
                    raise Conflict(
                        f"The {what} is not paused: the run is {row.status}.",
                        hint="An approval is decided at /api/v1/approvals; a signal is sent to "
                        "/api/v1/runs/{id}/signals/{name}.",
                    )
                _review_done(connection, tenant, run_id, by)
                return []
            if path:
                return []
            waits = store.waiting_for(connection, run_id)
            going = "running" if root is not None and root.status == "running" else "queued"
            told = store.tell(connection, tenant, run_id, [RunResumed(reason=f"by {by}")])
            status = "waiting" if waits is not None else going
            store.set_run(connection, run_id, status=status, waiting_for=waits)
            return told

        await self._order(run_id, transaction)
        return await self._runs.get(tenant, run_id)

    async def edit_plan(
        self,
        tenant: Tenant,
        run_id: str,
        edit: PlanEdit,
        *,
        by: str,
        if_match: Collection[str] | None = None,
    ) -> PlanDifference:
        """Put ``edit`` in place of the plan that waits for review; it stays waiting.

        Raises ``NotFound``, ``RunEnded``, ``Conflict`` for a run whose plan is not being reviewed,
        ``PreconditionFailed`` when the plan is not the one that ``if_match`` names (its revision),
        and ``InvalidRequest`` with every fault of the new plan.
        """
        self._check_plan(
            await self._runs.request(tenant, run_id), Plan(tasks=edit.tasks, actions=edit.actions)
        )
        found: list[PlanDifference] = []

        def transaction(connection: Connection) -> Told:
            store.locked_task(connection, run_id, "")
            row = _open(store.known_run_row(connection, tenant, run_id))
            made = store.last_event(connection, tenant, run_id, ("plan.created", "plan.revised"))
            if made is None or not store.awaits(connection, run_id, signal_awaited(REVIEWED)):
                raise Conflict(
                    f"The plan of the run {run_id!r} is not being reviewed: the run is {row.status}.",
                    hint='Submit a goal with "review": "plan" to edit its plan before it is '
                    "carried out.",
                )
            before = Plan.model_validate(made["plan"])
            if if_match is not None and not {"*", str(before.revision)} & set(if_match):
                raise PreconditionFailed(
                    f"The plan is at revision {before.revision}.",
                    hint="GET it again, and send its ETag as If-Match.",
                )
            after = Plan(tasks=edit.tasks, actions=edit.actions, revision=before.revision + 1)
            found.append(difference(before, after))
            event = PlanRevised(plan=after, reason=f"Edited by {by}.")
            return store.tell(connection, tenant, run_id, [event])

        self._roster.tell(run_id, await self._database.write(transaction))
        return found[-1]

    async def cancel_task(
        self, tenant: Tenant, run_id: str, task: str, *, by: str, reason: str = ""
    ) -> Task:
        """Stop one task and all that it began. It fails with ``task_cancelled``, and its node's
        policy decides what becomes of the run.

        Raises ``NotFound``, ``RunEnded``, and ``Conflict`` for a task that has ended.
        """
        path = await self._path(tenant, run_id, task)
        why = f": {reason}" if reason else "."
        error = TaskCancelled(f"Cancelled by {by}{why}").info()

        def transaction(connection: Connection) -> Told:
            now = utcnow()
            row = store.locked_task(connection, run_id, path)
            _open(store.known_run_row(connection, tenant, run_id))
            if row is None or row.status not in store.LIVE:
                found = "gone" if row is None else row.status
                raise Conflict(f"The task {task!r} has already ended: {found}.")
            if not store.dismiss_task(connection, row, error, now) or row.hidden:
                return []
            event: EventBase = TaskFailed(task_id=task, path=path, node=row.node, error=error)
            return store.tell(connection, tenant, run_id, [event])

        await self._order(run_id, transaction)
        tasks = await self._runs.tasks(tenant, run_id)
        return next(found for found in tasks if found.id == task)

    async def many(
        self, verb: Verb, tenant: Tenant, filters: RunFilters, *, by: str, reason: str = ""
    ) -> HaltedRuns:
        """Do that to every run that fits and has not ended, up to ``MOST``, the newest first."""
        if filters == RunFilters():
            raise InvalidRequest(
                f"Say which runs to {verb}: give at least one filter.",
                hint="status, agent, session_id, workflow, created_after or q.",
            )
        filters = replace(filters, live=True)
        calls: dict[str, Callable[[str], Awaitable[Run]]] = {
            "cancel": lambda run_id: self._runs.cancel(tenant, run_id, reason),
            "pause": lambda run_id: self.pause(tenant, run_id, by=by),
            "resume": lambda run_id: self.resume(tenant, run_id, by=by),
        }
        abreast = anyio.Semaphore(ABREAST)

        async def one(run_id: str) -> None:
            async with abreast:
                try:
                    done.append(await calls[verb](run_id))
                except (Conflict, LostLease):
                    refused.append(run_id)

        done: list[Run] = []
        refused: list[str] = []
        cursor: str | None = None
        while len(done) + len(refused) < MOST:
            page = await self._runs.list(tenant, filters=filters, limit=BATCH, cursor=cursor)
            async with anyio.create_task_group() as group:
                for run in page.data:
                    group.start_soon(one, run.id)
            cursor = page.next_cursor
            if cursor is None:
                break
        return HaltedRuns(data=tuple(done), refused=tuple(refused), more=cursor is not None)

    async def _path(self, tenant: Tenant, run_id: str, task: str | None) -> str:
        """Where the task stands in its run; ``""`` for the run itself."""
        if task is None:
            return ""
        await self._runs.get(tenant, run_id)
        paths = await self._database.read(lambda c: store.task_paths(c, tenant, run_id))
        for path in paths:
            if path and task_id(run_id, path) == task:
                return path
        raise NotFound(
            f"The run {run_id!r} has no task {task[:60]!r}.",
            hint=f"GET /api/v1/runs/{run_id}/tasks lists them.",
        )

    async def _order(self, run_id: str, transaction: Callable[[Connection], Told]) -> None:
        self._roster.tell(run_id, await self._database.write(transaction))
        self._roster.order(run_id)
        self._roster.offer()


def _open(row: Row[Any]) -> Row[Any]:
    """The run's row, which has not ended."""
    if RunStatus(row.status).ended:
        raise RunEnded(f"The run {row.id!r} has already ended: {row.status}.")
    return row


def _review_done(connection: Connection, tenant: Tenant, run_id: str, by: str) -> None:
    """The person who reads the plan lets it be carried out, as it now is."""
    made = store.last_event(connection, tenant, run_id, ("plan.created", "plan.revised"))
    now = utcnow()
    store.nudge_awaiting(connection, run_id, signal_awaited(REVIEWED))
    store.insert_signal(
        connection,
        {
            "id": new_id("sig"),
            "run_id": run_id,
            "tenant": tenant,
            "name": REVIEWED,
            "payload": None if made is None else made["plan"],
            "sent_by": by,
            "sent_at": now,
        },
    )
