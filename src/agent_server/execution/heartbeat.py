"""Signs of life on PostgreSQL: this node's beat, and the reaping of nodes whose beat stopped.

Both run on a thread and a connection of their own, so that a busy event loop is not mistaken
for death. Leans on the store; refuses to compare clocks: a node is dead when this process has
watched its beat stand still for a whole lease, and whatever interrupts the watching (a database
out of reach, this process frozen) starts it anew.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial

import structlog

from agent_server.domain.base import utcnow
from agent_server.execution import store
from agent_server.settings import Settings
from agent_server.storage.database import PostgresDatabase

log = structlog.get_logger(__name__)

BEAT_S = 2.0
"""The longest time between two beats; a quarter of the lease where that is shorter."""
CLOCK_S = 5.0
"""What a clock may be off by before that is said."""
PAUSE_S = 1.0
"""What looking may be late by, beyond half a lease, before it counts as an interruption."""


class Heartbeat:
    """Beats four times a lease or every ``BEAT_S``, and reaps when a node has died and once a lease, until stopped."""

    def __init__(
        self,
        url: str,
        node: str,
        settings: Settings,
        *,
        counted: Callable[[int], None],
        reaped: Callable[[], None],
    ) -> None:
        """``counted`` is told at each beat, on any thread, how many nodes carry out tasks;
        ``reaped``, on the loop that starts this, that tasks of the dead were queued again."""
        self._url = url
        self._node = node
        self._role = settings.role
        self._counted = counted
        self._reaped = reaped
        self._told_of_clock = False
        self._loop: asyncio.AbstractEventLoop
        self._begun: asyncio.Future[None]
        self._lease_s = settings.lease_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    async def start(self) -> None:
        """Begin in the background; returns after the first beat. Raises ``DatabaseUnavailable``, since
        who cannot say that it lives would be taken for dead."""
        self._loop = asyncio.get_running_loop()
        self._begun = self._loop.create_future()
        self._thread.start()
        await self._begun

    async def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    def _run(self) -> None:
        asyncio.run(self._beat_and_reap())

    async def _beat_and_reap(self) -> None:
        database = PostgresDatabase(self._url, pool_size=1)
        watch = Watch(self._lease_s)
        next_reap = 0.0
        try:
            try:
                await self._beat(database)
            except Exception as error:
                self._loop.call_soon_threadsafe(self._begin, error)
                return
            self._loop.call_soon_threadsafe(self._begin, None)
            while not self._stop.wait(min(BEAT_S, self._lease_s / 4)):
                try:
                    dead = watch.dead(await self._beat(database), time.monotonic())
                    if not dead and time.monotonic() < next_reap:
                        continue
                    next_reap = time.monotonic() + self._lease_s
                    count = await database.write(partial(store.reap, dead=dead))
                    if count:
                        log.warning("took tasks from dead nodes", tasks=count)
                        self._loop.call_soon_threadsafe(self._reaped)
                except Exception as error:  # Whatever it is, this node lives and must go on.
                    log.warning("heartbeat failed", error=str(error))
                    watch = Watch(self._lease_s)
        finally:
            await database.close()

    def _begin(self, error: Exception | None) -> None:
        if self._begun.done():  # Whoever started this was cancelled.
            return
        if error is None:
            self._begun.set_result(None)
        else:
            self._begun.set_exception(error)

    async def _beat(self, database: PostgresDatabase) -> dict[str, datetime]:
        """Every node's last beat, after this one's."""
        await database.write(lambda c: store.beat(c, self._node, self._role, utcnow()))
        beats, workers, now = await database.read(
            lambda c: (store.beats(c), store.workers(c), store.clock(c))
        )
        self._counted(workers)
        off_s = (utcnow() - now).total_seconds()
        if abs(off_s) > CLOCK_S and not self._told_of_clock:
            log.error("the clock of this machine is not the database's", off_s=round(off_s))
        self._told_of_clock = abs(off_s) > CLOCK_S
        return beats


class Watch:
    """Since when each node's beat stands still, by this process's own clock."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._seen: dict[str, tuple[datetime, float]] = {}
        self._looked_at: float | None = None

    def dead(self, beats: dict[str, datetime], now: float) -> dict[str, datetime]:
        """Those of ``beats`` that have stood still for a lease, at ``now`` in seconds."""
        if self._looked_at is not None and now - self._looked_at > self._lease_s / 2 + PAUSE_S:
            self._seen.clear()  # Not looked for too long: perhaps everybody was frozen.
        self._looked_at = now
        before, self._seen = self._seen, {}
        for node, beat in beats.items():
            known = before.get(node)
            self._seen[node] = known if known and known[0] == beat else (beat, now)
        return {
            node: beat for node, (beat, since) in self._seen.items() if now - since >= self._lease_s
        }
