"""The door of execution: submit, read, follow, wait for and cancel runs.

Leans on the engine and the store. Refuses to know what a goal, an agent or a workflow is: the
names in a request are looked up by the ``prepare`` it is given. Every call is for one tenant.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import structlog
from sqlalchemy import Connection

from agent_server.domain.base import JsonObject, utcnow
from agent_server.domain.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    RunEnded,
    SessionBusy,
)
from agent_server.domain.events import EventBase, RunCancelled, RunStarted
from agent_server.domain.ids import RunId, Tenant, new_run_id, task_id
from agent_server.domain.plans import Plan, PlanState, PlanTaskState
from agent_server.domain.runs import Run, RunRequest, RunStatus, Step, Task
from agent_server.execution import steering, store
from agent_server.execution.crash import crash_point
from agent_server.execution.engine import Engine
from agent_server.execution.events import (
    TERMINAL,
    UNREADABLE,
    EventHub,
    StoredEvent,
    Told,
    guarded,
)
from agent_server.execution.keys import Idempotency as Idempotency
from agent_server.execution.keys import KeyTaken, in_flight, keep_answer, stored_answer
from agent_server.execution.paging import Page, decode_cursor, encode_cursor
from agent_server.execution.ports import Fence, RunSnapshot, SignalReceived
from agent_server.execution.store import conversations
from agent_server.execution.submitting import NewRun, Origin
from agent_server.execution.unstored import run_unstored
from agent_server.settings import Settings
from agent_server.storage import outside
from agent_server.storage.database import Database
from agent_server.storage.outside import owned

Events = list[StoredEvent]
Tasks = list[Task]
Items = list[JsonObject]
log = structlog.get_logger(__name__)

PAGE = 500
CANCEL_ANSWER_S = 5.0


class Submitted(NamedTuple):
    """The run, and whether it is the stored answer to an earlier equal request.

    ``steered``: the run was under way, and the request was said into it when its last event had
    that number.
    """

    run: Run
    replayed: bool
    steered: int | None = None


@dataclass(frozen=True)
class RunFilters:
    """What ``GET /runs`` may be narrowed by; ``q`` is a part of the goal or name."""

    status: RunStatus | None = None
    agent: str | None = None
    session_id: str | None = None
    workflow: str | None = None
    created_after: datetime | None = None
    q: str | None = None
    live: bool = False
    """Only those that have not ended."""


class Follow:
    """The events of a run from a number on: first the stored, then the live ones.

    ``batches()`` yields lists of events in order, without a gap or a repeat, and ends after the
    run's last event. ``lagged`` is set when this reader was too slow for its queue.

    It listens from when it is made to when it is left, or let go without having been entered.
    Entering it raises ``NotFound``, except for a ``new`` run, which the caller submits.
    """

    def __init__(
        self,
        runs: "Runs",
        run_id: str,
        tenant: Tenant,
        after: int,
        *,
        deltas: bool,
        new: bool = False,
    ) -> None:
        self._runs = runs
        self._run_id = run_id
        self._tenant = tenant
        self._last = after
        self._new = new
        self._over = False
        self._subscription = runs.hub.subscribe(run_id, deltas=deltas)

    async def __aenter__(self) -> "Follow":
        if self._new:
            return self
        row = await self._runs.database.read(
            lambda c: store.known_run_row(c, self._tenant, self._run_id)
        )
        # Nobody can have seen more than there is.
        self._last = min(self._last, row.last_seq)
        self._over = RunStatus(row.status).ended
        return self

    async def __aexit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    @property
    def lagged(self) -> bool:
        return self._subscription.lagged

    async def batches(self) -> AsyncIterator[Events]:
        if not self._new:  # Else it has heard all there is, from the first event on.
            async for batch in self._stored():
                yield batch
                del batch  # It would live until the next event, which may be hours.
        while not self._over and not self.lagged:
            taken, look = await self._subscription.get()
            fresh = [e for e in taken if e.seq is None or e.seq > self._last]
            numbers = [e.seq for e in fresh if e.seq is not None]
            if numbers != list(range(self._last + 1, self._last + 1 + len(numbers))):
                # Commits of parallel tasks were announced out of order: the store has the order,
                # and all but the deltas.
                fresh, look = [e for e in fresh if e.seq is None], True
            if fresh:
                yield self._pass(fresh)
            if look and not self._over:
                async for batch in self._stored():
                    yield batch

    async def _stored(self) -> AsyncIterator[Events]:
        """What the store has beyond what was passed on."""
        while True:
            stored = await self._runs.events(self._tenant, self._run_id, self._last, PAGE)
            if stored:
                yield self._pass(stored)
            if len(stored) < PAGE:
                return

    def _pass(self, events: Events) -> Events:
        for number, event in enumerate(events):
            if event.seq is not None:
                self._last = event.seq
            if event.type in TERMINAL:
                self._over = True
                return events[: number + 1]
        return events

    def close(self) -> None:
        self._runs.hub.unsubscribe(self._run_id, self._subscription)


Prepare = Callable[[RunRequest, Tenant], Awaitable[RunRequest]]
"""Looks up the names in a request and answers it with what the run needs of them written out (a
stored workflow's definition), so that a later change never touches the run. Raises
``InvalidRequest`` or a kind of it."""


Limit = Callable[[RunRequest, Tenant, str], RunRequest]
"""Answers a request of that principal with the budget that holds for it; raises
``BudgetRefused``."""


class Runs:
    """Everything a caller may do with runs."""

    def __init__(
        self,
        *,
        database: Database,
        engine: Engine,
        hub: EventHub,
        settings: Settings,
        prepare: Prepare,
        limit: Limit = lambda request, tenant, principal: request,
        observe: Callable[[list[EventBase]], None] = lambda events: None,
    ) -> None:
        self.database = database
        self.engine = engine
        self.hub = hub
        self._settings = settings
        self._prepare = prepare
        self._limit = limit
        self._observe = guarded(observe)

    async def submit(
        self,
        request: RunRequest,
        *,
        tenant: Tenant,
        principal: str,
        idempotency: Idempotency | None = None,
        origin: Origin | None = None,
        run_id: RunId | None = None,
        continues: RunId | None = None,
        given: Fence | None = None,
    ) -> Submitted:
        """Store the run and let it begin; durable when this returns. ``origin`` is for
        ``history.py``, ``run_id`` the name of a run that is new.

        ``continues`` is the run whose words the request has or will be given: it is erased with
        that one. ``given``, called in the transaction, raises where other words in the request are
        no longer where they were read. Raises ``NotFound`` where ``continues`` is gone, and
        what ``prepare`` raises, and ``IdempotencyMismatch`` when the key came with
        another body. Of any number of equal requests at once, one makes the run.
        """
        if not request.store:
            raise InvalidRequest("A run that is not stored cannot be submitted to be kept.")
        if idempotency is not None:
            known = await self._stored_answer(tenant, idempotency)
            if known is not None:
                return known
        request = self._limit(await self._prepare(request, tenant), tenant, principal)
        new = NewRun(
            id=run_id or new_run_id(),
            tenant=tenant,
            principal=principal,
            request=request,
            now=utcnow(),
            origin=origin,
            continues=continues,
        )
        return await asyncio.shield(self._submit(new, idempotency, given))

    async def submit_followed(
        self,
        request: RunRequest,
        *,
        tenant: Tenant,
        principal: str,
        idempotency: Idempotency | None = None,
        deltas: bool = True,
        continues: RunId | None = None,
        given: Fence | None = None,
    ) -> tuple[Submitted, Follow]:
        """``submit`` with a reader that listens before the run begins and so misses no delta.

        An earlier request's run is followed from its first event, one that was steered from
        where it was.
        """
        run_id = new_run_id()
        follow = Follow(self, run_id, tenant, 0, deltas=deltas, new=True)
        made = await self.submit(
            request,
            tenant=tenant,
            principal=principal,
            idempotency=idempotency,
            run_id=run_id,
            continues=continues,
            given=given,
        )
        if made.run.id != run_id:
            follow = self.follow(tenant, made.run.id, made.steered or 0, deltas=deltas)
        return made, follow

    async def _submit(
        self,
        new: NewRun,
        idempotency: Idempotency | None,
        given: Fence | None = None,
    ) -> Submitted:
        request, tenant, origin = new.request, new.tenant, new.origin
        direct = self.engine.roster.free_slot(tenant) and not new.later
        interrupted: dict[str, Told] = {}
        begun: Events = []

        def transaction(connection: Connection) -> Submitted:
            takes = {taken for taken in (new.forked_from, new.continues) if taken is not None}
            if takes or new.lane is not None:
                store.hold_off(connection, tenant)  # Else an erasure may miss what this one takes.
            for taken in takes:
                store.known_run_row(connection, tenant, taken)
            if given is not None:
                given(connection)
            start, busy = direct, False
            if new.lane is not None:
                busy = store.lane_busy(connection, new.lane)
                start = direct and not busy
                if busy and request.on_busy == "reject":
                    raise SessionBusy(
                        f"A run is under way on the session {request.session_id!r}.",
                        hint='Wait for it, or send "on_busy": "queue", "steer" or "interrupt".',
                    )
                said = None
                if busy and request.on_busy == "steer" and origin is None:
                    said = steering.say(connection, new)
                if said is not None:
                    into, seq = said
                    keep_answer(
                        connection,
                        tenant,
                        idempotency,
                        into.id,
                        into.model_dump(mode="json") | {"steered": seq},
                    )
                    return Submitted(into, False, seq)
            run = new.shown(start)
            keep_answer(connection, tenant, idempotency, run.id, run.model_dump(mode="json"))
            begun[:] = new.insert(connection, self.engine.node if start else None, behind=busy)
            if new.lane is not None and request.on_busy == "interrupt":
                for other in store.lane_runs(connection, new.lane, new.id):
                    reason = f"interrupted by {new.id}"
                    told = self._order_cancel(connection, tenant, other, reason, new.now)
                    interrupted[other] = told
            return Submitted(run, False)

        crash_point("submit.before_commit")
        try:
            submitted = await self.database.write(owned(transaction, tenant, new.id))
        except KeyTaken:
            assert idempotency is not None
            known = await self._stored_answer(tenant, idempotency)
            if known is None:  # The other request failed after all.
                raise in_flight(idempotency) from None
            return known
        crash_point("submit.after_commit")
        for other, told in interrupted.items():
            self.engine.roster.tell(other, told)
            self.engine.roster.order(other)
        if submitted.steered is not None:
            return submitted
        self.hub.publish(new.id, begun)
        if submitted.run.status is RunStatus.RUNNING:
            self._observe([RunStarted(run_id=new.id)])
            self.engine.launch_root(
                RunSnapshot(
                    id=new.id,
                    tenant=tenant,
                    request=request,
                    created_at=new.now,
                    budget=request.budget,
                    principal=new.principal,
                    forked_from=new.forked_from,
                ),
                new.payload,
            )
        else:
            self.engine.wake()
        return submitted

    async def run_ephemeral(
        self,
        request: RunRequest,
        *,
        tenant: Tenant,
        principal: str,
        on_event: Callable[[StoredEvent], None] | None = None,
        deltas: bool = True,
        steers: list[SignalReceived] | None = None,
    ) -> Run:
        """Carry the run out without storing anything; cancelled with the caller. See
        ``run_unstored``."""
        request = self._limit(await self._prepare(request, tenant), tenant, principal)
        return await run_unstored(
            request,
            handlers=self.engine.handlers,
            tenant=tenant,
            principal=principal,
            on_event=on_event,
            deltas=deltas,
            steers=steers,
        )

    async def _stored_answer(self, tenant: Tenant, idempotency: Idempotency) -> Submitted | None:
        answer = await stored_answer(self.database, tenant, idempotency)
        if answer is None:
            return None
        steered = answer.pop("steered", None)
        return Submitted(Run.model_validate(answer), True, steered)

    async def get(self, tenant: Tenant, run_id: str) -> Run:
        """The run; raises ``NotFound``, for another tenant's too."""
        row = await self.database.read(lambda c: store.known_run_row(c, tenant, run_id))
        return store.run_of(row)

    async def submitted(self, tenant: Tenant, run_id: str) -> tuple[Run, RunRequest]:
        """The run, and what was asked for; raises ``NotFound``."""
        row = await self.database.read(lambda c: store.known_run_row(c, tenant, run_id))
        return store.run_of(row), RunRequest.model_validate(row.request)

    async def conversation(self, tenant: Tenant, run_id: str) -> "Items":
        """What was said up to the end of ``run_id``, as input items: its own turn and those it
        continued. Raises ``NotFound`` when one of them is gone."""
        found = await self.database.read(lambda c: conversations.conversation(c, tenant, run_id))
        if found is None:
            raise NotFound(
                f"The conversation that ended with {run_id!r} is not here, or not whole.",
                hint="A run that it continued was deleted; send the whole history as input.",
            )
        return found

    async def delete(self, tenant: Tenant, run_id: str) -> None:
        """Delete the run and all that was written of it. Raises ``NotFound``, and ``Conflict``
        before its end."""

        def transaction(connection: Connection) -> set[str]:
            row = store.known_run_row(connection, tenant, run_id)
            if not RunStatus(row.status).ended:
                raise Conflict(
                    f"The run {run_id!r} has not ended: {row.status}.", hint="Cancel it first."
                )
            blobs = outside.keys_of(connection, [run_id])
            store.erase_runs(connection, tenant, [run_id])
            # What continued it still has the words of what it continued itself.
            before = row.continues or row.forked_from
            store.continue_before(connection, tenant, run_id, before)
            return blobs

        await outside.forget(self.database, tenant, await self.database.write(transaction))

    async def list(
        self, tenant: Tenant, *, filters: RunFilters, limit: int, cursor: str | None
    ) -> Page[Run]:
        """Newest first."""
        before = decode_cursor(cursor) if cursor is not None else None
        rows = await self.database.read(
            lambda c: store.list_run_rows(
                c,
                tenant,
                status=filters.status.value if filters.status else None,
                agent=filters.agent,
                session_id=filters.session_id,
                workflow=filters.workflow,
                created_after=filters.created_after,
                q=filters.q,
                live=filters.live,
                before=before,
                limit=limit + 1,
            )
        )
        more = len(rows) > limit
        rows = rows[:limit]
        cursor_after = encode_cursor(rows[-1].created_at, rows[-1].id) if more else None
        return Page([store.run_of(row) for row in rows], cursor_after)

    async def wait(self, tenant: Tenant, run_id: str, timeout_s: float) -> Run:
        """The run at its end, or as it is when ``timeout_s`` has passed."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        announced = self.hub.await_end(run_id)
        try:
            run = await self.get(tenant, run_id)
            while not run.status.ended:
                left_s = deadline - loop.time()
                if left_s <= 0:
                    break
                try:
                    await asyncio.wait_for(announced.wait(), left_s)
                except asyncio.TimeoutError:
                    pass
                announced.clear()
                run = await self.get(tenant, run_id)
            return run
        finally:
            self.hub.forget_end(run_id, announced)

    async def cancel(self, tenant: Tenant, run_id: str, reason: str = "") -> Run:
        """Stop the run; a model call in flight is aborted, a tool that must not be repeated has
        its grace. Raises ``RunEnded`` at its end."""
        now = utcnow()
        told = await self.database.write(
            lambda c: self._order_cancel(c, tenant, run_id, reason, now)
        )
        self.engine.roster.tell(run_id, told)
        if not told:
            self.engine.roster.order(run_id)
        self.engine.wake()  # What stood behind it on its session, or what is to undo something.
        await self.engine.roster.cancel(run_id, reason)
        return await self.wait(tenant, run_id, CANCEL_ANSWER_S)

    def _order_cancel(
        self, connection: Connection, tenant: Tenant, run_id: str, reason: str, now: datetime
    ) -> Told:
        """What is said of the run's end; nothing where whoever carries it out ends it."""
        # The root first and locked: until the end of this, the run cannot end otherwise.
        root = store.root_status(connection, run_id)
        row = store.known_run_row(connection, tenant, run_id)
        if RunStatus(row.status).ended:
            raise RunEnded(
                f"The run {run_id!r} has already ended: {row.status}.",
                hint="There is nothing left to cancel.",
            )
        carried_out = root == "running"
        store.cancel_tasks(connection, run_id, only_idle=carried_out, now=now, spare=True)
        store.forget_halts(connection, run_id)
        store.order_cancel(connection, run_id, reason)
        if not carried_out and store.can_undo(connection, run_id):
            store.take_up_root(connection, run_id)
            carried_out = True
        if carried_out:
            return []  # Whoever carries the root out ends the run.
        event = RunCancelled(run_id=run_id, reason=reason, usage=store.usage_of(row))
        return store.tell(
            connection, tenant, run_id, [event], store.RunEnd(RunStatus.CANCELLED, now)
        )

    async def events(self, tenant: Tenant, run_id: str, after: int, limit: int) -> Events:
        """Stored events with numbers above ``after``, in order. Does not check that the run is."""
        found = await self.database.read(
            lambda c: store.event_rows(c, tenant, run_id, after, limit)
        )
        for event in found:
            if event.type == UNREADABLE:
                log.error(
                    "a stored event cannot be read", run_id=run_id, stands_in=event.data.decode()
                )
        return found

    def follow(self, tenant: Tenant, run_id: str, after: int, *, deltas: bool = True) -> Follow:
        """The run's events from number ``after`` on, until it ends.

        Without ``deltas`` none is made for this reader, which then cannot lag.
        """
        return Follow(self, run_id, tenant, after, deltas=deltas)

    async def request(self, tenant: Tenant, run_id: str) -> RunRequest:
        """What the run was submitted with, a workflow's definition included."""
        row = await self.database.read(lambda c: store.known_run_row(c, tenant, run_id))
        return RunRequest.model_validate(row.request)

    async def plan(self, tenant: Tenant, run_id: str) -> PlanState:
        """The plan as last made or revised, with how far each task is."""
        await self.get(tenant, run_id)

        def fetch(connection: Connection) -> Any:
            made = store.last_event(connection, tenant, run_id, ("plan.created", "plan.revised"))
            return made, store.task_rows(connection, tenant, run_id)

        made, rows = await self.database.read(fetch)
        if made is None:
            raise NotFound(
                f"The run {run_id!r} has no plan.",
                hint="Only a run of a goal has one, from the event plan.created on.",
            )
        plan = Plan.model_validate(made["plan"])
        latest = {row.node: row for row in rows}
        return PlanState(
            tasks=tuple(
                PlanTaskState(
                    **task.model_dump(),
                    status=latest[task.id].status if task.id in latest else "pending",
                    output=latest[task.id].output if task.id in latest else None,
                )
                for task in plan.tasks
            ),
            actions=plan.actions,
            revision=plan.revision,
        )

    async def tasks(self, tenant: Tenant, run_id: str) -> Tasks:
        """The run's tasks in the order they were begun."""
        run = await self.get(tenant, run_id)
        rows = await self.database.read(lambda c: store.task_rows(c, tenant, run_id))
        return [store.task_of(row, task_id(run.id, row.path)) for row in rows]

    async def steps(
        self, tenant: Tenant, run_id: str, *, limit: int, cursor: str | None
    ) -> Page[Step]:
        """The run's model and tool calls, oldest first."""
        await self.get(tenant, run_id)
        after = decode_cursor(cursor) if cursor is not None else None
        rows = await self.database.read(
            lambda c: store.step_rows(c, tenant, run_id, after, limit + 1)
        )
        more = len(rows) > limit
        rows = rows[:limit]
        next_cursor = encode_cursor(rows[-1].started_at, rows[-1].key) if more else None
        data = [
            store.step_of(row, task_id(run_id, row.task_path) if row.task_path else None)
            for row in rows
        ]
        return Page(data, next_cursor)
