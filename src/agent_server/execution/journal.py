"""The durable journal: one task's ledger steps and events, kept in order until they are stored.

Leans on the run's commits, which write what its journals hand in. Refuses to know what a step does.

A commit that somebody waits for takes everything before it along; what nobody waits for follows
within ``commits.LINGER_S``. Live readers hear of an event only after it is stored.
"""

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace

from sqlalchemy import Connection

from agent_server.domain.base import utcnow
from agent_server.domain.errors import RunCancelled
from agent_server.domain.events import (
    EventBase,
    StepCompleted,
    StepFailed,
    StepInDoubt,
    StepStarted,
)
from agent_server.domain.ids import TaskId
from agent_server.domain.runs import Usage
from agent_server.execution import store
from agent_server.execution.commits import PASSING, Batch, Birth, Commits, Ending, Entry
from agent_server.execution.crash import crash_point
from agent_server.execution.events import DELTA, StoredEvent
from agent_server.execution.ports import NO_USAGE, Estimate, Fence, Holder, LostLease, StepRecord

SHOWN_OUTPUT = 2_000
"""Characters of a tool's result that its event repeats; the whole is in the ledger."""


Write = Callable[[Connection], object]


class DurableJournal:
    """See ``ports.Journal``; one per attempt at a task."""

    stores = True

    def __init__(
        self,
        *,
        commits: Commits,
        holder: Holder,
        task_id: TaskId | None,
        recorded: list[StepRecord],
        on_lost: Callable[[], None],
        unborn: bool = False,
    ) -> None:
        """``unborn``: the task's own row is still to be inserted by ``commits``, see ``born``."""
        self.run_id = commits.run_id
        self.task_id = task_id
        self.scope = holder.path
        self.notes: object = None
        self._commits = commits
        self._meter = commits.meter
        self._holder = holder
        self._on_lost = on_lost
        self._recorded = {record.key: record for record in recorded}
        self._pending = Batch()
        self._last: Entry | None = None
        self._handed = False
        self._unborn = unborn
        self._waiters: list[asyncio.Future[None]] = []
        self._failure: Exception | None = None
        self._closed = False
        self._ended = False
        self._abandoned = asyncio.Event()
        self._lost_calls: dict[str, int] = {}
        self._halted = False
        self._held = False
        self._unsafe: set[str] = set()
        self._safe = asyncio.Event()
        self._safe.set()
        self._along: dict[str, tuple[Write | None, tuple[EventBase, ...]]] = {}
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
        if not self._commits.hub.listened(self.run_id):
            return
        if self._delta_of != (step, agent):
            # All but the text is the same for each piece of a message, and is written once.
            body = {"type": DELTA, "v": 1, "run_id": self.run_id, "task_id": self.task_id}
            head = json.dumps(body | {"step": step, "agent": agent}, separators=(",", ":"))
            self._delta_of, self._delta_head = (step, agent), head[:-1] + ',"text":'
        data = f"{self._delta_head}{json.dumps(text)}}}".encode()
        self._commits.hub.publish(self.run_id, [StoredEvent(None, DELTA, data)])

    async def begin(
        self, step: StepRecord, *, commit: bool, estimate: Estimate | None = None
    ) -> int | None:
        self._check()
        most = None
        await self._stand_still()
        if step.kind != "value" and self._meter.limited:
            self._refuse_halted()
            await self._wait_born()
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
                    run_id=self.run_id,
                    task_id=self.task_id,
                    step=step.key,
                    kind=step.kind,
                    name=step.name,
                    agent=step.agent,
                    input=shown,
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
            if along[0] is not None:
                pending.writes.append(along[0])
            for event in along[1]:
                self._take(event)
        if step.kind != "value":
            self._take(_ended(step, self.run_id, self.task_id))
        if not commit:
            self._linger()
            return
        crash_point("step.before_finish")
        await self.flush()
        crash_point("step.after_finish")

    def along(self, key: str, write: Write | None, *events: EventBase) -> None:
        self._along[key] = (write, events)

    async def fence(self) -> Fence:
        await self._wait_born()
        self._check()
        return self._fenced

    def _fenced(self, connection: Connection) -> None:
        store.hold_off(connection, self._commits.tenant)
        held = self._holder
        if not store.holds(connection, held.run_id, held.path, held.owner, held.epoch):
            raise LostLease(f"task {held.path!r} of {held.run_id} is no longer held here")

    async def in_doubt(self, step: StepRecord, detail: str) -> None:
        self._check()
        marked = replace(step, status="in_doubt")
        self._recorded[step.key] = marked
        self._pending.steps[step.key] = marked
        if step.status != "in_doubt":
            self._take(StepInDoubt(step=step.key, kind=step.kind, name=step.name, detail=detail))
        await self.flush()

    async def flush(self) -> None:
        while self._pending or self._handed or self._unborn:
            self._check()
            if self._pending:
                self._commits.soon(self._hand_over)
            await self._wait_told()
        self._check()

    async def end(self, last: Ending) -> bool:
        """Commit everything still pending together with ``last``; nothing may follow.

        False where ``last.unless`` found a reason not to end: then the task needs a new journal.
        """
        while self._handed:
            await self._wait_told()
        self._check()
        self._closed = True
        # Cancelled from here on, it is stored nevertheless and readers still hear of it.
        self._last = self._entry(last)
        self._commits.soon(self._hand_over)
        await self._wait_written()
        if self._failure is not None:
            raise self._failure
        return self._ended

    async def abandon(self) -> None:
        """Write nothing more; wait for what is already on its way."""
        self.close()
        await self._wait_written()

    def bear(self, birth: Birth) -> None:
        """Have the task's child inserted, behind all that the task has said."""
        self._check()
        if self._pending:
            self._commits.soon(self._hand_over)
        self._commits.bear(birth)

    def born(self) -> None:
        """The task's own row is there."""
        self._unborn = False
        self._wake()

    def close(self) -> None:
        """Take nothing more, and do not try again what fails: this attempt is over."""
        self._closed = True
        self._abandoned.set()
        self._pending = Batch()
        self._wake()

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
        self._wake()

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
            raise LostLease(f"task {self.scope!r} of {self.run_id} has ended here")

    def _take(self, event: EventBase) -> None:
        event = store.stamped(event, self.run_id, self.task_id)
        self._pending.events.append(store.encode_event(event))
        self._pending.observed.append(event)

    def _linger(self) -> None:
        if not self._closed:
            self._commits.linger(self._hand_over)

    def _entry(self, last: Ending | None) -> Entry:
        batch, self._pending = self._pending, Batch()
        return Entry(self._holder, self.task_id, batch, last, self._abandoned, self._told)

    def _hand_over(self) -> Entry | None:
        """See ``commits.HandOver``."""
        entry, self._last = self._last, None
        if entry is None and self._pending and not self._closed and self._failure is None:
            entry = self._entry(None)
        self._handed = entry is not None
        return entry

    def _told(self, error: Exception | None, ended: bool) -> None:
        """What was handed over is stored, or will never be."""
        self._handed = False
        self._ended = ended
        if error is not None and self._failure is None:
            self._failure = error
        if self._unsafe:
            self._unsafe = {key for key in self._unsafe if self._open(key)}
            if not self._unsafe or error is not None:
                self._safe.set()
        if isinstance(error, LostLease):
            self._on_lost()
        self._wake()

    def _open(self, key: str) -> bool:
        """Whether the call is under way, or how it went is still to be stored."""
        return self._recorded[key].status == "started" or key in self._pending.steps

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def _wait_told(self) -> None:
        """Return when something may have become of what was handed over."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    async def _wait_written(self) -> None:
        while self._handed or self._last is not None:
            await self._wait_told()

    async def _wait_born(self) -> None:
        while self._unborn:
            self._check()
            await self._wait_told()


def _ended(step: StepRecord, run_id: str, task_id: str | None) -> EventBase:
    """The event of a step that ended."""
    ended_at = step.ended_at or utcnow()
    duration_ms = int((ended_at - step.started_at).total_seconds() * 1000)
    if step.error is not None:
        return StepFailed(
            run_id=run_id,
            task_id=task_id,
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
        run_id=run_id,
        task_id=task_id,
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
