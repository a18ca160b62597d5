"""The engine: takes tasks, carries them out by their handlers, and hands them over on death.

Leans on the journal and the store. Refuses to know what a handler does, and what a run means
to a caller: ``runs.py`` is the door for those.

A task is a row with an owner and an epoch. Taking it raises the epoch; every write of an
attempt is fenced by owner and epoch, so that a worker which was frozen while another took over
stores nothing more. On SQLite there is one process, so whatever is ``running`` at start has a
dead owner; on PostgreSQL nodes beat and a reaper queues again what a dead node carried out.

Longer than our files should be, because it is one life of an attempt, from its taking to each of its
ends: every way out is a rule about the ways before it.
"""

import asyncio
import math
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import structlog
from sqlalchemy import Connection, Row

from agent_server.domain.base import JsonObject, utcnow
from agent_server.domain.errors import (
    AgentServerError,
    BudgetExceeded,
    FieldError,
    InternalError,
    RunCancelled,
    RunError,
    TooManyAttempts,
    error_info,
)
from agent_server.domain.events import (
    EventBase,
    RunFailed,
    RunResumed,
    RunStarted,
    TaskStarted,
)
from agent_server.domain.ids import new_id
from agent_server.domain.runs import RunStatus
from agent_server.execution import endings, store
from agent_server.execution.attempts import (
    Attempt,
    LocalRun,
    as_stored,
    root_kind,
    snapshot_of,
)
from agent_server.execution.budget import Meter
from agent_server.execution.children import Children
from agent_server.execution.commits import PASSING, Commits, Ending
from agent_server.execution.context import EngineContext
from agent_server.execution.crash import crash_point
from agent_server.execution.events import EventHub, Told, guarded
from agent_server.execution.heartbeat import Heartbeat
from agent_server.execution.journal import DurableJournal
from agent_server.execution.pause import wait_nudged
from agent_server.execution.ports import (
    FinalOutput,
    Handler,
    Holder,
    LostLease,
    RunSnapshot,
    StepRecord,
    Suspend,
    TaskContext,
    TaskOutcome,
)
from agent_server.execution.relay import Ears, Relay
from agent_server.execution.retention import keep_collecting, keep_forgetting
from agent_server.execution.roster import Roster, order_stop, settle
from agent_server.execution.store.columns import error_of
from agent_server.execution.waits import Waits
from agent_server.execution.watch import POLL_S, Watch
from agent_server.settings import Settings
from agent_server.storage.database import Database, PostgresDatabase
from agent_server.storage.tables import Unreadable
from agent_server.storage.wire import PostgresWire

log = structlog.get_logger(__name__)

_Taken = tuple[Row[Any], Row[Any], str | None]
"""A task taken, its run, and the kind of what it stood still for, if it did."""
FLUSH_S = 1.0
UNDONE_POLL_S = 0.1
"""How often a cancelled run looks whether its sub-workflows have undone what they did."""
LET_GO_S = 3.0
"""How long a stopping process waits for cancelled tasks; then it leaves them queued."""


class Engine:
    """Carries out tasks of this process's database with ``handlers`` by task kind.

    Start it inside the running loop (the lifespan), stop it before the loop ends.
    """

    def __init__(
        self,
        *,
        database: Database,
        hub: EventHub,
        settings: Settings,
        handlers: Mapping[str, Handler],
        append_items: endings.AppendItems,
        observe: Callable[[list[EventBase]], None] = lambda events: None,
    ) -> None:
        self.node = f"{socket.gethostname()}-{os.getpid()}-{new_id('node')[-8:]}"
        self._observe = guarded(observe)
        works = settings.role in {"all", "worker"}
        self._blame = store.BlameRule(settings.max_attempts, settings.lease_s)
        self._lives_since = 0.0
        self.roster = Roster(
            node=self.node,
            database=database,
            hub=hub,
            slots=settings.worker_concurrency if works else 0,
            tenant_slots=settings.tenant_concurrency,
            observe=self._observe,
            tool_grace_s=settings.tool_grace_s,
        )
        self._children = Children(
            self.roster,
            self._launch,
            settings.max_run_nodes,
            lambda kind: self._undo_of(kind) is not None,
        )
        self._watch = Watch(self.roster, self._blame)
        self._waits = Waits(self.roster)
        self.database = database
        self.hub = hub
        self._settings = settings
        self.handlers = handlers
        self._append_items = append_items
        self._tasks: set[asyncio.Task[None]] = set()
        self._loops: list[asyncio.Task[None]] = []
        self._heartbeat: Heartbeat | None = None
        self._grace_until = 0.0

    @property
    def queued(self) -> int:
        """Tasks that waited for a worker when last looked, over all tenants."""
        return self._watch.queued

    # Life ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take back what a dead process left, and begin to work."""
        self._lives_since = asyncio.get_running_loop().time()
        if not isinstance(self.database, PostgresDatabase):
            queued = await self.database.write(lambda c: store.reap_all(c))
            if queued:
                log.info("resuming after a stop", tasks=queued)
        else:
            self._heartbeat = Heartbeat(
                self.database.url,
                self.node,
                self._settings,
                counted=self.roster.count_workers,
                reaped=self.roster.share,
            )
            await self._heartbeat.start()
            self.roster.relay = self._joined(self.database.url)
            await self.roster.relay.start()
        self.roster.wake.set()  # Who came before may have left something.
        if self.roster.slots:
            self._loops.append(asyncio.create_task(self._claim_loop(), name="engine-claim"))
            # Not by an API server: one that only looks at a restored copy must not delete from a
            # place for large values that the original still uses.
            forgetting = keep_forgetting(self.database, self._settings)
            self._loops.append(asyncio.create_task(forgetting, name="engine-forget"))
            collecting = keep_collecting(self.database)
            self._loops.append(asyncio.create_task(collecting, name="engine-collect"))
        self._loops.append(asyncio.create_task(self._watch.run(), name="engine-watch"))

    def _joined(self, url: str) -> Relay:
        roster = self.roster
        ears = Ears(
            work=roster.wake.set,
            ended=roster.heard_end,
            order=roster.heard_order,
            carries=roster.runs.__contains__,
            hears_all=roster.hears_all,
        )
        wire = PostgresWire(url)
        return Relay(node=self.node, hub=self.hub, wire=wire, database=self.database, ears=ears)

    def drain(self) -> None:
        """Take no more tasks from now on; those in flight have the grace time to finish."""
        if not self.roster.draining:
            self.roster.draining = True
            self._grace_until = asyncio.get_running_loop().time() + self._settings.shutdown_grace_s
            self.roster.wake.set()
            self.roster.tell_work()  # What this node would have taken next.

    async def stop(self) -> None:
        """Take no more, let tasks finish within the grace time, queue the rest again."""
        self.drain()
        if self._tasks:
            left_s = self._grace_until - asyncio.get_running_loop().time()
            await asyncio.wait(set(self._tasks), timeout=max(0.0, left_s))
        journals = [a.journal for r in self.roster.runs.values() for a in r.attempts.values()]
        open_journals = [journal for journal in journals if journal is not None]
        if open_journals:
            flushes = [asyncio.ensure_future(journal.flush()) for journal in open_journals]
            await asyncio.wait(flushes, timeout=FLUSH_S)
            for flush in flushes:
                flush.cancel()
            await asyncio.gather(*flushes, return_exceptions=True)
        for journal in open_journals:
            journal.close()  # What comes of being interrupted is not recorded.
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=LET_GO_S)
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        try:
            await self.database.write(self._leave)
        except AgentServerError as error:
            log.warning("could not hand tasks over at stop", error=error.detail)
        self.roster.tell_work()
        if self.roster.relay is not None:
            await self.roster.relay.stop()
        if self._heartbeat is not None:
            await self._heartbeat.stop()
            try:  # Its last beat may have come after the row was gone.
                await self.database.write(lambda c: store.remove_node(c, self.node))
            except AgentServerError as error:
                log.warning("could not sign off", error=error.detail)

    def _leave(self, connection: Connection) -> None:
        store.release_tasks(connection, self.node)
        store.void_permits(connection, self.node)
        store.remove_node(connection, self.node)

    # What runs.py needs ------------------------------------------------------------------------

    def wake(self) -> None:
        """There may be something to take, here or on another node."""
        self.roster.offer()

    def launch_root(self, snapshot: RunSnapshot, payload: JsonObject) -> None:
        """Carry out a run whose root task was inserted as taken by this node (epoch 1)."""
        local = self._local(snapshot, None)
        local.begun = set()
        self._launch(
            Attempt(
                local=local,
                path="",
                node="",
                kind=root_kind(snapshot.request),
                description="",
                agent=None,
                payload=payload,
                hidden=True,
                epoch=1,
                number=1,
            ),
            announced=True,
        )

    # Taking tasks ------------------------------------------------------------------------------

    async def _claim_loop(self) -> None:
        now, due = asyncio.get_running_loop().time, math.inf
        while not self.roster.draining:
            await wait_nudged(self.roster.wake, min(POLL_S, max(0.0, due - now())))
            offered, self.roster.offered = self.roster.offered or due <= now(), False
            due, self.roster.unseen = math.inf, True
            free = self.roster.slots - self.roster.busy
            if free <= 0 or self.roster.draining:
                if offered:
                    self.roster.tell_work()
                continue
            claim = partial(self._claim, free=free, tries=self._may_try())
            try:
                rows, more, due_in_s = await self.database.write(claim)
                due = now() + due_in_s
                self.roster.contended = self.roster.unseen = more
                if more and offered:
                    self.roster.tell_work()
                for task_row, run_row, stood_for in rows:
                    await self._launch_or_fail(task_row, run_row, stood_for)
                if more and len(rows) == free:
                    self.roster.wake.set()
                elif more:  # The rest is for others, if they take it.
                    self.roster.wake_soon()
            except PASSING as error:
                log.error("cannot take tasks", error=error.detail)
            except Exception:
                log.exception("cannot take tasks")

    def _claim(
        self, connection: Connection, free: int, tries: bool
    ) -> tuple[list[_Taken], bool, float]:
        """Tasks taken, whether there were more, and in how many seconds the next one is due."""
        now = utcnow()
        taken = []
        found, more = store.claim(
            connection,
            self.node,
            free,
            now,
            self.roster.turns,
            self._blame,
            tries=tries,
            workers=self.roster.workers,
            tenant_slots=self.roster.tenant_slots,
        )
        # In one order by everybody: the runs' rows are locked on the way.
        for row, stood_for in sorted(found, key=lambda pair: (pair[0].run_id, pair[0].path)):
            run = store.engine_run_row(connection, row.run_id)
            alive = not RunStatus(run.status).ended
            if alive and (row.path == "" or stood_for is not None):
                # Others, perhaps left by an earlier attempt, may still wait for somebody.
                waits = store.waiting_for(connection, row.run_id) if row.epoch > 1 else None
                alive = store.begin_run(connection, row.run_id, now, waits)
            if alive:
                taken.append((row, run, stood_for))
            else:
                store.cancel_task(connection, row.run_id, row.path, now)
        moment = store.next_moment(connection)
        return taken, more, math.inf if moment is None else (moment - now).total_seconds()

    def _may_try(self) -> bool:
        """Whether this process, if it should die, would do so by the suspect that it took now."""
        lives_s = asyncio.get_running_loop().time() - self._lives_since
        on_trial = (
            self._blame.tried(attempt.losses) and not attempt.excused
            for local in self.roster.runs.values()
            for attempt in local.attempts.values()
        )
        return lives_s >= self._settings.lease_s and not any(on_trial)

    async def _launch_or_fail(self, row: Row[Any], run: Row[Any], stood_for: str | None) -> None:
        """A run whose stored request cannot be read is set aside with the reason."""
        try:
            self._launch_row(row, run, stood_for)
        except Exception as error:
            log.exception("a stored run cannot be read", run_id=row.run_id)
            info = error_info(InternalError(f"The stored run cannot be read: {error}."))
            failed = RunFailed(run_id=row.run_id, error=info, usage=store.usage_of(run))

            def end(connection: Connection) -> Told:
                now = utcnow()
                store.cancel_tasks(connection, row.run_id, only_idle=False, now=now)
                ended = store.RunEnd(RunStatus.FAILED, now, error=info.model_dump())
                return store.tell(connection, run.tenant, row.run_id, [failed], ended)

            self.roster.tell(row.run_id, await self.database.write(end))
            self.roster.offer()  # What stood behind it on its session.

    def _launch_row(self, row: Row[Any], run: Row[Any], stood_for: str | None) -> None:
        crash_point("task.claimed")
        if isinstance(row.payload, Unreadable):
            raise InternalError(f"what the task {row.path!r} is to do: {row.payload}")
        local = self._local(snapshot_of(run), run)
        doom = error_of(row.error)
        given_up = doom is not None and doom.code == RunCancelled.code
        self._launch(
            Attempt(
                cancelled=given_up,
                dismissed=None if given_up else doom,
                local=local,
                path=row.path,
                node=row.node,
                kind=row.kind,
                description=row.description,
                agent=row.agent,
                payload=row.payload,
                hidden=row.hidden,
                epoch=row.epoch,
                number=row.attempts,
                losses=row.losses,
                stood_for=stood_for,
            )
        )

    def _local(self, snapshot: RunSnapshot, run: Row[Any] | None) -> LocalRun:
        local = self.roster.runs.get(snapshot.id)
        if local is None:
            commits = Commits(
                database=self.database,
                hub=self.hub,
                run_id=snapshot.id,
                tenant=snapshot.tenant,
                meter=Meter(self.database, snapshot.budget, self._settings.budget_warn_share),
                observe=self._observe,
            )
            local = self.roster.runs[snapshot.id] = LocalRun(snapshot, commits)
        if run is not None and run.cancel_reason is not None:
            local.cancel_reason = run.cancel_reason
        return local

    def _launch(self, attempt: Attempt, *, announced: bool = False) -> None:
        self.roster.busy += 1
        self.roster.runs.setdefault(attempt.local.snapshot.id, attempt.local)
        attempt.local.attempts[attempt.path] = attempt
        attempt.local.elsewhere.discard(attempt.path)
        task = asyncio.get_running_loop().create_task(
            self._carry_out(attempt, announced), name=f"{attempt.local.snapshot.id}:{attempt.path}"
        )
        attempt.task = task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: self._landed(attempt))

    # Carrying one out --------------------------------------------------------------------------

    async def _carry_out(self, attempt: Attempt, announced: bool) -> None:
        run = attempt.local.snapshot
        journal: DurableJournal | None = None
        try:
            recorded: list[StepRecord] = []
            if attempt.epoch > 1 or run.forked_from is not None:
                recorded = await self.database.read(
                    lambda c: store.task_steps(c, run.id, attempt.path)
                )
            journal = attempt.journal = self._journal(attempt, recorded)
            attempt.begun = (
                True  # From here on an order interrupts it; until here it is looked for.
            )
            if attempt.held:
                raise asyncio.CancelledError
            if attempt.ordered:
                await self._end_cancelled(attempt, journal)
                return
            if not announced:
                self._announce(attempt, journal)
            if attempt.losses >= self._settings.max_attempts:
                await self._end_failed(
                    attempt,
                    journal,
                    TooManyAttempts(
                        f"The task was taken up {attempt.losses} times and never finished: "
                        "its worker died each time.",
                        hint="Look at what the task does; AGENT_SERVER_MAX_ATTEMPTS is the limit.",
                    ),
                )
            else:
                while not await self._handle(attempt, journal):
                    log.info("the run goes on with what was said into it", run_id=run.id)
                    recorded = await self.database.read(
                        lambda c: store.task_steps(c, run.id, attempt.path)
                    )
                    journal = attempt.journal = self._journal(attempt, recorded)
        except LostLease as error:
            log.info("attempt ended", run_id=run.id, path=attempt.path, detail=str(error))
        except asyncio.CancelledError:
            await self._broken_off(attempt, journal)
        except PASSING as error:
            # What is stored decides; the task is taken up again when the database is back.
            log.warning("task let go of", run_id=run.id, path=attempt.path, error=error.detail)
            await self._let_go(attempt, journal)
        except Exception as error:
            await self._fail_unrecorded(attempt, journal, error)

    async def _broken_off(self, attempt: Attempt, journal: DurableJournal | None) -> None:
        """Cancelled outside its handler: what was told to stop for good ends so, and is not queued
        for somebody to begin it anew."""
        if journal is not None and attempt.ordered and not (attempt.lost or journal.closed):
            try:
                await self._end_ordered(attempt, journal)
                return
            except LostLease:
                return
            except (Exception, asyncio.CancelledError) as error:
                log.warning("task let go of", path=attempt.path, error=str(error))
        await self._let_go(attempt, journal)

    def _landed(self, attempt: Attempt) -> None:
        """The attempt is over, perhaps before its first line: its slot is free."""
        local, run_id = attempt.local, attempt.local.snapshot.id
        if local.attempts.get(attempt.path) is attempt:
            del local.attempts[attempt.path]
        if not local.attempts and self.roster.runs.get(run_id) is local:
            del self.roster.runs[run_id]
        if attempt.outcome is None:
            self.hub.wake(run_id)
        self.roster.busy -= 1
        if attempt.path and attempt.outcome is not None:
            self.roster.freed()
        else:  # It may be queued again, or what stood behind its run may be.
            self.roster.wake.set()
            if self.roster.draining:
                self.roster.tell_work()
        self.roster.answer(run_id, attempt.path, attempt.outcome)

    async def _fail_unrecorded(
        self, attempt: Attempt, journal: DurableJournal | None, error: Exception
    ) -> None:
        """What the task did cannot be stored, and could not the next time: it fails saying so."""
        log.error(
            "task could not be recorded",
            run_id=attempt.local.snapshot.id,
            path=attempt.path,
            error=str(error),
        )
        if journal is not None:
            await journal.abandon()
        fresh = attempt.journal = self._journal(attempt, [])
        try:
            reason = f"What the task did could not be stored: {type(error).__name__}: {error}"
            await self._end_failed(attempt, fresh, InternalError(reason[:2000]))
        except LostLease:
            pass
        except (Exception, asyncio.CancelledError):
            await self._let_go(attempt, fresh, lost=True)

    def _journal(self, attempt: Attempt, recorded: list[StepRecord]) -> DurableJournal:
        run = attempt.local.snapshot

        def lost() -> None:
            attempt.lost = True
            log.warning("task was taken over", run_id=run.id, path=attempt.path)
            if attempt.task is not None:
                attempt.task.cancel()

        return DurableJournal(
            commits=attempt.local.commits,
            holder=Holder(run.id, attempt.path, self.node, attempt.epoch),
            task_id=attempt.identity,
            recorded=recorded,
            on_lost=lost,
            unborn=attempt.unborn,
        )

    def _announce(self, attempt: Attempt, journal: DurableJournal) -> None:
        if attempt.stood_for is not None:
            journal.emit(RunResumed(reason=attempt.stood_for))
        elif attempt.path == "":
            journal.emit(RunStarted(attempt=attempt.number))
        elif not attempt.hidden:
            journal.emit(
                TaskStarted(
                    run_id=journal.run_id,
                    task_id=journal.task_id,
                    path=attempt.path,
                    node=attempt.node,
                    kind=attempt.kind,
                    description=attempt.description,
                    agent=attempt.agent,
                    attempt=attempt.number,
                )
            )

    async def _handle(self, attempt: Attempt, journal: DurableJournal) -> bool:
        """Carry the task out to its end; False where it must be carried out again, from its
        ledger."""
        run = attempt.local.snapshot
        handler = self.handlers.get(attempt.kind)
        context = EngineContext(self.roster, self._children, self._waits, attempt, journal)
        log_context: dict[str, str] = {"run_id": run.id}
        if attempt.path:
            log_context["task"] = attempt.path
        # For as long as the attempt's own asyncio task lives.
        structlog.contextvars.bind_contextvars(**log_context)
        try:
            if handler is None:
                raise RunError(f"This server has no handler for tasks of kind {attempt.kind!r}.")
            deadline = None if attempt.path else _deadline(run)
            work = handler(context)
            output = await (work if deadline is None else _within(deadline, run, work))
            if attempt.ordered:
                # The SDK swallows a cancellation inside a tool; the decision stands.
                raise asyncio.CancelledError
        except (LostLease, *PASSING):
            raise
        except (Exception, asyncio.CancelledError) as error:
            if attempt.ordered and not attempt.lost:
                await self._end_ordered(attempt, journal)
            elif journal.let_go is not None:
                raise journal.let_go from error  # However the handler wrapped it.
            elif isinstance(error, Suspend):
                await journal.end(endings.parked(attempt, error, _deadline(run), utcnow()))
                self._wake_soon(error)
            elif isinstance(error, Exception):
                if not isinstance(error, AgentServerError):
                    log.exception("task failed unexpectedly", kind=attempt.kind)
                await self._end_failed(attempt, journal, error)
            else:
                raise
        else:
            return await self._end_succeeded(attempt, journal, output)
        return True

    def _wake_soon(self, suspend: Suspend) -> None:
        """Look at a short wait's end, not up to a whole ``POLL_S`` later."""
        if suspend.wake_at is not None:
            left_s = (suspend.wake_at - utcnow()).total_seconds()
            if left_s < POLL_S:
                asyncio.get_running_loop().call_later(max(0.0, left_s), self.roster.offer)

    async def _end_ordered(self, attempt: Attempt, journal: DurableJournal) -> None:
        """End as cancelled, even when the order comes twice."""
        ending = asyncio.ensure_future(self._end_cancelled(attempt, journal))
        while not ending.done():
            try:
                await asyncio.shield(ending)
            except asyncio.CancelledError:
                if attempt.lost or self.roster.draining:
                    raise

    # Ends --------------------------------------------------------------------------------------

    async def _end_succeeded(self, attempt: Attempt, journal: DurableJournal, output: Any) -> bool:
        """False where it does not end yet."""
        final = output if isinstance(output, FinalOutput) else FinalOutput(output)
        try:
            value = as_stored(final.value)
            if value is not final.value:
                final = replace(final, value=value)
        except (TypeError, ValueError, RecursionError) as error:
            bad = InternalError(
                f"The output of the task of kind {attempt.kind!r} is not JSON: {error}.",
                hint="Give text, numbers, booleans, null, lists and objects with text as keys.",
            )
            await self._end_failed(attempt, journal, bad)
            return True
        ending = endings.succeeded(attempt, final, self._append_items, utcnow())
        return await self._end(attempt, journal, ending, TaskOutcome("succeeded", final.value))

    async def _end_failed(
        self, attempt: Attempt, journal: DurableJournal, error: Exception
    ) -> None:
        partial = None
        if not attempt.path:
            run = attempt.local.snapshot
            await self._stop_children(run.id)
            if isinstance(error, BudgetExceeded):
                await journal.flush()
                partial = await self.database.read(
                    lambda c: endings.partial_result(c, run, error.limit)
                )
        info = error_info(error)
        if attempt.path and self._undo_of(attempt.kind) is not None:
            # Whoever takes it up after a crash ends it, and begins nothing.
            run_id = attempt.local.snapshot.id
            await self.database.write(lambda c: store.doom(c, run_id, attempt.path, info))
        faults = [f for f in await self._undo(attempt, journal) if f not in info.errors]
        if faults:
            info = info.model_copy(update={"errors": (*info.errors, *faults)})
        ending = endings.failed(attempt, error, info, utcnow(), partial)
        await self._end(attempt, journal, ending, TaskOutcome("failed", error=info))

    async def _end_cancelled(self, attempt: Attempt, journal: DurableJournal) -> None:
        if attempt.dismissed is not None and not attempt.local.stops:
            await self._undo(attempt, journal)
            ending = endings.dismissed(attempt, attempt.dismissed, utcnow())
            outcome = TaskOutcome("failed", error=attempt.dismissed)
            await self._end(attempt, journal, ending, outcome)
            return
        if not attempt.path:
            await self._stop_children(attempt.local.snapshot.id)
            await self._wait_undone(attempt)
        faults = await self._undo(attempt, journal)
        if faults and not attempt.path:
            said = "; ".join(fault.message for fault in faults)
            reason = attempt.local.cancel_reason
            attempt.local.cancel_reason = f"{reason}: {said}" if reason else said
        ending = endings.cancelled(attempt, utcnow())
        await self._end(attempt, journal, ending, TaskOutcome("cancelled"))

    async def _end(
        self,
        attempt: Attempt,
        journal: DurableJournal,
        ending: Ending,
        outcome: TaskOutcome,
    ) -> bool:
        point = "task" if attempt.path else "run"
        crash_point(f"{point}.before_end")
        ended = await journal.end(ending)
        crash_point(f"{point}.after_end")
        if ended:
            attempt.outcome = outcome
        return ended

    async def _undo(self, attempt: Attempt, journal: DurableJournal) -> list[FieldError]:
        """Let the handler undo what the task has done; see ``ports.Handler``."""
        undo = self._undo_of(attempt.kind)
        if undo is None:
            return []
        others = [a.task for p, a in attempt.local.attempts.items() if p and a.undoes and a.task]
        if others and not attempt.path:
            await asyncio.wait(others)
        attempt.undoes = True
        try:
            return await undo(
                EngineContext(self.roster, self._children, self._waits, attempt, journal)
            )
        except (LostLease, *PASSING):
            raise
        except Exception as error:
            log.exception("what a task has done was not undone", path=attempt.path)
            return [FieldError(path=attempt.path, message=f"it was not undone: {error}")]
        finally:
            attempt.undoes = False

    def _undo_of(self, kind: str) -> Callable[[TaskContext], Awaitable[list[FieldError]]] | None:
        found: Callable[[TaskContext], Awaitable[list[FieldError]]] | None = getattr(
            self.handlers.get(kind), "undo", None
        )
        return found

    async def _wait_undone(self, root: Attempt) -> None:
        """Return when the tasks of a cancelled run have ended that are to undo something: they are
        taken up for that, here or on another node."""
        run_id = root.local.snapshot.id
        self.roster.yield_slot(root)
        try:
            while await self.database.read(lambda c: store.undoing_tasks(c, run_id)):
                self.roster.offer()
                await wait_nudged(asyncio.Event(), UNDONE_POLL_S)
        finally:
            self.roster.take_slot_back(root)

    async def _stop_children(self, run_id: str) -> None:
        """Stop the run's tasks in this process, without touching its root."""
        local = self.roster.runs.get(run_id)
        if local is None:
            return
        local.ending = True
        order_stop(local)
        children = [attempt for path, attempt in local.attempts.items() if path]
        for child in children:
            child.interrupt()
        await settle(children)

    async def _let_go(
        self, attempt: Attempt, journal: DurableJournal | None, *, lost: bool = False
    ) -> None:
        """Leave the task as it is stored, for whoever takes it next. ``lost``: this
        counts as the loss of a worker."""
        if journal is not None:
            await journal.abandon()
        if attempt.path == "":
            attempt.local.ending = False
        if attempt.lost:
            return
        run_id = attempt.local.snapshot.id
        try:
            await self.database.write(
                lambda c: store.release_task(
                    c,
                    run_id,
                    attempt.path,
                    self.node,
                    attempt.epoch,
                    lost=lost,
                )
            )
        except Exception as error:  # The watch finds it later.
            log.warning("task not handed over", run_id=run_id, error=str(error))


async def _within(deadline: datetime, run: RunSnapshot, work: Awaitable[Any]) -> Any:
    """``work``'s result. Raises ``BudgetExceeded`` when the run's ``deadline`` comes first."""
    left_s = (deadline - utcnow()).total_seconds()
    try:
        return await asyncio.wait_for(work, max(0.0, left_s))
    except asyncio.TimeoutError:
        seconds = (deadline - run.created_at).total_seconds()
        raise BudgetExceeded(
            f"The run's deadline of {seconds:g} s has passed.",
            hint="Submit the run again with a larger deadline_s.",
            errors=[FieldError(path="/budget/deadline_s", message="passed")],
        ) from None


def _deadline(run: RunSnapshot) -> datetime | None:
    """When the run must have ended, whatever it waits for."""
    if run.budget is None or run.budget.deadline_s is None:
        return None
    return run.created_at + timedelta(seconds=run.budget.deadline_s)
