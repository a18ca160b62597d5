"""The wire between nodes: short texts, heard by every node within milliseconds, or not at all.

Leans on PostgreSQL's LISTEN and NOTIFY over one connection of its own. Refuses to promise
delivery: whoever must not miss something keeps it in a table, and looks there when ``up`` says
that the wire is broken. Behind ``Wire``, so that another carrier can stand there.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import structlog
from sqlalchemy import pool
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

log = structlog.get_logger(__name__)

MAX_TEXT = 7_900
"""Bytes of one text; PostgreSQL takes less than 8,000."""
CHANNEL = "agent_server"
KEEPALIVE_S = 5.0
"""How long a connection may be silent until it is asked whether it lives."""
ANSWER_S = 5.0
"""How long it may take to answer."""
RECONNECT_S = 1.0

Hear = Callable[[str], None]
Changed = Callable[[bool], None]


class Wire(Protocol):
    """Carries texts of at most ``MAX_TEXT`` bytes to every node, the sender included."""

    @property
    def up(self) -> bool:
        """Whether this node hears the others."""

    async def start(self, hear: Hear, changed: Changed) -> None:
        """Begin to listen, and go on until ``stop``. ``hear`` is told each text, ``changed``
        whether the wire is up, each time that turns; both on the running loop. A wire that
        cannot be laid now is laid later: this does not raise."""

    async def send(self, texts: Sequence[str]) -> None:
        """Send, in order; a broken wire drops them."""

    async def stop(self) -> None: ...


class PostgresWire:
    """See ``Wire``: one connection that listens, sends, and is laid anew when it breaks."""

    def __init__(self, url: str) -> None:
        self._engine = create_async_engine(
            url, poolclass=pool.NullPool, connect_args={"timeout": ANSWER_S}
        )
        self._driver: Any = None
        self._ended = asyncio.Event()
        self._stopping = False
        self._sending = asyncio.Lock()
        self._keeper: asyncio.Task[None] | None = None
        self._hear: Hear = lambda text: None
        self._changed: Changed = lambda up: None

    @property
    def up(self) -> bool:
        return self._driver is not None

    async def start(self, hear: Hear, changed: Changed) -> None:
        self._hear, self._changed = hear, changed
        self._keeper = asyncio.create_task(self._keep(), name="wire")

    async def send(self, texts: Sequence[str]) -> None:
        if self._driver is not None:
            await self._ask(
                "SELECT pg_notify($1, t) FROM unnest($2::text[]) t", CHANNEL, list(texts)
            )

    async def stop(self) -> None:
        self._stopping = (
            True  # Cancelling is not enough: a driver may swallow it while it connects.
        )
        self._ended.set()
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        await self._engine.dispose()

    async def _ask(self, *query: Any) -> None:
        """Run a statement; a connection that does not answer is given up."""
        async with self._sending:
            driver = self._driver
            if driver is None:
                return
            try:
                await driver.execute(*query, timeout=ANSWER_S)
            except Exception as error:
                log.warning("the wire to the other nodes does not answer", error=str(error))
                driver.terminate()
                self._ended.set()

    async def _keep(self) -> None:
        while not self._stopping:
            connection: AsyncConnection | None = None
            self._ended.clear()
            try:
                connection = await self._engine.connect()
                await self._listen(connection)
                await self._until_it_breaks()
                if not self._stopping:
                    log.warning("the wire to the other nodes broke")
            except Exception as error:
                log.warning("the wire to the other nodes cannot be laid", error=str(error))
            finally:
                driver, self._driver = self._driver, None
                if driver is not None:
                    driver.terminate()
                    self._changed(False)
                if connection is not None:
                    with suppress(Exception):
                        await connection.invalidate()
                    with suppress(Exception):
                        await connection.close()
            if not self._stopping:
                await asyncio.sleep(RECONNECT_S)

    async def _listen(self, connection: AsyncConnection) -> None:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        driver.add_termination_listener(lambda _: self._ended.set())
        await driver.add_listener(CHANNEL, lambda _c, _p, _ch, text: self._hear(text))
        self._driver = driver
        self._changed(True)

    async def _until_it_breaks(self) -> None:
        while not (self._ended.is_set() or self._stopping):
            try:
                await asyncio.wait_for(self._ended.wait(), KEEPALIVE_S)
            except asyncio.TimeoutError:
                await self._ask("SELECT 1")
