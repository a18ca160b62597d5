"""The live side of the event log: stored events and deltas, handed to whoever listens here.

Leans on nothing but asyncio. Refuses to store, and refuses to wait: a reader that is too slow
for its bounded queue is told so and dropped, and a run never notices.
"""

import asyncio
from collections import deque
from dataclasses import dataclass

DELTA = "message.delta"


@dataclass(frozen=True)
class StoredEvent:
    """An event as it is sent: ``data`` is its JSON, ``seq`` included; deltas have none."""

    seq: int | None
    type: str
    data: bytes


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

    def runs(self) -> list[str]:
        return list(self._readers)
