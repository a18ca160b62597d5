"""Signs of life on PostgreSQL: this node's beat, and the reaping of nodes whose beat stopped.

Both run on a thread and a connection of their own, so that a busy event loop is not mistaken
for death. Leans on the store; refuses to decide anything from a stale view: after the database
was out of reach, nothing is reaped for one lease, since every node's beat is old by then.
"""

import asyncio
import threading
import time
from datetime import timedelta
from functools import partial

import structlog

from agent_server.domain.base import utcnow
from agent_server.domain.errors import AgentServerError
from agent_server.execution import store
from agent_server.settings import Settings
from agent_server.storage.database import Database, PostgresDatabase

log = structlog.get_logger(__name__)

BEAT_S = 1.0


class Heartbeat:
    """Beats every ``BEAT_S`` and reaps every quarter of a lease, until stopped."""

    def __init__(self, database: Database, node: str, settings: Settings) -> None:
        assert isinstance(database, PostgresDatabase)
        self._url = database.url
        self._node = node
        self._role = settings.role
        self._lease_s = settings.lease_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._database = database

    async def start(self) -> None:
        """Write the first beat, then go on in the background."""
        await self._database.write(lambda c: store.beat(c, self._node, self._role, utcnow()))
        self._thread.start()

    async def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    def _run(self) -> None:
        asyncio.run(self._beat_and_reap())

    async def _beat_and_reap(self) -> None:
        database = PostgresDatabase(self._url, pool_size=1)
        reap_every_s = self._lease_s / 4
        next_reap = time.monotonic() + self._lease_s
        try:
            while not self._stop.wait(BEAT_S):
                try:
                    await database.write(lambda c: store.beat(c, self._node, self._role, utcnow()))
                    if time.monotonic() >= next_reap:
                        next_reap = time.monotonic() + reap_every_s
                        dead_before = utcnow() - timedelta(seconds=self._lease_s)
                        count = await database.write(partial(store.reap, dead_before=dead_before))
                        if count:
                            log.warning("took tasks from dead nodes", tasks=count)
                except AgentServerError as error:
                    log.warning("heartbeat failed", error=error.detail)
                    next_reap = time.monotonic() + self._lease_s
        finally:
            await database.close()
