"""The engine: takes tasks, carries them out by their handlers, and hands them over on death.

Leans on the journal and the store. Refuses to know what a handler does, and what a run means
to a caller: ``runs.py`` is the door for those.

A task is a row with an owner and an epoch. Taking it raises the epoch; every write of an
attempt is fenced by owner and epoch, so that a worker which was frozen while another took over
stores nothing more. On SQLite there is one process, so whatever is ``running`` at start has a
dead owner; on PostgreSQL nodes beat and a reaper queues again what a dead node carried out.

Longer than our files should be, because it is one state machine: taking a task, its attempt, its
children and the watch over them change the same few sets, and each rule is about two of them.
"""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import anyio
import structlog
from sqlalchemy import Connection, Row

from agent_server.domain.base import utcnow
from agent_server.domain.errors import (
    AgentServerError,
    BudgetExceeded,
    InternalError,
    RunError,
    TooManyAttempts,
    error_info,
)
from agent_server.domain.events import (
    EventBase,
    RunFailed,
    RunStarted,
    TaskSkipped,
    TaskStarted,
)
from agent_server.domain.ids import new_id, task_id
from agent_server.domain.runs import RunStatus
from agent_server.execution import endings, store
from agent_server.execution.attempts import (
    Attempt,
    LocalRun,
    as_stored,
    outcome_of,
    root_kind,
    snapshot_of,
)
from agent_server.execution.crash import crash_point
from agent_server.execution.events import EventHub, StoredEvent, guarded, splice_seq
from agent_server.execution.heartbeat import Heartbeat
from agent_server.execution.journal import PASSING, DurableJournal, Ending, Meter
from agent_server.execution.ports import (
    FinalOutput,
    Handler,
    LostLease,
    RunSnapshot,
    StepRecord,
    Suspend,
    TaskOutcome,
    TaskSpec,
)
from agent_server.execution.relay import Ears, Relay
from agent_server.settings import Settings
from agent_server.storage.database import Database, PostgresDatabase
from agent_server.storage.wire import PostgresWire

log = structlog.get_logger(__name__)

POLL_S = 1.0
"""How often due tasks, cancellations and children on other nodes are looked for."""
STRAY_LOOKS = 3
"""Every so many looks also for tasks that are stored as carried out here and are not."""
CANCEL_WAIT_S = 5.0
FLUSH_S = 1.0
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
        self.database = database
        self.hub = hub
        self._settings = settings
        self.handlers = handlers
        self._append_items = append_items
        self._observe = guarded(observe)
        self._works = settings.role in {"all", "worker"}
        self._busy = 0
        self._runs: dict[str, LocalRun] = {}
        self._waiters: dict[tuple[str, str], list[asyncio.Future[TaskOutcome]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._loops: list[asyncio.Task[None]] = []
        self._look = asyncio.Event()
        self._heartbeat: Heartbeat | None = None
        self._relay: Relay | None = None
        if isinstance(database, PostgresDatabase):
            self._heartbeat = Heartbeat(database, self.node, settings)
            self._relay = Relay(
                node=self.node,
                hub=hub,
                wire=PostgresWire(database.url),
                database=database,
                ears=Ears(
                    work=self._wake.set,
                    ended=lambda run_id, path: self._look.set(),
                    order=lambda run_id: self._look.set(),
                    carries=self._runs.__contains__,
                    hears_all=self.hears_all,
                ),
            )
        self._seen_ended: set[str] = set()
        self.draining = False
        self._grace_until = 0.0
        self.queued = 0
        """Tasks that waited for a worker when last looked, over all tenants."""

    # Life ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take back what a dead process left, and begin to work."""
        if self._heartbeat is None or self._relay is None:
            queued = await self.database.write(lambda c: store.reap_all(c))
            if queued:
                log.info("resuming after a stop", tasks=queued)
        else:
            await self._heartbeat.start()
            await self._relay.start()
        if self._works:
            self._loops.append(asyncio.create_task(self._claim_loop(), name="engine-claim"))
        self._loops.append(asyncio.create_task(self._watch_loop(), name="engine-watch"))

    def drain(self) -> None:
        """Take no more tasks from now on; those in flight have the grace time to finish."""
        if not self.draining:
            self.draining = True
            self._grace_until = asyncio.get_running_loop().time() + self._settings.shutdown_grace_s
            self._wake.set()

    async def stop(self) -> None:
        """Take no more, let tasks finish within the grace time, queue the rest again."""
        self.drain()
        if self._tasks:
            left_s = self._grace_until - asyncio.get_running_loop().time()
            await asyncio.wait(set(self._tasks), timeout=max(0.0, left_s))
        journals = [a.journal for r in self._runs.values() for a in r.attempts.values()]
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
        if self._relay is not None:
            self._relay.tell_work()
            await self._relay.stop()
        if self._heartbeat is not None:
            await self._heartbeat.stop()

    def _leave(self, connection: Connection) -> None:
        store.release_tasks(connection, self.node)
        store.remove_node(connection, self.node)

    # What runs.py needs ------------------------------------------------------------------------

    def free_slot(self) -> bool:
        """Whether a new task may start here at once."""
        return self._works and not self.draining and self._busy < self._settings.worker_concurrency

    def wake(self) -> None:
        """There may be something to take, here or on another node."""
        self._wake.set()
        if self._relay is not None and not self.free_slot():
            self._relay.tell_work()

    def tell_order(self, run_id: str) -> None:
        """What is to happen with the run was changed: whoever carries it out looks now."""
        self._look.set()
        if self._relay is not None:
            self._relay.tell_order(run_id)

    def hears_all(self, run_id: str) -> bool:
        """Whether every task of the run that lives is carried out here."""
        local = self._runs.get(run_id)
        return local is not None and "" in local.attempts and not local.elsewhere

    def launch_root(self, snapshot: RunSnapshot) -> None:
        """Carry out a run whose root task was inserted as taken by this node (epoch 1)."""
        local = self._local(snapshot, None)
        self._launch(
            Attempt(
                local=local,
                path="",
                node="",
                kind=root_kind(snapshot.request),
                description="",
                agent=None,
                payload={},
                hidden=True,
                epoch=1,
                number=1,
            ),
            announced=True,
        )

    async def cancel_local(self, run_id: str, reason: str) -> None:
        """Stop what this process carries out of the run; returns when it has stopped."""
        local = self._runs.get(run_id)
        if local is None:
            return
        local.cancel_reason = reason
        self._order_stop(local)
        attempts = list(local.attempts.values())
        root = local.attempts.get("")
        for attempt in attempts:
            if attempt is not root:
                attempt.interrupt()
        if root is not None:
            root.interrupt()
        running = [a.task for a in attempts if a.task is not None]
        if running:
            await asyncio.wait(running, timeout=CANCEL_WAIT_S)

    def _order_stop(self, local: LocalRun) -> None:
        for attempt in local.attempts.values():
            if attempt.journal is not None:
                attempt.journal.halt()

    # Taking tasks ------------------------------------------------------------------------------

    async def _claim_loop(self) -> None:
        while not self.draining:
            try:
                await asyncio.wait_for(self._wake.wait(), POLL_S)
            except asyncio.TimeoutError:
                pass
            self._wake.clear()
            free = self._settings.worker_concurrency - self._busy
            if free <= 0 or self.draining:
                continue
            try:
                rows = await self.database.write(
                    lambda c: self._claim(c, free)  # noqa: B023  # awaited within the iteration
                )
                for task_row, run_row in rows:
                    await self._launch_or_fail(task_row, run_row)
                if len(rows) == free:
                    self._wake.set()
            except PASSING as error:
                log.error("cannot take tasks", error=error.detail)
            except Exception:
                log.exception("cannot take tasks")

    def _claim(self, connection: Connection, free: int) -> list[tuple[Row[Any], Row[Any]]]:
        now = utcnow()
        taken = []
        for row in store.claim(connection, self.node, free, now):
            run = store.engine_run_row(connection, row.run_id)
            alive = not RunStatus(run.status).ended
            if alive and row.path == "":
                # An earlier attempt may have left children that wait for somebody.
                waits = store.waiting_for(connection, row.run_id) if row.attempts > 1 else None
                alive = store.begin_run(connection, row.run_id, now, waits)
            if alive:
                taken.append((row, run))
            else:
                store.cancel_task(connection, row.run_id, row.path, now)
        return taken

    async def _launch_or_fail(self, row: Row[Any], run: Row[Any]) -> None:
        """A run whose stored request cannot be read is set aside with the reason."""
        try:
            self._launch_row(row, run)
        except Exception as error:
            log.exception("a stored run cannot be read", run_id=row.run_id)
            info = error_info(InternalError(f"The stored run cannot be read: {error}."))
            failed = RunFailed(run_id=row.run_id, error=info, usage=store.usage_of(run))
            kind, data = store.encode_event(failed)

            def end(connection: Connection) -> StoredEvent:
                now = utcnow()
                store.cancel_tasks(connection, row.run_id, only_idle=False, now=now)
                ended = store.RunEnd(RunStatus.FAILED, now, error=info.model_dump())
                seq, _ = store.advance(connection, row.run_id, 1, store.NO_USAGE, ended)
                store.insert_events(connection, run.tenant, row.run_id, seq, [(kind, data)])
                return StoredEvent(seq, kind, splice_seq(seq, data))

            self.hub.publish(row.run_id, [await self.database.write(end)])
            self._observe([failed])

    def _launch_row(self, row: Row[Any], run: Row[Any]) -> None:
        crash_point("task.claimed")
        local = self._local(snapshot_of(run), run)
        self._launch(
            Attempt(
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
            )
        )

    def _local(self, snapshot: RunSnapshot, run: Row[Any] | None) -> LocalRun:
        local = self._runs.get(snapshot.id)
        if local is None:
            meter = Meter(snapshot.budget)
            if run is not None:
                meter.settle(run)
            local = self._runs[snapshot.id] = LocalRun(snapshot, meter)
        if run is not None and run.cancel_reason is not None:
            local.cancel_reason = run.cancel_reason
        return local

    def _launch(self, attempt: Attempt, *, announced: bool = False) -> None:
        self._busy += 1
        self._runs.setdefault(attempt.local.snapshot.id, attempt.local)
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
        attempt.begun = True
        run = attempt.local.snapshot
        journal: DurableJournal | None = None
        try:
            recorded: list[StepRecord] = []
            if attempt.number > 1:
                recorded = await self.database.read(
                    lambda c: store.task_steps(c, run.id, attempt.path)
                )
            journal = attempt.journal = self._journal(attempt, recorded)
            if attempt.ordered:
                await self._end_cancelled(attempt, journal)
                return
            if not announced:
                self._announce(attempt, journal)
            if attempt.number > self._settings.max_attempts:
                await self._end_failed(
                    attempt,
                    journal,
                    TooManyAttempts(
                        f"The task was taken up {attempt.number - 1} times and never finished: "
                        "its worker died or let go of it each time.",
                        hint="Look at what the task does; AGENT_SERVER_MAX_ATTEMPTS is the limit.",
                    ),
                )
            else:
                await self._handle(attempt, journal)
        except LostLease as error:
            log.info("attempt ended", run_id=run.id, path=attempt.path, detail=str(error))
        except asyncio.CancelledError:
            await self._let_go(attempt, journal)
        except PASSING as error:
            # What is stored decides; the task is taken up again when the database is back.
            log.warning("task let go of", run_id=run.id, path=attempt.path, error=error.detail)
            await self._let_go(attempt, journal)
        except Exception as error:
            await self._fail_unrecorded(attempt, journal, error)

    def _landed(self, attempt: Attempt) -> None:
        """The attempt is over, perhaps before its first line: its slot is free."""
        local, run_id = attempt.local, attempt.local.snapshot.id
        if local.attempts.get(attempt.path) is attempt:
            del local.attempts[attempt.path]
        if not local.attempts and self._runs.get(run_id) is local:
            del self._runs[run_id]
        if attempt.outcome is None:
            self.hub.wake(run_id)
        self._busy -= 1
        self._wake.set()
        awaited_here = (run_id, attempt.path) in self._waiters
        if attempt.outcome is not None and attempt.path and not awaited_here:
            if self._relay is not None:
                self._relay.tell_ended(run_id, attempt.path)
        self._answer(run_id, attempt.path, attempt.outcome)

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
            await self._let_go(attempt, fresh)

    def _journal(self, attempt: Attempt, recorded: list[StepRecord]) -> DurableJournal:
        run = attempt.local.snapshot

        def lost() -> None:
            attempt.lost = True
            log.warning("task was taken over", run_id=run.id, path=attempt.path)
            if attempt.task is not None:
                attempt.task.cancel()

        return DurableJournal(
            database=self.database,
            hub=self.hub,
            run_id=run.id,
            tenant=run.tenant,
            path=attempt.path,
            task_id=task_id(run.id, attempt.path) if attempt.path else None,
            owner=self.node,
            epoch=attempt.epoch,
            meter=attempt.local.meter,
            recorded=recorded,
            observe=self._observe,
            on_lost=lost,
        )

    def _announce(self, attempt: Attempt, journal: DurableJournal) -> None:
        if attempt.path == "":
            journal.emit(RunStarted(attempt=attempt.number))
        elif not attempt.hidden:
            journal.emit(
                TaskStarted(
                    path=attempt.path,
                    node=attempt.node,
                    kind=attempt.kind,
                    description=attempt.description,
                    agent=attempt.agent,
                    attempt=attempt.number,
                )
            )

    async def _handle(self, attempt: Attempt, journal: DurableJournal) -> None:
        run = attempt.local.snapshot
        handler = self.handlers.get(attempt.kind)
        context = EngineContext(self, attempt, journal)
        log_context: dict[str, str] = {"run_id": run.id}
        if attempt.path:
            log_context["task"] = attempt.path
        with structlog.contextvars.bound_contextvars(**log_context):
            try:
                if handler is None:
                    raise RunError(
                        f"This server has no handler for tasks of kind {attempt.kind!r}."
                    )
                output = await self._within_deadline(run, attempt, handler(context))
                if attempt.ordered:
                    # The SDK swallows a cancellation inside a tool; the decision stands.
                    raise asyncio.CancelledError
            except (LostLease, *PASSING):
                raise
            except (Exception, asyncio.CancelledError) as error:
                if attempt.ordered and not attempt.lost:
                    await self._end_ordered(attempt, journal)
                elif isinstance(error, Suspend):
                    wake_at = None if attempt.path else _deadline(run)
                    await journal.end(endings.parked(attempt, error.waiting_for, wake_at))
                elif isinstance(error, Exception):
                    if not isinstance(error, AgentServerError):
                        log.exception("task failed unexpectedly", kind=attempt.kind)
                    await self._end_failed(attempt, journal, error)
                else:
                    raise
            else:
                await self._end_succeeded(attempt, journal, output)

    async def _end_ordered(self, attempt: Attempt, journal: DurableJournal) -> None:
        """End as cancelled, even when the order comes twice."""
        ending = asyncio.ensure_future(self._end_cancelled(attempt, journal))
        while not ending.done():
            try:
                await asyncio.shield(ending)
            except asyncio.CancelledError:
                if attempt.lost or self.draining:
                    raise

    async def _within_deadline(
        self, run: RunSnapshot, attempt: Attempt, work: Awaitable[Any]
    ) -> Any:
        deadline = _deadline(run)
        if deadline is None or attempt.path != "":
            return await work
        left_s = (deadline - utcnow()).total_seconds()
        try:
            return await asyncio.wait_for(work, max(0.0, left_s))
        except asyncio.TimeoutError:
            seconds = (deadline - run.created_at).total_seconds()
            raise BudgetExceeded(
                f"The run's deadline of {seconds:g} s has passed.",
                hint="Submit the run again with a larger deadline_s.",
            ) from None

    # Ends --------------------------------------------------------------------------------------

    async def _end_succeeded(self, attempt: Attempt, journal: DurableJournal, output: Any) -> None:
        final = output if isinstance(output, FinalOutput) else FinalOutput(output)
        try:
            final = replace(final, value=as_stored(final.value))
        except (TypeError, ValueError, RecursionError) as error:
            bad = InternalError(
                f"The output of the task of kind {attempt.kind!r} is not JSON: {error}.",
                hint="Give text, numbers, booleans, null, lists and objects with text as keys.",
            )
            await self._end_failed(attempt, journal, bad)
            return
        ending = endings.succeeded(attempt, final, self._append_items, utcnow())
        await self._end(attempt, journal, ending, TaskOutcome("succeeded", final.value))

    async def _end_failed(
        self, attempt: Attempt, journal: DurableJournal, error: Exception
    ) -> None:
        info = error_info(error)
        if not attempt.path:
            await self._stop_children(attempt.local.snapshot.id)
        ending = endings.failed(attempt, error, info, utcnow())
        await self._end(attempt, journal, ending, TaskOutcome("failed", error=info))

    async def _end_cancelled(self, attempt: Attempt, journal: DurableJournal) -> None:
        if not attempt.path:
            await self._stop_children(attempt.local.snapshot.id)
        ending = endings.cancelled(attempt, utcnow())
        await self._end(attempt, journal, ending, TaskOutcome("cancelled"))

    async def _end(
        self,
        attempt: Attempt,
        journal: DurableJournal,
        ending: Ending,
        outcome: TaskOutcome,
    ) -> None:
        point = "task" if attempt.path else "run"
        crash_point(f"{point}.before_end")
        await journal.end(ending)
        crash_point(f"{point}.after_end")
        attempt.outcome = outcome

    async def _stop_children(self, run_id: str) -> None:
        """Stop the run's tasks in this process, without touching its root."""
        local = self._runs.get(run_id)
        if local is None:
            return
        local.ending = True
        self._order_stop(local)
        children = [attempt for path, attempt in local.attempts.items() if path]
        for child in children:
            child.interrupt()
        tasks = [child.task for child in children if child.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=CANCEL_WAIT_S)

    async def _let_go(self, attempt: Attempt, journal: DurableJournal | None) -> None:
        """Leave the task as it is stored, for whoever takes it next."""
        if journal is not None:
            await journal.abandon()
        if attempt.path == "":
            attempt.local.ending = False
        if attempt.lost:
            return
        run_id = attempt.local.snapshot.id
        try:
            await self.database.write(
                lambda c: store.release_task(c, run_id, attempt.path, self.node, attempt.epoch)
            )
        except Exception as error:  # The watch finds it later.
            log.warning("task not handed over", run_id=run_id, error=str(error))

    # Children ----------------------------------------------------------------------------------

    async def run_child(
        self, parent: Attempt, journal: DurableJournal, spec: TaskSpec
    ) -> TaskOutcome:
        """See ``TaskContext.child``. Cancelled, it cancels the child, unless the whole process
        lets go or the run itself is being ended, which reach the child by themselves."""
        parent.had_children = True
        begun = asyncio.ensure_future(self._begin_child(parent, journal, spec))
        self._yield_slot(parent)
        try:
            future = await asyncio.shield(begun)
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            # Shielded: a cancelled scope of anyio cancels every wait inside it anew.
            with anyio.CancelScope(shield=True):
                await asyncio.wait([begun])
                if not (self.draining or parent.lost or parent.local.stops):
                    await self._cancel_child(parent.local, spec.path)
            raise
        except Exception as error:
            journal.break_off(error)
            raise
        finally:
            self._take_slot_back(parent)

    async def _begin_child(
        self, parent: Attempt, journal: DurableJournal, spec: TaskSpec
    ) -> "asyncio.Future[TaskOutcome]":
        """Insert the task, or find it; the future answers when it has ended."""
        await journal.flush()
        run = parent.local.snapshot
        future: asyncio.Future[TaskOutcome] = asyncio.get_running_loop().create_future()
        here = self.free_slot()
        self._busy += here  # Reserved across the transaction; the attempt below takes its own.
        try:
            crash_point("child.before_insert")
            fresh, row = await self.database.write(
                lambda c: self._insert_child(c, parent, spec, here)
            )
            crash_point("child.after_insert")
        finally:
            self._busy -= here
        if row is not None and row.status not in store.LIVE:
            future.set_result(outcome_of(row))
            return future
        self._waiters.setdefault((run.id, spec.path), []).append(future)
        if fresh and here and not self.draining:
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
            self.hub.rouse(run.id)
            self.wake()
        return future

    def _insert_child(
        self, connection: Connection, parent: Attempt, spec: TaskSpec, here: bool
    ) -> tuple[bool, Row[Any] | None]:
        self._fence(connection, parent)
        now = utcnow()
        values = self._task_values(parent, spec) | {
            "status": "running" if here else "queued",
            "owner": self.node if here else None,
            "epoch": 1 if here else 0,
            "attempts": 1 if here else 0,
            "started_at": now if here else None,
            "created_at": now,
        }
        if store.insert_task(connection, values):
            return True, None
        return False, store.task_row(connection, parent.local.snapshot.id, spec.path)

    async def skip_child(
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
        kind, data = store.encode_event(event)

        def transaction(connection: Connection) -> list[StoredEvent]:
            self._fence(connection, parent)
            now = utcnow()
            values = self._task_values(parent, spec) | {
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
            first, _ = store.advance(connection, run.id, 1, store.NO_USAGE)
            store.insert_events(connection, run.tenant, run.id, first, [(kind, data)])
            return [StoredEvent(first, kind, splice_seq(first, data))]

        try:
            published = await self.database.write(transaction)
        except Exception as error:
            journal.break_off(error)
            raise
        if published:
            self.hub.publish(run.id, published)
            self._observe([event])

    def _task_values(self, parent: Attempt, spec: TaskSpec) -> dict[str, Any]:
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
        }

    def _fence(self, connection: Connection, attempt: Attempt) -> None:
        run_id = attempt.local.snapshot.id
        if not store.holds(connection, run_id, attempt.path, self.node, attempt.epoch):
            raise LostLease(f"task {attempt.path!r} of {run_id} was taken over")

    async def _cancel_child(self, local: LocalRun, path: str) -> None:
        child = local.attempts.get(path)
        if child is not None and child.task is not None:
            child.cancelled = True
            child.interrupt()
            await asyncio.wait([child.task], timeout=CANCEL_WAIT_S)
            if child.outcome is not None:
                return
        # Carried out by nobody here: queued, elsewhere, or just now put aside to wait.
        run_id = local.snapshot.id
        await self.database.write(lambda c: store.cancel_task(c, run_id, path, utcnow()))

    def _yield_slot(self, attempt: Attempt) -> None:
        """While it awaits children, the parent takes no slot."""
        attempt.awaited += 1
        if attempt.awaited == 1:
            self._busy -= 1
            self._wake.set()

    def _take_slot_back(self, attempt: Attempt) -> None:
        attempt.awaited -= 1
        if attempt.awaited == 0:
            self._busy += 1

    def _answer(self, run_id: str, path: str, outcome: TaskOutcome | None) -> None:
        """Tell whoever awaits the task here; without an outcome they go on waiting."""
        if outcome is None:
            return
        if run_id in self._runs:
            self._runs[run_id].elsewhere.discard(path)
        for future in self._waiters.pop((run_id, path), ()):
            if not future.done():
                future.set_result(outcome)

    # Watching ----------------------------------------------------------------------------------

    async def _watch_loop(self) -> None:
        """What no local event tells: ends on other nodes, cancellations, tasks that slipped."""
        stray: set[tuple[str, str, int]] = set()
        looks = 0
        while True:
            try:
                await asyncio.wait_for(self._look.wait(), POLL_S)
            except asyncio.TimeoutError:
                looks += 1
            self._look.clear()
            try:
                await self._look_for_ends()
                await self._look_for_orders()
                if looks >= STRAY_LOOKS:
                    looks = 0
                    stray = await self._release_stray(stray)
            except PASSING as error:
                log.warning("cannot watch the database", error=error.detail)
            except Exception:
                log.exception("cannot watch the database")

    async def _look_for_ends(self) -> None:
        for key in [k for k, futures in self._waiters.items() if all(f.done() for f in futures)]:
            del self._waiters[key]
        elsewhere = [
            key
            for key in self._waiters
            if key[0] not in self._runs or key[1] not in self._runs[key[0]].attempts
        ]
        if elsewhere:
            rows = await self.database.read(lambda c: store.ended_tasks(c, elsewhere))
            for row in rows:
                self._answer(row.run_id, row.path, outcome_of(row))

    async def _look_for_orders(self) -> None:
        """Cancel what somebody cancelled elsewhere; drop what belongs to a run that has ended."""
        local = list(self._runs)
        if not local:
            return
        stops = []
        ended = set()
        for row in await self.database.read(lambda c: store.orders(c, local)):
            here = self._runs.get(row.id)
            if here is None:
                continue
            if RunStatus(row.status).ended:
                ended.add(row.id)
                for attempt in here.attempts.values() if row.id in self._seen_ended else ():
                    attempt.lost = True
                    if attempt.journal is not None:
                        attempt.journal.close()
                    if attempt.task is not None:
                        attempt.task.cancel()
            elif here.cancel_reason is None:
                stops.append(self.cancel_local(row.id, row.cancel_reason))
        self._seen_ended = ended
        await asyncio.gather(*stops)

    async def _release_stray(
        self, suspects: set[tuple[str, str, int]]
    ) -> set[tuple[str, str, int]]:
        """Queue again what is stored as carried out here and is not, seen twice in a row."""
        held, self.queued = await self.database.read(
            lambda c: (store.held_tasks(c, self.node), store.queue_depth(c))
        )
        stray = {
            key
            for key in held
            if key[0] not in self._runs or key[1] not in self._runs[key[0]].attempts
        }
        for run_id, path, epoch in stray & suspects:
            log.warning("task was not being carried out; queued again", run_id=run_id, path=path)
            await self.database.write(
                lambda c, r=run_id, p=path, e=epoch: store.release_task(c, r, p, self.node, e)  # type: ignore[misc]
            )
            self._wake.set()
        return stray - suspects


class EngineContext:
    """See ``ports.TaskContext``."""

    def __init__(self, engine: Engine, attempt: Attempt, journal: DurableJournal) -> None:
        self.run = attempt.local.snapshot
        self.path = attempt.path
        self.node = attempt.node
        self.payload = attempt.payload
        self.attempt = attempt.number
        self.journal = journal
        self._engine = engine
        self._attempt = attempt
        self._journal = journal

    async def child(self, spec: TaskSpec) -> TaskOutcome:
        return await self._engine.run_child(self._attempt, self._journal, spec)

    async def skip(self, spec: TaskSpec, reason: str) -> None:
        await self._engine.skip_child(self._attempt, self._journal, spec, reason)

    async def value(self, key: str, make: Callable[[], Awaitable[Any]]) -> Any:
        whole = self.journal.key(key)
        found = self._journal.recorded().get(whole)
        if found is not None and found.status == "done":
            return found.output
        record = StepRecord(key=whole, kind="value", name=key)
        made = as_stored(await make())
        await self._journal.finish(record.done(made))
        return made


def _deadline(run: RunSnapshot) -> datetime | None:
    """When the run must have ended, whatever it waits for."""
    if run.budget is None or run.budget.deadline_s is None:
        return None
    return run.created_at + timedelta(seconds=run.budget.deadline_s)
