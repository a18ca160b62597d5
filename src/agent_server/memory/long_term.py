"""Long-term memory put together: store, recall, and the embedder that the settings name.

Leans on its parts. Refuses to know who serves it: they call ``open``, ``start`` and
``stop``.
"""

import asyncio

import structlog

from agent_server.domain.base import utcnow
from agent_server.execution.commits import PASSING
from agent_server.memory.embedders import embedder_for
from agent_server.memory.embedding import Embedding
from agent_server.memory.recall import Recall
from agent_server.memory.store import MemoryStore
from agent_server.settings import Settings
from agent_server.storage.database import Database

SWEEP_EVERY_S = 60.0
log = structlog.get_logger(__name__)


class LongTermMemory:
    """``store`` is ``ports.Memories``; ``embedding`` is None without an embedder.

    Raises ``ConfigurationError`` when the embedder that is set cannot work here.
    """

    def __init__(self, database: Database, settings: Settings) -> None:
        self.store = MemoryStore(database)
        self.embedding: Embedding | None = None
        embedder = embedder_for(settings, settings.embedder, settings.embedder_model)
        if embedder is not None:
            self.embedding = Embedding(
                self.store,
                embedder,
                lambda provider, model: embedder_for(settings, provider, model),
            )
        self._tasks: list[asyncio.Task[None]] = []
        Recall(self.store, self.embedding)

    async def open(self) -> None:
        await self.store.open()

    def start(self) -> None:
        """Begin to delete what expires and, if there is an embedder, to make vectors."""
        self._tasks = [asyncio.create_task(self._keep_sweeping(), name="memory-expiry")]
        if self.embedding is not None:
            self._tasks.append(asyncio.create_task(self.embedding.run(), name="memory-vectors"))

    async def stop(self) -> None:
        """Stop both; what is without a vector gets it after the next start."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self.embedding is not None:
            await self.embedding.close()

    async def _keep_sweeping(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_EVERY_S)
            try:
                if gone := await self.store.sweep(utcnow()):
                    log.info("memories expired", memories=gone)
            except PASSING as error:
                log.warning("expired memories not deleted", error=error.detail)
            except Exception:
                log.exception("expired memories not deleted")
