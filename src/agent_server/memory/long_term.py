"""Long-term memory put together: store, recall, and the embedder that the settings name.

Leans on its parts. Refuses to know who serves it: they call ``open``, ``start`` and
``stop``.
"""

import asyncio

from agent_server.memory.embedders import embedder_for
from agent_server.memory.embedding import Embedding
from agent_server.memory.recall import Recall
from agent_server.memory.store import MemoryStore
from agent_server.settings import Settings
from agent_server.storage.database import Database


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
        self._task: asyncio.Task[None] | None = None
        Recall(self.store, self.embedding)

    async def open(self) -> None:
        await self.store.open()

    def start(self) -> None:
        """Begin to make vectors, if there is an embedder."""
        if self.embedding is not None:
            self._task = asyncio.create_task(self.embedding.run(), name="memory-vectors")

    async def stop(self) -> None:
        """Stop making vectors; what is without one gets it after the next start."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self.embedding is not None:
            await self.embedding.close()
