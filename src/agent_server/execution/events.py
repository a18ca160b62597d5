"""The live side of the event log: stored events and deltas, handed to whoever listens here.

Leans on asyncio and the names of the events. Refuses to store, and refuses to wait: a reader that is too slow
for its bounded queue is told so and dropped, and a run never notices.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import structlog

from agent_server.domain.events import EventBase

log = structlog.get_logger(__name__)

DELTA = "message.delta"
UNREADABLE = "event.unreadable"
TERMINAL = frozenset({"run.succeeded", "run.failed", "run.cancelled", "run.budget_exceeded"})

Observe = Callable[[list[EventBase]], None]


def guarded(observe: Observe) -> Observe:
    """``observe`` whose failures are logged: what is stored stays stored whoever watches."""

    def quietly(events: list[EventBase]) -> None:
        try:
            observe(events)
        except Exception:
            log.exception("an observer of events failed")

    return quietly


@dataclass(frozen=True)
class StoredEvent:
    """An event as it is sent: ``data`` is its JSON, ``seq`` included; deltas have none."""

    seq: int | None
    type: str
    data: bytes


Told = list[tuple[StoredEvent, EventBase]]
"""Events as they were stored, each beside what it says, for readers and for observers."""


def splice_seq(seq: int, data: str) -> bytes:
    """The stored JSON of an event with its ``seq`` put in front."""
    return b'{"seq":%d,%s' % (seq, data[1:].encode())


class Subscription:
    """One reader's bounded queue. ``lagged`` is set when it overflowed; nothing follows then.

    Without ``deltas`` it takes facts alone, and never lags: the store has them all.
    There are thousands of them, so that it is a list and a future: a deque or an ``asyncio.Event``
    takes ten times as much.
    """

    def __init__(self, size: float, deltas: bool = True) -> None:
        self.deltas = deltas
        self._size = size
        self._queue: list[StoredEvent] = []
        self._ready = False
        self._waiter: asyncio.Future[None] | None = None
        self._looks = False
        self.lagged = False

    def put(self, event: StoredEvent) -> None:
        if self.lagged or (event.seq is None and not self.deltas):
            return
        if len(self._queue) >= self._size:
            self.lagged = self.deltas
            self._looks = not self.deltas
            self._queue.clear()
        else:
            self._queue.append(event)
        self.nudge()

    async def get(self) -> tuple[list[StoredEvent], bool]:
        """Wait for events and take all there are, none when lagged; and whether the store may have
        more than that."""
        if not self._ready:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._ready = False
        looks, self._looks = self._looks, False
        taken, self._queue = self._queue, []
        return taken, looks or not taken

    def nudge(self) -> None:
        """Let the reader take what there is, be it nothing: no more may come."""
        self._ready = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def wake(self) -> None:
        """Let the reader look into the store."""
        self._looks = True
        self.nudge()


class Elsewhere(Protocol):
    """The other nodes, as the hub speaks to them (``relay.Relay``)."""

    def wanted(self, run_id: str) -> bool:
        """Whether a reader there follows the run."""

    def publish(self, run_id: str, events: list[StoredEvent]) -> None: ...

    def look(self, run_id: str) -> None: ...

    def followed(self, run_id: str) -> None: ...


class EventHub:
    """Who listens to which run in this process, and through ``join`` in others."""

    def __init__(self, queue_size: int) -> None:
        self._queue_size = queue_size
        self._readers: dict[str, set[Subscription]] = {}
        self._ends: dict[str, set[asyncio.Event]] = {}
        self._elsewhere: Elsewhere | None = None

    def join(self, elsewhere: Elsewhere | None) -> None:
        """Carry events to and from other nodes; None parts again."""
        self._elsewhere = elsewhere

    def subscribe(self, run_id: str, *, deltas: bool = True) -> Subscription:
        subscription = Subscription(self._queue_size, deltas)
        self._readers.setdefault(run_id, set()).add(subscription)
        self._follow(run_id)
        return subscription

    def unsubscribe(self, run_id: str, subscription: Subscription) -> None:
        readers = self._readers.get(run_id)
        if readers is not None:
            readers.discard(subscription)
            if not readers:
                del self._readers[run_id]

    def listened(self, run_id: str) -> bool:
        """Whether anybody reads the run's deltas, here or elsewhere."""
        return any(reader.deltas for reader in self._readers.get(run_id, ())) or (
            self._elsewhere is not None and self._elsewhere.wanted(run_id)
        )

    def read(self, run_id: str) -> bool:
        """Whether anybody reads the run's facts, here or elsewhere."""
        return run_id in self._readers or (
            self._elsewhere is not None and self._elsewhere.wanted(run_id)
        )

    def followed(self) -> list[str]:
        """The runs whose events, or whose end, somebody waits for here."""
        return list(self._readers.keys() | self._ends.keys())

    def publish(self, run_id: str, events: list[StoredEvent]) -> None:
        """Events of this process, stored before if they are to be: for readers everywhere."""
        self.hand_out(run_id, events)
        if self._elsewhere is not None:
            self._elsewhere.publish(run_id, events)

    def hand_out(self, run_id: str, events: list[StoredEvent]) -> None:
        """Give events to the readers in this process."""
        for reader in self._readers.get(run_id, ()):
            for event in events:
                reader.put(event)
        if run_id in self._ends and any(event.type in TERMINAL for event in events):
            self._wake_ends(run_id)

    def wake(self, run_id: str) -> None:
        """Let everybody look for themselves: there is more than was published."""
        self.rouse(run_id)
        if self._elsewhere is not None:
            self._elsewhere.look(run_id)

    def rouse(self, run_id: str) -> None:
        """Let the readers in this process look for themselves."""
        for reader in self._readers.get(run_id, ()):
            reader.wake()
        self._wake_ends(run_id)
        if run_id in self._readers or run_id in self._ends:
            self._follow(run_id)  # It may have left this process, too.

    def await_end(self, run_id: str) -> asyncio.Event:
        """An event that is set when the run's end is announced, or somebody must look."""
        ended = asyncio.Event()
        self._ends.setdefault(run_id, set()).add(ended)
        self._follow(run_id)
        return ended

    def forget_end(self, run_id: str, ended: asyncio.Event) -> None:
        waiting = self._ends.get(run_id)
        if waiting is not None:
            waiting.discard(ended)
            if not waiting:
                del self._ends[run_id]

    def _follow(self, run_id: str) -> None:
        if self._elsewhere is not None:
            self._elsewhere.followed(run_id)

    def _wake_ends(self, run_id: str) -> None:
        for ended in self._ends.get(run_id, ()):
            ended.set()
