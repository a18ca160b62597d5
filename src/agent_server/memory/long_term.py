"""Long-term memory put together: store, recall, and the embedder that the settings name.

Leans on its parts. Refuses to start anything: whoever serves calls ``open`` and runs ``run`` as a
task of its own.
"""

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
        Recall(self.store, self.embedding)

    async def open(self) -> None:
        await self.store.open()

    async def run(self) -> None:
        """Make vectors until cancelled; returns at once without an embedder."""
        if self.embedding is not None:
            try:
                await self.embedding.run()
            finally:
                await self.embedding.close()
