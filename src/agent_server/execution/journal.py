"""The durable journal: one task's ledger steps and events, committed in order and fenced.

Leans on the store's SQL and the database's transactions. Refuses to know what a step does.

What is handed in is kept in order and written in one transaction: the events take the run's
next numbers, the steps are upserted, the run's totals grow by what finished. A commit that
somebody waits for takes everything before it along; what nobody waits for follows within
``LINGER_S``. Live readers hear of an event only after it is stored.
"""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from types import SimpleNamespace
from typing import Any

from sqlalchemy import Connection

from agent_server.domain.base import utcnow
from agent_server.domain.errors import DatabaseUnavailable, RunCancelled, StorageFull
from agent_server.domain.events import (
    EventBase,
    StepCompleted,
    StepFailed,
    StepInDoubt,
    StepStarted,
)
from agent_server.domain.ids import RunId, TaskId, Tenant
from agent_server.domain.runs import Usage
from agent_server.execution import store
from agent_server.execution.budget import Holder, Meter, warnings
from agent_server.execution.crash import crash_point
from agent_server.execution.events import DELTA, EventHub, StoredEvent, splice_seq
from agent_server.execution.ports import NO_USAGE, Estimate, LostLease, StepRecord, Suspend
from agent_server.storage.database import Database
from agent_server.storage.outside import owned

LINGER_S = 0.02
SHOWN_OUTPUT = 2_000
"""Characters of a tool's result that its event repeats; the whole is in the ledger."""
PATIENCE_S = 30.0
"""How long a commit is tried again while the database cannot be used."""
RETRY_S = 0.25
PASSING = (DatabaseUnavailable, StorageFull)
"""Failures that are not the task's: it is taken up again when the database is back."""


@dataclass
class _Batch:
    """What goes into one transaction."""

    events: list[tuple[str, str]] = field(default_factory=list)
    observed: list[EventBase] = field(default_factory=list)
    steps: dict[str, StepRecord] = field(default_factory=dict)
    used: list[Usage] = field(default_factory=list)
    settled: list[str] = field(default_factory=list)
    cut_off: list[str] = field(default_factory=list)
    writes: list[Callable[[Connection], object]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.events or self.steps or self.cut_off)


@dataclass(frozen=True)
class Ending:
    """How a task ends, or stands still, in its last transaction.

    ``parked`` is why, and until when, it stands still; ``run`` ends the run too; ``events`` (exactly ``count``) are made from the run's totals;
    ``also`` writes whatever else belongs to the end. Where ``unless`` says so in that transaction,
    the task does not end: what came before is stored, and its owner keeps it.
    """

    status: str
    ended_at: datetime
    output: Any = None
    error: Any = None
    parked: Suspend | None = None
    run: store.RunEnd | None = None
    count: int = 0
    events: Callable[[Usage], list[EventBase]] = lambda usage: []
    also: Callable[[Connection], None] | None = None
    unless: Callable[[Connection], bool] | None = None


_Stored = tuple[list[StoredEvent] | None, bool, list[EventBase]]
"""The events for readers (None: they must look in the store), whether the task ended, and what
happened."""


class DurableJournal:
    """See ``ports.Journal``; one per attempt at a task."""

    stores = True

    def __init__(
        self,
        *,
        database: Database,
        hub: EventHub,
        run_id: RunId,
        tenant: Tenant,
        path: str,
        task_id: TaskId | None,
        owner: str,
        epoch: int,
        meter: Meter,
        recorded: list[StepRecord],
        observe: Callable[[list[EventBase]], None],
        on_lost: Callable[[], None],
    ) -> None:
        self.run_id = run_id
        self.task_id = task_id
        self.scope = path
        self._database = database
        self._hub = hub
        self._tenant = tenant
        self._path = path
        self._owner = owner
        self._epoch = epoch
        self._meter = meter
        self._observe = observe
        self._on_lost = on_lost
        self._recorded = {record.key: record for record in recorded}
        self._pending = _Batch()
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.Task[None] | None = None
        self._failure: Exception | None = None
        self._closed = False
        self._ended = False
        self._abandoned = asyncio.Event()
        self._holder = Holder(run_id, path, owner, epoch)
        self._lost_calls: dict[str, int] = {}
        self._halted = False
        self._held = False
        self._unsafe: set[str] = set()
        self._safe = asyncio.Event()
        self._safe.set()
        self._along: dict[str, tuple[Callable[[Connection], object], tuple[EventBase, ...]]] = {}
        self._delta_of: tuple[str, str | None] | None = None
        self._delta_head = ""

    def key(self, *parts: str) -> str:
        return "/".join((self.scope, *parts) if self.scope else parts)

    def recorded(self, prefix: str = "") -> dict[str, StepRecord]:
        if not prefix:
            return dict(self._recorded)
        return {k: r for k, r in self._recorded.items() if k.startswith(prefix)}

    def step(self, key: str) -> StepRecord | None:
        """The step ``key``, if it is done."""
        found = self._recorded.get(key)
        return found if found is not None and found.status == "done" else None

    def emit(self, event: EventBase) -> None:
        self._take(event)
        self._linger()

    def delta(self, step: str, agent: str | None, text: str) -> None:
        if not self._hub.listened(self.run_id):
            return
        if self._delta_of != (step, agent):
            # All but the text is the same for each piece of a message, and is written once.
            body = {"type": DELTA, "v": 1, "run_id": self.run_id, "task_id": self.task_id}
            head = json.dumps(body | {"step": step, "agent": agent}, separators=(",", ":"))
            self._delta_of, self._delta_head = (step, agent), head[:-1] + ',"text":'
        data = f"{self._delta_head}{json.dumps(text)}}}".encode()
        self._hub.publish(self.run_id, [StoredEvent(None, DELTA, data)])

    async def begin(
        self, step: StepRecord, *, commit: bool, estimate: Estimate | None = None
    ) -> int | None:
        self._check()
        most = None
        await self._stand_still()
        if step.kind != "value" and self._meter.limited:
            self._refuse_halted()
            grant = await self._meter.reserve(self._holder, step.key, step.kind, estimate)
            self._lost_calls[step.key] = grant.lost
            most = grant.most_output
            self._check()
        self._refuse_halted()
        self._recorded[step.key] = step
        if step.kind != "value":
            shown = step.input if step.kind == "tool" else None
            self._take(
                StepStarted(
                    step=step.key, kind=step.kind, name=step.name, agent=step.agent, input=shown
                )
            )
        if not commit:
            self._linger()
            return most
        self._pending.steps[step.key] = step
        self._unsafe.add(step.key)
        self._safe.clear()
        crash_point("step.before_begin")
        await self.flush()
        crash_point("step.after_begin")
        return most

    async def again(
        self, step: StepRecord, estimate: Estimate | None = None, spent: Usage = NO_USAGE
    ) -> int | None:
        self._check()
        await self._stand_still()
        self._refuse_halted()
        if not self._meter.limited:
            return None
        return (await self._meter.again(self._holder, step.key, estimate, spent)).most_output

    def cut_off(self, step: StepRecord) -> None:
        if self._meter.limited and not self._closed:
            self._pending.cut_off.append(step.key)
            self._linger()

    async def finish(self, step: StepRecord, *, commit: bool = True) -> None:
        self._check()
        self._unsafe.discard(step.key)
        if not self._unsafe:
            self._safe.set()
        lost = self._lost_calls.pop(step.key, 0)
        if lost:
            # Begun by attempts that died: perhaps made, perhaps billed.
            name = f"{step.kind}_calls"
            more = {name: getattr(step.usage, name) + lost}
            step = replace(step, usage=step.usage.model_copy(update=more))
        self._recorded[step.key] = step
        pending = self._pending
        pending.steps[step.key] = step
        pending.used.append(step.usage)
        pending.settled.append(step.key)
        along = self._along.pop(step.key, None)
        if along is not None and step.status == "done":
            pending.writes.append(along[0])
            for event in along[1]:
                self._take(event)
        if step.kind != "value":
            self._take(_ended(step))
        if not commit:
            self._linger()
            return
        crash_point("step.before_finish")
        await self.flush()
        crash_point("step.after_finish")

    def along(self, key: str, write: Callable[[Connection], object], *events: EventBase) -> None:
        self._along[key] = (write, events)

    async def in_doubt(self, step: StepRecord, detail: str) -> None:
        self._check()
        marked = replace(step, status="in_doubt")
        self._recorded[step.key] = marked
        self._pending.steps[step.key] = marked
        if step.status != "in_doubt":
            self._take(StepInDoubt(step=step.key, kind=step.kind, name=step.name, detail=detail))
        await self.flush()

    async def flush(self) -> None:
        while self._pending or self._writing is not None:
            self._check()
            self._start_writing()
            assert self._writing is not None
            await asyncio.shield(self._writing)
        self._check()

    async def end(self, last: Ending) -> bool:
        """Commit everything still pending together with ``last``; nothing may follow.

        False where ``last.unless`` found a reason not to end: then the task needs a new journal.
        """
        # Not once: the next may begin before whoever waited for this one has its turn.
        while self._writing is not None:
            await asyncio.shield(self._writing)
        self._check()
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        batch, self._pending = self._pending, _Batch()
        # A task of its own: cancelled here, the write still ends and readers still hear of it.
        self._writing = asyncio.get_running_loop().create_task(self._write(batch, last))
        await asyncio.shield(self._writing)
        if self._failure is not None:
            raise self._failure
        return self._ended

    async def abandon(self) -> None:
        """Write nothing more; wait for what is already on its way."""
        self.close()
        if self._writing is not None:
            await asyncio.wait([self._writing])

    def close(self) -> None:
        """Take nothing more, and do not try again what fails: this attempt is over."""
        self._closed = True
        self._abandoned.set()
        if self._timer is not None:
            self._timer.cancel()
        self._pending = _Batch()

    @property
    def closed(self) -> bool:
        """Whether it takes nothing more: its last transaction is on its way, or it was given up."""
        return self._closed

    def halt(self) -> None:
        """Begin nothing more: ``begin`` raises ``RunCancelled``, whoever swallowed the order."""
        self._halted = True

    def break_off(self, error: Exception) -> None:
        """Nothing after ``error`` counts, even where the handler swallows it."""
        if self._failure is None:
            self._failure = error

    @property
    def let_go(self) -> Exception | None:
        """Why this attempt cannot go on, where its task is left to whoever takes it next."""
        return self._failure if isinstance(self._failure, (LostLease, *PASSING)) else None

    def hold(self) -> None:
        """Let no further call begin: whoever wants to waits until this attempt is let go of."""
        self._held = True

    async def wait_safe(self, timeout_s: float) -> None:
        """Return when no call is under way that must not be repeated, or the time is up."""
        try:
            await asyncio.wait_for(self._safe.wait(), timeout_s)
        except asyncio.TimeoutError:
            pass

    async def _stand_still(self) -> None:
        while self._held:
            await asyncio.Event().wait()  # Ended by the cancellation that follows.

    def _refuse_halted(self) -> None:
        if self._halted:
            raise RunCancelled(f"The run {self.run_id!r} is being cancelled.")

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise LostLease(f"task {self._path!r} of {self.run_id} has ended here")

    def _take(self, event: EventBase) -> None:
        event = store.stamped(event, self.run_id, self.task_id)
        self._pending.events.append(store.encode_event(event))
        self._pending.observed.append(event)

    def _linger(self) -> None:
        if self._timer is None and not self._closed:
            self._timer = asyncio.get_running_loop().call_later(LINGER_S, self._due)

    def _due(self) -> None:
        self._timer = None
        if self._pending and not self._closed and self._failure is None:
            self._start_writing()

    def _start_writing(self) -> None:
        if self._writing is not None or not self._pending:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        batch, self._pending = self._pending, _Batch()
        self._writing = asyncio.get_running_loop().create_task(self._write(batch, None))

    async def _write(self, batch: _Batch, last: Ending | None) -> None:
        await self._commit(batch, last)
        # Here and not in a callback of the task: whoever awaited it must find it gone.
        self._writing = None
        if self._pending and not self._closed and self._failure is None:
            self._linger()

    async def _commit(self, batch: _Batch, last: Ending | None) -> None:
        """One transaction. Never raises: the failure is kept and raised to whoever waits."""
        try:
            published, self._ended, observed = await self._persist(batch, last)
        except LostLease as error:
            self._failure = error
            self._on_lost()
        except Exception as error:
            self._failure = error
        else:
            if batch.settled or batch.cut_off:
                self._meter.settled()
            if published is None:
                self._hub.wake(self.run_id)
            else:
                self._hub.publish(self.run_id, published)
            self._observe(observed)

    async def _persist(self, batch: _Batch, last: Ending | None) -> _Stored:
        """Commit, again and again while the database is away: what has happened must be told.

        A commit whose answer was lost may have happened; ``again`` finds it and repeats nothing.
        """
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + PATIENCE_S
        again = False
        while True:
            try:
                return await self._database.write(
                    owned(
                        lambda c: self._transact(c, batch, last, again),  # noqa: B023  # awaited
                        self._tenant,
                        self.run_id,
                    )
                )
            except PASSING:
                if self._abandoned.is_set() or loop.time() >= give_up_at:
                    raise
                again = True
            try:
                await asyncio.wait_for(self._abandoned.wait(), RETRY_S)
            except asyncio.TimeoutError:
                pass

    def _transact(
        self, connection: Connection, batch: _Batch, last: Ending | None, again: bool
    ) -> _Stored:
        if again:
            stored = self._stored(connection, batch, last)
            if stored is not None:
                return stored
        lease = (connection, self.run_id, self._path, self._owner, self._epoch)
        if last is not None and last.unless is not None and last.unless(connection):
            last = None
        if last is None:
            held = store.holds(*lease)
        elif last.parked is not None:
            held = store.park_task(
                *lease,
                waiting_for=last.parked.waiting_for.model_dump(mode="json"),
                awaits=last.parked.awaits,
                wake_at=last.parked.wake_at,
                now=last.ended_at,
            )
        else:
            held = store.end_task(
                *lease,
                status=last.status,
                ended_at=last.ended_at,
                output=last.output,
                error=last.error,
            )
        if not held:
            raise LostLease(
                f"task {self._path!r} of {self.run_id} is no longer carried out by {self._owner}"
            )
        used = dict(store.NO_USAGE)
        for usage in batch.used:
            for name, amount in store.usage_columns(usage).items():
                used[name] += amount
        events = list(batch.events)
        observed = list(batch.observed)
        closing = last.count if last is not None else 0
        for write in batch.writes:
            write(connection)
        if last is not None and last.also is not None:
            # Before the run's row is locked: tasks first, then their run, by everybody.
            last.also(connection)
        warned = self._settle(connection, batch, last, used)
        events += [store.encode_event(event) for event in warned]
        observed += warned
        first, totals = store.advance(
            connection, self.run_id, len(events) + closing, used, last.run if last else None
        )
        if last is not None:
            said = [
                store.stamped(event, self.run_id, self.task_id)
                for event in last.events(store.usage_of(totals))
            ]
            assert len(said) == closing
            events += [store.encode_event(event) for event in said]
            observed += said
        if events:
            store.insert_events(connection, self._tenant, self.run_id, first, events)
        if batch.steps:
            store.upsert_steps(
                connection, self._tenant, self.run_id, self._path, list(batch.steps.values())
            )
        published = [
            StoredEvent(first + i, kind, splice_seq(first + i, data))
            for i, (kind, data) in enumerate(events)
        ]
        return published, last is not None, observed

    def _settle(
        self, connection: Connection, batch: _Batch, last: Ending | None, used: dict[str, int]
    ) -> list[EventBase]:
        """Give back what the calls that ended had reserved; what is to be said of the budget."""
        meter = self._meter
        if not meter.limited or meter.budget is None:
            return []
        if batch.cut_off:
            store.cut_off(connection, self.run_id, batch.cut_off)
        if last is not None and last.run is not None:
            store.forget_reservations(connection, self.run_id)
        elif batch.settled:
            store.settle(connection, self.run_id, batch.settled)
        if not any(used.values()):
            return []
        before = store.locked_run_row(connection, self.run_id)
        after = SimpleNamespace(**{name: getattr(before, name) + n for name, n in used.items()})
        said = warnings(meter.budget, before, after, meter.warn_share)
        return [store.stamped(event, self.run_id, self.task_id) for event in said]

    def _stored(self, connection: Connection, batch: _Batch, last: Ending | None) -> _Stored | None:
        """What an earlier try of this commit stored after all; None when it did not."""
        ended = last is not None and store.has_ended(
            connection, self.run_id, self._path, self._epoch, last.status
        )
        told = batch.events and store.event_stored(connection, self.run_id, batch.events[0][1])
        if not (ended or told):
            return None
        # Readers are woken and find the events in the store.
        said: list[EventBase] = []
        if last is not None and ended:
            said = last.events(store.usage_of(store.engine_run_row(connection, self.run_id)))
        said = [store.stamped(event, self.run_id, self.task_id) for event in said]
        return None, ended, batch.observed + said


def _ended(step: StepRecord) -> EventBase:
    """The event of a step that ended."""
    ended_at = step.ended_at or utcnow()
    duration_ms = int((ended_at - step.started_at).total_seconds() * 1000)
    if step.error is not None:
        return StepFailed(
            step=step.key,
            kind=step.kind,
            name=step.name,
            agent=step.agent,
            error=step.error,
            duration_ms=duration_ms,
        )
    output = step.output if step.kind == "tool" else None
    if isinstance(output, str) and len(output) > SHOWN_OUTPUT:
        output = output[:SHOWN_OUTPUT] + "…"
    return StepCompleted(
        step=step.key,
        kind=step.kind,
        name=step.name,
        agent=step.agent,
        usage=step.usage,
        duration_ms=duration_ms,
        output=output,
        cached_tokens=step.cached_tokens,
        reasoning_tokens=step.reasoning_tokens,
    )
