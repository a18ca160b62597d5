"""The live side of the event log: stored events and deltas, handed to whoever listens here.

Leans on asyncio and the names of the events. Refuses to store, and refuses to wait: a reader that is too slow
for its bounded queue is told so and dropped, and a run never notices.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from agent_server.domain.events import EventBase

log = structlog.get_logger(__name__)

DELTA = "message.delta"
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
    """One reader's bounded queue. ``lagged`` is set when it overflowed; nothing follows then."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._queue: deque[StoredEvent] = deque()
        self._ready = asyncio.Event()
        self.lagged = False

    def put(self, event: StoredEvent) -> None:
        if self.lagged:
            return
        if len(self._queue) >= self._size:
            self.lagged = True
            self._queue.clear()
        else:
            self._queue.append(event)
        self._ready.set()

    async def get(self) -> list[StoredEvent]:
        """Wait for events and take all there are; empty when lagged or woken for nothing."""
        await self._ready.wait()
        self._ready.clear()
        taken = list(self._queue)
        self._queue.clear()
        return taken

    def wake(self) -> None:
        self._ready.set()


class EventHub:
    """Who listens to which run in this process."""

    def __init__(self, queue_size: int) -> None:
        self._queue_size = queue_size
        self._readers: dict[str, set[Subscription]] = {}
        self._ends: dict[str, set[asyncio.Event]] = {}

    def subscribe(self, run_id: str) -> Subscription:
        subscription = Subscription(self._queue_size)
        self._readers.setdefault(run_id, set()).add(subscription)
        return subscription

    def unsubscribe(self, run_id: str, subscription: Subscription) -> None:
        readers = self._readers.get(run_id)
        if readers is not None:
            readers.discard(subscription)
            if not readers:
                del self._readers[run_id]

    def listened(self, run_id: str) -> bool:
        return run_id in self._readers

    def publish(self, run_id: str, events: list[StoredEvent]) -> None:
        for reader in self._readers.get(run_id, ()):
            for event in events:
                reader.put(event)
        if run_id in self._ends and any(event.type in TERMINAL for event in events):
            self._wake_ends(run_id)

    def wake(self, run_id: str) -> None:
        """Let everybody look for themselves: this process may not hear of all any more."""
        for reader in self._readers.get(run_id, ()):
            reader.wake()
        self._wake_ends(run_id)

    def await_end(self, run_id: str) -> asyncio.Event:
        """An event that is set when the run's end is announced, or somebody must look."""
        ended = asyncio.Event()
        self._ends.setdefault(run_id, set()).add(ended)
        return ended

    def forget_end(self, run_id: str, ended: asyncio.Event) -> None:
        waiting = self._ends.get(run_id)
        if waiting is not None:
            waiting.discard(ended)
            if not waiting:
                del self._ends[run_id]

    def _wake_ends(self, run_id: str) -> None:
        for ended in self._ends.get(run_id, ()):
            ended.set()

    def runs(self) -> list[str]:
        return list(self._readers)
