"""The commits of one run in this process: what its tasks hand in at the same moment is stored at once.

Leans on the store's SQL and the database's transactions. Refuses to know what a step does.

A journal that has something to store says so, and a parent that wants a child. A round takes what
there is by then, up to ``MOST``: the children are inserted, the events take the run's next numbers,
the steps are upserted, tasks end, and the run's totals grow by what finished, in one transaction.
The rest, and what comes meanwhile, waits for the next round, so that a hundred tasks that finish
together cost little more than four. Each is fenced by its own lease. Whatever is out of the ordinary (a lease that
was lost, a value that cannot be stored, a database that is away) undoes the round, and each of it is
then committed by itself, so that nobody pays for another's fault.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from types import SimpleNamespace
from typing import Any, Final

import anyio
from sqlalchemy import Connection, Row

from agent_server.domain.errors import DatabaseUnavailable, StorageFull
from agent_server.domain.events import EventBase
from agent_server.domain.ids import RunId, TaskId, Tenant
from agent_server.domain.runs import Usage
from agent_server.execution import store
from agent_server.execution.budget import Meter, warnings
from agent_server.execution.crash import crash_point
from agent_server.execution.events import TERMINAL, EventHub, StoredEvent, splice_seq
from agent_server.execution.ports import Holder, LostLease, StepRecord, Suspend
from agent_server.storage.database import Database
from agent_server.storage.outside import owned

LINGER_S: Final = 0.02
"""How long what nobody waits for may wait for company."""
MOST: Final = 25
"""Children, entries that end their task, and others, of one transaction. A hundred items that end
together come apart by it, so that some are carried out while others are stored."""
GATHER: Final = 5
"""Turns of the loop before a round, where there are several and nothing was left by the last one: in
them those who were told of it say what comes next. An item's end reaches its map, which begins the
next, which begins its call: all of it is one transaction then instead of three."""
PATIENCE_S: Final = 30.0
"""How long a commit is tried again while the database cannot be used."""
RETRY_S: Final = 0.25
PASSING = (DatabaseUnavailable, StorageFull)
"""Failures that are not the task's: it is taken up again when the database is back."""


@dataclass
class Batch:
    """What a journal has to store."""

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

    ``parked`` is why, and until when, it stands still; ``run`` ends the run too; ``events``
    (exactly ``count``) are made from the run's totals; ``also`` writes whatever else belongs to
    the end. Where ``unless`` says so in that transaction, the task does not end: what came before
    is stored, and its owner keeps it.
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


@dataclass(frozen=True, eq=False)
class Entry:
    """What one task hands in. ``told`` hears, once, what went wrong, and whether the task ended."""

    holder: Holder
    task_id: TaskId | None
    batch: Batch
    last: Ending | None
    abandoned: asyncio.Event
    """Set when its attempt is over: it is not tried again."""
    told: Callable[[Exception | None, bool], None]

    @property
    def plain(self) -> bool:
        """Whether it touches its own rows and its run's alone, so that it may have company."""
        last = self.last
        return not self.batch.writes and (
            last is None or (last.run is None and last.parked is None and last.also is None)
        )


@dataclass(frozen=True, eq=False)
class Birth:
    """A child to insert, under its parent's lease. ``told`` hears how it went, once: with the row
    that stood at its path before, if one did."""

    parent: Holder
    values: dict[str, Any]
    """Its columns but for ``halt``."""
    sure: bool
    """Nothing can stand at its path yet."""
    told: Callable[[Row[Any] | None, Exception | None], None]

    @property
    def path(self) -> str:
        return str(self.values["path"])


HandOver = Callable[[], Entry | None]
"""Gives what a journal has to store by now, if anything."""


@dataclass(frozen=True)
class _Stored:
    """``events`` are for readers, the first with the number ``first``; None: they must look in the
    store."""

    events: list[tuple[str, str]] | None
    first: int
    observed: list[EventBase]
    existing: dict[str, Row[Any]]
    ended: bool = True
    """Whether tasks that were to end did."""


class Commits:
    """One run's commits; everything here runs on the engine's loop."""

    def __init__(
        self,
        *,
        database: Database,
        hub: EventHub,
        run_id: RunId,
        tenant: Tenant,
        meter: Meter,
        observe: Callable[[list[EventBase]], None],
    ) -> None:
        self.hub = hub
        self.run_id = run_id
        self.meter = meter
        self._database = database
        self.tenant = tenant
        self._observe = observe
        self._births: list[Birth] = []
        self._entries: dict[HandOver, Entry] = {}
        """Handed over, and not yet in a round."""
        self._waiting: dict[HandOver, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.Task[None] | None = None
        self._due = False
        self._untold: dict[Birth | Entry, None] = {}
        """What the present round has taken in hand, and not answered yet."""

    def linger(self, hand_over: HandOver) -> None:
        """There is something that nobody waits for: it is stored with the next round, within
        ``LINGER_S``."""
        self._waiting[hand_over] = None
        self._set_timer()

    def soon(self, hand_over: HandOver) -> None:
        """There is something that somebody waits for."""
        self._waiting[hand_over] = None
        self._start()

    def bear(self, birth: Birth) -> None:
        """Insert a child, before whatever it hands in itself and behind what waits already."""
        crash_point("child.before_insert")
        self._births.append(birth)
        self._start()

    def _set_timer(self) -> None:
        if self._timer is None and self._writing is None:
            self._timer = asyncio.get_running_loop().call_later(LINGER_S, self._start)

    def _start(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._due = True
        if self._writing is None:
            # A task of its own: whoever waits may be cancelled, what was handed in is stored.
            self._writing = asyncio.get_running_loop().create_task(self._rounds())

    async def _rounds(self) -> None:
        crowd = False
        try:
            while self._due or self._entries:
                if not self._entries and (crowd or self._births or len(self._waiting) > 1):
                    for _ in range(GATHER):
                        await asyncio.sleep(0)
                births, later = _distinct(self._births)
                births, self._births = births[:MOST], births[MOST:] + later
                waiting, self._waiting = self._waiting, {}
                for hand_over in waiting:
                    if hand_over in self._entries:
                        self._waiting[hand_over] = None  # One journal has one entry in hand.
                    elif (entry := hand_over()) is not None:
                        self._entries[hand_over] = entry
                taken = _company(self._entries, {birth.path for birth in self._births})
                entries = [self._entries.pop(hand_over) for hand_over in taken]
                self._due = bool(self._births or self._waiting)
                self._untold = dict.fromkeys([*births, *entries])
                crowd = len(self._untold) > 1
                if births and entries and not entries[0].plain:
                    await self._together(births, [])
                    births = []
                if births or entries:
                    await self._together(births, entries)
        except BaseException:
            # The loop ends, or a fault of ours: nobody is left to wait for ever.
            untold = [*self._untold, *self._births, *self._entries.values()]
            self._births, self._entries = [], {}
            for one in untold:
                self._tell_failed(one, DatabaseUnavailable("What was to be stored was broken off."))
            raise
        finally:
            self._writing = None
            if self._waiting:
                self._set_timer()

    async def _together(self, births: list[Birth], entries: list[Entry]) -> None:
        """One transaction, or if it does not go, one for each. Never raises."""
        if not births and len(entries) == 1:
            await self._alone(entries[0], again=False)
            return
        try:
            stored = await self._write(births, entries)
        except PASSING:
            again = True  # It may have been stored after all.
        except Exception:
            again = False  # Whose fault it is shows when each is alone.
        else:
            self._tell(births, entries, stored)
            return
        while births:
            # A child whose parent is among them comes after it.
            unborn = {birth.path for birth in births}
            async with anyio.create_task_group() as group:
                for birth in births:
                    if birth.parent.path not in unborn:
                        group.start_soon(self._bear_alone, birth)
            births = [birth for birth in births if birth.parent.path in unborn]
        async with anyio.create_task_group() as group:
            for entry in entries:
                group.start_soon(self._alone, entry, again)

    async def _bear_alone(self, birth: Birth) -> None:
        try:
            looking = replace(birth, sure=False)
            stored = await self._write([looking], [])
        except Exception as error:
            self._tell_failed(birth, error)
        else:
            self._tell([birth], [], stored)

    async def _alone(self, entry: Entry, again: bool) -> None:
        """Commit, again and again while the database is away: what has happened must be told.

        A commit whose answer was lost may have happened; ``again`` finds it and repeats nothing.
        """
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + PATIENCE_S
        while True:
            try:
                stored = await self._write([], [entry], again)
            except PASSING as error:
                if entry.abandoned.is_set() or loop.time() >= give_up_at:
                    self._tell_failed(entry, error)
                    return
                again = True
            except Exception as error:
                self._tell_failed(entry, error)
                return
            else:
                self._tell([], [entry], stored)
                return
            try:
                await asyncio.wait_for(entry.abandoned.wait(), RETRY_S)
            except asyncio.TimeoutError:
                pass

    async def _write(
        self, births: Sequence[Birth], entries: Sequence[Entry], again: bool = False
    ) -> _Stored:
        return await self._database.write(
            owned(lambda c: self._transact(c, births, entries, again), self.tenant, self.run_id)
        )

    def _tell(self, births: list[Birth], entries: list[Entry], stored: _Stored) -> None:
        """Whoever waits, readers and observers hear of what was stored."""
        if any(entry.batch.settled or entry.batch.cut_off for entry in entries):
            self.meter.settled()
        if stored.events is None:
            self.hub.wake(self.run_id)
        elif stored.events:
            self.hub.publish(self.run_id, self._told(stored.first, stored.events))
        self._observe(stored.observed)
        for birth in births:
            if birth.path not in stored.existing:
                crash_point("child.after_insert")
            self._untold.pop(birth, None)
            birth.told(stored.existing.get(birth.path), None)
        for entry in entries:
            self._untold.pop(entry, None)
            entry.told(None, stored.ended and entry.last is not None)

    def _told(self, first: int, events: list[tuple[str, str]]) -> list[StoredEvent]:
        """As readers get them; where there are none, what ends the run is enough."""
        whole = self.hub.read(self.run_id)
        return [
            StoredEvent(seq, kind, splice_seq(seq, data))
            for seq, (kind, data) in enumerate(events, first)
            if whole or kind in TERMINAL
        ]

    def _tell_failed(self, one: Birth | Entry, error: Exception) -> None:
        self._untold.pop(one, None)
        if isinstance(one, Birth):
            one.told(None, error)
        else:
            one.told(error, False)

    # In the transaction ------------------------------------------------------------------------

    def _transact(
        self,
        connection: Connection,
        births: Sequence[Birth],
        entries: Sequence[Entry],
        again: bool = False,
    ) -> _Stored:
        if again:
            stored = self._stored(connection, entries[0])
            if stored is not None:
                return stored
        ended = True
        for entry in entries if len(entries) == 1 else ():
            if entry.last is not None and entry.last.unless is not None:
                ended = not entry.last.unless(connection)
                entries = entries if ended else [replace(entry, last=None)]
        existing = self._take_hold(connection, births, entries)
        if not entries:
            return _Stored([], 0, [], existing)
        for entry in entries:
            for write in entry.batch.writes:
                write(connection)
            if entry.last is not None and entry.last.also is not None:
                # Before the run's row is locked: tasks first, then their run, by everybody.
                entry.last.also(connection)
        used = _sum([usage for entry in entries for usage in entry.batch.used])
        warned = self._settle(connection, entries)
        count = sum(
            len(entry.batch.events) + len(said) + (entry.last.count if entry.last else 0)
            for entry, said in zip(entries, warned, strict=True)
        )
        run_end = entries[0].last.run if entries[0].last else None
        first, totals = store.advance(connection, self.run_id, count, used, run_end)
        events: list[tuple[str, str]] = []
        observed: list[EventBase] = []
        usage = store.usage_of(totals)
        for entry, said in zip(entries, warned, strict=True):
            if entry.last is not None and entry.last.count:
                said = said + self._last_words(entry, usage)
            events += entry.batch.events
            events += [store.encode_event(event) for event in said]
            observed += entry.batch.observed
            observed += said
        assert len(events) == count
        if events:
            store.insert_events(connection, self.tenant, self.run_id, first, events)
        steps = [
            (entry.holder.path, step) for entry in entries for step in entry.batch.steps.values()
        ]
        if steps:
            store.upsert_steps(connection, self.tenant, self.run_id, steps)
        return _Stored(events, first, observed, existing, ended)

    def _take_hold(
        self, connection: Connection, births: Sequence[Birth], entries: Sequence[Entry]
    ) -> dict[str, Row[Any]]:
        """Insert the children, check every lease, and end those tasks that end; the rows that
        stood where a child was to be. Raises ``LostLease``."""
        if not births and len(entries) == 1:
            _let_go(connection, entries[0])
            return {}
        born = {birth.path for birth in births}
        holders = {birth.parent for birth in births} | {entry.holder for entry in entries}
        known = {holder for holder in holders if holder.path not in born}
        halted = store.hold_all(connection, known)
        stored: set[str] = set()
        unsure = [birth.path for birth in births if not birth.sure]
        existing = store.tasks_at(connection, self.run_id, unsure) if unsure else {}
        for birth in births:
            row = existing.get(birth.path)
            if row is not None and row.created_at == birth.values["created_at"]:
                del existing[birth.path]  # An earlier try of this very commit made it.
                stored.add(birth.path)
        fresh = []
        for birth in births:
            if birth.path in existing or birth.path in stored:
                continue
            halt = store.PAUSE if birth.parent.path in halted else None
            if halt is not None:
                halted.add(birth.path)  # Its own children may be among them.
            fresh.append(birth.values | {"halt": halt})
        if fresh:
            store.insert_tasks(connection, fresh)
        again = {holder for holder in holders if holder.path in existing}
        if again:  # It was taken for new, and is not: its own lease must hold.
            store.hold_all(connection, again)
        ends = [_end(entry.holder, entry.last) for entry in entries if entry.last is not None]
        if ends:
            store.end_tasks(connection, ends)
        return existing

    def _settle(self, connection: Connection, entries: Sequence[Entry]) -> list[list[EventBase]]:
        """Give back what the calls that ended had reserved; what is to be said of the budget by
        each entry."""
        meter = self.meter
        if not meter.limited or meter.budget is None:
            return [[] for _ in entries]
        cut_off = [key for entry in entries for key in entry.batch.cut_off]
        if cut_off:
            store.cut_off(connection, self.run_id, cut_off)
        settled = [key for entry in entries for key in entry.batch.settled]
        if entries[0].last is not None and entries[0].last.run is not None:
            store.forget_reservations(connection, self.run_id)
        elif settled:
            store.settle(connection, self.run_id, settled)
        growth = [_sum(entry.batch.used) for entry in entries]
        if not any(any(used.values()) for used in growth):
            return [[] for _ in entries]
        before: Any = store.locked_run_row(connection, self.run_id)
        found = []
        for entry, used in zip(entries, growth, strict=True):
            after = SimpleNamespace(**{name: getattr(before, name) + n for name, n in used.items()})
            said = warnings(meter.budget, before, after, meter.warn_share)
            found.append([store.stamped(event, self.run_id, entry.task_id) for event in said])
            before = after
        return found

    def _last_words(self, entry: Entry, usage: Usage) -> list[EventBase]:
        said = entry.last.events(usage) if entry.last is not None else []
        return [store.stamped(event, self.run_id, entry.task_id) for event in said]

    def _stored(self, connection: Connection, entry: Entry) -> _Stored | None:
        """What an earlier try of this commit stored after all; None when it did not."""
        holder, last = entry.holder, entry.last
        ended = last is not None and store.has_ended(
            connection, self.run_id, holder.path, holder.epoch, last.status
        )
        events = entry.batch.events
        told = events and store.event_stored(connection, self.run_id, events[0][1])
        if not (ended or told):
            return None
        # Readers are woken and find the events in the store.
        said: list[EventBase] = []
        if ended:
            totals = store.engine_run_row(connection, self.run_id)
            said = self._last_words(entry, store.usage_of(totals))
        return _Stored(None, 0, entry.batch.observed + said, {}, ended)


def _distinct(births: list[Birth]) -> tuple[list[Birth], list[Birth]]:
    """The births at different paths, and those that must wait to find what is then there."""
    first = {birth.path: birth for birth in reversed(births)}
    later = [birth for birth in births if first[birth.path] is not birth]
    return [birth for birth in births if first[birth.path] is birth], later


def _company(entries: Mapping[HandOver, Entry], unborn: Collection[str]) -> list[HandOver]:
    """Whose entries go into the next transaction: one whose task is still ``unborn`` waits for it,
    one that is not plain goes by itself, and before what comes behind it. What ends a task takes no
    room from what begins, so that the next items begin with the ends of those behind them."""
    some: list[HandOver] = []
    room = {True: MOST, False: MOST}
    for hand_over, entry in entries.items():
        if entry.holder.path in unborn or not room[entry.last is not None]:
            continue
        if entry.plain:
            some.append(hand_over)
            room[entry.last is not None] -= 1
        else:
            return some or [hand_over]
    return some


def _sum(usages: Sequence[Usage]) -> dict[str, int]:
    """What ``usages`` come to."""
    used = dict(store.NO_USAGE)
    for usage in usages:
        for name, amount in store.usage_columns(usage).items():
            used[name] += amount
    return used


def _end(holder: Holder, last: Ending) -> dict[str, Any]:
    return {
        "run_id": holder.run_id,
        "path": holder.path,
        "owner": holder.owner,
        "epoch": holder.epoch,
        "status": last.status,
        "ended_at": last.ended_at,
        "output": last.output,
        "error": last.error,
    }


def _let_go(connection: Connection, entry: Entry) -> None:
    """Check the lease of an entry that is alone, and let go of its task if it ends or is put aside.
    Raises ``LostLease``."""
    holder, last = entry.holder, entry.last
    lease = (connection, holder.run_id, holder.path, holder.owner, holder.epoch)
    if last is None:
        held = store.holds(*lease)
    elif last.parked is not None:
        held = store.park_task(
            *lease,
            waiting_for=last.parked.waiting_for.model_dump(mode="json"),
            awaits=last.parked.awaits,
            wake_at=last.parked.wake_at,
        )
    else:
        held = store.end_task(connection, **_end(holder, last))
    if not held:
        raise LostLease(
            f"task {holder.path!r} of {holder.run_id} is no longer carried out by {holder.owner}"
        )
